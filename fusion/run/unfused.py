"""A chain in plain torch, with torch's own gradients: what runs where nothing better does.

Attention is torch's scaled_dot_product_attention, whatever the order of dimensions, with its masks and grouped heads;
everything else goes product by product.

Source: our definition.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fusion.plan.chain import Chain
from fusion.plan.stages import Causal, Elementwise, MatMul, Softmax
from fusion.run.tail import finish

SHORT = 128  # keys: for so few, torch's attention takes up to eight times as long with gradients (bf16 with AMX)


def run_unfused(chain: Chain, tensors: Mapping[str, Tensor]) -> Tensor:
    """Run a chain with every value written out, but for the scores of attention where torch keeps them inside.

    Args:
        chain: None of a gradient's.
        tensors: By name, as for any way to run it.

    Returns:
        The output, contiguous; differentiable.
    """
    attention = attention_of(chain)
    if attention is not None and not _is_short(attention, chain, tensors):
        value = attention.run(chain, tensors)
        return finish(chain, chain.epilogue(chain.output), value, tensors).contiguous()
    letters, values = chain.tensors, dict(tensors)
    for stage in chain.stages:
        if isinstance(stage, MatMul):
            named = letters[stage.left], letters[stage.right], letters[stage.out]
            value = _product(values[stage.left], values[stage.right], *named)
            values[stage.out] = finish(chain, chain.epilogue(stage.out), value, values)
    return values[chain.output].contiguous()


def _is_short(attention: "Attention", chain: Chain, tensors: Mapping[str, Tensor]) -> bool:
    """Whether product by product is faster on a CPU: with gradients, where scores are few."""
    needs = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values())
    on_cpu = tensors[attention.query].device.type == "cpu"
    return needs and on_cpu and chain.sizes[attention.column] <= SHORT


def _product(left: Tensor, right: Tensor, of_left: str, of_right: str, of_out: str) -> Tensor:
    """A matrix product; one whose letters stand as matmul wants them is spared what einsum takes to find out."""
    batch, row, column = of_out[:-2], of_out[-2:-1], of_out[-1]
    over = of_left[-1]
    if of_left == batch + row + over and of_right == batch + over + column:
        return torch.matmul(left, right)
    if of_left == batch + row + over and of_right == batch + column + over:
        return torch.matmul(left, right.mT)
    return torch.einsum(f"{of_left},{of_right}->{of_out}", left, right)


@dataclass(frozen=True)
class Attention:
    """Which inputs of a chain are what of softmax(query key^T scale + masks) value, and which letters index them."""

    query: str
    key: str
    value: str
    batch: str
    row: str
    column: str
    over: str
    """What a query and a key are multiplied along."""
    width: str
    """Of a value."""
    scale: float
    masks: tuple[tuple[str, bool], ...]
    """Inputs, and whether they are boolean."""
    causal: bool

    def run(self, chain: Chain, tensors: Mapping[str, Tensor]) -> Tensor:
        """The value of the chain's last product, by torch.

        Args:
            chain: Of which this is the attention.
            tensors: By name.
        """
        sizes, letters = chain.sizes, chain.tensors

        def seen(name: str, loops: str) -> Tensor:
            """A tensor with the batch's letters first, then the loops'; what it lacks is expanded."""
            own, wanted = letters[name], self.batch + loops
            ordered = tensors[name].permute([own.index(letter) for letter in wanted if letter in own])
            spread = ordered[tuple(slice(None) if letter in own else None for letter in wanted)]
            spread = spread.expand([sizes[letter] for letter in wanted])
            lead = len(self.batch)
            return spread.flatten(0, lead - 2) if lead > 2 else spread[(None,) * (2 - lead)]

        mask = None
        for name, is_boolean in self.masks:
            own = seen(name, self.row + self.column)
            numbers = (
                own if not is_boolean else torch.zeros_like(own, dtype=torch.float32).masked_fill(~own, -torch.inf)
            )
            mask = own if mask is None and len(self.masks) == 1 else numbers if mask is None else mask + numbers
        query = seen(self.query, self.row + self.over)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        found = functional.scaled_dot_product_attention(
            query,
            seen(self.key, self.column + self.over),
            seen(self.value, self.column + self.width),
            attn_mask=mask,
            is_causal=self.causal,
            scale=self.scale,
        )
        order = self.batch + self.row + self.width
        whole = found.reshape([sizes[letter] for letter in order])
        return whole.permute([order.index(letter) for letter in letters[chain.output]])


@functools.lru_cache(maxsize=1024)
def attention_of(chain: Chain) -> Attention | None:
    """What of attention the inputs of a chain are.

    Args:
        chain: Any.

    Returns:
        None if it is none that torch computes at once.
    """
    if len(chain.products) != 2 or not all(chain.sizes.values()):
        return None
    first, second = chain.products
    between, letters = chain.epilogue(first.out), chain.tensors
    if not between or not isinstance(between[-1], Softmax) or second.over != between[-1].over:
        return None
    column, over = second.over, first.over
    query, key = (first.left, first.right) if column in letters[first.right] else (first.right, first.left)
    value = second.right if second.left == first.out else second.left
    stages = _stages(between[:-1])
    row, width = (_loops(chain, name, without) for name, without in ((query, over), (value, column)))
    if stages is None or value in chain.intermediates or _loops(chain, key, over) != column or len(row + width) != 2:
        return None
    scale, masks, causal = stages
    is_causal = causal is not None and causal == Causal(first.out, row, column)
    if causal is not None and (not is_causal or masks):
        return None
    batch = "".join(letter for letter in letters[second.out] if letter not in row + width)
    named = (scale, tuple((name, name in chain.boolean_inputs) for name in masks), is_causal)
    return Attention(query, key, value, batch, row, column, over, width, *named)


def _loops(chain: Chain, name: str, without: str) -> str:
    """Letters of a tensor beside the batch's and one of a sum."""
    return "".join(letter for letter in chain.tensors[name] if letter not in chain.batch + without)


def _stages(stages: tuple[Elementwise | Causal | Softmax, ...]) -> tuple[float, list[str], Causal | None] | None:
    """A number to multiply by, then masks; None for what comes in another order or is neither."""
    scale, masks, causal = 1.0, list[str](), None
    for stage in stages:
        match stage:
            case Elementwise(operation="mul", operand=float(number)) if not masks and causal is None:
                scale *= number
            case Elementwise(operation="add" | "mask", operand=str(name)):
                masks.append(name)
            case Causal() if causal is None:
                causal = stage
            case _:
                return None
    return scale, masks, causal
