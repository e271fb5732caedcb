"""A winner and what it is valid for, as JSON; what is read back is checked through and through.

Source: not in the paper (the artifact keeps its records in TinyDB).
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fusion.plan.chain import Chain
from fusion.plan.cpu_model import MICRO_KERNELS
from fusion.plan.prune import repeated_finish, split_softmax, tile_sizes
from fusion.plan.schedule import Schedule, schedule
from fusion.plan.stages import Causal, Dim, Elementwise, Input, MatMul, Softmax, Stage

PACKAGES = ("plan", "emit")  # whose sources decide what a winner means
MAX_STAGES_AHEAD = 8
MEASURED = ("measured_us", "torch_us", "parts_us")
WARPS = (1, 2, 4, 8, 16, 32)
STAGES: Mapping[str, type[Stage]] = MappingProxyType(
    {kind.__name__: kind for kind in (MatMul, Elementwise, Causal, Softmax)}
)

CHAIN_FIELDS: Mapping[str, type] = MappingProxyType({"dtype": str, "dims": list, "inputs": list, "stages": list})


class WinnerError(ValueError):
    """JSON that is no winner of a chain; the message says what is wrong with it."""


@dataclass(frozen=True)
class Winner:
    """The schedule that a search found; `measured_us` is None where only the model judged.

    `torch_us` is what torch took for the chain in the same run, and `parts_us` its first product and the rest of it as
    kernels of their own, where that was measured.
    """

    schedule: Schedule
    predicted_us: float
    measured_us: float | None = None
    torch_us: float | None = None
    parts_us: float | None = None

    def is_better(self, other: "Winner | None") -> bool:
        """Whether to prefer it: what was measured to what was not, of two of a kind the faster one.

        Args:
            other: Of the same chain; None is worse than any.
        """
        return other is None or self._rank < other._rank

    @property
    def _rank(self) -> tuple[bool, float]:
        return self.measured_us is None, self.predicted_us if self.measured_us is None else self.measured_us


@functools.cache
def code_version() -> str:
    """Hash of the sources that decide what a schedule means and which one wins; computed once."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in (".py", ".json", ".h"):
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Key:
    """What a winner is valid for: a chain whose inputs come by name, a device's name, a version of the sources."""

    chain: Chain
    device: str
    code: str

    @classmethod
    def of(cls, chain: Chain, device: str) -> "Key":
        """The key of a chain in this version.

        Args:
            chain: Its inputs may come in any order, which means the same.
            device: Name of the device.
        """
        inputs = tuple(sorted(chain.inputs, key=lambda tensor: tensor.name))
        return cls(dataclasses.replace(chain, inputs=inputs), device, code_version())

    @property
    def structure(self) -> "Key":
        """The key without sizes, numbers and diagonals: what chains have in common that differ in those."""
        dims = tuple(dataclasses.replace(dim, size=1) for dim in self.chain.dims)
        stages = tuple(_without_numbers(stage) for stage in self.chain.stages)
        return dataclasses.replace(self, chain=dataclasses.replace(self.chain, dims=dims, stages=stages))


def _without_numbers(stage: Stage) -> Stage:
    match stage:
        case Elementwise(operand=float()):
            return dataclasses.replace(stage, operand=1.0)
        case Causal():
            return dataclasses.replace(stage, diagonal=0)
        case _:
            return stage


def encode_key(key: Key) -> dict[str, Any]:
    """A key as JSON.

    Args:
        key: Any.
    """
    return {"device": key.device, "code": key.code, **encode_chain(key.chain)}


def encode_chain(chain: Chain) -> dict[str, Any]:
    """A chain as JSON.

    Args:
        chain: Any.
    """
    return {
        "dtype": chain.dtype,
        "dims": [dataclasses.asdict(dim) for dim in chain.dims],
        "inputs": [dataclasses.asdict(tensor) for tensor in chain.inputs],
        "stages": [{"stage": type(stage).__name__, **dataclasses.asdict(stage)} for stage in chain.stages],
    }


def encode(key: Key, winner: Winner) -> dict[str, Any]:
    """A winner with its key as JSON.

    Args:
        key: What it is valid for.
        winner: Of the key's chain.
    """
    plan = winner.schedule
    return {
        "key": encode_key(key),
        "winner": {
            "expression": str(plan.expression),
            "tiles": dict(plan.tiles),
            "num_warps": plan.num_warps,
            "num_stages": plan.num_stages,
            "micro": list(plan.micro),
            "predicted_us": winner.predicted_us,
            "measured_us": winner.measured_us,
            "torch_us": winner.torch_us,
            "parts_us": winner.parts_us,
        },
    }


