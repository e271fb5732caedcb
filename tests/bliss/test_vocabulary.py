import pytest
import torch

from bliss import Vocabulary


@pytest.mark.parametrize(
    ("tokens", "starts"),
    [
        (["<s>", "\u2581the", "re", "\u2581a", "##"], [False, True, False, True, False]),
        (["<s>", "\u0120the", "re", "\u0120a", "##"], [False, True, False, True, False]),
        (["[CLS]", "the", "##re", "##s", "a"], [True, True, False, False, True]),
    ],
)
def test_reads_word_starts_off_the_marking(tokens: list[str], starts: list[bool]) -> None:
    vocabulary = Vocabulary.from_tokens(tokens, special_ids=[0, 0])
    assert vocabulary.starts_word_V.tolist() == starts
    assert vocabulary.special_V.tolist() == [True, False, False, False, False]
    assert vocabulary.drawable_N.tolist() == [1, 2, 3, 4]


def test_moves_between_devices() -> None:
    moved = Vocabulary.from_tokens(["\u2581a", "b"], special_ids=[]).to(torch.device("cpu"))
    assert moved.to("cpu") is moved
    assert moved.starts_word_V.tolist() == [True, False]


def test_names_what_is_wrong() -> None:
    flags = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="tokens: none of the 2 tokens"):
        Vocabulary.from_tokens(["a", "b"], special_ids=[])
    with pytest.raises(ValueError, match="special_ids has 2"):
        Vocabulary.from_tokens(["\u2581a", "b"], special_ids=[2])
    with pytest.raises(ValueError, match="special_ids has -1"):
        Vocabulary.from_tokens(["\u2581a", "b"], special_ids=[-1])
    with pytest.raises(TypeError, match="starts_word_V is torch"):
        Vocabulary(starts_word_V=flags.long(), special_V=flags)
    with pytest.raises(ValueError, match="special_V has 2 entries"):
        Vocabulary(starts_word_V=flags, special_V=flags[:2])
    with pytest.raises(ValueError, match="special_V leaves 0 ordinary ids"):
        Vocabulary(starts_word_V=flags, special_V=flags)
