"""One run of a study: a method fine-tunes the upper layers, is scored, and its experts are measured.

B: texts, S: padded length, M: width
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import moe_pipeline
import omoe
from configs.sections import MoESection, TrainerConfig
from omoe.rivals import output_orthogonality, router_similarity, weight_orthogonality
from scripts.testbed.batches import TokenBatches
from scripts.testbed.data import Data
from scripts.testbed.study.diversity import Diversity, LayerDiversity
from scripts.testbed.study.features import Features
from scripts.testbed.study.methods import Method
from scripts.testbed.study.network import UpperNetwork
from scripts.testbed.study.scores import Scores, score

RIVAL_TOKENS = 64  # of a batch that are sent to every expert for a loss on outputs
MEASURES = 5  # of a run, of what steps leave in the others' subspace


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a run found."""

    scores: Scores
    before: Sequence[LayerDiversity]
    after: Sequence[LayerDiversity]
    losses: Sequence[float]
    """The task's loss at every step."""
    removed_energy: float
    """Share of the experts' steps that was taken out, in squared length, averaged over steps and linears."""
    seconds: float
    leftover: float | None = None
    """Share of the experts' finished steps, in length, that still lay in the other experts' subspace, averaged over
    measures and linears; None where OMoE took no part, and in runs from before it was measured."""


class Training:
    """What all runs on one data set share.

    Args:
        data: The set.
        train: Features of its training rows.
        held_out: Of the rows on which experts are measured.
        scored: Of the rows that are scored.
        moe: The layers' experts and gate.
        trainer: Steps, batches, learning rate and schedule.
        bf16: Whether under autocast.
    """

    def __init__(
        self,
        data: Data,
        *,
        train: Features,
        held_out: Features,
        scored: Features,
        moe: MoESection,
        trainer: TrainerConfig,
        bf16: bool,
        num_tokens: int,
    ) -> None:
        self._data, self._moe, self._trainer = data, moe, trainer
        self._train, self._held_out, self._scored = train, held_out, scored
        self._num_tokens = num_tokens
        self._autocast = lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16)

    def run(self, network: UpperNetwork, method: Method, *, seed: int) -> Finished:
        """Train a fresh dense network by a method.

        Args:
            network: Its weights are the seed's; upcycled in place.
            method: Whether there are experts, and what keeps them apart.
            seed: Of router, order of the data and dropout.
        """
        diversity = None
        if method.moe:
            moe_pipeline.upcycle(network, self._moe.gate, expert_noise_std=self._moe.expert_noise_std, seed=seed)
            diversity = Diversity(network, self._held_out, num_tokens=self._num_tokens)
        before = diversity.measure() if diversity else []
        started_s = time.monotonic()
        losses, removed, leftover = self._fit(network, method, seed)
        seconds = time.monotonic() - started_s
        return Finished(
            scores=self.scores(network),
            before=before,
            after=diversity.measure() if diversity else [],
            losses=losses,
            removed_energy=_mean(removed) or 0.0,
            seconds=seconds,
            leftover=_mean(leftover),
        )

    def _fit(self, network: UpperNetwork, method: Method, seed: int) -> tuple[list[float], list[float], list[float]]:
        """The loss of every step, what it took out of experts' steps, and what some of them left."""
        trainer = self._trainer
        optimizer = _optimizer(network, method, trainer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, trainer))
        batches = TokenBatches(
            self._train.lengths, batch_tokens=trainer.batch_tokens, num_batches=trainer.max_steps, seed=seed
        )
        layers = {name: part for name, part in network.named_modules() if isinstance(part, moe_pipeline.MoELayer)}
        inputs = _keep_inputs(layers) if method.loss == "output_orthogonality" else {}
        torch.manual_seed(seed)
        network.train()
        losses: list[float] = []
        removed: list[float] = []
        leftover: list[float] = []
        for batch in batches:
            h_BSM, mask_BS, examples = self._train.batch([row for _, row in batch])
            with self._autocast(), _routed(network, mask_BS, moe=method.moe) as records:
                logits = network(h_BSM, mask_BS)
                task_loss = network.loss(logits, mask_BS, examples)
                loss = task_loss + sum(record.loss for calls in records.values() for record in calls)
                if method.loss != "none":
                    loss = loss + method.weight * rival_loss(layers, method.loss, inputs, mask_BS)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), trainer.max_grad_norm)
            optimizer.step()
            schedule.step()
            losses.append(float(task_loss.detach()))
            if isinstance(optimizer, omoe.OMoE):
                removed += [float(share_E.mean()) for share_E in optimizer.removed_energy().values()]
                if optimizer.num_steps % optimizer.measure_every == 0:
                    leftover += [float(share_E.mean()) for share_E in optimizer.leftover().values()]
        return losses, removed, leftover

    @torch.no_grad()
    def scores(self, network: UpperNetwork) -> Scores:
        """The set's metrics on the scored rows."""
        network.eval()
        predicted: dict[int, Any] = {}
        for rows in self._scored.by_length(4 * self._trainer.batch_tokens):
            h_BSM, mask_BS, examples = self._scored.batch(rows)
            moe = any(isinstance(module, moe_pipeline.MoELayer) for module in network.modules())
            with self._autocast(), _routed(network, mask_BS, moe=moe):
                logits = network(h_BSM, mask_BS)
            predicted |= dict(zip(rows, network.predictions(logits, examples, self._data), strict=True))
        targets = [example.target if example.answer is None else example.answer for example in self._scored.examples]
        return score(self._data, [predicted[row] for row in range(len(targets))], targets)


