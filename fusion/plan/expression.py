"""Tiling expressions: trees of cross-tile loops, written as the paper does.

A letter is a loop over the tiles of that dimension, juxtaposition nests (the left loop is the outer one), and
parentheses hold siblings that run one after the other: `mhnk` is m around h around n around k, `mn(k,h)` is m around n
around first k, then h. Each loop appears once; loops of one product always nest, or the product had no place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product as combinations

from fusion.plan.chain import Chain


@dataclass(frozen=True)
class Tree:
    """A loop over the tiles of one dimension, and the loops inside it.

    Source: MCFuser (arXiv:2506.22169), Figure 3.
    """

    letter: str
    inside: tuple[Tree, ...] = ()

    def __str__(self) -> str:
        return self.letter.lower() + _written(self.inside)


@dataclass(frozen=True)
class Expression:
    """Loops that stand side by side, usually one, with all that they hold.

    Source: MCFuser (arXiv:2506.22169), Figure 3.
    """

    trees: tuple[Tree, ...]

    def __str__(self) -> str:
        return _written(self.trees)

    @property
    def paths(self) -> dict[str, str]:
        """Letter -> the letters of the loops around it, outermost first, and itself."""
        return dict(_paths(self.trees, ""))

    @property
    def is_deep(self) -> bool:
        """Whether all loops nest: the only kind that Chimera's space has."""
        return all(len(trees) <= 1 for trees in _levels(self.trees))


def parse(text: str) -> Expression:
    """The expression that a text in the paper's notation means.

    Args:
        text: Such as `mhnk` or `mn(k,h)`.

    Returns:
        The expression; `str` of it is the text again.

    Raises:
        ValueError: Names the position where the text is no expression, or a loop that it repeats.

    Source: MCFuser (arXiv:2506.22169), Figure 3.
    """
    trees, end = _parse(text, 0)
    if end != len(text):
        raise ValueError(f"text={text!r}: position {end} holds {text[end]!r}, accepted is a lower-case letter or '('")
    letters = [letter for letter, _ in _paths(trees, "")]
    repeated = sorted({letter.lower() for letter in letters if letters.count(letter) > 1})
    if repeated:
        raise ValueError(f"text={text!r}: the loop {repeated[0]!r} appears twice; a tile loop appears once")
    return Expression(trees)


def expressions(chain: Chain) -> tuple[Expression, ...]:
    """Every tiling expression of a chain, deep and flat.

    Args:
        chain: Any.

    Returns:
        All trees of its loops in which the loops of each product nest; siblings stand in the order of data flow, which
        leaves them no other. 26 for a chain of two products.

    Source: MCFuser (arXiv:2506.22169), Figure 3; the count of longer chains is not in the paper.
    """
    loops_of = [frozenset(letters) - set(chain.batch) for letters in product_loops(chain).values()]
    return tuple(Expression(trees) for trees in _forests(chain.loops, loops_of))


def product_loops(chain: Chain) -> dict[str, str]:
    """Value -> the loops of its product: those that index it and the one that it sums over.

    Args:
        chain: Any.

    Source: MCFuser (arXiv:2506.22169), section on tiling expressions.
    """
    tensors, loops = chain.tensors, chain.loops
    return {
        product.out: "".join(letter for letter in loops if letter in tensors[product.out] + product.over)
        for product in chain.products
    }


def _written(trees: Sequence[Tree]) -> str:
    text = ",".join(str(tree) for tree in trees)
    return f"({text})" if len(trees) > 1 else text


def _paths(trees: Sequence[Tree], around: str) -> Iterator[tuple[str, str]]:
    for tree in trees:
        yield tree.letter, around + tree.letter
        yield from _paths(tree.inside, around + tree.letter)


def _levels(trees: tuple[Tree, ...]) -> Iterator[tuple[Tree, ...]]:
    yield trees
    for tree in trees:
        yield from _levels(tree.inside)


def _parse(text: str, start: int) -> tuple[tuple[Tree, ...], int]:
    """Loops from a position on, up to a comma, a closing parenthesis or the end."""
    if start == len(text) or text[start] in ",)":
        return (), start
    if "a" <= text[start] <= "z":
        inside, end = _parse(text, start + 1)
        return (Tree(text[start].upper(), inside),), end
    if text[start] != "(":
        return (), start
    trees: list[Tree] = []
    end = start
    while end < len(text) and text[end] in "(,":
        inside, end = _parse(text, end + 1)
        if len(inside) != 1:
            raise ValueError(f"text={text!r}: a sibling that ends at position {end} must be one nest of loops")
        trees += inside
    if end == len(text) or text[end] != ")" or len(trees) < 2:
        raise ValueError(f"text={text!r}: the parenthesis at {start} must hold two siblings or more and be closed")
    return tuple(trees), end + 1


def _forests(letters: str, loops_of: Sequence[frozenset[str]]) -> Iterator[tuple[Tree, ...]]:
    """All ways to arrange loops side by side and inside each other; products never have loops on both sides."""
    for groups in _partitions(_components(letters, loops_of)):
        yield from combinations(*[tuple(_trees(group, loops_of)) for group in groups])


def _trees(letters: str, loops_of: Sequence[frozenset[str]]) -> Iterator[Tree]:
    for outer in letters:
        for inside in _forests(letters.replace(outer, ""), loops_of):
            yield Tree(outer, inside)


def _components(letters: str, loops_of: Sequence[frozenset[str]]) -> list[str]:
    """Loops that products tie together, in the order of the first product that has one of them."""
    groups: list[set[str]] = []
    for loops in loops_of:
        tied = set(letters) & loops
        if tied:
            touching = [group for group in groups if group & tied]
            first = groups.index(touching[0]) if touching else len(groups)
            groups = [group for group in groups if group not in touching]
            groups.insert(first, tied.union(*touching))
    return ["".join(letter for letter in letters if letter in group) for group in groups]


def _partitions(parts: list[str]) -> Iterator[list[str]]:
    """All ways to join parts into groups, each group and the groups themselves in the parts' order."""
    if not parts:
        yield []
        return
    for rest in _partitions(parts[1:]):
        yield [parts[0], *rest]
        for index, group in enumerate(rest):
            yield [parts[0] + group, *rest[:index], *rest[index + 1 :]]
