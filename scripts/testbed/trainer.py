"""The library's Trainer with what the quartet adds: token batches, sealed checkpoints, named losses, OMoE, ranks."""

import logging
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

import omoe
from configs.schema import Config
from moe_pipeline import MoELayer
from moe_pipeline.parallel import clip_grad_norm, exclude_experts, gather_state, local_state
from omoe.experts import stacked_EOI
from omoe.start import start_EOI
from scripts.testbed import checkpoints
from scripts.testbed.batches import EpochRows, TokenBatches
from scripts.testbed.precision import resolve
from scripts.testbed.progress import Interruption, Progress
from scripts.testbed.quartet import QuartetModel
from scripts.testbed.tasks.task import IGNORED, Task

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
EVAL_BATCH = 64


class QuartetTrainer(Seq2SeqTrainer):
    """Trains a `QuartetModel` on a task.

    Args:
        config: The run's configuration.
        task: Splits, collation and tokenizer.
        model: What to train.
        folder: Where checkpoints and TensorBoard events go.
        orthogonal: Whether OMoE wraps the base optimizer.
    """

    def __init__(self, config: Config, task: Task, model: QuartetModel, *, folder: Path, orthogonal: bool) -> None:
        self._config = config
        self._orthogonal = orthogonal
        self._terms: defaultdict[str, float] = defaultdict(float)
        self._num_terms = 0
        self._num_tokens = 0
        self._started_s, self._started_cpu_s = time.monotonic(), time.process_time()
        self._interruption = Interruption()
        callbacks: list[TrainerCallback] = [_tensorboard(folder), Progress(), self._interruption]
        if config.trainer.early_stopping is not None:
            callbacks.append(EarlyStoppingCallback(config.trainer.early_stopping))
        super().__init__(
            model=model,
            args=arguments(config, folder, generates=task.generates),
            data_collator=task.collate,
            train_dataset=EpochRows(task.splits.train),
            eval_dataset=task.splits.valid,
            processing_class=task.tokenizer,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        if self.is_deepspeed_enabled:
            from scripts.testbed import deepspeed_experts  # loads slowly

            deepspeed_experts.skip_compilation()
            deepspeed_experts.mark_experts(model)
        else:
            exclude_experts(model)

    @property
    def interrupted(self) -> bool:
        """Whether a person stopped the run before its last step."""
        return self._interruption.asked

    def get_train_dataloader(self) -> DataLoader[Any]:
        """All batches of the run, in an order that the seed alone decides."""
        trainer = self._config.trainer
        rows = self.train_dataset._rows
        lengths = [max(len(row["input_ids"]), _target_length(row)) for row in rows]
        batches = TokenBatches(
            lengths,
            batch_tokens=trainer.batch_tokens,
            num_batches=trainer.max_steps * trainer.accumulation_steps,
            seed=self._config.seed,
            rank=self.args.process_index,
            num_ranks=self.args.world_size,
        )
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW of the library; around it OMoE, where the network has experts."""
        optimizer = super().create_optimizer(model)
        if self._spread and self.is_deepspeed_enabled:
            from scripts.testbed.deepspeed_experts import split_groups

            optimizer.param_groups[:] = split_groups(optimizer.param_groups)
        if self._orthogonal:
            experts = omoe.find_expert_linears(self.model.network)
            spread = next((layer.ranks for layer in self.model.modules() if isinstance(layer, MoELayer)), None)
            world = dist.group.WORLD if self.args.world_size > 1 else None
            self.optimizer = optimizer = omoe.OMoE(
                optimizer,
                experts,
                self._config.omoe,
                process_group=world if spread is None else spread.replicas,
                expert_group=None if spread is None else spread.experts,
                measure_every=self._config.trainer.log_every,
            )
            logger.info("OMoE: %s", optimizer.cost())
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch; its named terms are kept for the next log line."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs, step=self.state.global_step)
        for name, value in outputs["terms"].items():
            self._terms[name] += float(value)
        self._num_terms += 1
        labels = inputs["labels"]
        self._num_tokens += int((labels != IGNORED).sum() if labels.ndim == 2 else inputs["attention_mask"].sum())
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the loss with its terms, and the seconds and tokens since the run began, resumed or not."""
        if "loss" in logs:
            logs |= {name: total / self._num_terms for name, total in self._terms.items()}
            self._terms.clear()
            self._num_terms = 0
            logs |= self.progress()
            logs |= self._orthogonality()
        super().log(logs, start_time)

    def _orthogonality(self) -> dict[str, float]:
        """What OMoE took out of the latest orthogonal step and what it left, and how alike experts' changes are now."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # the library wraps it
        if not isinstance(optimizer, omoe.OMoE) or not optimizer.linear_state:
            return {}
        found = {"omoe_removed_energy": _mean(optimizer.removed_energy().values())}
        if optimizer.num_steps >= optimizer.measure_every:
            found["omoe_leftover"] = _mean(optimizer.leftover().values())
        if self._spread:
            return found  # the rest needs the experts of all ranks
        if optimizer.config.space == "input":
            return {**found, "omoe_trace_share": _mean(optimizer.trace_share().values())}
        cosines = [
            omoe.mean_pairwise(omoe.change_cosine(stacked_EOI(linear), start_EOI(optimizer.linear_state[linear.name])))
            for linear in optimizer.expert_linears
        ]
        return {**found, "omoe_change_cosine": _mean(cosines)}

    def progress(self) -> dict[str, float]:
        """Since the run first began: seconds, of the clock and of this process, and tokens trained on.

        Tokens are those of the target, or of a text to classify.
        """
        before: dict[str, Any] = next((entry for entry in reversed(self.state.log_history) if "seconds" in entry), {})
        now_s, now_cpu_s = time.monotonic(), time.process_time()
        found = {"seconds": now_s - self._started_s, "cpu_seconds": now_cpu_s - self._started_cpu_s}
        found["num_tokens"] = self._num_tokens
        self._started_s, self._started_cpu_s, self._num_tokens = now_s, now_cpu_s, 0
        return {name: value + before.get(name, 0) for name, value in found.items()}

    def train(self, resume_from_checkpoint: str | bool | None = None, **settings: Any) -> Any:
        """Train, counting time from here."""
        self._started_s, self._started_cpu_s = time.monotonic(), time.process_time()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **settings)

    @property
    def _spread(self) -> bool:
        """Whether experts are spread over ranks."""
        return bool(self.model.has_spread_experts)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self._spread and not self.is_deepspeed_enabled:  # which clips by itself
            return clip_grad_norm(self.model, self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._spread and not self.is_deepspeed_enabled:
            grad_norm = clip_grad_norm(self.model, float("inf"))
        return super()._get_grad_norm(model, grad_norm)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save and seal; where that fails, say so, remove the remains and train on: the last good one stays."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every rank writes a file of its own into the folder
            if self.args.should_save:
                checkpoints.seal(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            if self.state.best_model_checkpoint == str(folder):
                self.state.best_model_checkpoint = None
            free_bytes = shutil.disk_usage(self.args.output_dir).free
            logger.error("%s was not saved (%s); %d MB are free; training goes on", folder, error, free_bytes // 10**6)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        weights = _untied(gather_state(self.model))  # spread experts need every rank
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._spread and not self.is_deepspeed_enabled and not self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            torch.save(self.optimizer.state_dict(), self._own_optimizer(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self._spread:
            return
        if self.is_deepspeed_enabled:  # which has loaded the first rank's experts
            self._load_from_checkpoint(checkpoint)
        elif not self.args.should_save:
            state = torch.load(self._own_optimizer(checkpoint), map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(state)

    def _own_optimizer(self, folder: str) -> str:
        """The state of this rank's optimizer, whose experts are not those of the first rank."""
        return os.path.join(folder, f"optimizer_{self.args.process_index}.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        _load_weights(model or self.model, os.path.join(resume_from_checkpoint, WEIGHTS))

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
            if self._spread:
                self._load_from_checkpoint(self.state.best_model_checkpoint)
            return
        best = self.state.best_model_checkpoint
        reason = checkpoints.damage(Path(best))
        if reason is not None:
            logger.warning("%s is not used: %s; the last weights are evaluated", best, reason)
            return
        self._load_from_checkpoint(best)


def _mean(values: Iterable[Tensor]) -> float:
    return float(torch.stack([value.double().mean() for value in values]).mean())


def _untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor once, under its first name.

    By hand, not by safetensors' save_model: DeepSpeed keeps all parameters in one buffer, which that takes for one.
    """
    found: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in state.items():
        found.setdefault((tensor.data_ptr(), tensor.shape), name)
    return {name: state[name] for name in found.values()}


def _load_weights(model: nn.Module, file: str) -> None:
    """Load the weights of a whole model, of whose spread experts each rank takes its own."""
    state = local_state(model, safetensors.torch.load_file(file))
    missing, unexpected = model.load_state_dict(state, strict=False)
    untied = _untied(model.state_dict())
    if unexpected or not untied.keys().isdisjoint(missing):
        raise RuntimeError(
            f"{file}: got weights of another model; missing are {sorted(untied.keys() & set(missing))}, unexpected "
            f"{sorted(unexpected)}"
        )


def arguments(config: Config, folder: Path, *, generates: bool) -> Seq2SeqTrainingArguments:
    """The library's arguments for a configuration."""
    trainer, cluster = config.trainer, config.cluster
    bf16 = resolve(trainer.precision, cluster.device) == "bf16"
    save_every = min(trainer.save_every, trainer.max_steps)
    return Seq2SeqTrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=trainer.max_steps,
        gradient_accumulation_steps=trainer.accumulation_steps,
        per_device_eval_batch_size=EVAL_BATCH,
        learning_rate=trainer.learning_rate,
        lr_scheduler_type=trainer.schedule,
        warmup_steps=trainer.warmup_steps,
        weight_decay=trainer.weight_decay,
        adam_beta2=trainer.adam_beta2,
        max_grad_norm=trainer.max_grad_norm,
        seed=config.seed,
        bf16=bf16,
        use_cpu=cluster.device == "cpu",
        logging_steps=trainer.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=save_every,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=trainer.keep_checkpoints,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        predict_with_generate=generates,
        generation_num_beams=trainer.num_beams,
        generation_max_length=config.model.max_length,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        log_level="error",
        report_to=[],
        deepspeed=deepspeed(config, bf16=bf16),
    )


def deepspeed(config: Config, *, bf16: bool) -> dict[str, Any] | None:
    """DeepSpeed's settings for the chosen ZeRO stage; None without it."""
    if config.trainer.deepspeed == "off":
        return None
    return {
        "zero_optimization": {"stage": int(config.trainer.deepspeed[-1])},
        "gradient_accumulation_steps": "auto",  # these three are the Trainer's own
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
    }


def _target_length(row: dict[str, Any]) -> int:
    labels = row["labels"]
    return len(labels) if isinstance(labels, list) else 1


def _tensorboard(folder: Path) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter  # loads slowly

    return TensorBoardCallback(SummaryWriter(str(folder / "tensorboard")))
