"""The search space of a chain on a device: every expression with every choice of tiles, less what the rules drop.

Nothing is enumerated to count it: expressions are few, tile sizes are dropped dimension by dimension, and rule 4 is
counted over the tiles that stay.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product as combinations
from typing import Literal, get_args

from fusion.plan.chain import Chain
from fusion.plan.device import Device
from fusion.plan.expression import Expression, expressions
from fusion.plan.prune import (
    expression_classes,
    limit_entries,
    loaded_operands,
    padding,
    partial_tiles,
    repeated_finish,
    same_program,
    split_softmax,
    tile_sizes,
)
from fusion.plan.traffic import skeleton

Kind = Literal["mcfuser", "chimera"]


class SpaceError(ValueError):
    """No candidate is left; the message names the rules that dropped them.

    Source: not in the paper.
    """


@dataclass(frozen=True)
class Step:
    """What a rule left, and why it dropped the rest.

    Source: MCFuser (arXiv:2506.22169), its funnel of pruning rules.
    """

    rule: str
    expressions: int
    candidates: int
    dropped: tuple[tuple[str, int], ...] = ()
    """Reason -> candidates that it dropped."""

    def __str__(self) -> str:
        reasons = "".join(f"\n    {number:,}: {reason}" for reason, number in self.dropped)
        return f"{self.rule}: {self.candidates:,} candidates, {self.expressions} expressions{reasons}"


@dataclass(frozen=True)
class Region:
    """An expression with the tile sizes that each of its loops may have, in the chain's order.

    Source: MCFuser (arXiv:2506.22169), search space.
    """

    expression: Expression
    choices: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def candidates(self) -> int:
        """How many choices of tiles it has."""
        return math.prod(len(sizes) for _, sizes in self.choices)


@dataclass(frozen=True)
class Space:
    """What is left to search.

    Source: MCFuser (arXiv:2506.22169), search space.
    """

    chain: Chain
    device: Device
    regions: tuple[Region, ...]
    """They do not overlap; an expression has several where a legality rule ties its tiles to each other."""
    funnel: tuple[Step, ...]
    """From all candidates to those that rule 4 leaves."""

    @property
    def candidates(self) -> int:
        """How many."""
        return self.funnel[-1].candidates

    def tiles(self, region: Region) -> Iterator[tuple[int, ...]]:
        """The tile sizes of every candidate of a region, in the order of its choices.

        Args:
            region: One of the space's.
        """
        for tiles, _ in _fitting(region.choices, self._pairs, self._limit_entries, {}):
            yield tiles

    def sizes(self, region: Region, tiles: Sequence[int], index: int) -> tuple[int, ...]:
        """The sizes that one loop may have beside the tiles of the others.

        Args:
            region: One of the space's.
            tiles: In the order of its choices.
            index: Which loop.

        Returns:
            Those of its choices that rule 4 accepts, the smallest first.
        """
        named = {letter: tile for (letter, _), tile in zip(region.choices, tiles, strict=True)}
        letter, choices = region.choices[index]
        fixed = sum(named[a] * named[b] for a, b in self._pairs if letter not in (a, b))
        rate = sum(named[b if a == letter else a] for a, b in self._pairs if letter in (a, b))
        return choices[: bisect_right(choices, self._limit_entries - fixed, key=lambda size: size * rate)]

    @cached_property
    def _pairs(self) -> tuple[tuple[str, str], ...]:
        return loaded_operands(self.chain)

    @cached_property
    def _limit_entries(self) -> int:
        return limit_entries(self.chain, self.device)


def search_space(chain: Chain, device: Device, *, kind: Kind = "mcfuser") -> Space:
    """The candidates that rules 1 to 4 and the rules on legality leave.

    Args:
        chain: What is computed.
        device: Whose shared memory bounds the tiles.
        kind: The paper's space, or Chimera's: nested orders of all loops, without what a flat expression runs too.

    Returns:
        The space, with the count after each step.

    Raises:
        SpaceError: Nothing is left.
        ValueError: The kind is unknown.

    Source: MCFuser (arXiv:2506.22169), search space and pruning; the count needs no enumeration.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r} must be one of {get_args(Kind)}")
    sizes = {letter: chain.sizes[letter] for letter in chain.loops}
    every = {letter: tuple(tile_sizes(size)) for letter, size in sizes.items()}
    per_expression = math.prod(len(choices) for choices in every.values())
    kept, funnel = _expressions(chain, kind, per_expression)
    regions, step = _legal(chain, kept, every)
    funnel.append(step)
    regions, step = _unpadded(sizes, regions)
    funnel.append(step)
    regions, step = _fit(chain, device, regions)
    funnel.append(step)
    if not regions:
        steps = "\n".join(str(step) for step in funnel)
        raise SpaceError(f"no candidate is left for {chain} on {device.name}:\n{steps}")
    return Space(chain, device, regions, tuple(funnel))


def _expressions(chain: Chain, kind: Kind, per_expression: int) -> tuple[list[Expression], list[Step]]:
    """Rules 1 and 2, which look at expressions alone."""
    every = expressions(chain)
    classes = expression_classes(chain, every)
    funnel = [Step("all", len(every), len(every) * per_expression)]
    reasons = [(expression, same_program(expression, classes)) for expression in every]
    kept = _keep("rule 1, same program", reasons, per_expression, funnel)
    if kind == "chimera":
        flat = {group.representative for group in classes if not all(member.is_deep for member in group.members)}
        reasons = [(expression, "a flat expression runs it too" if expression in flat else None) for expression in kept]
        kept = _keep("nested orders only", reasons, per_expression, funnel)
    programs = {group.representative: group.program for group in classes}
    reasons = [(expression, partial_tiles(chain, programs[expression])) for expression in kept]
    return _keep("rule 2, partial tiles", reasons, per_expression, funnel), funnel


