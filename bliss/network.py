"""What is used of an encoder-decoder network: encode, decode, and change what either embeds.

B  sentence
S  slot of the source
T  slot of the target
M  width of the encoder
V  id of the vocabulary
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]


class EncoderOutputs(Protocol):
    """What an encoder returns: a Hugging Face `ModelOutput` (not in the paper)."""

    last_hidden_state: Tensor


class DecoderOutputs(Protocol):
    """What a network returns: a Hugging Face `ModelOutput` (not in the paper)."""

    logits: Tensor


class Stack(Protocol):
    """An encoder or a decoder (not in the paper)."""

    @property
    def __call__(self) -> Callable[..., EncoderOutputs]: ...

    def get_input_embeddings(self) -> nn.Module: ...


class EncoderDecoder(Protocol):
    """What is used of a network; Marian, BART, T5 and EncoderDecoderModel have it (not in the paper)."""

    @property
    def __call__(self) -> Callable[..., DecoderOutputs]: ...

    def get_encoder(self) -> Stack: ...

    def get_decoder(self) -> Stack: ...

    def get_input_embeddings(self) -> nn.Embedding: ...

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor: ...


def encode_source(
    network: EncoderDecoder, input_ids_BS: Tensor, attention_mask_BS: Tensor, change: Change | None = None
) -> EncoderOutputs:
    """Run the encoder.

    Args:
        network: The network.
        input_ids_BS: int64 (B, S), the source.
        attention_mask_BS: (B, S), 0 for padding.
        change: Maps the embedded source, (B, S, width), to what the encoder reads in its place.

    Returns:
        The encoder's outputs, with states (B, S, M).

    Source: not in the paper.
    """
    encoder = network.get_encoder()
    with changed_embeddings(encoder, change):
        return encoder(input_ids=input_ids_BS, attention_mask=attention_mask_BS, return_dict=True)


def decode_target(
    network: EncoderDecoder,
    states_BSM: Tensor,
    attention_mask_BS: Tensor,
    decoder_input_ids_BT: Tensor,
    change: Change | None = None,
) -> Tensor:
    """Run the decoder on given states.

    Args:
        network: The network.
        states_BSM: (B, S, M), what the decoder attends to.
        attention_mask_BS: (B, S), 0 for padding.
        decoder_input_ids_BT: int64 (B, T), the target moved right by one.
        change: Maps the embedded target, (B, T, width), to what the decoder reads in its place.

    Returns:
        Logits (B, T, V).

    Source: not in the paper.
    """
    # Not labels=: the network would compute a cross entropy of its own that nobody reads.
    with changed_embeddings(network.get_decoder(), change):
        return network(
            encoder_outputs=(states_BSM,),
            attention_mask=attention_mask_BS,
            decoder_input_ids=decoder_input_ids_BT,
            use_cache=False,
            return_dict=True,
        ).logits


@contextmanager
def changed_embeddings(stack: Stack, change: Change | None) -> Iterator[None]:
    """Let an encoder or decoder read changed embeddings inside the block; with None nothing is touched.

    A hook, since networks differ in where they scale embeddings, and only the embedding's own output is alike in all.

    Source: not in the paper.
    """
    if change is None:
        yield
        return

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return change(output)

    handle = stack.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
