"""What `--help` says: the experiments of a verb, the groups and their choices, and the words every run understands."""

from pathlib import Path

import yaml

import configs
from configs.typed import closest

CONFIGS = Path(configs.__file__).parent

TEXT = """python -m scripts.{verb} experiment=<package>/<name> [group=choice ...] [key=value ...]

experiments
{experiments}

groups
{groups}

every run understands
  resume=auto     continue the newest unfinished run of this name (train)
  debug=smoke     shrink the run to seconds
  record=true     put its rows into scripts/results, from which the README's tables are made
  --cfg job       print the whole configuration and stop
  -m key=1,2,3    run a sweep
"""


def experiments(verb: str) -> list[str]:
    """Names of the experiments that are written for a verb."""
    folder = CONFIGS / "experiment"
    contents = {path: yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.rglob("*.yaml")}
    return sorted(content["name"] for content in contents.values() if content["experiment_verb"] == verb)


def groups() -> dict[str, list[str]]:
    """Config groups and their choices."""
    folders = sorted(
        path for path in CONFIGS.iterdir() if path.is_dir() and path.name not in ("experiment", "__pycache__")
    )
    return {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}


def text(verb: str) -> str:
    """The help of a verb."""
    return TEXT.format(
        verb=verb,
        experiments="\n".join(f"  {name}" for name in experiments(verb)),
        groups="\n".join(f"  {group:14}{', '.join(choices)}" for group, choices in groups().items()),
    )


def missing_experiment(verb: str, given: str | None) -> str:
    """What to answer where no experiment, or an unknown one, was named."""
    came = "missing; " if given is None else f"got {given!r}, "
    return f"experiment: {came}{closest(given or '', experiments(verb))}"
