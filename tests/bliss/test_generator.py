import math
from dataclasses import dataclass

import pytest
import torch
from closeness import assert_equal_up_to_rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bliss import BlissConfig, Vocabulary, perturb, reference
from bliss.generator import Perturbed, replacement_probability, similar_ids

PAD, EOS, BOS, NUM_IDS = 0, 1, 2, 19
SPECIAL = [index < 3 for index in range(NUM_IDS)]
STARTS = [index % 3 != 0 for index in range(NUM_IDS)]
VOCABULARY = Vocabulary(starts_word_V=torch.tensor(STARTS), special_V=torch.tensor(SPECIAL))
EMBEDDING = torch.randn(NUM_IDS, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

sentences = st.lists(st.lists(st.integers(1, NUM_IDS - 1), max_size=14), min_size=1, max_size=5)
configs = st.builds(
    BlissConfig,
    shuffle_range=st.integers(0, 6),
    replace_ratio=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    replace_by=st.sampled_from(["uniform", "similar"]),
)


@dataclass(frozen=True)
class Batch:
    input_ids_BS: Tensor
    attention_mask_BS: Tensor


def pad(rows: list[list[int]], *, left: bool = False, extra: int = 0) -> Batch:
    width = max(map(len, rows), default=0) + extra
    padding = [[PAD] * (width - len(row)) for row in rows]
    ids = [gap + row if left else row + gap for row, gap in zip(rows, padding, strict=True)]
    mask = [
        [0] * len(g) + [1] * len(r) if left else [1] * len(r) + [0] * len(g) for r, g in zip(rows, padding, strict=True)
    ]
    shape = (len(rows), width)
    return Batch(torch.tensor(ids, dtype=torch.int64).reshape(shape), torch.tensor(mask).reshape(shape))


def noise(
    batch: Batch, config: BlissConfig, ids: list[int] | None = None, *, epoch: int = 0, seed: int = 0
) -> Perturbed:
    sentence_id_B = torch.tensor(ids if ids is not None else range(len(batch.input_ids_BS)), dtype=torch.int64)
    return perturb(
        batch.input_ids_BS,
        batch.attention_mask_BS,
        sentence_id_B=sentence_id_B,
        epoch=epoch,
        seed=seed,
        vocabulary=VOCABULARY,
        config=config,
        embedding_VM=EMBEDDING,
    )


def row(
    perturbed: Perturbed, index: int, length: int, *, left: bool = False
) -> tuple[list[int], list[int], list[bool]]:
    """One sentence of a perturbed batch, its padding taken away."""
    start = perturbed.input_ids_BS.shape[1] - length if left else 0
    ids, slots, replaced = (
        tensor[index, start : start + length]
        for tensor in (perturbed.input_ids_BS, perturbed.source_slot_BS - start, perturbed.replaced_BS)
    )
    return ids.tolist(), slots.tolist(), replaced.tolist()


def words_of(tokens: list[int]) -> list[list[int]]:
    """Slots of the words of a sentence, special tokens left out."""
    words: list[list[int]] = []
    for slot, token in enumerate(tokens):
        if SPECIAL[token]:
            continue
        if slot == 0 or SPECIAL[tokens[slot - 1]] or STARTS[token]:
            words.append([])
        words[-1].append(slot)
    return words


@settings(max_examples=60, deadline=None)
@given(rows=sentences, config=configs, epoch=st.integers(0, 3), left=st.booleans(), extra=st.integers(0, 3))
def test_equals_the_reference_under_any_padding(
    rows: list[list[int]], config: BlissConfig, epoch: int, left: bool, extra: int
) -> None:
    perturbed = noise(pad(rows, left=left, extra=extra), config, epoch=epoch, seed=5)
    for index, tokens in enumerate(rows):
        expected = reference.perturb(
            tokens,
            sentence_id=index,
            epoch=epoch,
            seed=5,
            starts_word=STARTS,
            special=SPECIAL,
            config=config,
            replace_ratio=config.replace_ratio,
            embedding_VM=EMBEDDING,
        )
        assert row(perturbed, index, len(tokens), left=left) == expected


@settings(max_examples=60, deadline=None)
@given(rows=sentences, config=configs)
def test_invariants_of_the_definition(rows: list[list[int]], config: BlissConfig) -> None:
    batch = pad(rows, extra=2)
    perturbed = noise(batch, config)
    slots = torch.arange(batch.input_ids_BS.shape[1])
    assert torch.equal(perturbed.source_slot_BS.sort(1).values, slots.expand(len(rows), -1))  # a permutation

    fixed_BS = (batch.attention_mask_BS == 0) | VOCABULARY.special_V[batch.input_ids_BS]
    assert torch.equal(perturbed.source_slot_BS[fixed_BS], slots.expand(len(rows), -1)[fixed_BS])
    assert torch.equal(perturbed.input_ids_BS[fixed_BS], batch.input_ids_BS[fixed_BS])
    assert not perturbed.replaced_BS[fixed_BS].any()
    assert not VOCABULARY.special_V[perturbed.input_ids_BS[~fixed_BS]].any()

    kept_BS = ~perturbed.replaced_BS
    moved_BS = batch.input_ids_BS.gather(1, perturbed.source_slot_BS)
    assert torch.equal(perturbed.input_ids_BS[kept_BS], moved_BS[kept_BS])

    for index, tokens in enumerate(rows):
        words = words_of(tokens)
        source_slot = perturbed.source_slot_BS[index].tolist()
        order = []
        for slot in (slot for slot in source_slot if any(slot == word[0] for word in words)):
            word = next(word for word in words if word[0] == slot)
            at = source_slot.index(slot)
            assert source_slot[at : at + len(word)] == word  # subwords stay together and in order
            assert len(set(perturbed.replaced_BS[index, at : at + len(word)].tolist())) == 1  # replaced whole
            order.append(words.index(word))
        assert sorted(order) == list(range(len(words)))
        assert all(abs(place - word) < max(config.shuffle_range, 1) for place, word in enumerate(order))


@settings(max_examples=40, deadline=None)
@given(rows=sentences, shuffle_range=st.integers(0, 1), replace_by=st.sampled_from(["uniform", "similar"]))
def test_no_shuffle_and_no_replacement_is_the_identity(
    rows: list[list[int]], shuffle_range: int, replace_by: str
) -> None:
    batch = pad(rows)
    perturbed = noise(batch, BlissConfig(shuffle_range=shuffle_range, replace_ratio=0.0, replace_by=replace_by))
    assert torch.equal(perturbed.input_ids_BS, batch.input_ids_BS)
    assert torch.equal(perturbed.source_slot_BS, torch.arange(batch.input_ids_BS.shape[1]).expand(len(rows), -1))
    assert not perturbed.replaced_BS.any()


@settings(max_examples=40, deadline=None)
@given(rows=sentences, config=configs, cut=st.integers(0, 5), order=st.randoms(use_true_random=False))
def test_noise_does_not_depend_on_the_batch(
    rows: list[list[int]], config: BlissConfig, cut: int, order: object
) -> None:
    whole = noise(pad(rows), config)
    indices = list(range(len(rows)))
    order.shuffle(indices)  # type: ignore[attr-defined]
    for part in (indices[:cut], indices[cut:]):
        if part:
            alone = noise(pad([rows[index] for index in part], extra=1), config, part)
            for place, index in enumerate(part):
                assert row(alone, place, len(rows[index])) == row(whole, index, len(rows[index]))


def test_epochs_sentences_and_seeds_differ() -> None:
    rows = [[BOS, *range(4, 18, 3), *range(5, 18, 3), EOS]] * 2
    config = BlissConfig(replace_ratio=0.5)
    first = noise(pad(rows), config)
    assert row(first, 0, 12) != row(first, 1, 12)
    assert row(noise(pad(rows), config, epoch=1), 0, 12) != row(first, 0, 12)
    assert row(noise(pad(rows), config, seed=1), 0, 12) != row(first, 0, 12)
    assert row(noise(pad(rows), config), 0, 12) == row(first, 0, 12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_dtype_of_the_mask_does_not_matter(dtype: torch.dtype) -> None:
    batch = pad([[4, 5, 7, 8, EOS], [4, EOS]])
    config = BlissConfig(replace_ratio=0.5)
    other = noise(Batch(batch.input_ids_BS, batch.attention_mask_BS.to(dtype)), config)
    assert torch.equal(other.input_ids_BS, noise(batch, config).input_ids_BS)


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (3, 0), (3, 4)])
def test_empty_batches_and_rows_of_padding(shape: tuple[int, int]) -> None:
    for replace_by in ("uniform", "similar"):
        batch = Batch(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64))
        perturbed = noise(batch, BlissConfig(replace_ratio=1.0, replace_by=replace_by))
        assert torch.equal(perturbed.input_ids_BS, batch.input_ids_BS)
        assert perturbed.source_slot_BS.shape == perturbed.replaced_BS.shape == shape


