"""Networks in PyTorch, or compiled: python -m ...workers.networks <eager|compile|fusion|zentorch> [<n>] <threads>.

n is how many candidates of each of our searches are compiled and measured.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel, PegasusConfig, PegasusForConditionalGeneration

from scripts.testbed.memory_pool import keep_freed_memory
from scripts.testbed.peer_processes.network import Network
from scripts.testbed.peer_processes.serve import DeclinedError, Loaded, fastest, serve
from scripts.testbed.peer_processes.workers.pytorch import DTYPES, arrays, facts

Outputs = Callable[[Tensor], Tensor]


def built(network: Network, *, attention: str) -> nn.Module:
    """The library's network with random weights, the same wherever its version is.

    Args:
        network: Sizes.
        attention: The library's name of an implementation.
    """
    torch.manual_seed(network.seed)
    if network.kind == "bert":
        bert = BertConfig(
            vocab_size=network.vocabulary, hidden_size=network.width, num_hidden_layers=network.num_layers,
            num_attention_heads=network.num_heads, intermediate_size=network.hidden, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, max_position_embeddings=network.length, attn_implementation=attention,
        )  # fmt: skip
        model = BertForMaskedLM(bert) if network.backward else BertModel(bert, add_pooling_layer=False)
    else:
        pegasus = PegasusConfig(
            vocab_size=network.vocabulary, d_model=network.width, encoder_layers=network.num_layers,
            decoder_layers=network.num_layers, encoder_attention_heads=network.num_heads,
            decoder_attention_heads=network.num_heads, encoder_ffn_dim=network.hidden,
            decoder_ffn_dim=network.hidden, dropout=0.0, attention_dropout=0.0, activation_function="relu",
            max_position_embeddings=network.length, attn_implementation=attention,
        )  # fmt: skip
        model = PegasusForConditionalGeneration(pegasus)
    return model.to(DTYPES[network.dtype]).train(network.backward)


class HiddenStates(nn.Module):
    """An encoder as exporters want it: one input, one output."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids -> the last hidden states."""
        return self.encoder(input_ids=ids).last_hidden_state


def forward(model: nn.Module, network: Network) -> Outputs:
    """What is asked of a network, as a function of token ids.

    Args:
        model: The network.
        network: Its sizes.

    Returns:
        Ids -> the last hidden states, or the loss of predicting the tokens that went in.
    """
    if network.backward:
        return lambda ids: model(input_ids=ids, labels=ids).loss
    return lambda ids: model(input_ids=ids).last_hidden_state


def loaded(network: Network, model: nn.Module, function: Outputs) -> Loaded:
    """A network on its tokens.

    Args:
        network: Sizes.
        model: Whose gradients are computed in a training step.
        function: Of `forward`, as it is or compiled.
    """
    ids = torch.from_numpy(network.tokens())
    if not network.backward:

        @torch.no_grad()
        def run() -> Sequence[Tensor]:
            return [function(ids)]

    else:

        def run() -> Sequence[Tensor]:
            model.zero_grad(set_to_none=True)
            loss = function(ids)
            loss.backward()
            return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]

    return Loaded(run=run, outputs=lambda: arrays(run()))


def way(
    network: Network, attention: str, *, backend: Any = None, mode: str | None = None, freeze: bool = False
) -> Callable[[], Loaded]:
    """A way to run a network, to be made ready.

    Args:
        network: Sizes.
        attention: The library's name of an implementation.
        backend: Of torch.compile; None does not compile.
        mode: Of torch.compile.
        freeze: Whether the compiler may take weights for constants, and pack them.
    """

    def make() -> Loaded:
        torch._dynamo.reset()
        torch._inductor.config.freezing = freeze
        model = built(network, attention=attention)
        function = forward(model, network)
        if backend is not None:
            function = torch.compile(function, backend=backend, dynamic=False, mode=mode)
        return loaded(network, model, function)

    return make


def load(variant: str, network: Network) -> Loaded:
    """The best of a variant's ways.

    Args:
        variant: eager, compile, fusion or zentorch.
        network: What to run.
    """
    if variant == "zentorch" and network.backward:
        raise DeclinedError("inference alone")
    attentions = ("eager", "sdpa")
    match variant:
        case "eager":
            ways = {name: way(network, name) for name in attentions}
        case "fusion":
            from fusion.compile import mcfuser

            ways = {name: way(network, name, backend=mcfuser) for name in attentions}
        case "zentorch":
            ways = {
                f"{name}{', frozen' * freeze}": way(network, name, backend="zentorch", freeze=freeze)
                for name in attentions
                for freeze in (False, True)
            }
        case _:
            ways = {name: way(network, name, backend="inductor") for name in attentions}
            if not network.backward:
                mode = "max-autotune-no-cudagraphs"
                ways["sdpa, frozen"] = way(network, "sdpa", backend="inductor", freeze=True)
                ways["sdpa, frozen, tuned"] = way(network, "sdpa", backend="inductor", freeze=True, mode=mode)
    return fastest(ways)


if __name__ == "__main__":
    variant, compiled, threads = sys.argv[1], sys.argv[2:-1], int(sys.argv[-1])
    torch.set_num_threads(threads)
    if compiled:
        from scripts.testbed.own_kernels import search

        search(compiled)
    keep_freed_memory()
    if variant == "zentorch":
        importlib.import_module("zentorch")  # which registers its back end
    serve(lambda network: load(variant, network), facts)
