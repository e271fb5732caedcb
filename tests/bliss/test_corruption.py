import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bliss import Draw, RivalConfig, Vocabulary, reference
from bliss.config import RivalKind
from bliss.corruption import Side, corrupt, corruption_rate, switched_share

NUM_IDS, PAD = 23, 0
SPECIAL = [index < 3 for index in range(NUM_IDS)]
VOCABULARY = Vocabulary(starts_word_V=torch.ones(NUM_IDS, dtype=torch.bool), special_V=torch.tensor(SPECIAL))
EMBEDDING = torch.randn(NUM_IDS, 5, generator=torch.Generator().manual_seed(3))
KINDS: list[RivalKind] = ["word_dropout", "rep_uni", "rep_sim", "switchout", "token_cutoff", "simcut", "r_drop", "vat"]
SENTENCES = st.lists(st.lists(st.integers(1, NUM_IDS - 1), max_size=9), min_size=1, max_size=4)


def padded(rows: Sequence[Sequence[int]], *, left: int = 0) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows)) + left
    ids = [[PAD] * left + list(row) + [PAD] * (width - left - len(row)) for row in rows]
    real = [[0] * left + [1] * len(row) + [0] * (width - left - len(row)) for row in rows]
    shape = (len(rows), width)
    return torch.tensor(ids, dtype=torch.long).view(shape), torch.tensor(real, dtype=torch.long).view(shape)


def draw(count: int, *, epoch: int = 2, seed: int = 5) -> Draw:
    return Draw(sentence_id_B=torch.arange(count) + 11, epoch=epoch, seed=seed)


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(rows=SENTENCES, rate=st.sampled_from([0.0, 0.4, 1.0]), left=st.integers(0, 2))
def test_equals_the_reference_whatever_the_padding(
    kind: RivalKind, side: Side, rows: list[list[int]], rate: float, left: int
) -> None:
    config = RivalConfig(kind=kind, rate=rate, temperature=2.0)
    ids_BS, real_BS = padded(rows, left=left)
    found = corrupt(
        ids_BS, real_BS, side=side, config=config, draw=draw(len(rows)), vocabulary=VOCABULARY, embedding_VM=EMBEDDING
    )
    kept_BS = torch.ones_like(ids_BS, dtype=torch.bool) if found.kept_BS is None else found.kept_BS
    for index, row in enumerate(rows):
        ids, kept = reference.corrupt(
            row, sentence_id=11 + index, epoch=2, seed=5, side=side, special=SPECIAL, config=config, rate=rate,
            embedding_VM=EMBEDDING,
        )  # fmt: skip
        real = real_BS[index] != 0
        assert found.ids_BS[index][real].tolist() == ids
        assert kept_BS[index][real].tolist() == kept
        assert kept_BS[index][~real].all()
        assert torch.equal(found.ids_BS[index][~real], ids_BS[index][~real])


@pytest.mark.parametrize("kind", KINDS)
def test_a_sentence_is_corrupted_alike_in_every_batch_and_anew_in_every_epoch(kind: RivalKind) -> None:
    config = RivalConfig(kind=kind, rate=0.5, temperature=9.0)
    rows = [[3 + (7 * index + slot) % 20 for slot in range(20)] for index in range(6)]
    ids_BS, real_BS = padded(rows)

    def run(rows_B: list[int], epoch: int, side: Side = "source") -> Tensor:
        own = Draw(sentence_id_B=torch.tensor(rows_B), epoch=epoch, seed=1)
        found = corrupt(
            ids_BS[rows_B], real_BS[rows_B], side=side, config=config, draw=own, vocabulary=VOCABULARY,
            embedding_VM=EMBEDDING,
        )  # fmt: skip
        return found.ids_BS if found.kept_BS is None else found.ids_BS * found.kept_BS

    assert torch.equal(run([4, 1], 0), run([0, 1, 2, 3, 4], 0)[[4, 1]])
    changes = kind not in ("r_drop", "vat")
    assert torch.equal(run([0, 1], 0), run([0, 1], 1)) != changes
    assert torch.equal(run([0, 1], 0), run([0, 1], 0, "target")) != changes


def test_cut_tokens_embed_to_zero_and_the_others_as_they_were() -> None:
    ids_BS, real_BS = padded([[5, 6, 7, 8], [9]])
    config = RivalConfig(kind="simcut", rate=0.5)
    found = corrupt(ids_BS, real_BS, side="source", config=config, draw=draw(2), vocabulary=VOCABULARY)
    embedded = nn.functional.embedding(ids_BS, EMBEDDING)
    assert found.kept_BS is not None
    assert not found.kept_BS.all()
    assert torch.equal(found.cut(embedded), torch.where(found.kept_BS[..., None], embedded, 0))


def test_switchout_draws_counts_in_proportion_to_their_weights() -> None:
    length, temperature, count = 4, 1.5, 20000
    own = Draw(sentence_id_B=torch.arange(count), epoch=0, seed=0)
    share = switched_share(torch.full((count, 1), length), own, "source", temperature)
    found = torch.bincount((share.flatten() * length).round().long(), minlength=length + 1) / count
    weights = torch.tensor([math.exp(-n / temperature) for n in range(length + 1)])
    expected = weights / weights.sum()
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() < 5 * deviation).all()


def test_the_ramp_ends_at_the_rate_and_needs_the_step() -> None:
    config = RivalConfig(kind="rep_uni", rate=0.2, ramp_steps=10)
    assert corruption_rate(config, step=0) < 0.1
    assert corruption_rate(config, step=10**6 // 2000) == 0.2
    with pytest.raises(ValueError, match="step is None; with ramp_steps=10"):
        corruption_rate(config, step=None)
