"""From the command line to a typed config and a run folder, and from a result to rows, a report and the last line."""

import datetime
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import hydra
import torch.distributed as dist
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError

from configs.schema import Config, VerbName, load, register_defaults
from configs.typed import ConfigError, accepted_keys, closest
from scripts.testbed import report, rows, usage
from scripts.testbed.data import DataError
from scripts.testbed.files import write_text
from scripts.testbed.memory_pool import keep_freed_memory
from scripts.testbed.rows import Kind, Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run writes and what it is compared by."""

    folder: Path
    """The run's folder; everything it leaves lies here."""
    rank: int
    """This process among the run's ranks; rank 0 writes."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a verb's function hands back to be written, shown and printed."""

    rows: tuple[Row, ...]
    summary: dict[str, float | int | str | None]
    kind: Kind = "measured"
    data_sha256: str = ""
    sections: tuple[report.Section, ...] = ()
    on_record: bool = False
    """Whether the rows are those that scripts/results holds already."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """What figures depend on beside the packages that every row names."""


Verb = Callable[[Config, Run], Outcome]


def main(verb: str, function: Verb) -> None:
    """Run a verb from the command line; an unusable configuration ends with one clear message."""
    _start_ranks()
    register_defaults()
    OmegaConf.register_new_resolver("run_folder", _agreed_run_folder, replace=True, use_cache=True)
    overrides = sys.argv[1:]
    if not {"--help", "-h"}.isdisjoint(overrides):
        print(usage.text(verb))
        return
    try:
        _need_experiment(verb, overrides)
        if not any(argument.startswith("-") for argument in overrides):
            load(compose(verb, overrides))
        hydra.main(version_base=None, config_path="pkg://configs", config_name=verb)(
            functools.partial(_job, function)
        )()
    except (ConfigError, ConfigCompositionException, OmegaConfBaseException) as error:
        sys.exit(f"error: {explain(error)}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _need_experiment(verb: str, overrides: Sequence[str]) -> None:
    named = [argument.removeprefix("experiment=") for argument in overrides if argument.startswith("experiment=")]
    known = [name for other in get_args(VerbName) for name in usage.experiments(other)]
    unknown = [name for names in named for name in names.split(",") if name not in known]
    if not named or unknown:
        raise ConfigError(usage.missing_experiment(verb, unknown[0] if unknown else None))


def compose(verb: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration of a verb with command-line overrides, without running anything."""
    register_defaults()
    with hydra.initialize_config_module("configs", version_base=None):
        return hydra.compose(verb, overrides=list(overrides))


def explain(error: Exception) -> str:
    """One message for a configuration error: the key, what it got and what is accepted."""
    cause: BaseException | None = error
    while cause is not None:
        match = re.search(r"full_key: ([\w.]+)", str(cause))
        if match and "not in struct" in str(cause):
            *path, name = match.group(1).split(".")
            accepted = accepted_keys(Config, path)
            if accepted is not None:
                return (
                    f"{match.group(1)}: unknown key; {'.'.join(path) or 'the configuration'} {closest(name, accepted)}"
                )
        cause = cause.__cause__
    return str(error)


def execute(config: Config, function: Verb, run: Run) -> rows.Result:
    """Run a verb's function and write what it found: config, rows, report.

    Returns:
        The result, whose JSON is the last line a verb prints.
    """
    outcome = function(config, run)
    result = rows.Result(
        experiment=config.name,
        kind=outcome.kind,
        rows=outcome.rows,
        summary={**outcome.summary, "report": str(run.folder / "report.html")},
        seed=config.seed,
        data_sha256=outcome.data_sha256,
        commit=rows.commit(),
        device=rows.device(config.cluster.device),
        versions={**rows.versions(), **outcome.versions},
        date=datetime.date.today().isoformat(),
    )
    if run.rank == 0:
        write_text(run.folder / "report.html", report.render(config, result, outcome.sections))
        if config.record and not outcome.on_record:
            recorded = rows.record(result, one_run=config.comparison.enabled)
            logger.info("rows recorded in %s", recorded.relative_to(rows.REPOSITORY))
        rows.write_rows(run.folder / "rows.csv", rows.recorded(result))
    return result


def _job(function: Verb, composed: DictConfig) -> None:
    try:
        _write_and_print(function, composed)
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
    except (OSError, SafetensorError) as error:
        if "No space left on device" not in str(error):
            raise
        sys.exit(f"error: {error}; free some space and go on from the last checkpoint with resume=auto")


