"""The corrector: extra encoder layers and two heads that undo the perturbation; a part of training only.

B  sentence
S  slot of the source
M  width of the model
H  attention head
E  width of a head
R  slot whose token is predicted
N  slot whose displacement is predicted
D  displacement class, -K' to K'
V  id of the vocabulary
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- the name everyone uses

from bliss.config import BlissConfig


class Corrector(nn.Module):
    """Maps encoder states of the perturbed source to corrected states, and those to tokens and displacements.

    The token head is tied with the source embedding, which is passed in; it adds only a bias. Weights come from a
    generator of their own, so that creating a corrector does not shift the global random stream.

    Args:
        config: corrector_layers, target and max_displacement are read.
        d_model: Width of the encoder's states.
        num_heads: Attention heads of each layer.
        d_ff: Width of each layer's feed-forward part.
        vocab_size: Rows of the source embedding.
        dropout: Probability of dropout after each sublayer.
        seed: Seed of the initial weights.

    Raises:
        ValueError: `num_heads` does not divide `d_model`.

    Source: our definition (the paper's text gives none).
    """

    def __init__(
        self,
        config: BlissConfig,
        *,
        d_model: int,
        num_heads: int,
        d_ff: int,
        vocab_size: int,
        dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(f"num_heads is {num_heads}; it must divide d_model={d_model}: use the encoder's own")
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(
            CorrectorLayer(d_model, num_heads, d_ff, dropout, generator) for _ in range(config.corrector_layers)
        )
        self.token_bias_V = nn.Parameter(torch.zeros(vocab_size))
        self.position_head: nn.Linear | None = None
        if config.target == "two_heads":
            self.position_head = _linear(d_model, 2 * config.max_displacement + 1, generator)

    def forward(self, states_BSM: Tensor, attention_mask_BS: Tensor) -> Tensor:
        """Return the corrected states z, (B, S, M), of the encoder's states; padding is not attended to."""
        for layer in self.layers:
            states_BSM = layer(states_BSM, attention_mask_BS)
        return states_BSM

    def token_logits(self, states_RM: Tensor, embedding_VM: Tensor) -> Tensor:
        """Return z W_emb^T + bias, (R, V), for the corrected states of the slots that count.

        Raises:
            ValueError: The embedding does not have this corrector's vocabulary.

        Source: our definition (the paper's text gives none).
        """
        if len(embedding_VM) != len(self.token_bias_V):
            raise ValueError(
                f"embedding_VM has {len(embedding_VM)} rows and the corrector's vocab_size is "
                f"{len(self.token_bias_V)}; they must agree: create the corrector with the source embedding's rows"
            )
        return F.linear(states_RM, embedding_VM, self.token_bias_V)

    def position_logits(self, states_NM: Tensor) -> Tensor:
        """Return logits (N, D) over the displacements -K' to K'.

        Raises:
            ValueError: The corrector was created for restore_in_place, which has no position head.

        Source: our definition (the paper's text gives none).
        """
        if self.position_head is None:
            raise ValueError("config.target: this corrector restores in place and has no position head: use two_heads")
        return self.position_head(states_NM)


class CorrectorLayer(nn.Module):
    """A post-norm Transformer encoder layer.

    Attention is written out: under a mask in bfloat16 on a CPU it is several times faster than the fused kernel.

    Source: Transformer (arXiv:1706.03762), section 3.1.
    """

    def __init__(self, d_model: int, num_heads: int, d_ff: int, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = _linear(d_model, 3 * d_model, generator)
        self.attended = _linear(d_model, d_model, generator)
        self.attention_norm = nn.LayerNorm(d_model)
        self.expand = _linear(d_model, d_ff, generator)
        self.contract = _linear(d_ff, d_model, generator)
        self.feed_forward_norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BSM: Tensor, attention_mask_BS: Tensor) -> Tensor:
        """Return the layer's output, (B, S, M)."""
        x_BSM = self.attention_norm(x_BSM + self.dropout(self._attend(x_BSM, attention_mask_BS)))
        return self.feed_forward_norm(x_BSM + self.dropout(self.contract(F.relu(self.expand(x_BSM)))))

    def _attend(self, x_BSM: Tensor, attention_mask_BS: Tensor) -> Tensor:
        q_BHSE, k_BHSE, v_BHSE = (
            part_BSM.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part_BSM in self.query_key_value(x_BSM).chunk(3, dim=-1)
        )
        scores_BHSS = q_BHSE @ k_BHSE.transpose(-1, -2) * q_BHSE.shape[-1] ** -0.5
        # The smallest number rather than -inf: a row of padding alone must not become nan.
        hidden_B11S = attention_mask_BS[:, None, None, :] == 0
        scores_BHSS = scores_BHSS.masked_fill(hidden_B11S, torch.finfo(scores_BHSS.dtype).min)
        return self.attended((scores_BHSS.softmax(-1) @ v_BHSE).transpose(1, 2).flatten(2))


def _linear(d_in: int, d_out: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, d_in, d_out)
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
