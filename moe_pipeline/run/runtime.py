"""Runtime: what a layer runs on beside its experts."""

from dataclasses import dataclass

from moe_pipeline.run.adaptive import Adaptive
from moe_pipeline.run.buffers import Workspace
from moe_pipeline.run.ranks import ExpertRanks
from moe_pipeline.run.recorder import Recorder


@dataclass(frozen=True, kw_only=True, eq=False)
class Runtime:
    """What calls of a layer share.

    Source: not in the paper.
    """

    name: str
    """The layer's name, for errors and timelines; the same on every rank."""
    ranks: ExpertRanks | None
    """Who shares the experts; None keeps all of them here."""
    workspace: Workspace
    """Shared memory."""
    average: bool = False
    """Whether the experts' gradients are averaged over ranks, as those of the rest of a model are."""
    recorder: Recorder | None = None
    """Notes when operations run; None costs nothing."""
    adaptive: Adaptive | None = None
    """Chooses for every call what the layer's settings leave open."""