@pytest.mark.parametrize("gamma", [0.05, 0.1, 0.3])
def test_rate_of_replacement_is_binomial(gamma: float) -> None:
    words = pad([[4, 5, 7, 8, 10, 11, 13, 14, 16, 17]] * 3000)  # ten words of one subword
    num_words = words.input_ids_BS.numel()
    num_replaced = int(noise(words, BlissConfig(replace_ratio=gamma)).replaced_BS.sum())
    assert abs(num_replaced - gamma * num_words) < 5 * math.sqrt(num_words * gamma * (1 - gamma))


@pytest.mark.parametrize("replace_by", ["uniform", "similar"])
def test_replacements_have_their_distribution(replace_by: str) -> None:
    batch = pad([[4] * 10] * 2000)
    perturbed = noise(batch, BlissConfig(replace_ratio=1.0, replace_by=replace_by))
    counts_V = perturbed.input_ids_BS.flatten().bincount(minlength=NUM_IDS)
    if replace_by == "uniform":
        weights_V = torch.ones(NUM_IDS)
    else:
        weights_V = (torch.cosine_similarity(EMBEDDING[4], EMBEDDING) / 0.1).exp()
        weights_V[4] = 0.0
    weights_V[:3] = 0.0
    p_V = weights_V / weights_V.sum()
    num_draws = batch.input_ids_BS.numel()
    assert ((counts_V - num_draws * p_V).abs() <= 5 * (num_draws * p_V * (1 - p_V)).sqrt() + 1).all()


