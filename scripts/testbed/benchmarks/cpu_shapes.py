"""The chains and attentions that are timed on a CPU, by name, as (batch, M, N, K, H) and (heads, M = N, K = H)."""

from configs.cpu import CPUSection
from configs.typed import ConfigError, closest
from scripts.testbed.peer_processes.problem import DType, Problem

CHAINS = {
    "x".join(map(str, sizes)): sizes
    for sizes in (
        (1, 512, 256, 64, 64),
        (1, 512, 256, 64, 128),
        (1, 512, 512, 256, 256),
        (1, 512, 1024, 256, 256),
        (1, 512, 512, 1024, 256),
        (1, 1024, 512, 128, 128),
        (1, 2048, 512, 128, 128),
        (1, 1024, 1024, 128, 128),
        (4, 1024, 1024, 128, 128),
        (8, 1024, 1024, 128, 128),
        (1, 4096, 4096, 64, 64),
        (1, 16384, 16384, 64, 64),
    )
}
SEARCHED_CHAINS = (
    "1x512x256x64x64",
    "1x512x512x256x256",
    "1x1024x512x128x128",
    "8x1024x1024x128x128",
    "1x4096x4096x64x64",
)
SEARCHED_ATTENTIONS = ("8x512x64", "16x256x80")
LONG_CHAINS = ("1x4096x4096x64x64", "1x16384x16384x64x64")
ATTENTIONS = {
    "x".join(map(str, sizes)): sizes
    for sizes in (
        (8, 512, 64),
        (12, 512, 64),
        (16, 512, 64),
        (12, 256, 64),
        (16, 256, 64),
        (16, 256, 80),
        (8, 2048, 64),
        (8, 4096, 64),
    )
}
LONG_ATTENTIONS = ("8x2048x64", "8x4096x64")


def chain_problem(name: str, dtype: DType) -> Problem:
    """A chain by name.

    Args:
        name: Of CHAINS, or any sizes written likewise.
        dtype: Of its tensors.

    Raises:
        ValueError: Where the name is not five sizes.
    """
    batch, M, N, K, H = _sizes(name, 5, "batch x M x N x K x H")
    return Problem(kind="chain", batch=batch, M=M, N=N, K=K, H=H, dtype=dtype)


def attention_problem(name: str, dtype: DType, *, causal: bool, backward: bool = False) -> Problem:
    """An attention by name.

    Args:
        name: Of ATTENTIONS, or any sizes written likewise.
        dtype: Of its tensors.
        causal: Whether rows see earlier columns alone.
        backward: Whether gradients are computed, too.

    Raises:
        ValueError: Where the name is not three sizes.
    """
    heads, M, K = _sizes(name, 3, "heads x M x K")
    return Problem(kind="attention", batch=heads, M=M, N=M, K=K, H=K, dtype=dtype, causal=causal, backward=backward)


def _sizes(name: str, number: int, form: str) -> list[int]:
    parts = name.split("x")
    if len(parts) != number or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"shapes: got {name!r}, accepts {form} without spaces, numbers from 1 on")
    return [int(part) for part in parts]


def searched(section: CPUSection) -> dict[str, Problem]:
    """The problems whose kernels are searched for, chains first, by name.

    Args:
        section: Of the configuration.

    Raises:
        ConfigError: Where a shape is unknown.
    """
    problems = {name: chain_problem(name, "fp32") for name in SEARCHED_CHAINS}
    for name in SEARCHED_ATTENTIONS:
        for causal in (False, True):
            problems[f"{name}{'_causal' * causal}"] = attention_problem(name, "fp32", causal=causal)
    for name in section.shapes:
        if name not in problems:
            raise ConfigError(f"bench.cpu.shapes: got {name!r}, {closest(name, tuple(problems))}")
    chosen = list(section.shapes or problems)[: section.num_shapes]
    return {name: problems[name] for name in chosen}
