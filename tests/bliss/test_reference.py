"""The reference itself against values worked out by hand."""

import math

import torch

from bliss import BlissConfig, reference


def test_position_target_by_hand() -> None:
    assert reference.position_target(-1, max_displacement=1, temperature=0.0) == [1.0, 0.0, 0.0]
    e = math.exp(-1.0)
    total = 1 + e + e**2
    assert reference.position_target(-7, max_displacement=1, temperature=1.0) == [
        1 / total,
        e / total,
        math.exp(-2) / total,
    ]


def test_sequence_loss_by_hand() -> None:
    logits_TV = torch.zeros(2, 4)
    assert reference.sequence_loss(logits_TV, [1, -100], label_smoothing=0.0) == torch.tensor(4.0).log()


def test_words_are_whole_and_special_tokens_are_walls() -> None:
    starts_word, special = [True, True, False, True, True], [True, False, False, False, False]
    noisy, source_slot, replaced = reference.perturb(
        [1, 2, 2, 0, 3, 4],
        sentence_id=0,
        epoch=0,
        seed=0,
        starts_word=starts_word,
        special=special,
        config=BlissConfig(shuffle_range=9),
        replace_ratio=0.0,
    )
    assert source_slot[:4] == [0, 1, 2, 3]  # one word of three subwords, then the wall
    assert sorted(source_slot[4:]) == [4, 5]
    assert noisy == [[1, 2, 2, 0, 3, 4][slot] for slot in source_slot]
    assert not any(replaced)
