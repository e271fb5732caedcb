"""What is on record of a comparison: a run's rows, and its figures per sentence, from which p-values are made."""

import dataclasses
import io
import lzma
from pathlib import Path

import numpy as np

from configs.schema import Config
from configs.typed import ConfigError
from scripts.testbed import rows
from scripts.testbed.data.files import text_of
from scripts.testbed.rows import Row
from scripts.testbed.tasks.scores import Figures, Metric, p_value


def suffix(config: Config) -> str:
    """What a run's metrics end in: equal time is told apart from equal updates."""
    return "" if config.comparison.budget == "updates" else "_equal_time"


def step_time_ratio(config: Config) -> float | None:
    """Time of this method's step over the plain one's, as bench experiment=bliss/overhead recorded it; None without."""
    path = rows.RESULTS / "bliss.csv"
    found = rows.read_rows(path) if path.exists() else []
    own = [row for row in found if row.experiment == "bliss/overhead" and row.provider == config.comparison.method]
    return next((row.value for row in own if row.metric == "step_time_ratio"), None)


def budgeted(config: Config) -> Config:
    """The configuration with as many updates as fit in the plain method's time, where that is the budget.

    Raises:
        ConfigError: The cost of the method's step is not on record.
    """
    if config.comparison.budget == "updates":
        return config
    ratio = step_time_ratio(config)
    if ratio is None:
        raise ConfigError(
            f"comparison.budget: got time, but no step time of {config.comparison.method} is on record; measure it "
            "with: python -m scripts.bench experiment=bliss/overhead record=true"
        )
    steps = max(1, round(config.trainer.max_steps / max(ratio, 1.0)))
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, max_steps=steps))


def recorded(config: Config) -> list[Row]:
    """The rows on record of this method, seed and budget; none where the run has another number of updates.

    A run is known by its updates: change the experiment's name where another setting changes what it measures.
    """
    path = rows.RESULTS / f"{config.name.split('/')[0]}.csv"
    found = rows.read_rows(path) if path.exists() else []
    who = (config.name, config.comparison.method, config.seed)
    own = [row for row in found if (row.experiment, row.provider, row.seed) == who]
    updates = [row.value for row in own if row.metric == f"updates{suffix(config)}"]
    if updates != [float(config.trainer.max_steps)]:
        return []
    equal_time = config.comparison.budget == "time"
    return [
        Row(provider=row.provider, metric=row.metric, unit=row.unit, value=row.value)
        for row in own
        if row.metric.endswith("_equal_time") == equal_time
    ]


def file_of(config: Config, method: str) -> Path:
    """Where the figures per sentence of a method's run with this seed are kept; the baseline's serve both budgets."""
    folder = rows.RESULTS / "sentences" if config.record else Path("outputs") / "comparison" / "sentences"
    budget = "" if method == config.comparison.baseline else suffix(config)
    return folder / f"{config.name.replace('/', '_')}-{method}-{config.seed}{budget}.csv.xz"


def compare(config: Config, metric: Metric, figures: Figures) -> float | None:
    """Keep a run's figures, and say how likely chance explains its difference from the baseline.

    Args:
        config: The run's configuration.
        metric: What the figures are of.
        figures: (sentences, figures) of the test split.

    Returns:
        The p-value; None for the baseline itself, or where its run with this seed and budget is not on record.
    """
    if not config.smoke:
        _write(file_of(config, config.comparison.method), figures)
    baseline = file_of(config, config.comparison.baseline)
    if config.comparison.method == config.comparison.baseline or not baseline.exists():
        return None
    other = np.loadtxt(io.StringIO(text_of(baseline)), delimiter=",", ndmin=2)
    return p_value(metric, figures, other, samples=config.comparison.bootstrap_samples, seed=config.seed)


def _write(path: Path, figures: Figures) -> None:
    stream = io.StringIO()
    np.savetxt(stream, figures, delimiter=",", fmt="%.6g")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(lzma.compress(stream.getvalue().encode()))
    temporary.replace(path)
