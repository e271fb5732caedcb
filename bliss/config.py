"""Every choice of BLISS, in one frozen record."""

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

Mode = Literal["clean", "perturbed", "both", "corrected"]


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
        for name, kind in get_type_hints(BlissConfig).items():
            if get_origin(kind) is Literal:
                choices = get_args(kind)
                _check(name, getattr(self, name), getattr(self, name) in choices, f"one of {choices}")
        _check_number("weight", self.weight, 0.0, math.inf)
        _check_number("temperature", self.temperature, 0.0, math.inf)
        _check_number("replace_ratio", self.replace_ratio, 0.0, 1.0)
        _check_number("label_smoothing", self.label_smoothing, 0.0, 1.0)
        _check_int("shuffle_range", self.shuffle_range, 0, 1023)
        _check_int("max_displacement", self.max_displacement, 1, 1023)
        if self.ramp_steps is not None:
            _check_int("ramp_steps", self.ramp_steps, 1, 1 << 31)


def _check(name: str, value: object, accepted: bool, expected: str) -> None:
    if not accepted:
        raise ValueError(f"BlissConfig.{name} is {value!r}; it must be {expected}: set {name} to such a value")


def _check_number(name: str, value: object, least: float, most: float) -> None:
    accepted = isinstance(value, (int, float)) and math.isfinite(value) and least <= value <= most
    _check(name, value, accepted, f"a finite number from {least:g} to {most:g}")


def _check_int(name: str, value: object, least: int, most: int) -> None:
    _check(name, value, isinstance(value, int) and least <= value <= most, f"an int from {least} to {most}")
