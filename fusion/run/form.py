"""The form of a chain: all but its sizes, as text that an operator of a graph takes; tensors bring the sizes.

Source: not in the paper, whose chains have fixed sizes.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fusion.plan.chain import Chain
from fusion.run.winner import WinnerError, decode_chain, encode_chain

MAX_FORMS = 1024  # kept decoded; a model has a few


@functools.lru_cache(maxsize=MAX_FORMS)
def form_of(chain: Chain) -> str:
    """The form of a chain.

    Args:
        chain: Of any sizes.
    """
    return json.dumps(encode_chain(_of_sizes(chain, {})), separators=(",", ":"))


@functools.lru_cache(maxsize=MAX_FORMS)
def read_form(form: str) -> Chain:
    """The chain of a form, with sizes of 1.

    Args:
        form: As `form_of` makes it, from anywhere.

    Raises:
        ValueError: It is none.
    """
    try:
        return _of_sizes(decode_chain(json.loads(form)), {})
    except (json.JSONDecodeError, WinnerError, RecursionError) as error:
        raise ValueError(f"form={form[:80]!r}: {error}; pass what fusion.run.form.form_of returns") from error


def sizes_of(chain: Chain, shapes: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """The sizes of a chain's letters.

    Args:
        chain: Any of its form.
        shapes: Of its inputs, in their order; sizes may be symbols.

    Returns:
        Letter -> size, in the chain's order.

    Raises:
        ValueError: There are more or fewer inputs, one has another number of dimensions, or two disagree about a size.
    """
    if len(shapes) != len(chain.inputs):
        names = [tensor.name for tensor in chain.inputs]
        raise ValueError(f"tensors: {len(shapes)} of them; this chain needs {len(names)}: {names}")
    found: dict[str, Any] = {}
    for tensor, shape in zip(chain.inputs, shapes, strict=True):
        dims = f"{tensor.name}[{','.join(tensor.dims)}]"
        if len(shape) != len(tensor.dims):
            raise ValueError(f"tensors[{tensor.name!r}] has shape {tuple(shape)}; {dims} has {len(tensor.dims)} sizes")
        for letter, size in zip(tensor.dims, shape, strict=True):
            if found.setdefault(letter, size) != size:
                raise ValueError(
                    f"tensors[{tensor.name!r}] has shape {tuple(shape)}; in {dims}, {letter} is {found[letter]} in "
                    "the inputs before it"
                )
    return {letter: found[letter] for letter in chain.sizes}


def of_sizes(form: str, sizes: Mapping[str, int]) -> Chain:
    """The chain of a form with sizes.

    Args:
        form: As `form_of` makes it.
        sizes: Letter -> size.
    """
    return _of_sizes(read_form(form), sizes)


def of_shapes(form: str, shapes: Sequence[Sequence[int]]) -> Chain:
    """The chain of a form with the sizes of its inputs.

    Args:
        form: As `form_of` makes it.
        shapes: Of its inputs, in their order.

    Raises:
        ValueError: As `sizes_of`.
    """
    return of_sizes(form, sizes_of(read_form(form), shapes))


def _of_sizes(chain: Chain, sizes: Mapping[str, int]) -> Chain:
    return replace(chain, dims=tuple(replace(dim, size=sizes.get(dim.name, 1)) for dim in chain.dims))
