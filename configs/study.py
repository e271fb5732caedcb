"""The section of studies: tasks x methods x paired seeds, on networks whose lower layers are frozen."""

from dataclasses import dataclass, field
from typing import Literal

from configs.typed import at_least


@dataclass(frozen=True, kw_only=True)
class StudySection:
    """Many short fine-tunings that differ in one thing at a time."""

    tasks: tuple[str, ...] = ()
    """Names of data sets, or of suites (glue, super_glue) for all of theirs; data.root is then the folder that holds a
    folder of each, null takes them from the hub."""
    smoke_task: str = "vader_movie"
    """What debug=smoke reads instead of the tasks, where data.root is null: it ships with the repository."""
    methods: tuple[str, ...] = ("adamw",)
    """Methods and their settings, as in `adamw`, `expert_lr:factor=0.3` or `omoe:space=input,alpha=1.0`; the first is
    what the others are compared with."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    """Each decides the head, the router, the order of the data and dropout, for every method alike."""
    split: Literal["valid", "test"] = "test"
    """Which rows are scored: settings are chosen on valid, and reported on test."""
    frozen_layers: int = 4
    """Lower encoder layers that are not trained; their outputs, without dropout, are computed once."""
    features_gb: float = 4.0
    """Most memory for those outputs of one split, in GB; where they need more, they are computed batch by batch, in
    every run again."""
    steps: dict[str, int] = field(default_factory=dict)
    """Optimizer steps by task, where they are not trainer.max_steps."""
    learning_rates: dict[str, float] = field(default_factory=dict)
    """Learning rate by task, where it is not trainer.learning_rate."""
    folder: str | None = None
    """Where finished runs are kept and found again; null takes outputs/studies/<name>. With record=true they also go to
    scripts/results/studies, where they are found too."""
    only_finished: bool = False
    """Whether to train nothing, and to report the runs that are there."""
    held_out_tokens: int = 512
    """Tokens of valid that are sent to every expert to measure how different they are."""

    def __post_init__(self) -> None:
        at_least(self, 0, "frozen_layers", "features_gb")
        at_least(self, 2, "held_out_tokens")
        for name, values in (("methods", self.methods), ("seeds", self.seeds)):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name}: got {list(values)}, accepts a list of at least one, each once")
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks: got {list(self.tasks)}, accepts each once")
        for name, least in (("steps", 1), ("learning_rates", 0)):
            given: dict[str, float] = getattr(self, name)
            if given and min(given.values()) < least:
                raise ValueError(f"{name}: got {given}, accepts numbers of at least {least}")
