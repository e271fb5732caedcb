"""Texts from a trained encoder-decoder: beam search over batches of similar lengths.

B: sentences, S: source length
"""

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerFast

from configs.schema import Config
from scripts.testbed.precision import resolve
from scripts.testbed.quartet import QuartetModel
from scripts.testbed.tasks.task import pad

BATCH_SENTENCES = 64
BATCH_TOKENS = {"cpu": 0, "cuda": 1 << 14}  # a GPU that gets few of them waits for Python
SPARE_TOKENS = 12  # a text may be twice as long as its source, and this much longer


@torch.no_grad()
def texts_of(
    model: QuartetModel, tokenizer: PreTrainedTokenizerFast, sources: Sequence[str], *, config: Config, num_beams: int
) -> list[str]:
    """Generate a text for each source.

    Args:
        model: The network with its objective, which decides what the decoder reads.
        tokenizer: That of the network.
        sources: Texts; an empty one is read as the end of a sentence alone.
        config: Precision, device, longest source and length penalty are read.
        num_beams: 1 decodes greedily.
    """
    if not sources:
        return []
    limit = config.model.max_length
    tokens = tokenizer(list(sources), truncation=True, max_length=limit)["input_ids"]
    texts = [""] * len(tokens)
    bf16 = resolve(config.trainer.precision, config.cluster.device) == "bf16"
    was_training = model.training
    model.eval()
    penalty = {"length_penalty": config.comparison.length_penalty} if num_beams > 1 else {}
    for rows in batches(tokens, config.cluster.device):
        input_ids_BS = pad([tokens[row] for row in rows], tokenizer.pad_token_id).to(model.network.device)
        with torch.autocast(config.cluster.device, torch.bfloat16, enabled=bf16):
            generated = model.generate(
                input_ids_BS,
                (input_ids_BS != tokenizer.pad_token_id).long(),
                num_beams=num_beams,
                do_sample=False,
                max_new_tokens=min(2 * len(tokens[rows[0]]) + SPARE_TOKENS, 2 * limit - 1),
                **penalty,
            )
        for row, text in zip(rows, tokenizer.batch_decode(generated, skip_special_tokens=True), strict=True):
            texts[row] = text.strip()
    model.train(was_training)
    return texts


def batches(tokens: Sequence[Sequence[int]], device: str) -> Iterator[list[int]]:
    """Rows of each batch, the longest first; on a GPU as many as one decodes in the time of few."""
    order = sorted(range(len(tokens)), key=lambda row: -len(tokens[row]))
    while order:
        count = max(BATCH_SENTENCES, BATCH_TOKENS[device] // len(tokens[order[0]]))
        yield order[:count]
        order = order[count:]
