"""The runs of an experiment, one after another: data set by data set, and on each, seed by seed, every method."""

import copy
import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from configs.schema import Config
from configs.typed import ConfigError
from scripts.testbed import launch, networks, rows, threads
from scripts.testbed.data import load
from scripts.testbed.data.hub_sets import SUITES
from scripts.testbed.precision import resolve
from scripts.testbed.study import features, methods, outcome
from scripts.testbed.study.examples import encode
from scripts.testbed.study.network import UpperNetwork
from scripts.testbed.study.record import Record, Records, digest
from scripts.testbed.study.training import Training
from scripts.testbed.tasks.build import tokenizer_of

logger = logging.getLogger(__name__)


def run(config: Config, run: launch.Run) -> launch.Outcome:
    """Run what is missing of a study, and report all of it.

    Args:
        config: The run's configuration; `study` says what is compared.
        run: Where to write.

    Raises:
        ConfigError: A method or a setting is unknown, or nothing is finished though only that is asked for.
    """
    torch.set_num_threads(threads.chosen(config))
    for text in config.study.methods:
        methods.parse(text)
    records = Records(_folder(config, run), rows.RESULTS / "studies" / f"{config.name.replace('/', '_')}.txt")
    found: dict[str, Record] = {}
    digests: list[str] = []
    smoke = config.smoke and config.data.root is None
    for task in (config.study.smoke_task,) if smoke else data_sets(config.study.tasks):
        on_task = Task(config, task, records)
        digests.append(on_task.data.sha256)
        found |= on_task.finish()
    if not found:
        raise ConfigError("study.only_finished: got true, but there is no finished run of this experiment")
    if config.record:
        records.commit(found)
    return outcome.outcome(
        config, list(found.values()), data_sha256=digests[0] if len(digests) == 1 else _joined(digests)
    )


def data_sets(tasks: Sequence[str]) -> tuple[str, ...]:
    """Names of data sets, each once, with those of a suite (`glue`, `super_glue`) in its place."""
    return tuple(dict.fromkeys(name for task in tasks for name in SUITES.get(task, (task,))))


@dataclass(frozen=True)
class _Planned:
    method: str
    seed: int
    name: str


class Task:
    """One data set of a study.

    Args:
        config: The run's configuration.
        name: The data set.
        records: Of the study's finished runs.
    """

    def __init__(self, config: Config, name: str, records: Records) -> None:
        self._config, self._name, self._records = config, name, records
        root = None if config.data.root is None else str(Path(config.data.root) / name)
        self.data = load(dataclasses.replace(config.data, name=name, root=root))
        study, trainer = config.study, config.trainer
        self._trainer = dataclasses.replace(
            trainer,
            max_steps=study.steps.get(name, trainer.max_steps),
            learning_rate=study.learning_rates.get(name, trainer.learning_rate),
        )
        settings = self._settings()
        self._planned = [
            _Planned(text, seed, digest(settings, task=name, method=text, seed=seed))
            for seed in study.seeds
            for text in study.methods
        ]

    def finish(self) -> dict[str, Record]:
        """Every run of this data set by its name, finished before or now."""
        found = {plan.name: self._records.get(plan.name) for plan in self._planned}
        missing = [plan for plan in self._planned if found[plan.name] is None]
        logger.info("%s: %d of %d runs are finished", self._name, len(found) - len(missing), len(found))
        if missing and not self._config.study.only_finished:
            training = self._prepared()
            for plan in missing:
                found[plan.name] = self._run(training, plan)
        return {name: known for name, known in found.items() if known is not None}

    def _run(self, training: Training, plan: _Planned) -> Record:
        method = methods.parse(plan.method)
        with torch.random.fork_rng():
            torch.manual_seed(plan.seed)
            finished = training.run(self._upper(), method, seed=plan.seed)
        done = Record(
            task=self._name,
            method=plan.method,
            seed=plan.seed,
            commit=rows.commit(),
            device=rows.device(self._config.cluster.device),
            finished=finished,
        )
        done = self._records.put(plan.name, done)
        shown = ", ".join(f"{metric} {value:.2f}" for metric, value in finished.scores.items())
        logger.info("%s, %s, seed %d: %s (%.0f s)", self._name, plan.method, plan.seed, shown, finished.seconds)
        return done

    def _prepared(self) -> Training:
        config, study = self._config, self._config.study
        self._tokenizer: PreTrainedTokenizerFast = tokenizer_of(config, self.data)
        self._encoder = networks.encoder(config.model, self._tokenizer, seed=config.seed)
        self._layers = list(self._encoder.encoder.layer)
        if not 0 <= study.frozen_layers < len(self._layers):
            raise ConfigError(
                f"study.frozen_layers: got {study.frozen_layers}, accepts 0 to {len(self._layers) - 1}, for the "
                f"encoder has {len(self._layers)} layers and at least one is trained"
            )
        self._encoder.encoder.layer = self._encoder.encoder.layer[: study.frozen_layers]
        bf16 = resolve(config.trainer.precision, config.cluster.device) == "bf16"
        logger.info("%s: computing the outputs of the frozen layers", self._name)
        splits = {
            split: features.compute(
                self._encoder,
                encode(self.data, getattr(self.data, split), self._tokenizer, max_length=config.model.max_length),
                pad_id=self._tokenizer.pad_token_id,
                bf16=bf16,
                max_bytes=study.features_gb * 1e9,
            )
            for split in ("train", "valid", "test")
            if split in ("train", "valid", study.split)
        }
        return Training(
            self.data,
            train=splits["train"],
            held_out=splits["valid"],
            scored=splits[study.split],
            moe=config.moe,
            trainer=self._trainer,
            bf16=bf16,
            num_tokens=study.held_out_tokens,
        )

    def _upper(self) -> UpperNetwork:
        """The layers that are trained as they were before any training, with a head of the seed in force."""
        encoder = self._encoder.config
        return UpperNetwork(
            copy.deepcopy(self._layers[self._config.study.frozen_layers :]),
            self.data.task,
            width=encoder.hidden_size,
            num_labels=len(self.data.label_names),
            dropout=encoder.hidden_dropout_prob,
        )

    def _settings(self) -> dict[str, Any]:
        """What a run's figures depend on, besides data set, method and seed."""
        config = self._config
        model = dataclasses.asdict(config.model)
        trainer = self._trainer
        named = ("max_steps", "batch_tokens", "learning_rate", "warmup_steps", "weight_decay", "adam_beta2")
        gate = config.moe.gate
        return {
            "trainer": {name: getattr(trainer, name) for name in (*named, "max_grad_norm", "precision")},
            "gate": [gate.kind, gate.num_experts, gate.top_k, gate.noise, gate.noise_std, gate.balance_weight],
            "data": self.data.sha256,
            "model": {"pretrained": model["pretrained"], "max_length": model["max_length"]}
            if config.model.pretrained
            else model,
            "noise": config.moe.expert_noise_std,
            "frozen_layers": config.study.frozen_layers,
            "split": config.study.split,
            "held_out_tokens": config.study.held_out_tokens,
        }


def _folder(config: Config, run: launch.Run) -> Path:
    if config.smoke:
        return run.folder / "runs"
    return Path(config.study.folder or f"outputs/studies/{config.name}")


def _joined(digests: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()
