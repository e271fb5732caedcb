"""One module that trains: a network, its routing losses and its objective, behind the library's Trainer.

B: sentences, S: source length, T: target length
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import bliss
import moe_pipeline
from bliss.config import Mode
from configs.schema import Config
from configs.typed import ConfigError
from moe_pipeline.parallel import spread_parameters
from moe_pipeline.run.ranks import expert_ranks
from scripts.testbed.fused import fuse
from scripts.testbed.tasks.task import IGNORED, Task


class QuartetModel(nn.Module):
    """Hands a batch to the network and returns the loss with its named terms.

    Args:
        network: A Hugging Face model, dense or upcycled.
        objective: BLISS's settings; with mode clean and weight 0 it is the plain objective.
        corrector: BLISS's corrector; None where the weight is 0.
        vocabulary: What BLISS and rivals may perturb; None where neither takes part.
        rival: A rival's settings, whose loss takes the place of L_seq; None for none.
        seed: Seed of the perturbation.
    """

    accepts_loss_kwargs = False  # losses are means over a batch; the Trainer averages them over accumulated batches
    main_input_name = "input_ids"

    def __init__(
        self,
        network: PreTrainedModel,
        *,
        objective: bliss.BlissConfig,
        corrector: bliss.Corrector | None = None,
        vocabulary: bliss.Vocabulary | None = None,
        rival: bliss.RivalConfig | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network = network
        self.corrector = corrector
        self.objective = objective
        self.vocabulary = vocabulary
        self.rival = rival
        self.seed = seed
        self.has_experts = any(isinstance(module, moe_pipeline.MoELayer) for module in network.modules())
        self.has_spread_experts = bool(spread_parameters(network))
        self.config = network.config
        self.generation_config = getattr(network, "generation_config", None)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        sentence_id: Tensor | None = None,
        epoch: Tensor | None = None,
        step: int = 0,
    ) -> dict[str, Any]:
        """Compute the loss of a batch.

        Args:
            input_ids: (B, S) token ids.
            attention_mask: (B, S), 1 at real tokens.
            labels: (B, T) token ids of the target with -100 at padding, or (B,) classes.
            sentence_id: (B,) numbers of the sentences, which with the epoch decide their noise.
            epoch: () the epoch the batch is drawn in.
            step: Optimizer steps taken so far.

        Returns:
            `loss`; while training also `terms`, its named parts as scalars; while evaluating `logits`.
        """
        with self.routed(attention_mask, labels) as records:
            if labels.ndim == 1:
                outputs = self.network(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
                loss, logits, terms = outputs.loss, outputs.logits, {"loss_task": outputs.loss.detach()}
            else:
                losses = self._sequence_losses(input_ids, attention_mask, labels, sentence_id, epoch, step)
                loss, logits, terms = losses.total, losses.logits_BTV, _bliss_terms(losses)
        if not self.training:
            return {"loss": loss, "logits": logits}
        if records:
            routing = torch.stack([record.loss for calls in records.values() for record in calls]).mean() * len(records)
            loss, terms["loss_routing"] = loss + routing, routing.detach()
        return {"loss": loss, "terms": terms}

    def routed(
        self, attention_mask: Tensor, labels: Tensor
    ) -> AbstractContextManager[Mapping[str, Sequence[moe_pipeline.MoERecord]]]:
        """Collect what every MoE layer returns inside a `with` block, and keep padding from being routed.

        Args:
            attention_mask: (B, S), 1 at real tokens of the source.
            labels: (B, T) with -100 at padding of the target, or (B,) classes.

        Returns:
            A context that yields layer name -> one record per call; empty for a dense network.
        """
        if not self.has_experts:
            return nullcontext({})
        masks = {"": attention_mask.bool()}
        if labels.ndim == 2:
            masks = {"model.encoder": masks[""], "model.decoder": labels != IGNORED}
        names = [name for name, module in self.network.named_modules() if isinstance(module, moe_pipeline.MoELayer)]
        used = {prefix: mask for prefix, mask in masks.items() if any(name.startswith(prefix) for name in names)}
        return moe_pipeline.routed(self.network, used)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **settings: Any) -> Tensor:
        """Generate with the network's own search; what the loss alone reads is dropped.

        Args:
            input_ids: (B, S) token ids.
            attention_mask: (B, S), 1 at real tokens.
            settings: The library's generation settings; `labels`, `sentence_id` and `epoch` are accepted and unused.

        Returns:
            (B, T) token ids.
        """
        for name in ("labels", "sentence_id", "epoch"):
            settings.pop(name, None)
        if self.has_spread_experts:
            settings["synced_gpus"] = True  # a rank that is done goes on as long as others need its experts
        if self.objective.mode == "corrected":
            settings["encoder_outputs"] = bliss.encode(
                self.network,
                self.corrector,
                input_ids_BS=input_ids,
                attention_mask_BS=attention_mask,
                config=self.objective,
            )
        return self.network.generate(input_ids=input_ids, attention_mask=attention_mask, **settings)

    def _sequence_losses(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        sentence_id: Tensor | None,
        epoch: Tensor | None,
        step: int,
    ) -> bliss.BlissLosses:
        objective = self.objective
        perturbed = rival = None
        if self.vocabulary is not None:  # no module, so it does not move with the network
            self.vocabulary = self.vocabulary.to(input_ids.device)
        if not self.training:
            # Validation follows input -> output on the clean source alone, or early stopping would follow the noise.
            mode: Mode = "corrected" if objective.mode == "corrected" else "clean"
            objective = bliss.BlissConfig(
                mode=mode, weight=0.0, label_smoothing=0.0, shuffle_range=0, replace_ratio=0.0
            )
        elif self.vocabulary is not None and self.rival is not None:
            assert sentence_id is not None
            assert epoch is not None
            draw = bliss.Draw(sentence_id_B=sentence_id, epoch=int(epoch), seed=self.seed, step=step)
            rival = bliss.Rival(config=self.rival, draw=draw, vocabulary=self.vocabulary)
        if self.corrector is not None and self.vocabulary is not None and sentence_id is not None and epoch is not None:
            perturbed = bliss.perturb(
                input_ids,
                attention_mask,
                sentence_id_B=sentence_id,
                epoch=int(epoch),
                seed=self.seed,
                vocabulary=self.vocabulary,
                config=objective,
                step=step,
                embedding_VM=self.network.get_input_embeddings().weight,
            )
        return bliss.bliss_losses(
            self.network,
            self.corrector,
            input_ids_BS=input_ids,
            attention_mask_BS=attention_mask,
            labels_BT=labels,
            perturbed=perturbed,
            config=objective,
            rival=rival,
        )


def build(config: Config, task: Task, *, moe: bool) -> QuartetModel:
    """The network of a task with the methods a configuration asks for.

    Args:
        config: The run's configuration.
        task: Gives the network and the tokenizer.
        moe: Whether feed-forward layers become Mixtures of Experts; the dense control leaves them.

    Raises:
        ConfigError: Where no layer fits `moe.layers`, or the gate would change what a pretrained network computes.
    """
    network = task.network()
    if moe:
        _upcycle(network, config)
    if config.fusion.enabled:
        fuse(network, patience_flops=config.fusion.patience_flops)
    rival = config.rival if config.rival.enabled else None
    words = vocabulary(task.tokenizer) if config.bliss.enabled or rival is not None else None
    if not config.bliss.enabled:
        plain = bliss.BlissConfig(mode="clean", weight=0.0, label_smoothing=config.trainer.label_smoothing)
        return QuartetModel(network, objective=plain, vocabulary=words, rival=rival, seed=config.seed)
    corrector = bliss.Corrector(
        config.bliss,
        d_model=config.model.d_model,
        num_heads=config.model.num_heads,
        d_ff=config.model.d_ff,
        vocab_size=len(task.tokenizer),
        dropout=config.model.dropout,
        seed=config.seed,
    )
    return QuartetModel(
        network, objective=config.bliss, corrector=corrector, vocabulary=words, rival=rival, seed=config.seed
    )


def _upcycle(network: PreTrainedModel, config: Config) -> None:
    section = config.moe
    try:
        moe_pipeline.upcycle(
            network,
            section.gate,
            layers=section.layers,
            expert_noise_std=section.expert_noise_std,
            seed=config.seed,
            exact=config.model.pretrained is not None,  # from scratch there is no function to keep
            pipeline=section.pipeline,
            ranks=expert_ranks(ranks_per_copy=section.expert_ranks) if section.expert_ranks > 1 else None,
        )
    except ValueError as error:
        raise ConfigError(f"moe: {error}") from error


def vocabulary(tokenizer: PreTrainedTokenizerFast) -> bliss.Vocabulary:
    """What BLISS needs to know of a tokenizer."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return bliss.Vocabulary.from_tokens(tokens, special_ids=tokenizer.all_special_ids)


def _bliss_terms(losses: bliss.BlissLosses) -> dict[str, Tensor]:
    terms = {"loss_sequence": losses.sequence, "loss_token": losses.token, "loss_position": losses.position}
    accuracies = {f"accuracy_{name}": value for name, value in losses.accuracies.items()}
    return {name: value.detach() for name, value in (terms | accuracies).items()}
