"""The mean of the weights of a run's newest checkpoints."""

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from scripts.testbed import checkpoints

WEIGHTS = "model.safetensors"


def newest_weights(folder: Path, count: int) -> dict[str, Tensor]:
    """Average the newest whole checkpoints.

    Args:
        folder: Holds `checkpoint-<step>` folders.
        count: Checkpoints to average; fewer where there are fewer.

    Returns:
        Weights by name, in their own types.

    Raises:
        FileNotFoundError: There is no whole checkpoint.
    """
    found = [path for path in folder.iterdir() if checkpoints.NAME.fullmatch(path.name)]
    whole = [path for path in found if checkpoints.damage(path) is None]
    newest = sorted(whole, key=lambda path: -int(path.name.rpartition("-")[2]))[:count]
    if not newest:
        raise FileNotFoundError(f"{folder}: no whole checkpoint")
    states = [safetensors.torch.load_file(path / WEIGHTS) for path in newest]
    return {name: mean([state[name] for state in states]) for name in states[0]}


def mean(tensors: list[Tensor]) -> Tensor:
    """The mean, computed in float64 and rounded once; tensors of integers must agree and stay."""
    if not tensors[0].is_floating_point():
        return tensors[0]
    return torch.stack([tensor.double() for tensor in tensors]).mean(0).to(tensors[0].dtype)
