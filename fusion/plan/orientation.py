"""Which letter of a value is its column, along which vectors lie; the other one is its row.

A product reads its left operand entry by entry and its right one vector by vector, so the right one has the letter of
the value's columns. What a chain leaves open is chosen such that a value is the left operand of the next product, and
that a softmax runs along rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fusion.plan.chain import Chain
from fusion.plan.stages import MatMul, Softmax, operands
from fusion.plan.statements import product_of


class OrientationError(ValueError):
    """Readers of a value want its columns along different letters; the message names them; not in the paper."""


@dataclass(frozen=True)
class Roles:
    """The operands of a product: read entry by entry, and vector by vector.

    Source: not in the paper.
    """

    left: str
    right: str


def columns(chain: Chain) -> dict[str, str]:
    """The column of every value.

    Args:
        chain: Any.

    Returns:
        Value -> one of its two letters that are loops.

    Raises:
        OrientationError: There is no choice that suits all readers and softmaxes.

    Source: not in the paper.
    """
    found: dict[str, str] = {}

    def choose(value: str) -> None:
        """A value's readers come first, whatever the order in which products run: some combine it with another one."""
        readers = [
            stage.out if isinstance(stage, MatMul) else stage.x for stage in chain.stages if value in operands(stage)
        ]
        for other in readers:
            if other not in found:
                choose(other)
        product = product_of(chain, value)
        found[value] = _wanted_by_readers(chain, value, found) or _wanted_by_itself(chain, product)

    for product in chain.products:
        if product.out not in found:
            choose(product.out)
    return found


def roles(chain: Chain, value: str, column: Mapping[str, str]) -> Roles:
    """Which operand of a value's product is which.

    Args:
        chain: Any.
        value: Of a product.
        column: As `columns` gives it.

    Source: not in the paper.
    """
    product = product_of(chain, value)
    first, second = operands(product)
    return Roles(first, second) if column[value] in chain.tensors[second] else Roles(second, first)


def _loops(chain: Chain, value: str) -> str:
    return "".join(letter for letter in chain.tensors[value] if letter in chain.loops)


def _wanted_by_readers(chain: Chain, value: str, found: Mapping[str, str]) -> str:
    """The column that those who read a value need, if they need one."""
    wanted: dict[str, str] = {}
    for stage in chain.stages:
        if value not in operands(stage):
            continue
        if isinstance(stage, MatMul):
            if roles(chain, stage.out, found).right == value:
                wanted[found[stage.out]] = f"{stage.out} reads it vector by vector"
        elif set(_loops(chain, value)) == set(_loops(chain, stage.x)):
            wanted[found[stage.x]] = f"{stage.x} is combined with it"
    for stage in chain.epilogue(value):
        if isinstance(stage, Softmax):
            wanted[stage.over] = f"its softmax runs along {stage.over}"
    if len(wanted) > 1:
        reasons = " and ".join(f"{letter}, for {reason}" for letter, reason in wanted.items())
        raise OrientationError(f"{value} would have its columns along {reasons}: cut the chain there")
    return next(iter(wanted), "")


def _wanted_by_itself(chain: Chain, product: MatMul) -> str:
    """Nobody needs a column: the letter that its reader sums over, or that of the operand which is no value."""
    letters = _loops(chain, product.out)
    readers = [stage for stage in chain.products if product.out in operands(stage)]
    if readers:
        return readers[0].over
    inputs = {tensor.name for tensor in chain.inputs}
    fresh = [name for name in operands(product) if name in inputs]
    choices = [letter for letter in letters if len(fresh) != 1 or letter in chain.tensors[fresh[0]]]
    return choices[-1]
