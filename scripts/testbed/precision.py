"""Which autocast precision pays on a device."""

from typing import Literal

import torch


def resolve(precision: Literal["auto", "fp32", "bf16"], device: str) -> Literal["fp32", "bf16"]:
    """Turn `auto` into bf16 where the device multiplies bf16 matrices in hardware, else into fp32.

    Args:
        precision: What the configuration asks for.
        device: `cpu` or `cuda`.
    """
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