def _write_and_print(function: Verb, composed: DictConfig) -> None:
    config = load(composed)
    _refuse_another_world(config)
    run = Run(folder=Path(HydraConfig.get().runtime.output_dir), rank=int(os.environ.get("RANK", "0")))
    run.folder.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    set_up_logging(run)
    text = OmegaConf.to_yaml(composed, resolve=True)
    if run.rank == 0:
        _refuse_another_config(run.folder / "config.yaml", composed)
        write_text(run.folder / "config.yaml", text)
    result = execute(config, function, run)
    if run.rank == 0:
        for name, value in result.summary.items():
            logger.info("%-24s %s", name, report.figure(value))
        sys.stderr.flush()
        print(result.json_line(), flush=True)


def set_up_logging(run: Run) -> None:
    """Send the log to the run's folder and to standard error; ranks but the first speak up only to warn."""
    prefix = "" if run.rank == 0 else f"rank {run.rank}: "
    formatter = logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if run.rank == 0:
        handlers.append(logging.FileHandler(run.folder / "run.log", encoding="utf-8"))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    transformers.logging.disable_progress_bar()
    logging.getLogger("scripts").setLevel(logging.INFO if run.rank == 0 else logging.WARNING)


def _start_ranks() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(timeout=datetime.timedelta(minutes=10))


def _agreed_run_folder(name: str, resume: str, verb: str) -> str:
    """The run's folder, chosen once by the first rank."""
    chosen: list[Any] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        chosen = [run_folder(Path("outputs"), name, resume, verb)]
    if dist.is_initialized():
        dist.broadcast_object_list(chosen, src=0)
    return str(chosen[0])


def run_folder(outputs: Path, name: str, resume: str, verb: str) -> Path:
    """Choose the folder a run writes to; a new one is made at once, so that no run started beside takes it too.

    Args:
        outputs: Folder of all runs.
        name: The experiment's name.
        resume: `off`, `auto` (the newest unfinished run of this name, if any) or the folder of a run.
        verb: The verb being run; only `train` has anything to resume.

    Returns:
        An existing folder to continue, or a new one under today's date.

    Raises:
        ConfigError: Where `resume` names a folder that does not exist.
    """
    flat = name.replace("/", "_")
    if resume not in ("off", "auto"):
        if not Path(resume).is_dir():
            raise ConfigError(f"resume: got {resume!r}, accepts off, auto, or the folder of an earlier run")
        return Path(resume)
    if resume == "auto" and verb == "train":
        earlier = sorted(outputs.glob(f"*/{flat}*/checkpoints"), key=lambda path: path.parent.stat().st_mtime_ns)
        own = [path.parent for path in earlier if re.fullmatch(rf"{re.escape(flat)}(-\d+)?", path.parent.name)]
        unfinished = [folder for folder in own if not (folder / "rows.csv").exists()]
        if unfinished:
            return unfinished[-1]
    today = outputs / datetime.date.today().isoformat()
    folder, count = today / flat, 2
    while not _made(folder):
        folder, count = today / f"{flat}-{count}", count + 1
    return folder


def _made(folder: Path) -> bool:
    """Make a folder; False where it is there already."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def _refuse_another_world(config: Config) -> None:
    world, wanted = int(os.environ.get("WORLD_SIZE", "1")), config.cluster.num_ranks
    if world != wanted:
        raise ConfigError(
            f"cluster.num_ranks: got {wanted}, but {world} rank(s) were started; start that many with: "
            f"torchrun --nproc-per-node {wanted} -m scripts.{config.verb} experiment={config.name} cluster=..."
        )


def _refuse_another_config(path: Path, composed: DictConfig) -> None:
    """A resumed run must be the run that was started: nothing that changes its figures may differ."""
    if not path.exists():
        return
    before, now = _flat(OmegaConf.load(path)), _flat(composed)
    free = {"resume", "record"}
    changed = [key for key in sorted(before.keys() | now.keys()) if key not in free and before.get(key) != now.get(key)]
    if changed:
        detail = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed)
        raise ConfigError(
            f"resume: {path.parent} holds a run with another configuration ({detail}); use resume=off for a new run"
        )


def _flat(node: object, prefix: str = "") -> dict[str, object]:
    value = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: part for name, inner in value.items() for key, part in _flat(inner, f"{prefix}.{name}".lstrip(".")).items()
    }
