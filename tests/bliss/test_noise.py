import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from bliss import reference
from bliss.noise import random_bits

INT64 = st.integers(-(2**63), 2**63 - 1)


@given(sentence=INT64, counter=st.integers(0, 2**31), seed=st.integers(0, 2**64), epoch=st.integers(0, 2**31))
def test_equals_the_hash_in_exact_integers(sentence: int, counter: int, seed: int, epoch: int) -> None:
    bits = random_bits(torch.tensor([sentence]), torch.tensor([[counter]]), seed=seed, epoch=epoch, stream=1)
    assert bits.item() == reference.random_bits(sentence, counter, seed=seed, epoch=epoch, stream=1)
    assert 0 <= bits.item() < 2**32


def test_dtype_of_the_sentence_ids_does_not_matter() -> None:
    counters = torch.arange(7).expand(3, -1)
    of_dtype = [
        random_bits(torch.tensor([0, 5, 100], dtype=dtype), counters, seed=0, epoch=0, stream=0)
        for dtype in (torch.int64, torch.int32, torch.uint8)
    ]
    assert all(torch.equal(bits, of_dtype[0]) for bits in of_dtype)


def _draws(num_sentences: int, num_counters: int, **key: int) -> torch.Tensor:
    counters = torch.arange(num_counters).expand(num_sentences, -1)
    return random_bits(torch.arange(num_sentences), counters, **({"seed": 0, "epoch": 0, "stream": 0} | key))


def test_is_uniform_to_six_standard_deviations() -> None:
    draws = _draws(400, 100)
    num_bins = 64
    expected = draws.numel() / num_bins
    spread = math.sqrt(expected * (1 - 1 / num_bins))
    for shift in (26, 13, 0):  # the top, middle and bottom six bits
        counts = ((draws >> shift) % num_bins).flatten().bincount(minlength=num_bins)
        assert (counts - expected).abs().max() < 6 * spread


def test_neighbours_epochs_streams_and_seeds_are_uncorrelated() -> None:
    draws = _draws(400, 100).double()
    others = {
        "next counter": draws.roll(1, 1),
        "next sentence": draws.roll(1, 0),
        "epoch": _draws(400, 100, epoch=1).double(),
        "stream": _draws(400, 100, stream=1).double(),
        "seed": _draws(400, 100, seed=1).double(),
        "high seed": _draws(400, 100, seed=1 << 32).double(),
    }
    for name, other in others.items():
        correlation = torch.corrcoef(torch.stack([draws.flatten(), other.flatten()]))[0, 1]
        assert correlation.abs() < 6 / math.sqrt(draws.numel()), name


def test_no_sentence_has_the_noise_of_another() -> None:
    assert _draws(400, 100).unique().numel() > 400 * 100 - 20  # about 0.2 collisions are expected by chance
