"""Device: what a machine can do at best, as far as a search and the size of a kernel depend on it.

A device is read from a JSON file: one that comes with the package (`device_names`), or another with the same fields.
Nothing in a file is trusted: every field must be there, known and in range.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from fusion.plan.chain import DType

FOLDER = Path(__file__).parent / "devices"
Kind = Literal["cuda", "hip", "cpu"]


class DeviceError(ValueError):
    """A device file that cannot be used; the message names the file, the field, what came and what is accepted.

    Source: not in the paper.
    """


@dataclass(frozen=True, kw_only=True)
class Device:
    """A machine's limits; `origin` says where each figure comes from.

    Source: MCFuser (arXiv:2506.22169) uses P, W, N_SM and Shm_max; the other limits are not in the paper.
    """

    name: str
    origin: str
    kind: Kind
    arch: str
    """Of cuda the compute capability as in "80", of hip the target as in "gfx942", of a cpu the instruction set."""
    fp32_flops_per_s: float
    """The paper's P for fp32 that is fp32: tf32 does not count."""
    fp16_flops_per_s: float
    """P for fp16 with sums in fp32, dense."""
    bf16_flops_per_s: float
    """P for bf16 with sums in fp32, dense."""
    dram_bytes_per_s: float
    """The paper's W."""
    num_sms: int
    """Streaming multiprocessors, compute units or cores: what runs blocks side by side."""
    shared_bytes_per_block: int
    """The most that one block may ask for, the paper's Shm_max; of a cpu a core's L2 cache."""
    shared_bytes_per_sm: int
    registers_per_sm: int
    """Registers of 32 bits."""
    warp_size: int
    """Threads that run in step; of a cpu fp32 numbers in a vector."""

    def flops_per_s(self, dtype: DType) -> float:
        """The paper's P for products of a dtype.

        Args:
            dtype: Of the products' operands.

        Source: MCFuser (arXiv:2506.22169), analytical performance model.
        """
        peaks = {"fp32": self.fp32_flops_per_s, "fp16": self.fp16_flops_per_s, "bf16": self.bf16_flops_per_s}
        return peaks[dtype]


def device_names() -> list[str]:
    """The devices that come with the package; not in the paper."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_device(name: str | Path) -> Device:
    """Read a device.

    Args:
        name: One of `device_names`, or the path of a file.

    Returns:
        The device.

    Raises:
        DeviceError: If there is no such file, or a field is missing, unknown or out of range.

    Source: not in the paper.
    """
    path = FOLDER / f"{name}.json" if str(name) in device_names() else Path(name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        accepted = f"one of {device_names()} or the path of a file"
        raise DeviceError(f"device: got {str(name)!r} ({error.strerror}); accepted is {accepted}") from error
    except (ValueError, RecursionError) as error:  # of the decoder, of json, and of integers with too many digits
        raise DeviceError(f"{path}: is not JSON ({error}); write it again or take one of {device_names()}") from error
    return parse_device(content, where=str(path))


def parse_device(content: object, *, where: str = "device") -> Device:
    """Check what a file holds.

    Args:
        content: Parsed JSON.
        where: Its name, for errors.

    Returns:
        The device.

    Raises:
        DeviceError: As `load_device`.

    Source: not in the paper.
    """
    names = [field.name for field in fields(Device)]
    if not isinstance(content, Mapping):
        raise DeviceError(f"{where}: got {content!r}; accepted is an object with the fields {names}")
    missing, unknown = [name for name in names if name not in content], sorted(content.keys() - set(names))
    if missing or unknown:
        problem = f"lacks {missing}" if missing else f"has the unknown {unknown}"
        raise DeviceError(f"{where}: {problem}; accepted are exactly the fields {names}")
    values = {field.name: _value(content[field.name], field.type, f"{where}: {field.name}") for field in fields(Device)}
    device = Device(**values)
    if device.shared_bytes_per_block > device.shared_bytes_per_sm:
        raise DeviceError(
            f"{where}: shared_bytes_per_block: got {device.shared_bytes_per_block}; accepted is at most "
            f"shared_bytes_per_sm, {device.shared_bytes_per_sm}"
        )
    return device


def _value(value: object, kind: object, where: str) -> Any:
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and 1 <= value <= sys.float_info.max:  # type: ignore[operator]
            return float(value)  # type: ignore[arg-type]
        raise DeviceError(f"{where}: got {value!r}; accepted is a finite number of at least 1")
    if kind is int:
        if type(value) is int and value >= 1:
            return value
        raise DeviceError(f"{where}: got {value!r}; accepted is an integer of at least 1")
    if kind is Kind:
        if value in get_args(Kind):
            return value
        raise DeviceError(f"{where}: got {value!r}; accepted is one of {get_args(Kind)}")
    if isinstance(value, str) and value:
        return value
    raise DeviceError(f"{where}: got {value!r}; accepted is text that is not empty")