def test_two_words_swap_half_the_time_that_their_scores_cross() -> None:
    num_rows, shuffle_range = 20000, 3
    perturbed = noise(pad([[4, 5]] * num_rows), BlissConfig(shuffle_range=shuffle_range, replace_ratio=0.0))
    # The difference of two uniforms on [0, K) exceeds 1 with probability (1 - 1 / K)^2 / 2.
    p = (1 - 1 / shuffle_range) ** 2 / 2
    num_swapped = int(perturbed.source_slot_BS[:, 0].sum())
    assert abs(num_swapped - num_rows * p) < 5 * math.sqrt(num_rows * p * (1 - p))


def test_similar_draws_do_not_depend_on_autocast() -> None:
    batch, config = pad([list(range(3, 19))] * 50), BlissConfig(replace_ratio=1.0, replace_by="similar")
    plain = noise(batch, config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(noise(batch, config).input_ids_BS, plain.input_ids_BS)


@pytest.mark.parametrize("bits", [0, 2**32 - 1])
def test_similar_draws_at_both_ends_of_the_distribution(bits: int) -> None:
    for original, end in ((3, 4), (NUM_IDS - 1, NUM_IDS - 2)):
        drawn_R = similar_ids(torch.tensor([original]), torch.tensor([bits]), VOCABULARY, EMBEDDING)
        ends = {0: (3, end), 2**32 - 1: (end, NUM_IDS - 1)}[bits]
        assert drawn_R.item() in set(ends) - {original}


def test_ramp_follows_its_schedule_and_reaches_gamma() -> None:
    config = BlissConfig(replace_ratio=0.3, ramp_steps=50)
    ramp = [replacement_probability(config, step=step) for step in range(0, 1000, 10)]
    keep = [max(1 - 0.3, 50 / (50 + math.exp(step / 50))) for step in range(0, 1000, 10)]
    expected = torch.tensor([1 - value for value in keep], dtype=torch.float64)
    assert_equal_up_to_rounding("ramp", torch.tensor(ramp, dtype=torch.float64), expected, roundings=8)
    assert 0 < ramp[0] < 2 / 50
    assert ramp == sorted(ramp)
    assert replacement_probability(config, step=10**9) == 0.3
    assert replacement_probability(BlissConfig(replace_ratio=0.3), step=None) == 0.3


def test_ramp_reaches_the_batch() -> None:
    batch, config = pad([[4, 5, 7, 8]] * 500), BlissConfig(replace_ratio=0.5, ramp_steps=100)
    arguments = {"sentence_id_B": torch.arange(500), "epoch": 0, "seed": 0, "vocabulary": VOCABULARY, "config": config}
    early, late = (
        perturb(batch.input_ids_BS, batch.attention_mask_BS, step=step, **arguments).replaced_BS.float().mean()  # type: ignore[arg-type]
        for step in (0, 10_000)
    )
    assert early < 0.03 < 0.4 < late


def test_names_what_is_wrong() -> None:
    batch = pad([[4, 5, 7]])
    ids, mask = batch.input_ids_BS, batch.attention_mask_BS

    def call(ids: Tensor = ids, mask: Tensor = mask, **changes: object) -> None:
        arguments = {"sentence_id_B": torch.tensor([0]), "epoch": 0, "seed": 0, "vocabulary": VOCABULARY}
        perturb(ids, mask, **(arguments | {"config": BlissConfig()} | changes))  # type: ignore[arg-type]

    call()
    with pytest.raises(ValueError, match=r"input_ids_BS is torch.float32"):
        call(ids=ids.float())
    with pytest.raises(ValueError, match=r"input_ids_BS is torch.int64 of shape"):
        call(ids=ids[0])
    with pytest.raises(ValueError, match=r"input_ids_BS runs from -100"):
        call(ids=ids.masked_fill(ids == 5, -100))
    with pytest.raises(ValueError, match="input_ids_BS runs from 4 to 19"):
        call(ids=ids.masked_fill(ids == 5, NUM_IDS))
    with pytest.raises(ValueError, match=r"attention_mask_BS has shape"):
        call(mask=mask[:, :2])
    with pytest.raises(ValueError, match=r"sentence_id_B is torch\.int64 of shape"):
        call(sentence_id_B=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"sentence_id_B is torch.float32"):
        call(sentence_id_B=torch.tensor([0.0]))
    with pytest.raises(ValueError, match="vocabulary is on cpu and the batch on meta"):
        call(ids=ids.to("meta"), mask=mask.to("meta"))
    with pytest.raises(ValueError, match="step is None"):
        call(config=BlissConfig(ramp_steps=10))
    with pytest.raises(ValueError, match="step is -1"):
        call(config=BlissConfig(ramp_steps=10), step=-1)
    with pytest.raises(ValueError, match="embedding_VM has shape None"):
        call(config=BlissConfig(replace_by="similar"))
    with pytest.raises(ValueError, match=r"embedding_VM has shape \(3, 5\)"):
        call(config=BlissConfig(replace_by="similar"), embedding_VM=EMBEDDING[:3])


@pytest.mark.gpu
@pytest.mark.parametrize("replace_by", ["uniform", "similar"])
def test_a_gpu_draws_the_same_noise(replace_by: str) -> None:
    batch, config = pad([list(range(3, 19))] * 50), BlissConfig(replace_ratio=0.5, replace_by=replace_by)
    expected = noise(batch, config)
    actual = perturb(
        batch.input_ids_BS.cuda(),
        batch.attention_mask_BS.cuda(),
        sentence_id_B=torch.arange(50).cuda(),
        epoch=0,
        seed=0,
        vocabulary=VOCABULARY.to("cuda"),
        config=config,
        embedding_VM=EMBEDDING.cuda(),
    )
    for name in ("input_ids_BS", "source_slot_BS", "replaced_BS"):
        assert torch.equal(getattr(actual, name).cpu(), getattr(expected, name)), name
