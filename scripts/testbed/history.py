"""What a training run logged, as curves, rows and headline figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from scripts.testbed import plots
from scripts.testbed.report import Section
from scripts.testbed.rows import Row

Points = tuple[tuple[float, ...], tuple[float, ...]]
WARM_UP_SHARE = 0.1  # speed is read after this share of the log lines: the first steps build kernels


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Logged quantities by name, each as steps and values, and the run's totals."""

    points: Mapping[str, Points]
    seconds: float
    """Training, validation and checkpoints, since the run first began."""
    tokens_per_s: float
    """Tokens of the target, or of a text to classify; median over log intervals without validation or checkpoint."""


def read(log: Sequence[Mapping[str, float]]) -> Curves:
    """Sort the Trainer's log by quantity."""
    points: dict[str, tuple[list[float], list[float]]] = {}
    for entry in log:
        for name, value in entry.items():
            if name not in ("step", "epoch"):
                steps, values = points.setdefault(name, ([], []))
                steps.append(entry["step"])
                values.append(value)
    curves = {name: (tuple(steps), tuple(values)) for name, (steps, values) in points.items()}
    timed = [entry for entry in log if "seconds" in entry]
    speeds = sorted(_speeds(timed, validated={entry["step"] for entry in log if "eval_loss" in entry}))
    return Curves(
        points=curves,
        seconds=timed[-1]["seconds"] if timed else 0.0,
        tokens_per_s=speeds[len(speeds) // 2] if speeds else 0.0,
    )


def rows(curves: Curves, provider: str) -> tuple[Row, ...]:
    """Seconds, speed and the last losses."""
    found = [
        Row(provider=provider, metric="train_seconds", unit="s", value=curves.seconds),
        Row(provider=provider, metric="tokens_per_s", unit="tokens/s", value=curves.tokens_per_s),
    ]
    for name, metric in (("loss", "final_loss"), ("eval_loss", "best_valid_loss")):
        if name in curves.points:
            values = curves.points[name][1]
            value = values[-1] if name == "loss" else min(values)
            found.append(Row(provider=provider, metric=metric, unit="nats", value=value))
    return tuple(found)


def summary(curves: Curves) -> dict[str, float]:
    """Headline figures of a run under stable names."""
    figures = {"train_seconds": curves.seconds, "tokens_per_s": curves.tokens_per_s}
    for name, metric in (("loss", "final_loss"), ("eval_loss", "final_valid_loss")):
        if name in curves.points:
            figures[metric] = curves.points[name][1][-1]
    return figures


def sections(curves: Curves) -> tuple[Section, ...]:
    """Loss, learning rate, the objective's terms and what OMoE does as pictures."""
    points = curves.points
    losses = {
        label: points[name] for label, name in (("training", "loss"), ("validation", "eval_loss")) if name in points
    }
    terms = {name.removeprefix("loss_"): points[name] for name in sorted(points) if name.startswith("loss_")}
    accuracies = {
        name.removeprefix("accuracy_"): points[name] for name in sorted(points) if name.startswith("accuracy_")
    }
    orthogonality = {
        name.removeprefix("omoe_").replace("_", " "): points[name]
        for name in sorted(points)
        if name.startswith("omoe_")
    }
    step = {"x_label": "step"}
    pictures = [plots.curves(losses, title="Loss", y_label="nats", **step)] if losses else []
    if "learning_rate" in points:
        rate = {"learning rate": points["learning_rate"]}
        pictures.append(plots.curves(rate, title="Learning rate", y_label="learning rate", **step))
    if terms:
        pictures.append(plots.curves(terms, title="Terms of the loss", y_label="nats", **step))
    if accuracies:
        pictures.append(plots.curves(accuracies, title="Self-supervised accuracy", y_label="share right", **step))
    if orthogonality:
        title = "Experts' steps in the others' subspace"
        pictures.append(plots.curves(orthogonality, title=title, y_label="share or cosine", **step))
    note = f"{curves.seconds:.0f} s, {curves.tokens_per_s:,.0f} tokens/s while training."
    return (Section(title="Training", note=note, plots=tuple(pictures)),)


def _speeds(timed: Sequence[Mapping[str, float]], *, validated: set[float]) -> list[float]:
    speeds = []
    for before, after in pairwise(timed):
        seconds = after["seconds"] - before["seconds"]
        if seconds > 0 and before["step"] not in validated:
            speeds.append((after["num_tokens"] - before["num_tokens"]) / seconds)
    return speeds[int(len(speeds) * WARM_UP_SHARE) :]
