"""OMoEConfig: every choice of the method, checked."""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

Space = Literal["update", "input"]
Combine = Literal["mean", "load", "product", "union"]
Source = Literal["inputs", "weights", "gradients"]
Side = Literal["input", "output"]
Linears = Literal["both", "up", "down"]
Projects = Literal["step", "gradient"]
Control = Literal["none", "length", "random", "own"]

INPUT_ONLY = (
    "alpha", "alpha_decay", "alpha_steps", "source", "side", "combine", "refresh_in_orthogonal", "rank", "forgetting",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OMoEConfig:
    """How experts are kept apart.

    Raises:
        ValueError: A field is out of its range, or set where `space` gives it no meaning.

    Source: OMoE (arXiv:2310.09762) for the two phases and the averaged projectors; every default is our definition.
    """

    space: Space = "update"
    """What the others' subspace is spanned by: their accumulated changes W - W_0, or their mean inputs."""
    period: int = 1
    """Steps in a cycle: period - 1 accumulating ones, then an orthogonal one; 1 makes every step orthogonal."""
    first_orthogonal_step: int = 0
    """Steps, counted from 0, before which every step is accumulating."""
    projects: Projects = "step"
    """What is projected: the base optimizer's finished step, or the gradient before it, which an optimizer that divides
    element by element partly undoes."""
    linears: Linears = "both"
    """Which of an expert's linears are projected: those into the hidden width (up), those out of it (down), or both."""
    alpha: float = 100.0
    """OWM's constant, in squared units of a mean input; small forgets slowly and freezes. Only for space=input."""
    alpha_decay: float = 1.0
    """What alpha is multiplied by on its way to the last step: alpha * alpha_decay ** progress, so that later inputs
    count more. Only for space=input."""
    alpha_steps: int | None = None
    """Steps over which that progress goes from 0 to 1, where it stays; needed where alpha_decay is not 1."""
    source: Source = "inputs"
    """Whose mean an expert's projector takes in: the inputs of its tokens, the rows of its weight as the step leaves
    it, or those of its gradient as the step finds it, where a gradient of zero counts as no tokens. For the last two
    read "mean row" for "mean input" here and elsewhere. Not in the paper. Only for space=input."""
    side: Side = "input"
    """Whether a step loses directions of the others' mean inputs (U Q), or of their linears' mean outputs, biases
    included (Q U), for linears whose outputs leave a module; of weights and gradients, the mean column. Only for
    space=input."""
    combine: Combine = "mean"
    """Others' projector: their mean, their mean weighted by tokens so far (source=inputs alone counts any), their
    product in the order of the experts, or that of their union. Only for space=input."""
    rank: int | None = None
    """Columns that are kept of every projector, which bounds its memory; None keeps it exact. Only for space=input."""
    refresh_in_orthogonal: bool = True
    """Whether orthogonal steps refresh the projectors too. Only for space=input."""
    forgetting: float = 1.0
    """Share b of what a projector takes out that a refresh leaves before it adds more: P <- b P + (1 - b) I. Only for
    space=input without a rank."""
    control: Control = "none"
    """What an experiment's control does instead of an orthogonal step; see omoe/control.py."""

    def __post_init__(self) -> None:
        """Check every field."""
        for name, choices in (
            ("space", Space),
            ("source", Source),
            ("side", Side),
            ("combine", Combine),
            ("linears", Linears),
            ("projects", Projects),
            ("control", Control),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name}={getattr(self, name)!r}: accepted are {', '.join(get_args(choices))}")
        for name, least in (("period", 1), ("first_orthogonal_step", 0), ("rank", 1), ("alpha_steps", 1)):
            value = getattr(self, name)
            if name in ("rank", "alpha_steps") and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: give an integer of at least {least}")
        self._check_alpha()
        if isinstance(self.forgetting, bool) or not 0 < self.forgetting <= 1:
            raise ValueError(
                f"forgetting={self.forgetting!r}: give a number above 0 and at most 1, which forgets nothing"
            )
        if self.forgetting < 1 and self.rank is not None:
            raise ValueError(f"forgetting={self.forgetting!r} with rank={self.rank}: set rank=None, or forgetting=1.0")
        if self.combine == "load" and self.source != "inputs":
            raise ValueError(
                f"combine='load' with source={self.source!r}, which counts no tokens: accepted are mean, product and "
                "union, or source='inputs'"
            )
        if not isinstance(self.refresh_in_orthogonal, bool):
            raise ValueError(f"refresh_in_orthogonal={self.refresh_in_orthogonal!r}: give True or False")
        if self.space == "update":
            self._refuse_input_only()
        elif not self.refresh_in_orthogonal and self.period == 1 and self.first_orthogonal_step == 0:
            raise ValueError(
                "refresh_in_orthogonal=False with period=1 and first_orthogonal_step=0 never refreshes a projector, so "
                "nothing would ever be projected: raise period or first_orthogonal_step, or refresh in orthogonal steps"
            )

    def alpha_at(self, step: int) -> float:
        """OWM's constant at a step, counted from 0: alpha * alpha_decay ** progress.

        Source: official code of OWM (arXiv:1810.01256), whose layers decay from 1 to 1e-5, 1e-4, 1e-2 and 1e-1; that
            alpha is the start and one decay holds for all linears is our definition, section 4.1.
        """
        if self.alpha_steps is None:
            return self.alpha
        return self.alpha * self.alpha_decay ** min(1.0, step / self.alpha_steps)

    def _check_alpha(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float):
            raise ValueError(f"alpha={self.alpha!r}: give a number above 0, such as 100.0")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha={self.alpha!r}: give a finite number above 0, such as 100.0")
        decay = self.alpha_decay
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 < decay <= 1:
            raise ValueError(f"alpha_decay={decay!r}: give a number above 0 and at most 1, which keeps alpha as it is")
        if decay < 1 and self.alpha_steps is None:
            raise ValueError(f"alpha_decay={decay!r} without alpha_steps: give the steps of the whole training")
        if decay == 1 and self.alpha_steps is not None:
            raise ValueError(f"alpha_steps={self.alpha_steps!r} with alpha_decay=1.0 means nothing: drop it, or decay")

    def _refuse_input_only(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name in INPUT_ONLY:
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} means nothing for space='update'; drop it, or set space='input'"
                )