def decode(content: object) -> tuple[Key, Winner]:
    """Read what `encode` made.

    Args:
        content: Parsed JSON, from anywhere.

    Returns:
        The key and its winner.

    Raises:
        WinnerError: A field is missing, unknown, of another type or out of range, or the winner is none of the chain.
    """
    entry = _object(content, "entry", {"key": dict, "winner": dict})
    key = _decode_key(entry["key"])
    kinds = {"expression": str, "tiles": dict, "num_warps": int, "num_stages": int, "micro": list}
    fields = _object(entry["winner"], "winner", {**kinds, **dict.fromkeys(["predicted_us", *MEASURED])})
    chain = key.chain
    if sorted(fields["tiles"]) != sorted(chain.loops):
        raise WinnerError(f"winner: tiles of {sorted(fields['tiles'])}, the chain's loops are {sorted(chain.loops)}")
    for letter, tile in fields["tiles"].items():
        if type(tile) is not int or tile not in tile_sizes(chain.sizes[letter]):
            size = chain.sizes[letter]
            raise WinnerError(f"winner: a tile of {tile!r} for {letter}={size}; accepted are {tile_sizes(size)}")
    if fields["num_warps"] not in WARPS or not 1 <= fields["num_stages"] <= MAX_STAGES_AHEAD:
        raise WinnerError(f"winner: {fields['num_warps']} warps and {fields['num_stages']} stages")
    micro = tuple(fields["micro"])
    if micro not in MICRO_KERNELS:
        raise WinnerError(f"winner: a register block of {micro}; accepted are {MICRO_KERNELS}")
    try:
        plan = schedule(
            chain,
            fields["expression"],
            fields["tiles"],
            num_warps=fields["num_warps"],
            num_stages=fields["num_stages"],
        )
        plan = dataclasses.replace(plan, micro=micro)
    except (ValueError, RecursionError) as error:
        raise WinnerError(f"winner: {error}") from error
    program = plan.program(chain)
    illegal = repeated_finish(chain, program) or split_softmax(chain, program)
    if illegal:
        raise WinnerError(f"winner: {illegal}")
    times = [None if fields[name] is None else _time(fields[name]) for name in MEASURED]
    return key, Winner(plan, _time(fields["predicted_us"]), *times)


def _decode_key(content: dict[str, Any]) -> Key:
    fields = _object(content, "key", {"device": str, "code": str, **CHAIN_FIELDS})
    chain = decode_chain({name: fields[name] for name in CHAIN_FIELDS})
    return dataclasses.replace(Key.of(chain, fields["device"]), code=fields["code"])


def decode_chain(content: object) -> Chain:
    """Read what `encode_chain` made.

    Args:
        content: Parsed JSON, from anywhere.

    Returns:
        The chain.

    Raises:
        WinnerError: A field is missing, unknown or of another type, or the parts are no chain.
    """
    fields = _object(content, "chain", CHAIN_FIELDS)
    dims = tuple(Dim(**_object(dim, "dim", {"name": str, "size": int, "batch": bool})) for dim in fields["dims"])
    inputs = tuple(Input(**_object(tensor, "input", {"name": str, "dims": str})) for tensor in fields["inputs"])
    try:
        return Chain(dims, inputs, tuple(_stage(stage) for stage in fields["stages"]), fields["dtype"])
    except (TypeError, ValueError, KeyError) as error:
        raise WinnerError(f"key: {error}") from error


def _stage(content: object) -> Stage:
    name = content.get("stage") if isinstance(content, dict) else None
    if not isinstance(name, str) or name not in STAGES:
        raise WinnerError(f"stage {name!r}: accepted are {sorted(STAGES)}")
    kind = STAGES[name]
    kinds = {x.name: int if x.type is int else str if x.type is str else None for x in dataclasses.fields(kind)}
    fields = _object(content, name, {"stage": str, **kinds})
    operand = fields.get("operand")
    if not (operand is None or isinstance(operand, str) or type(operand) is float):
        raise WinnerError(f"{name}: an operand of {operand!r}")
    if not isinstance(fields.get("operation", ""), str):
        raise WinnerError(f"{name}: an operation of {fields['operation']!r}")
    return kind(**{name: value for name, value in fields.items() if name != "stage"})


def _object(content: object, where: str, kinds: Mapping[str, type | None]) -> dict[str, Any]:
    """An object with exactly these fields of these types; None leaves the type to whoever asks."""
    if not isinstance(content, dict) or content.keys() != kinds.keys():
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise WinnerError(f"{where}: got {found}, accepted is an object with the fields {sorted(kinds)}")
    for name, kind in kinds.items():
        if kind is not None and type(content[name]) is not kind:
            raise WinnerError(f"{where}: {name} is a {type(content[name]).__name__}, accepted is a {kind.__name__}")
    return content


def _time(value: object) -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:  # type: ignore[operator]
        raise WinnerError(f"winner: a time of {value!r} us")
    return float(value)  # type: ignore[arg-type]
