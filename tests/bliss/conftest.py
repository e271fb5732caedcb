"""Tiny random networks of four architectures, and batches for them."""

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

NUM_IDS, D_MODEL, NUM_HEADS, D_FF = 23, 8, 2, 12
PAD, EOS, BOS = 0, 1, 2

_LAYERS = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": NUM_HEADS,
    "decoder_attention_heads": NUM_HEADS,
    "encoder_ffn_dim": D_FF,
    "decoder_ffn_dim": D_FF,
    "d_model": D_MODEL,
    "vocab_size": NUM_IDS,
    "max_position_embeddings": 32,
    "init_std": 0.3,
}
_IDS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS, "decoder_start_token_id": PAD}


def _marian(dropout: float) -> PreTrainedModel:
    return MarianMTModel(MarianConfig(**_LAYERS, **_IDS, decoder_vocab_size=NUM_IDS, dropout=dropout))


def _bart(dropout: float) -> PreTrainedModel:
    return BartForConditionalGeneration(BartConfig(**_LAYERS, **_IDS, dropout=dropout, forced_eos_token_id=None))


def _t5(dropout: float) -> PreTrainedModel:
    sizes = {"d_model": D_MODEL, "d_kv": 4, "d_ff": D_FF, "num_layers": 1, "num_heads": NUM_HEADS}
    return T5ForConditionalGeneration(T5Config(vocab_size=NUM_IDS, **sizes, **_IDS, dropout_rate=dropout))


def _bert2bert(dropout: float) -> PreTrainedModel:
    bert = BertConfig(
        vocab_size=NUM_IDS,
        hidden_size=D_MODEL,
        num_hidden_layers=1,
        num_attention_heads=NUM_HEADS,
        intermediate_size=D_FF,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
        initializer_range=0.3,
    )
    return EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(bert, bert, **_IDS))


NETWORKS = {"marian": _marian, "bart": _bart, "t5": _t5, "bert2bert": _bert2bert}

MakeNetwork = Callable[..., PreTrainedModel]


@pytest.fixture
def make_network() -> MakeNetwork:
    """`make_network(kind, dropout=0.0)`: the same weights for the same kind, in training mode."""

    def make(kind: str, dropout: float = 0.0) -> PreTrainedModel:
        torch.manual_seed(7)
        return NETWORKS[kind](dropout).train()

    return make


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