def rival_loss(
    layers: Mapping[str, moe_pipeline.MoELayer], name: str, inputs: Mapping[str, Tensor], mask_BS: Tensor
) -> Tensor:
    """A rival's loss, averaged over the layers.

    Args:
        layers: Name -> Mixture of Experts.
        name: Which rival's.
        inputs: Name -> what the layer has just read, (B, S, M); for a loss on outputs, some of its tokens are sent to
            every expert.
        mask_BS: bool, False for padding.
    """
    if name == "router_similarity":
        return torch.stack([router_similarity(layer.gate.router.weight) for layer in layers.values()]).mean()
    if name == "weight_orthogonality":
        experts = omoe.find_expert_linears(nn.ModuleDict(_named(layers)))
        return torch.stack([weight_orthogonality(linear.parameters[0]) for linear in experts]).mean()
    return torch.stack([_outputs_loss(layer, inputs[name][mask_BS]) for name, layer in layers.items()]).mean()


def _named(layers: Mapping[str, moe_pipeline.MoELayer]) -> dict[str, nn.Module]:
    return {name.replace(".", "_"): layer for name, layer in layers.items()}


def _outputs_loss(layer: moe_pipeline.MoELayer, x_TM: Tensor) -> Tensor:
    x_TM = x_TM[torch.linspace(0, len(x_TM) - 1, min(RIVAL_TOKENS, len(x_TM))).long()]
    num_experts = layer.gate.config.num_experts
    output_RM = layer.experts(x_TM.repeat(num_experts, 1), (len(x_TM),) * num_experts)
    return output_orthogonality(output_RM.float().unflatten(0, (num_experts, len(x_TM))))


def _keep_inputs(layers: Mapping[str, moe_pipeline.MoELayer]) -> dict[str, Tensor]:
    """A mapping that holds what every layer read last, from now on."""
    inputs: dict[str, Tensor] = {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(partial(_keep_input, inputs, name))
    return inputs


def _keep_input(inputs: dict[str, Tensor], name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    inputs[name] = args[0]


def _routed(
    network: nn.Module, mask_BS: Tensor, *, moe: bool
) -> AbstractContextManager[Mapping[str, Sequence[moe_pipeline.MoERecord]]]:
    return moe_pipeline.routed(network, {"": mask_BS}) if moe else nullcontext({})


def _optimizer(network: nn.Module, method: Method, trainer: TrainerConfig) -> torch.optim.Optimizer:
    rate = trainer.learning_rate if method.lr is None else method.lr
    experts = {id(p) for name, p in network.named_parameters() if ".experts." in name}
    groups = [
        {"params": [p for p in network.parameters() if id(p) not in experts], "lr": rate},
        {"params": [p for p in network.parameters() if id(p) in experts], "lr": rate * method.expert_lr},
    ]
    base = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(0.9, trainer.adam_beta2),
        weight_decay=trainer.weight_decay,
        fused=True,
    )
    if method.omoe is None:
        return base
    measure_every = max(1, trainer.max_steps // MEASURES)
    return omoe.OMoE(base, omoe.find_expert_linears(network), method.omoe, measure_every=measure_every)


def _rate(step: int, trainer: TrainerConfig) -> float:
    """Linear warm-up, then linear to 0."""
    if step < trainer.warmup_steps:
        return (step + 1) / (trainer.warmup_steps + 1)
    return (trainer.max_steps - step) / max(1, trainer.max_steps - trainer.warmup_steps)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
