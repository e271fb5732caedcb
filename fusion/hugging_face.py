"""Hugging Face's attention interface: models of that library attend by chains, in training and in inference.

    import fusion.hugging_face
    model = AutoModel.from_pretrained(name, attn_implementation="mcfuser")

Importing this module adds the name to the library's tables of attention functions and of masks. What no chain computes,
and what no kernel runs on the tensors' device, is left to torch's scaled_dot_product_attention, with a reason.

Legend: Z batch, G key/value heads, R query heads for each, M queries, N keys, K length of a query, H of a value.

Source: not in the paper.
"""

import importlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fusion.plan.chain import Chain, DType
from fusion.plan.stages import Causal, Dim, Elementwise, Input, MatMul, Softmax, Stage
from fusion.run.check import DTYPES
from fusion.run.executors import DEFAULT
from fusion.run.form import form_of
from fusion.run.operator import call_chain, is_due, is_run, run_in_torch

logger = logging.getLogger(__name__)

NAME = "mcfuser"
UNKNOWN = ("softcap", "s_aux", "cache", "output_attentions")  # options that no chain has


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend, as the library's attention functions do.

    Args:
        module: The attention layer; `is_causal` is read from it where the argument is None.
        query: [Z, G R, M, K].
        key: [Z, G, N, K].
        value: [Z, G, N, H].
        attention_mask: Broadcasts to [Z, G R, M, N]: bool with True where a key takes part, or a number to be added.
        dropout: Probability of dropping a weight; where it is not 0, torch computes.
        scaling: Of the scores; None is 1 / sqrt(K).
        is_causal: Whether queries take part with keys up to their own place, where there is no mask.
        **options: What the library passes besides: `position_bias` is added to the scores as a mask is, learned or not;
            what else changes the result is left to torch.

    Returns:
        [Z, M, G R, H], contiguous, and None for the weights, which are never written out.

    Raises:
        ValueError: A tensor does not fit the query; the message names it.

    Source: not in the paper; the interface is transformers'.
    """
    bias = options.get("position_bias")
    _check(query, key, value, attention_mask, bias)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(query.shape[2] > 1 and attention_mask is None and causal)
    if causal and key.shape[2] > query.shape[2]:  # a cache that is not full yet
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        bias = None if bias is None else bias[..., : query.shape[2]]
    query, key, value = _cast(query, key, value)
    reason = _obstacle(query, key, value, dropout, options)
    if not reason:
        form, tensors = _chain_of(query, key, value, (bias, attention_mask), scaling, causal=causal)
        if torch.compiler.is_compiling() or not query.numel() or _is_run(form, tensors):
            return _joined(call_chain(form, tensors, DEFAULT)), None
        if query.device.type == "cpu" and _is_training(tensors):  # which torch's attention is not always best at
            return _joined(run_in_torch(form, tensors)), None
        reason = "no kernel runs it on this device, or none has been looked for yet"
    _say_once(reason)
    given = {"dropout": dropout, "scaling": scaling, "is_causal": causal if attention_mask is None else False}
    output, _ = _torchs_attention()(module, query, key, value, attention_mask, **given, **options)
    return output, None


def _is_training(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _joined(output_ZMGRH: Tensor) -> Tensor:
    """The heads as one dimension; without groups they are one already."""
    return output_ZMGRH.flatten(2, -2)


def _is_run(form: str, tensors: Sequence[Tensor]) -> bool:
    return is_due(form, tensors, DEFAULT) and is_run(form, tensors, DEFAULT)


def register() -> None:
    """Add the name to the library's tables; importing this module has done it.

    Raises:
        ImportError: transformers is not installed.

    Source: not in the paper.
    """
    transformers = importlib.import_module("transformers")
    masks = importlib.import_module("transformers.masking_utils")
    transformers.AttentionInterface.register(NAME, attention_forward)
    transformers.AttentionMaskInterface.register(NAME, masks.sdpa_mask)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None) -> None:
    """Every tensor fits the query."""
    masks = {"attention_mask": mask, "position_bias": bias}
    for name, tensor in {"query": query, "key": key, "value": value, **masks}.items():
        if tensor is not None and tensor.dim() != 4:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; accepted are 4 dimensions, heads the second")
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}; accepted is the query's device, {query.device}")
    batch, heads, _, width = query.shape
    if key.shape[0] != batch or key.shape[3] != width or key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(
            f"key: got shape {tuple(key.shape)}; accepted is ({batch}, a divisor of {heads}, keys, {width}), as the "
            f"query has {tuple(query.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: got shape {tuple(value.shape)}; accepted is ({', '.join(map(str, key.shape[:3]))}, any)"
        )
    whole = (batch, heads, query.shape[2], key.shape[2])
    for name, tensor in masks.items():
        if tensor is not None and any(own not in (1, size) for own, size in zip(tensor.shape, whole, strict=True)):
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; accepted is what broadcasts to {whole}")


def _torchs_attention() -> Any:
    return importlib.import_module("transformers.integrations.sdpa_attention").sdpa_attention_forward


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As autocast does before torch's own attention."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def _obstacle(query: Tensor, key: Tensor, value: Tensor, dropout: float, options: Mapping[str, Any]) -> str:
    """Why no chain computes this, or nothing."""
    if dropout:
        return f"dropout={dropout} of the weights: set attention dropout to 0, or call eval()"
    window = options.get("sliding_window")
    if window is not None and window < key.shape[2]:
        return f"a sliding window of {window} keys: a chain would compute all scores"
    unknown = [name for name in UNKNOWN if options.get(name) is not None and options[name] is not False]
    if unknown:
        return f"{', '.join(unknown)}: no stage of a chain"
    if query.dtype not in DTYPES.values() or not query.dtype == key.dtype == value.dtype:
        return f"dtypes {query.dtype}, {key.dtype}, {value.dtype}: accepted is one of {list(DTYPES.values())}"
    return ""


def _chain_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Sequence[Tensor | None],
    scaling: float | None,
    *,
    causal: bool,
) -> tuple[str, list[Tensor]]:
    """The form of the chain and its tensors; heads stand behind queries, as they do where the tensors come from."""
    repeats = query.shape[1] // key.shape[1]
    grouped = repeats > 1
    query_ZMGK = query.transpose(1, 2)
    tensors = [query_ZMGK.unflatten(2, (key.shape[1], repeats)) if grouped else query_ZMGK]
    tensors += [key.transpose(1, 2), value.transpose(1, 2)]
    stages: list[tuple[Literal["add", "mask"], str]] = []
    for mask in masks:
        if mask is not None:
            is_boolean = mask.dtype == torch.bool
            letters, narrow = _narrowed(mask if is_boolean else mask.to(query.dtype), query, key, grouped=grouped)
            tensors.append(narrow)
            stages.append(("mask" if is_boolean else "add", letters))
    scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    return _form(scale, tuple(stages), str(query.dtype), grouped=grouped, causal=causal), tensors


def _narrowed(mask: Tensor, query: Tensor, key: Tensor, *, grouped: bool) -> tuple[str, Tensor]:
    """The letters of a mask, and the mask without the dimensions along which it is the same."""
    letters, kept = "N", mask.expand(-1, -1, -1, key.shape[2])
    for letter, dim, size in (("M", 2, query.shape[2]), ("G", 1, query.shape[1]), ("Z", 0, query.shape[0])):
        if (mask.shape[dim] == 1 and size != 1) or mask.stride(dim) == 0:
            kept = kept.select(dim, 0)
        elif letter == "G" and grouped:
            letters, kept = f"GR{letters}", kept.unflatten(1, (key.shape[1], size // key.shape[1]))
        else:
            letters = letter + letters
    return letters, kept


@torch.compiler.assume_constant_result
def _form(
    scale: float, masks: tuple[tuple[Literal["add", "mask"], str], ...], dtype: str, *, grouped: bool, causal: bool
) -> str:
    heads = "GR" if grouped else "G"
    inputs = [Input("A", f"ZM{heads}K"), Input("B", "ZNGK"), Input("D", "ZNGH")]
    stages: list[Stage] = [MatMul("C", "A", "B", over="K"), Elementwise("C", "mul", scale)]
    for number, (operation, letters) in enumerate(masks):
        inputs.append(Input(f"{'keep' if operation == 'mask' else 'mask'}{number or ''}", letters))
        stages.append(Elementwise("C", operation, inputs[-1].name))
    if causal:
        stages.append(Causal("C", row="M", column="N"))
    stages += [Softmax("C", over="N"), MatMul("E", "C", "D", over="N")]
    dims = tuple(Dim(letter, 1, letter in "ZGR") for letter in f"ZM{heads}NKH")
    own = next(name for name in get_args(DType) if str(DTYPES[name]) == dtype)
    return form_of(Chain(dims, tuple(inputs), tuple(stages), own))


class _Said:
    """Reasons that were told already."""

    def __init__(self) -> None:
        self.reasons: set[str] = set()


_SAID = _Said()


@torch.compiler.assume_constant_result
def _say_once(reason: str) -> bool:
    if reason not in _SAID.reasons:
        _SAID.reasons.add(reason)
        logger.warning('attn_implementation="%s" leaves attention to torch: %s', NAME, reason)
    return True


register()