def _keep(
    rule: str, reasons: Sequence[tuple[Expression, str | None]], per_expression: int, funnel: list[Step]
) -> list[Expression]:
    kept = [expression for expression, reason in reasons if reason is None]
    dropped: dict[str, int] = {}
    for _, reason in reasons:
        if reason is not None:
            dropped[reason] = dropped.get(reason, 0) + per_expression
    funnel.append(Step(rule, len(kept), len(kept) * per_expression, tuple(dropped.items())))
    return kept


def _legal(
    chain: Chain, kept: Sequence[Expression], every: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[Region, ...], Step]:
    """Split the expressions that are legal only while some loops do not turn by which loops turn."""
    regions, dropped = [], dict[str, int]()
    can_turn = "".join(letter for letter, sizes in every.items() if len(sizes) > 1)

    def illegal(expression: Expression, turning: str) -> str | None:
        program = skeleton(chain, expression, turning)
        return repeated_finish(chain, program) or split_softmax(chain, program)

    for expression in kept:
        if illegal(expression, can_turn) is None:  # fewer loops do no harm
            regions.append(Region(expression, tuple(every.items())))
            continue
        for choice in combinations(*[(letter, "") for letter in can_turn]):
            turning = "".join(choice)
            choices = {x: sizes[:-1] if x in turning else sizes[-1:] for x, sizes in every.items()}
            region, reason = Region(expression, tuple(choices.items())), illegal(expression, turning)
            if reason is None:
                regions.append(region)
            else:
                dropped[reason] = dropped.get(reason, 0) + region.candidates
    return tuple(regions), _step("legality", regions, [region.candidates for region in regions], dropped)


def _unpadded(sizes: Mapping[str, int], regions: Sequence[Region]) -> tuple[tuple[Region, ...], Step]:
    """Rule 3."""
    kept, dropped = [], dict[str, int]()
    for region in regions:
        left, choices = region.candidates, []
        for letter, before in region.choices:
            after = tuple(tile for tile in before if padding(sizes[letter], tile) is None)
            choices.append((letter, after))
            if len(after) < len(before):
                reason = f"{letter}: tiles that add too much to {sizes[letter]}"
                dropped[reason] = dropped.get(reason, 0) + left - left * len(after) // len(before)
            left = left * len(after) // len(before)
        kept.append(Region(region.expression, tuple(choices)))
    kept = [region for region in kept if region.candidates]
    return tuple(kept), _step("rule 3, padding", kept, [region.candidates for region in kept], dropped)


def _fit(chain: Chain, device: Device, regions: Sequence[Region]) -> tuple[tuple[Region, ...], Step]:
    """Rule 4."""
    pairs, limit, counts = loaded_operands(chain), limit_entries(chain, device), dict[object, int]()
    for region in regions:
        if region.choices not in counts:
            counts[region.choices] = _count(region, pairs, limit)
    fitting = [region for region in regions if counts[region.choices]]
    left = [counts[region.choices] for region in fitting]
    above = sum(region.candidates for region in regions) - sum(left)
    dropped = {f"tiles of more than {limit} entries": above} if above else {}
    return tuple(fitting), _step("rule 4, shared memory", fitting, left, dropped)


def _step(rule: str, regions: Sequence[Region], candidates: Sequence[int], dropped: Mapping[str, int]) -> Step:
    return Step(rule, len({region.expression for region in regions}), sum(candidates), tuple(dropped.items()))


def _count(region: Region, pairs: Sequence[tuple[str, str]], limit: int) -> int:
    """Candidates of a region that rule 4 accepts.

    While one loop's tile is fixed, the others fall into groups that no operand connects: only their sums are compared.
    """
    choices, total = dict(region.choices), 0
    splits = [(letter, *_groups(letter, choices, pairs)) for letter in choices]
    middle, many, few = min(splits, key=lambda split: math.prod(len(choices[letter]) for letter in split[1]))
    first, second = ([(letter, choices[letter]) for letter in group] for group in (many, few))
    for size in choices[middle]:
        sums = sorted(entries for _, entries in _fitting(second, pairs, limit, {middle: size}))
        found = _fitting(first, pairs, limit, {middle: size})
        total += sum(bisect_right(sums, limit - entries) for _, entries in found)
    return total


def _groups(
    middle: str, choices: Mapping[str, Sequence[int]], pairs: Sequence[tuple[str, str]]
) -> tuple[list[str], list[str]]:
    """Two groups of the other loops that no pair connects, the one with more choices first."""
    parts: list[list[str]] = []
    for letter in choices:
        if letter != middle:
            tied = [part for part in parts if any((x, letter) in pairs or (letter, x) in pairs for x in part)]
            joined = [letter, *(x for part in tied for x in part)]
            parts = [*(part for part in parts if part not in tied), joined]
    many, few = list[str](), list[str]()
    for part in sorted(parts, key=lambda part: math.prod(len(choices[x]) for x in part), reverse=True):
        (few if many else many).extend(part)
    return many, few


def _fitting(
    choices: Sequence[tuple[str, Sequence[int]]], pairs: Sequence[tuple[str, str]], limit: int, fixed: Mapping[str, int]
) -> Iterator[tuple[tuple[int, ...], int]]:
    """Tiles of some loops, beside fixed ones, with the entries that they add if these stay within a limit."""
    if not choices:
        yield (), 0
        return
    (letter, sizes), *rest = choices
    rate = sum(fixed.get(b if a == letter else a, 0) for a, b in pairs if letter in (a, b))
    for size in sizes:
        if size * rate > limit:
            break
        for tiles, entries in _fitting(rest, pairs, limit - size * rate, {**fixed, letter: size}):
            yield (size, *tiles), size * rate + entries
