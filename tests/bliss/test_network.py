from collections.abc import Callable

import pytest
import torch
from torch import nn

from bliss.network import changed_embeddings, decode_target, encode_source

IDS, MASK = torch.tensor([[5, 7, 9, 1], [4, 1, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
KINDS = ["marian", "bart", "t5", "bert2bert"]


@pytest.mark.parametrize("kind", KINDS)
def test_changes_reach_one_side_alone_and_only_inside_the_block(
    make_network: Callable[..., nn.Module], kind: str
) -> None:
    network = make_network(kind)
    plain = encode_source(network, IDS, MASK).last_hidden_state
    logits = decode_target(network, plain, MASK, IDS)
    zeroed = encode_source(network, IDS, MASK, torch.zeros_like).last_hidden_state
    assert not torch.equal(zeroed, plain)
    assert torch.equal(encode_source(network, IDS, MASK).last_hidden_state, plain)
    assert not torch.equal(decode_target(network, plain, MASK, IDS, torch.zeros_like), logits)
    assert torch.equal(decode_target(network, plain, MASK, IDS), logits)
    # all words look alike, so a sentence is told apart by its positions alone
    swapped = encode_source(network, IDS[:, [1, 0, 3, 2]], MASK, torch.zeros_like).last_hidden_state
    assert torch.equal(swapped, zeroed)


def test_the_hook_goes_even_where_the_network_fails(make_network: Callable[..., nn.Module]) -> None:
    encoder = make_network("marian").get_encoder()
    with pytest.raises(RuntimeError, match="stop"), changed_embeddings(encoder, torch.zeros_like):
        raise RuntimeError("stop")
    assert not encoder.get_input_embeddings()._forward_hooks
