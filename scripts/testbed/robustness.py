"""How a trained network bears noise on its sources: scores by kind and level, and how far its states move.

B: sentences, S: source length, M: width of the encoder
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.schema import Config
from scripts.testbed import plots
from scripts.testbed.generation import batches
from scripts.testbed.quartet import QuartetModel
from scripts.testbed.report import Section
from scripts.testbed.rows import Row
from scripts.testbed.source_noise import KINDS, SEEN, UNSEEN, lexicon_of, noisy
from scripts.testbed.tasks.task import pad
from scripts.testbed.tasks.translation import Translation

Generate = Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """What noise does to one network."""

    rows: tuple[Row, ...]
    """Scores, greedily decoded, with the worst and best of the noise's seeds; cosines of states."""
    sections: tuple[Section, ...]
    """Curves over the level, where there are several."""


def measure(config: Config, task: Translation, model: QuartetModel, generate: Generate) -> Robustness:
    """Score noisy test sources of every kind and level, each drawn with several seeds.

    Args:
        config: The run's configuration; comparison.noise_percents and noise_seeds are read.
        task: Gives the test split, its metric, and the words that replacements are drawn from.
        model: The trained network.
        generate: Sources -> texts, greedily.
    """
    comparison, metric, data = config.comparison, task.metric, task.data
    sources, references = list(data.test["source"]), task.references(data.test)
    lexicon = lexicon_of(data.train["source"])
    clean = metric(generate(sources), references, sources)
    states_BM = pooled_states(model, task, sources)
    rows = [Row(provider=comparison.method, metric=f"{metric.name}_greedy", unit=metric.unit, value=clean)]
    scores: dict[tuple[str, int], list[float]] = {}
    for percent in comparison.noise_percents:
        level = f"_{percent}" if len(comparison.noise_percents) > 1 else ""
        for kind in KINDS:
            cosines: list[float] = []
            own = scores[kind, percent] = []
            for seed in range(1, comparison.noise_seeds + 1):
                texts = noisy(sources, kind, share=percent / 100, seed=seed, lexicon=lexicon)
                own.append(metric(generate(texts), references, sources))
                moved_BM = pooled_states(model, task, texts)
                cosines.append(torch.cosine_similarity(states_BM, moved_BM, dim=1).mean().item())
            rows.append(_row(comparison.method, f"{metric.name}_{kind}{level}", metric.unit, own))
            rows.append(_row(comparison.method, f"state_cosine_{kind}{level}", "cosine", cosines))
        for group, kinds in (("seen", SEEN), ("unseen", UNSEEN)):
            means = [
                sum(column) / len(kinds) for column in zip(*(scores[kind, percent] for kind in kinds), strict=True)
            ]
            rows.append(_row(comparison.method, f"{metric.name}_{group}{level}", metric.unit, means))
    return Robustness(rows=tuple(rows), sections=_sections(config, metric.name, clean, scores))


@torch.no_grad()
def pooled_states(model: QuartetModel, task: Translation, texts: Sequence[str]) -> Tensor:
    """The encoder's states of each text, averaged over its tokens: (B, M), float32, on the CPU."""
    was_training = model.training
    model.eval()
    limit = {"truncation": True, "max_length": model.network.config.max_position_embeddings // 2}
    tokens = task.tokenizer(list(texts), **limit)["input_ids"]
    device, pooled, order = model.network.device, [], []
    for rows in batches(tokens, device.type):
        input_ids_BS = pad([tokens[row] for row in rows], task.tokenizer.pad_token_id).to(device)
        mask_BS = (input_ids_BS != task.tokenizer.pad_token_id).long()
        states_BSM = model.network.get_encoder()(input_ids=input_ids_BS, attention_mask=mask_BS).last_hidden_state
        real_BS1 = mask_BS[..., None]
        pooled.append(((states_BSM * real_BS1).sum(1) / real_BS1.sum(1)).float().cpu())
        order += rows
    model.train(was_training)
    return torch.cat(pooled)[torch.tensor(order).argsort()]


def _row(provider: str, metric: str, unit: str, values: Sequence[float]) -> Row:
    low, high = (min(values), max(values)) if len(values) > 1 else (None, None)
    return Row(provider=provider, metric=metric, unit=unit, value=_mean(values), low=low, high=high)


def _sections(
    config: Config, metric: str, clean: float, scores: dict[tuple[str, int], list[float]]
) -> tuple[Section, ...]:
    percents = config.comparison.noise_percents
    if len(percents) < 2:
        return ()
    xs = (0.0, *map(float, percents))

    def curve(kind: str, pick: Callable[[Sequence[float]], float]) -> tuple[float, ...]:
        return (clean, *(pick(scores[kind, percent]) for percent in percents))

    bands = {kind: (xs, curve(kind, _mean), curve(kind, min), curve(kind, max)) for kind in KINDS}
    note = "Mean, worst and best over the noise's seeds. Shuffle and replace are kinds that BLISS trains on."
    labels = {"x_label": "words perturbed, percent", "y_label": metric}
    picture = plots.banded_curves(bands, title=f"{config.comparison.method} under noise", **labels)
    return (Section(title="Robustness", note=note, plots=(picture,)),)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
