"""Training texts -> a byte-pair tokenizer to which no text is unknown."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>", "<s>")  # their ids are 0 to 3
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
NUM_FIXED_TOKENS = len(SPECIAL_TOKENS) + len(BYTE_TOKENS)


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, max_alphabet: int = 256, max_length: int = 512
) -> PreTrainedTokenizerFast:
    """Learns byte-pair merges from texts; the same texts give the same tokenizer.

    Words are cut at blanks; text is normalised to NFC; a character outside the alphabet becomes its UTF-8 bytes.
    An encoded text ends in </s>. Decoding gives back every NFC text that neither starts nor ends with a blank, even
    one that spells a special token. Save it with `save_pretrained`.

    Args:
        texts: The training split's texts, no others.
        vocab_size: Number of tokens, with the 4 special ones and the 256 bytes.
        max_alphabet: Most characters with a token of their own, the frequent ones first.
        max_length: Tokens that the model can read, for `truncation=True`.

    Returns:
        A tokenizer with <pad>, </s>, <unk> and <s> as 0, 1, 2 and 3.

    Raises:
        ValueError: `vocab_size` leaves no room for the alphabet.
    """
    if vocab_size <= NUM_FIXED_TOKENS + max_alphabet:
        least = NUM_FIXED_TOKENS + max_alphabet + 1
        raise ValueError(f"vocab_size: {vocab_size}; give at least {least}, or a smaller max_alphabet")
    normalizer = normalizers.NFC()
    # "<" stands alone, so that no merge can spell a special token or a byte
    pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Split("<", "isolated")])
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = normalizer, pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(BYTE_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        limit_alphabet=max_alphabet,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(with_bytes(learner))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", SPECIAL_TOKENS.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        bos_token="<s>",  # noqa: S106
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def with_bytes(learner: Tokenizer) -> models.BPE:
    """The learnt merges with a token for each byte between the special tokens and the learnt ones."""
    learnt = json.loads(learner.to_str())["model"]
    by_rank = sorted(learnt["vocab"], key=learnt["vocab"].get)[len(SPECIAL_TOKENS) :]
    vocabulary = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *BYTE_TOKENS, *by_rank))}
    merges = [tuple(merge) for merge in learnt["merges"]]
    return models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)  # noqa: S106
