"""What makes dimensions, inputs and stages a chain; every rule is a check whose error names the part at fault."""

import math
from collections.abc import Iterable
from typing import get_args

from fusion.plan.stages import (
    Activation,
    Causal,
    Dim,
    Elementwise,
    Input,
    MatMul,
    Operation,
    Softmax,
    Stage,
    operands,
    product_dims,
)

MAX_PRODUCTS = 4  # three in a row, one of them gated


def verify(dims: tuple[Dim, ...], inputs: tuple[Input, ...], stages: tuple[Stage, ...]) -> None:
    """Check that the parts form a chain.

    Args:
        dims: The dimensions, in the order that the letters of products' values take.
        inputs: The caller's tensors.
        stages: The stages, in the order they run.

    Raises:
        TypeError: An argument is not a tuple of its kind, or a size is not an int.
        ValueError: A dimension, input or stage breaks a rule.

    Source: our definition (the paper gives no rules for what stands between its products).
    """
    for argument, values, kinds in (("dims", dims, Dim), ("inputs", inputs, Input), ("stages", stages, Stage)):
        if not isinstance(values, tuple) or not all(isinstance(value, kinds) for value in values):
            raise TypeError(f"{argument}={values!r}: pass a tuple of {kinds}")
    _verify_dims(dims)
    _verify_inputs(inputs, {dim.name for dim in dims})
    walk = _Walk(dims, inputs, stages)
    for index, stage in enumerate(stages):
        walk.step(f"stage {index}, {stage}", stage)
    walk.finish()


def _require(condition: bool, where: object, problem: str) -> None:
    if not condition:
        raise ValueError(f"{where}: {problem}")


def _verify_dims(dims: tuple[Dim, ...]) -> None:
    seen: set[str] = set()
    for dim in dims:
        _require(
            isinstance(dim.name, str) and len(dim.name) == 1 and "A" <= dim.name <= "Z" and dim.name not in seen,
            dim,
            f"name={dim.name!r} must be one capital letter that no other dimension has",
        )
        if type(dim.size) is not int:
            raise TypeError(f"{dim}: size={dim.size!r} must be an int; symbolic sizes are not accepted")
        _require(dim.size >= 0, dim, f"size={dim.size} must not be negative")
        seen.add(dim.name)


def _verify_inputs(inputs: tuple[Input, ...], letters: set[str]) -> None:
    seen: set[str] = set()
    for tensor in inputs:
        _require(_is_name(tensor.name), tensor, f"name={tensor.name!r} must be an identifier in ASCII")
        _require(tensor.name not in seen, tensor, f"name={tensor.name!r} is taken by another input")
        _require(
            isinstance(tensor.dims, str) and set(tensor.dims) <= letters and len(set(tensor.dims)) == len(tensor.dims),
            tensor,
            f"dims={tensor.dims!r} must be different letters out of {_listed(letters)}",
        )
        seen.add(tensor.name)
    unused = letters - set("".join(tensor.dims for tensor in inputs))
    _require(not unused, "dims", f"no input is indexed by {_listed(unused)}; leave these dimensions out")


def _is_name(name: str) -> bool:
    return isinstance(name, str) and name.isascii() and name.isidentifier()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


