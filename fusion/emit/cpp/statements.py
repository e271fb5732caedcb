"""The statements of a program as lines of C++: load, compute, finish and store one tile.

Source: MCFuser (arXiv:2506.22169), Figure 4, for the statements; their text, and all between the products, is ours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from fusion.emit.causal import vanishing
from fusion.emit.cpp.elementwise import is_fixed, operand_text, stage_line
from fusion.emit.cpp.storage import Storage
from fusion.emit.softmax import Online
from fusion.plan.prune import online_reader
from fusion.plan.stages import Causal, Elementwise, Softmax, operands
from fusion.plan.statements import Statement, product_of

INDENT = "  "
LOG2_E = 1.4426950408889634
Changes = Sequence[Elementwise | Causal]


@dataclass(frozen=True)
class StatementText:
    """Lines of the statements of one program.

    Source: not in the paper.
    """

    storage: Storage
    online: dict[str, Online]
    summed: frozenset[str]
    """Values whose sum takes more than one round."""
    micro: tuple[int, int]
    """Rows, and vectors of columns, of a block of registers."""
    lse: str
    """Tensor that the softmax's log-sum-exp is stored to; none if empty."""

    def lines(self, statement: Statement) -> Iterator[str]:
        """The lines of a statement on the current tiles."""
        name, storage = statement.tensor, self.storage
        match statement.kind:
            case "L" if name in storage.widened:
                yield from self._widen(name)
            case "C":
                yield from self._compute(name)
            case "F":
                yield from self._finish(name)
            case "S":
                row, column = storage.row(name), storage.column[name]
                yield (
                    f"store_tile({storage.tile(name)}, {storage.ld(name)}, {row}_len, {column}_len, "
                    f"{storage.pointer(name)}, {storage.stride(name, row)}, {storage.stride(name, column)});"
                )

    def zeros(self, value: str) -> str:
        """The line that starts a sum."""
        row, column = self.storage.row(value), self.storage.column[value]
        return f"zero({self.storage.tile(value)}, {row}_len, {column}_len, {self.storage.ld(value)});"

    def rows(self, kind: str, value: str) -> str:
        """Of an online softmax, the current tile of what there is for every row: `peak`, `total` or `factor`."""
        online = self.online.get(value)
        row = self.storage.row(value)
        moves = ""
        if online is not None:
            for letter in online.inner:
                moves += f" + {letter}_at / {letter}_tile * {self.storage.sizes[row]}"
        return f"{value}_{kind}{moves}"

    def start(self, value: str) -> str:
        """Before the loop of an online softmax."""
        row = self.storage.row(value)
        return f"start({self.rows('peak', value)}, {self.rows('total', value)}, {row}_len);"

    def divide(self, value: str) -> Iterator[str]:
        """A complete sum over the entries of an online softmax becomes their average."""
        yield from (self._on_rows("divide_rows", value, self.rows("total", name)) for name in self._online(value))

    def store_lse(self, value: str) -> Iterator[str]:
        """Write the log-sum-exp of a softmax that is complete, if it is asked for."""
        if self.lse:
            row = self.storage.row(value)
            yield (
                f"store_lse({self.rows('peak', value)}, {self.rows('total', value)}, {row}_len, "
                f"{self.storage.pointer(self.lse)}, {self.storage.stride(self.lse, row)});"
            )

    def _online(self, value: str) -> Iterator[str]:
        return (name for name in operands(product_of(self.storage.chain, value)) if name in self.online)

    def _on_rows(self, function: str, value: str, argument: str) -> str:
        row, column = self.storage.row(value), self.storage.column[value]
        tile, ld = self.storage.tile(value), self.storage.ld(value)
        return f"{function}({tile}, {ld}, {row}_len, {column}_len, {argument});"

    def _widen(self, name: str) -> Iterator[str]:
        row, column = self.storage.wide_shape(name)
        strides = f"{self.storage.stride(name, row)}, {self.storage.stride(name, column)}"
        ld = self.storage.wide_ld(column)
        arguments = f"{self.storage.pointer(name)}, {strides}, {row}_len, {column}_len, {name}_wide, {ld}"
        whole = self.storage.in_unit
        yield f"const auto {name}_rows = left_rows({arguments});" if whole else f"widen_tile({arguments});"

    def _compute(self, value: str) -> Iterator[str]:
        """One round of a product's sum, or all of it."""
        storage = self.storage
        row, column, over = storage.row(value), storage.column[value], product_of(storage.chain, value).over
        roles = storage.roles[value]
        for name in self._online(value):
            yield self._on_rows("multiply_rows", value, self.rows("factor", name))
        for name in {roles.left, roles.right} & set(storage.scratch) & set(storage.widened) - self._finished_wide:
            yield (
                f"round_tile<{storage.dtype}>({storage.tile(name)}, {storage.ld(name)}, {storage.row(name)}_len, "
                f"{storage.column[name]}_len, {name}_wide, {storage.wide_ld(storage.column[name])});"
            )
        mr, nv = self.micro
        left, right = self._left(roles.left, row, over), self._right(roles.right, column, over)
        add = "true" if value in self.summed else "false"
        yield (
            f"product<{mr}, {nv}>({self._limit(value, roles.left)}, {left}, {right}, {storage.tile(value)}, "
            f"{storage.ld(value)}, "
            f"{row}_len, {column}_len, {over}_len, {add});"
        )
        for name in (name for name, reader in self._deferred.items() if reader == value):
            yield self._on_rows("divide_rows", value, f"{name}_total")

    def _limit(self, value: str, left: str) -> str:
        """What of a product a causal mask leaves: of the value itself, or of the left operand that it sums over."""
        for kind, name in (("Columns", value), ("Depth", left)):
            mask = vanishing(self.storage.chain, name) if name in self.storage.scratch else None
            if mask is not None and self.storage.row(name) == self.storage.row(value):
                side = "Before" if self._ends(name, mask) else "From"
                return f"{kind}{side}({self._offset(name, mask)})"
        return "Full()"

    def _ends(self, value: str, mask: Causal) -> bool:
        """Whether what a mask leaves of a value's row is its beginning; else it is its end."""
        return mask.column == self.storage.column[value]

    def _offset(self, value: str, mask: Causal) -> str:
        """Where that ends or begins in the tile's first row; one column on with every row."""
        row, column = self.storage.row(value), self.storage.column[value]
        shift = mask.diagonal + 1 if self._ends(value, mask) else -mask.diagonal
        return f"{row}_at - {column}_at + {shift}"

    def _left(self, name: str, row: str, over: str) -> str:
        """Pointer of a left operand, and its strides along rows and depth."""
        storage = self.storage
        if storage.in_unit and name not in storage.scratch:
            return f"{name}_rows.base, {name}_rows.ld, 1"
        if name in storage.widened or name in storage.scratch:
            rows, cols = (
                storage.wide_shape(name) if name not in storage.scratch else (storage.row(name), storage.column[name])
            )
            wide = name in storage.widened
            base, ld = (f"{name}_wide", storage.wide_ld(cols)) if wide else (storage.tile(name), storage.ld(name))
            return f"{base}, {ld}, 1" if rows == row else f"{base}, 1, {ld}"
        return f"{storage.pointer(name)}, {storage.stride(name, row)}, {storage.stride(name, over)}"

    def _right(self, name: str, column: str, over: str) -> str:
        """A right operand from the current columns on, and how far along the depth the tile starts."""
        storage = self.storage
        depth = f"{over}_at" if over in storage.turning else "0"
        if name in storage.packed:
            at = f" + {column}_at * {storage.depth(over)}" if column in storage.turning else ""
            return f"Packed{{{name}_packed + {packed_index(storage, name)}{at}, {storage.depth(over)}}}, {depth}"
        if name in storage.by_panel:
            strides = f"{storage.stride(name, over)}, {storage.stride(name, column)}"
            return f"Unpacked{{{storage.pointer(name)}, {strides}, panel_wide}}, 0"
        if name in storage.scratch:
            base = f"{name}_wide" if name in storage.widened else storage.tile(name)
            ld = storage.wide_ld(storage.column[name]) if name in storage.widened else storage.ld(name)
            return f"Scratch{{{base}, {ld}}}, 0"
        return f"Direct{{{storage.pointer(name, skip=over)}, {storage.stride(name, over)}}}, {depth}"

    def _finish(self, value: str) -> Iterator[str]:
        """A value's epilogue: passes over its tile, one for what leads to each softmax and one for what is left."""
        changes: list[Elementwise | Causal] = []
        cut = vanishing(self.storage.chain, value)
        for stage in self.storage.chain.epilogue(value):
            if stage == cut:
                continue
            if isinstance(stage, Softmax):
                yield from self._softmax(value, changes)
                changes = []
            else:
                changes.append(stage)
        if changes:
            wide = value in self._finished_wide
            kept = [] if cut is None and not wide else ["x = select(inside, x, splat(0.0f));"]
            yield from self._over_rows(value, self._over_vectors(value, changes, [*kept, *self._keep(value)]))

    def _keep(self, value: str) -> Iterator[str]:
        """Lines that store a finished vector, as its readers want it."""
        storage = self.storage
        wide = value in self._finished_wide
        if wide:
            yield f"keep<{storage.dtype}>(wide + c, x);"
        if not wide or value in storage.read_exact:
            yield "store(row + c, x);"

    def _softmax(self, value: str, changes: Changes) -> Iterator[str]:
        """What leads to it is computed twice, for the maximum and for the exponents, rather than written."""
        online = value in self.online
        peak, total, factor = (self.rows(kind, value) for kind in ("peak", "total", "factor"))
        scale, changes = _leading_scale(changes)
        lines = ["V peaks = splat(-INF);"]
        lines += self._over_vectors(value, changes, ["peaks = max(peaks, select(inside, x, splat(-INF)));"])
        largest = f"max(peaks) * {scale!r}f" if scale != 1.0 else "max(peaks)"
        if online:
            yield from self._over_rows(value, [*lines, f"({factor})[r] = {largest};"], last=False)
            yield f"advance({peak}, {total}, {factor}, {self.storage.row(value)}_len);"
            lines = []
        else:
            lines.append(f"({peak})[r] = {largest};")
        lines += [f"const V shift = splat(finite(({peak})[r]) * {-LOG2_E!r}f);", "V totals = splat(0.0f);"]
        power = "exp2_below" if self.storage.dtype == "float" else "exp2_below_roughly"  # what follows is rounded
        exponent = f"{power}(fma(x, splat({scale * LOG2_E!r}f), shift))"
        after = [f"x = select(inside, {exponent}, splat(0.0f));", "totals = totals + x;", *self._keep(value)]
        lines += self._over_vectors(value, changes, after)
        lines.append(f"({total})[r] {'+=' if online else '='} sum(totals);")
        yield from self._over_rows(value, lines)
        if not online:
            if value not in self._deferred:
                yield self._on_rows("divide_rows", value, f"{value}_total")
            yield from self.store_lse(value)

    @property
    def _deferred(self) -> dict[str, str]:
        """Softmaxes in one tile that their only reader divides by: its sums are fewer than the softmax's entries."""
        chain = self.storage.chain
        stages = [stage for stage in chain.stages if isinstance(stage, Softmax) and stage.x not in self.online]
        return {stage.x: reader for stage in stages if (reader := online_reader(chain, stage)) is not None}

    @cached_property
    def _finished_wide(self) -> frozenset[str]:
        """Values whose one pass writes them as operands; of the others, their readers make copies."""
        storage, found = self.storage, set()
        for value in set(storage.scratch) & set(storage.widened) if storage.in_unit else ():
            *before, last = storage.chain.epilogue(value) or (None,)
            divided = isinstance(last, Softmax) and value not in self.online and value not in self._deferred
            several = any(isinstance(stage, Softmax) for stage in before)
            if last is not None and not divided and not several and not storage.live[value]:
                found.add(value)
        return frozenset(found)

    def _over_rows(self, value: str, lines: Sequence[str], *, last: bool = True) -> Iterator[str]:
        """Lines for every row; the last pass over a value leaves what its readers find."""
        storage, row = self.storage, self.storage.row(value)
        yield f"for (int64_t r = 0; r < {row}_len; ++r) {{"
        yield f"{INDENT}float* const row = {storage.tile(value)} + r * {storage.ld(value)};"
        column, wide = storage.column[value], last and value in self._finished_wide
        if wide:
            yield f"{INDENT}{storage.operand}* const wide = {value}_wide + r * {storage.wide_ld(column)};"
        cut = vanishing(storage.chain, value)
        ends = cut is not None and self._ends(value, cut)
        if cut is not None:
            bound, offset = "kept" if ends else "skipped", self._offset(value, cut)
            yield f"{INDENT}const int64_t {bound} = std::clamp<int64_t>(r + {offset}, 0, {column}_len);"
        yield from (INDENT + line for line in lines)
        exact = last and (not wide or value in storage.read_exact)
        for name in [*["wide"] * wide, *["row"] * exact]:
            if cut is not None and not ends:
                yield f"{INDENT}clear_before({name}, skipped);"
            if ends or name == "wide":
                yield f"{INDENT}clear({name}, {'kept' if ends else f'{column}_len'}, {column}_len);"
        yield "}"

    def _over_vectors(self, value: str, changes: Changes, after: Sequence[str]) -> list[str]:
        storage, column, row = self.storage, self.storage.column[value], self.storage.row(value)
        cut = vanishing(storage.chain, value)
        left = f"{column}_len" if cut is None else "kept" if self._ends(value, cut) else f"skipped, {column}_len"
        before, lines = [], ["V x = load(row + c);"]
        for index, stage in enumerate(changes):
            operand = operand_text(stage, storage, column)
            if is_fixed(stage, storage, column):
                before.append(f"const auto fixed_{index} = {operand};")
                operand = f"fixed_{index}"
            lines.append(stage_line(stage, operand, row, column))
        body = [INDENT + line for line in (*lines, *after)]
        return ["{", *before, f"vectors({left}, [&](int64_t c, auto inside) {{", *body, "});", "}"]


def _leading_scale(changes: Changes) -> tuple[float, Changes]:
    """A positive number by which a softmax's entries are multiplied first, which their maximum can be too."""
    match changes:
        case [Elementwise(operation="mul", operand=float(scale)), *others] if scale > 0 and not others:
            return scale, others
        case _:
            return 1.0, changes


def packed_index(storage: Storage, name: str) -> str:
    """Where the packed operand of the current batch starts."""
    batch = [letter for letter in storage.letters[name] if letter in storage.chain.batch]
    index = "0"
    for letter in batch:
        index = f"{letter}_at" if index == "0" else f"({index} * {letter}_size + {letter}_at)"
    return f"{index} * {name}_packed_floats" if batch else "0"
