"""Every choice of BLISS, and every choice of a rival, in one frozen record each."""

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

Mode = Literal["clean", "perturbed", "both", "corrected"]
RivalKind = Literal["word_dropout", "rep_uni", "rep_sim", "switchout", "token_cutoff", "r_drop", "simcut", "vat"]
AUGMENTATIONS: tuple[RivalKind, ...] = ("word_dropout", "rep_uni", "rep_sim", "switchout")


@dataclass(frozen=True, kw_only=True)
class BlissConfig:
    """The objective L = L_seq + weight * (L_tok + L_pos) and the noise it is trained on.

    Source: our definition (the paper's text gives no formula); the two supervisions are those of BLISS
    (arXiv:2204.07837), abstract.
    """

    mode: Mode = "clean"
    """Encoder states that the decoder reads: of x, of perturbed x, one loss on each (halves), or corrected ones."""

    weight: float = 0.1
    """lambda, the weight of L_tok + L_pos; 0 switches the self-supervised task off."""

    shuffle_range: int = 3
    """K in words: every word moves by fewer than K places; 0 and 1 leave the order alone."""

    replace_ratio: float = 0.1
    """gamma, the probability that a word is replaced."""

    replace_by: Literal["uniform", "similar"] = "uniform"
    """Replacements drawn uniformly, or in favour of tokens with a similar embedding."""

    ramp_steps: int | None = None
    """v in optimizer steps: the replacement probability grows from about 0 to gamma; None keeps it at gamma."""

    target: Literal["two_heads", "restore_in_place"] = "two_heads"
    """What a slot predicts: its own token and how far it moved, or the token that belongs in the slot."""

    token_slots: Literal["replaced", "all"] = "replaced"  # noqa: S105 -- not a password
    """Slots that L_tok counts; for restore_in_place, "replaced" counts moved slots too."""

    temperature: float = 1.0
    """tau in slots: how far the soft position target spreads; 0 makes it one-hot."""

    max_displacement: int = 10
    """K' in slots: displacements are clipped to [-K', K']."""

    corrector_layers: Literal[0, 1, 2] = 1
    """Transformer layers between the encoder and the corrector's heads."""

    label_smoothing: float = 0.1
    """Probability mass that L_seq spreads over the vocabulary."""

    def __post_init__(self) -> None:
        _check_choices(self, BlissConfig)
        _check_number(self, "weight", 0.0, math.inf)
        _check_number(self, "temperature", 0.0, math.inf)
        _check_number(self, "replace_ratio", 0.0, 1.0)
        _check_number(self, "label_smoothing", 0.0, 1.0)
        _check_int(self, "shuffle_range", 0, 1023)
        _check_int(self, "max_displacement", 1, 1023)
        if self.ramp_steps is not None:
            _check_int(self, "ramp_steps", 1, 1 << 31)


@dataclass(frozen=True, kw_only=True)
class RivalConfig:
    """A method that BLISS is compared with, or combined with: its loss takes the place of L_seq.

    Source: not in the paper, whose five rivals are unknown; each kind's own paper is named in `bliss/rivals.py`.
    """

    kind: RivalKind
    """Which method."""

    rate: float = 0.05
    """Probability that a token of either side is cut or replaced; r_drop, vat and switchout do not read it."""

    weight: float = 1.0
    """alpha, the weight of the divergence between two passes; augmentations have none and do not read it."""

    ramp_steps: int | None = None
    """v in optimizer steps, of rep_uni and rep_sim: `rate` is reached over about that many; None keeps it."""

    temperature: float = 1.0
    """Of switchout: n tokens of a sentence are replaced with probability in proportion to exp(-n / temperature)."""

    radius: float = 0.1
    """Of vat: length of the adversarial noise on a sentence over the length of its embeddings."""

    def __post_init__(self) -> None:
        _check_choices(self, RivalConfig)
        _check_number(self, "rate", 0.0, 1.0)
        _check_number(self, "weight", 0.0, math.inf)
        _check_number(self, "temperature", 1e-3, math.inf)
        _check_number(self, "radius", 0.0, math.inf)
        if self.ramp_steps is not None:
            _check_int(self, "ramp_steps", 1, 1 << 31)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """BLISS's modes it can be combined with: noise on noise, or on corrected states, makes no sense."""
        return ("clean",) if self.kind in AUGMENTATIONS else ("clean", "perturbed", "both")


def _check_choices(config: object, cls: type) -> None:
    for name, kind in get_type_hints(cls).items():
        if get_origin(kind) is Literal:
            choices = get_args(kind)
            _check(config, name, getattr(config, name) in choices, f"one of {choices}")


def _check(config: object, name: str, accepted: bool, expected: str) -> None:
    if not accepted:
        raise ValueError(
            f"{type(config).__name__}.{name} is {getattr(config, name)!r}; it must be {expected}: set {name} to such a "
            f"value"
        )


def _check_number(config: object, name: str, least: float, most: float) -> None:
    value = getattr(config, name)
    accepted = isinstance(value, (int, float)) and math.isfinite(value) and least <= value <= most
    _check(config, name, accepted, f"a finite number from {least:g} to {most:g}")


def _check_int(config: object, name: str, least: int, most: int) -> None:
    value = getattr(config, name)
    _check(config, name, isinstance(value, int) and least <= value <= most, f"an int from {least} to {most}")