class _Walk:
    """What is known of each tensor while the stages are gone through in order."""

    def __init__(self, dims: tuple[Dim, ...], inputs: tuple[Input, ...], stages: tuple[Stage, ...]) -> None:
        self.order = "".join(dim.name for dim in dims)
        self.batch = {dim.name for dim in dims if dim.batch}
        self.boolean = {str(s.operand) for s in stages if isinstance(s, Elementwise) and s.operation == "mask"}
        self.tensors = {tensor.name: tensor.dims for tensor in inputs}
        self.summed: dict[str, set[str]] = {}  # value -> letters that it or what it was made of is summed over
        self.masked: set[str] = set()  # values that hold -inf and still need their softmax
        self.read: set[str] = set()
        self.output = ""

    def step(self, where: str, stage: Stage) -> None:
        for name in operands(stage):
            _require(name in self.tensors, where, f"{name!r} is not defined yet; defined are {_listed(self.tensors)}")
            _require(name not in self.masked, where, f"{name!r} holds -inf; put its Softmax before this stage")
            self.read.add(name)
        if isinstance(stage, MatMul):
            self._product(where, stage)
            return
        _require(stage.x in self.summed, where, f"x={stage.x!r} must be a product's value: {_listed(self.summed)}")
        _require(
            stage.x not in self.read,
            where,
            f"x={stage.x!r} is read by this or an earlier stage; change it before anything reads it",
        )
        match stage:
            case Elementwise():
                self._elementwise(where, stage)
            case Causal():
                self._causal(where, stage)
            case Softmax():
                self._loop(where, "over", stage.over, stage.x)
                self.masked.discard(stage.x)

    def _product(self, where: str, stage: MatMul) -> None:
        for argument, name in (("left", stage.left), ("right", stage.right)):
            letters = self.tensors[name]
            _require(name not in self.boolean, where, f"{argument}={name!r} is boolean: the operand of a mask")
            self._loop(where, "over", stage.over, name)
            _require(
                len(set(letters) - self.batch) == 2,
                where,
                f"{argument}={name!r} must have two letters beside the batch's, one of them over={stage.over!r}; "
                f"it has {letters!r}",
            )
        out = product_dims(stage, self.tensors, self.order)
        _require(
            len(set(out) - self.batch) == 2, where, "left and right must differ in the letter they do not sum over"
        )
        _require(
            _is_name(stage.out) and stage.out not in self.tensors,
            where,
            f"out={stage.out!r} must be an ASCII identifier that no other tensor has",
        )
        summed = self.summed.get(stage.left, set()) | self.summed.get(stage.right, set()) | {stage.over}
        _require(
            not summed & set(out),
            where,
            f"{_listed(summed & set(out))} is summed over and indexes out={stage.out!r} too; use another letter",
        )
        self.tensors[stage.out], self.summed[stage.out], self.output = out, summed, stage.out

    def _elementwise(self, where: str, stage: Elementwise) -> None:
        operation, operand = stage.operation, stage.operand
        accepted = get_args(Operation)
        _require(operation in accepted, where, f"operation={operation!r} must be one of {accepted}")
        if operation in get_args(Activation):
            _require(operand is None, where, f"operand={operand!r} must be None for {operation!r}")
        elif isinstance(operand, str):
            letters = self.tensors[operand]
            _require(
                set(letters) <= set(self.tensors[stage.x]),
                where,
                f"operand={operand!r} is indexed by {letters!r}, which must be among x's {self.tensors[stage.x]!r}",
            )
            _require(
                operand not in self.boolean or (operation == "mask" and operand not in self.summed),
                where,
                f"operand={operand!r} must be either a boolean input that only masks or a tensor that never does",
            )
            self.summed[stage.x] |= self.summed.get(operand, set())
        else:
            number = type(operand) is float and math.isfinite(operand) and operation in ("add", "mul")
            _require(number, where, f"operand={operand!r} must be a tensor's name, or for add and mul a finite float")
        if operation == "mask":
            self.masked.add(stage.x)
        if operation == "exp_minus":
            self.masked.discard(stage.x)
        _require(
            stage.x not in self.masked or operation in ("add", "mask"),
            where,
            f"x={stage.x!r} holds -inf, which {operation!r} would spoil; put this stage before the mask",
        )

    def _causal(self, where: str, stage: Causal) -> None:
        self._loop(where, "row", stage.row, stage.x)
        self._loop(where, "column", stage.column, stage.x)
        _require(stage.row != stage.column, where, "row and column must be different letters")
        _require(type(stage.diagonal) is int, where, f"diagonal={stage.diagonal!r} must be an int")
        self.masked.add(stage.x)

    def _loop(self, where: str, argument: str, letter: str, name: str) -> None:
        loops = set(self.tensors[name]) - self.batch
        _require(
            letter in loops,
            where,
            f"{argument}={letter!r} must be a letter of {name!r} beside the batch's: {_listed(loops)}",
        )

    def finish(self) -> None:
        _require(
            1 <= len(self.summed) <= MAX_PRODUCTS,
            "stages",
            f"{len(self.summed)} products; accepted are 1 to {MAX_PRODUCTS}",
        )
        unread = self.tensors.keys() - self.read - {self.output}
        _require(not unread, "stages", f"nothing reads {_listed(unread)}; leave them out or use them")
        _require(not self.masked, "stages", f"{_listed(self.masked)} hold -inf; end with their Softmax")
