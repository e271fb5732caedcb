"""The root of every run's configuration: the only meeting point of Hydra and code."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from configs.comparison import ComparisonSection, RivalSection
from configs.sections import (
    BenchConfig,
    BlissSection,
    ClusterConfig,
    DataConfig,
    FusionSection,
    ModelConfig,
    MoESection,
    OMoESection,
    TrainerConfig,
    TuneConfig,
    known_baselines,
)
from configs.study import StudySection
from configs.typed import build

VerbName = Literal["train", "bench", "tune"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run depends on."""

    name: str
    """Experiment name, `<package>/<file>`."""
    verb: VerbName
    """The verb being run."""
    experiment_verb: VerbName
    """The verb the experiment was written for."""
    seed: int
    """Seed of weights, data order, dropout and perturbation."""
    resume: str
    """`auto` continues the newest unfinished run of this name, `off` starts afresh, else the folder of a run."""
    record: bool
    """Whether the rows go to scripts/results, from which the README's tables are made."""
    smoke: bool
    """Whether this run was shrunk by debug=smoke: its figures mean nothing."""
    baselines: tuple[str, ...]
    """What the experiment is compared with in the same run: copy, memory, lead (the first sentence), tfidf, dense,
    one_process (on all ranks' batches), one_process_reordered."""
    paper: dict[str, float]
    """The paper's own figures, `<provider>/<metric>` -> value; they stand beside ours in the README's tables."""
    model: ModelConfig
    data: DataConfig
    moe: MoESection
    fusion: FusionSection
    omoe: OMoESection
    bliss: BlissSection
    trainer: TrainerConfig
    study: StudySection
    cluster: ClusterConfig
    bench: BenchConfig
    tune: TuneConfig
    comparison: ComparisonSection = ComparisonSection()
    rival: RivalSection = RivalSection()

    def __post_init__(self) -> None:
        if self.verb != self.experiment_verb:
            raise ValueError(
                f"experiment: got {self.name}, which is written for another verb; "
                f"run it with: python -m scripts.{self.experiment_verb} experiment={self.name}"
            )
        known_baselines(self.baselines)
        if self.record and self.smoke:
            raise ValueError(
                "record: got true with debug=smoke; accepts false, for a shrunk run's figures mean nothing"
            )
        if self.trainer.deepspeed != "off" and self.cluster.num_ranks < 2:
            raise ValueError(
                f"trainer.deepspeed: got {self.trainer.deepspeed} with cluster.num_ranks={self.cluster.num_ranks}; "
                "accepts off, or cluster.num_ranks=2 or more started by torchrun"
            )
        if self.trainer.deepspeed != "off" and self.omoe.enabled:
            raise ValueError(
                f"omoe.enabled: got true with trainer.deepspeed={self.trainer.deepspeed}; accepts false (omoe=off), "
                "for ZeRO steps a flat buffer in which experts cannot be told apart, or trainer.deepspeed=off"
            )
        self._check_expert_ranks()
        if self.rival.enabled and self.bliss.enabled and self.bliss.mode not in self.rival.modes:
            raise ValueError(
                f"rival.kind: got {self.rival.kind} with bliss.mode={self.bliss.mode}; it goes with the modes "
                f"{', '.join(self.rival.modes)}"
            )
        if (self.rival.enabled or self.comparison.enabled) and self.model.kind == "bert":
            raise ValueError("model.kind: got bert; accepts marian, pegasus or bart, which generate text")
        if self.bliss.enabled and self.model.kind == "bert":
            raise ValueError("bliss.enabled: got true with model.kind=bert; accepts marian or bart, or bliss=off")

    def _check_expert_ranks(self) -> None:
        spread = self.moe.expert_ranks
        if spread == 1:
            return
        if not self.moe.enabled:
            raise ValueError(f"moe.expert_ranks: got {spread} with moe.enabled=false; accepts 1, or moe=on")
        if self.cluster.num_ranks % spread:
            raise ValueError(
                f"moe.expert_ranks: got {spread}, accepts a divisor of cluster.num_ranks={self.cluster.num_ranks}"
            )


def register_defaults() -> None:
    """Let Hydra know every field: base.yaml starts from the dataclasses' defaults, and YAML holds only differences."""
    ConfigStore.instance().store(name="schema", node=_defaults(Config))


def _defaults(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = _defaults(hints[field.name])
        elif isinstance(default, tuple):
            values[field.name] = list(default)
        else:
            values[field.name] = "???" if default is dataclasses.MISSING else default
    return values


def load(composed: DictConfig) -> Config:
    """Type a composed configuration.

    Args:
        composed: What Hydra composed.

    Returns:
        The frozen root dataclass; nothing behind it sees a Hydra object.

    Raises:
        ConfigError: Names the key, what it got and what it accepts.
    """
    return build(Config, OmegaConf.to_container(composed, resolve=True, throw_on_missing=True))
