"""What Triton's launcher would tell the compiler of a kernel's arguments.

Source: not in the paper; the rules are Triton's: unit strides are constants, and whether pointers and other strides are
divisible by 16 decides whether loads are vectorised.
"""

from typing import Any

from fusion.emit.triton import Kernel
from fusion.plan.chain import Chain
from fusion.plan.device import Device

DIVISOR = 16  # of pointers in bytes and of strides in elements
INT32_MAX = 2**31 - 1
ITEM_BYTES = {"*fp32": 4, "*fp16": 2, "*bf16": 2, "*u1": 1}


def signature(kernel: Kernel, chain: Chain, device: Device) -> dict[str, dict[str, Any]]:
    """What the launcher would tell the compiler of a kernel's arguments, if all tensors are contiguous.

    Args:
        kernel: As emitted.
        chain: That it computes.
        device: Of the kind cuda or hip.

    Returns:
        `signature`: argument -> type; `constants`: argument -> value, for strides of one; `attributes`: argument ->
        pairs of an attribute and its value.

    Source: not in the paper; what is told is Triton's launcher's.
    """
    types, constants, attributes = {}, {}, {}
    values: dict[str, int] = {}
    for name, letters in kernel.tensors:
        types[f"{name}_ptr"] = pointer = _pointer(name, kernel, chain)
        attributes[f"{name}_ptr"] = [["tt.divisibility", DIVISOR]]
        stride = 1
        for letter in reversed(letters):
            values[f"{name}_{letter}_stride"] = stride
            stride *= max(chain.sizes[letter], 1)
        if device.kind == "hip" and stride * ITEM_BYTES[pointer] <= INT32_MAX:
            attributes[f"{name}_ptr"].append(["tt.pointer_range", 32])  # offsets fit 32 bits
    for argument, stride in values.items():
        types[argument] = "constexpr" if stride == 1 else "i32" if stride <= INT32_MAX else "i64"
        if stride == 1:
            constants[argument] = 1
        elif stride % DIVISOR == 0:
            attributes[argument] = [["tt.divisibility", DIVISOR]]
    ordered = {argument: types[argument] for argument in kernel.arguments}
    return {"signature": ordered, "constants": constants, "attributes": attributes}


def _pointer(name: str, kernel: Kernel, chain: Chain) -> str:
    if name in chain.boolean_inputs:
        return "*u1"
    return f"*{'fp32' if name in kernel.fp32 else chain.dtype}"
