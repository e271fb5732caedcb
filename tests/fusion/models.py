"""Small models of the kinds that a graph pass meets: from a library, and by hand where that has none."""

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

WIDTHS = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 1}


class Mixer(nn.Module):
    """A block of MLP-Mixer: products over tokens, then over channels."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.tokens = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        self.channels = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, x):
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norms[1](x))


class LoRA(nn.Module):
    """A linear map with a product of two thin matrices beside it."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(16, 24).requires_grad_(False)
        self.a, self.b = nn.Linear(16, 4, bias=False), nn.Linear(4, 24, bias=False)

    def forward(self, x):
        return functional.silu(self.base(x) + 2.0 * self.b(self.a(x)))


def tokens(batch=2, length=6):
    return {"input_ids": torch.randint(3, 40, (batch, length))}


def padded(batch=2, length=6):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length - 2 :] = 0
    return {**tokens(batch, length), "attention_mask": mask}


def bert(**options):
    config = BertConfig(vocab_size=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **WIDTHS, **options)
    return BertModel(config, add_pooling_layer=False)


def vit(**options):
    sizes = {"image_size": 8, "patch_size": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTModel(ViTConfig(**WIDTHS, **sizes, **options), add_pooling_layer=False)


def marian(**options):
    sizes = {f"{side}_{what}": number for side in ("encoder", "decoder")
             for what, number in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": 1}
    config = MarianConfig(vocab_size=40, d_model=16, dropout=0.0, **sizes, **ids, **options)
    return MarianMTModel(config)


def llama(**options):
    config = LlamaConfig(vocab_size=40, num_key_value_heads=1, use_cache=False, **WIDTHS, **options)
    return LlamaForCausalLM(config)


def t5(**options):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=40, **sizes, **options))


def translated(batch=2, length=6):
    return {**padded(batch, length), "decoder_input_ids": torch.randint(3, 40, (batch, length - 1))}


MODELS = {
    "BERT": (bert, padded),
    "ViT": (vit, lambda batch=2, length=6: {"pixel_values": torch.randn(batch, 3, 8, 8)}),
    "Marian": (marian, translated),
    "Llama": (llama, tokens),
    "MLP-Mixer": (Mixer, lambda batch=2, length=6: {"x": torch.randn(batch, 6, 16)}),
    "LoRA": (LoRA, lambda batch=2, length=6: {"x": torch.randn(batch, length, 16)}),
}
"""Name -> what makes the model, and what makes arguments for it, of a batch and a length where it has one."""


def tensor_of(output):
    """The one tensor of a model's output that all depends on."""
    if torch.is_tensor(output):
        return output
    return output.logits if "logits" in output else output.last_hidden_state
