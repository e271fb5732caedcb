"""Networks of the library, built from sizes or from a pretrained folder."""

from collections.abc import Sequence

import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    MarianConfig,
    MarianMTModel,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from configs.sections import ModelConfig
from configs.typed import ConfigError
from scripts.testbed import pretrained

# Masked scaled-dot-product attention in bf16 runs several times slower on CPUs than products and a softmax.
ATTENTION = "eager"


def translator(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> PreTrainedModel:
    """An encoder-decoder from scratch, with one embedding for source, target and output.

    Args:
        config: Sizes; `kind` is marian (fixed sinusoidal positions) or bart (learned positions).
        tokenizer: Gives the vocabulary's size and special ids.
        seed: Seed of the weights; the global random stream is left alone.
    """
    sizes = {
        "vocab_size": len(tokenizer),
        "d_model": config.d_model,
        "encoder_layers": config.num_encoder_layers,
        "decoder_layers": config.num_decoder_layers,
        "encoder_attention_heads": config.num_heads,
        "decoder_attention_heads": config.num_heads,
        "encoder_ffn_dim": config.d_ff,
        "decoder_ffn_dim": config.d_ff,
        "activation_function": config.activation,
        "dropout": config.dropout,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "max_position_embeddings": 2 * config.max_length,  # generation may run past the longest training example
        "scale_embedding": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
        "forced_eos_token_id": None,
    }
    configuration, network_class = {
        "marian": (MarianConfig, MarianMTModel),
        "bart": (BartConfig, BartForConditionalGeneration),
        "pegasus": (PegasusConfig, PegasusForConditionalGeneration),
    }[config.kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = network_class(configuration(**sizes, attn_implementation=ATTENTION))
        _draw_as_the_transformer_does(network, tokenizer.pad_token_id)
    return network


def _draw_as_the_transformer_does(network: PreTrainedModel, pad_token_id: int) -> None:
    """Draw Xavier weights and embeddings of deviation 1/sqrt(width), not the library's 0.02 everywhere.

    With that, a narrow network whose norms follow the sublayers stays at the words' frequencies for many epochs.
    """
    for name, parameter in network.named_parameters():
        if parameter.ndim == 2 and not any(part in name for part in ("shared", "embed", "lm_head")):
            torch.nn.init.xavier_uniform_(parameter)
    embedding = network.get_input_embeddings().weight
    torch.nn.init.normal_(embedding, std=embedding.shape[1] ** -0.5)
    with torch.no_grad():
        embedding[pad_token_id].zero_()


def classifier(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, labels: Sequence[str], *, seed: int
) -> PreTrainedModel:
    """An encoder with a classification head, pretrained or from scratch.

    Args:
        config: Sizes, or the name of a pretrained encoder.
        tokenizer: Gives the vocabulary's size and special ids.
        labels: Names of the classes.
        seed: Seed of the head (and of all weights from scratch); the global random stream is left alone.
    """
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if config.pretrained is not None:
            folder = pretrained.folder(config.pretrained)
            return AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=len(labels), attn_implementation=ATTENTION, use_safetensors=True, **names
            )
        return BertForSequenceClassification(_bert(config, tokenizer, num_labels=len(labels), **names))


def encoder(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> PreTrainedModel:
    """An encoder without a head, pretrained or from scratch; its layers are at `.encoder.layer`.

    Args:
        config: Sizes, or the name of a pretrained encoder.
        tokenizer: Gives the vocabulary's size and special ids.
        seed: Seed of the weights from scratch; the global random stream is left alone.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if config.pretrained is not None:
            folder = pretrained.folder(config.pretrained)
            network = AutoModel.from_pretrained(folder, attn_implementation=ATTENTION, use_safetensors=True)
            if not hasattr(getattr(network, "encoder", None), "layer"):
                raise ConfigError(
                    f"model.pretrained: got {config.pretrained}, a {type(network).__name__}; accepts encoders with "
                    "their layers at encoder.layer: BERT, RoBERTa and their like"
                )
            return network
        return BertModel(_bert(config, tokenizer))


def _bert(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, **settings: object) -> BertConfig:
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_attention_heads=config.num_heads,
        num_hidden_layers=config.num_encoder_layers,
        hidden_act=config.activation,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=config.max_length,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation=ATTENTION,
        **settings,
    )
