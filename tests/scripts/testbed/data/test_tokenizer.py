import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from scripts.testbed.data import train_tokenizer
from scripts.testbed.data.tokenizer import NUM_FIXED_TOKENS

TEXTS = [f"Wählen Sie {word} - {word} <br> im Menü." for word in ("Einfügen", "Ansicht", "Format", "Extras")] * 9
VOCAB_SIZE = 400


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=VOCAB_SIZE, max_alphabet=60)


def round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    return str(tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True))


def test_the_special_tokens_have_fixed_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4, 259]) == [
        "<pad>",
        "</s>",
        "<unk>",
        "<s>",
        "<0x00>",
        "<0xFF>",
    ]
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
    assert ids == (0, 1, 2, 3)
    assert NUM_FIXED_TOKENS == 260


def test_a_text_ends_in_one_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("Wählen Sie")["input_ids"]
    assert ids[-1] == 1
    assert ids.count(1) == 1
    assert tokenizer("")["input_ids"] == [1]
    assert tokenizer("Sie", "Sie")["input_ids"] == tokenizer("Sie")["input_ids"] * 2


def test_frequent_words_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("Wählen Sie Einfügen") == ["\u2581Wählen", "\u2581Sie", "\u2581Einfügen"]


@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\u2581"), max_size=40))
def test_decoding_gives_every_text_back_and_nothing_is_unknown(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    normal = unicodedata.normalize("NFC", text).strip(" ")
    assert round_trip(tokenizer, normal) == normal
    assert 2 not in tokenizer(normal)["input_ids"]


@pytest.mark.parametrize("text", ["</s>", "<pad> <unk> <s>", "<0x41>", "a  b", "tab\tand\nline", "🙂 ﷽", "< b"])
def test_texts_that_look_special_are_texts(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert round_trip(tokenizer, text) == text
    assert tokenizer(text)["input_ids"].count(1) == 1


def test_no_merge_can_spell_a_special_token_or_a_byte() -> None:
    texts = [f"{letter}{special}{letter}" for letter in "abcdefgh" for special in ("</s>", "<0x41>", "<pad>")]
    hostile = train_tokenizer(texts * 50, vocab_size=330, max_alphabet=30)
    for text in (*texts, "z</s>z", "z<0x41>z", "z<pad>z"):  # the last three are not learnt as whole words
        assert round_trip(hostile, text) == text
        assert hostile(text)["input_ids"].count(1) == 1


def test_saving_and_loading(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    for loaded in (PreTrainedTokenizerFast.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.get_vocab() == tokenizer.get_vocab()
        for text in (*TEXTS[:4], "</s> <0x41>", "ünknown 🙂"):
            assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
            assert round_trip(loaded, text) == text
        assert (loaded.pad_token_id, loaded.eos_token_id, loaded.model_max_length) == (0, 1, 512)


def test_the_same_texts_give_the_same_tokenizer_in_another_process(tokenizer: PreTrainedTokenizerFast) -> None:
    program = (
        "from scripts.testbed.data import train_tokenizer\n"
        f"tokenizer = train_tokenizer({TEXTS!r}, vocab_size={VOCAB_SIZE}, max_alphabet=60)\n"
        "print(tokenizer.backend_tokenizer.to_str())"
    )
    root = Path(__file__).resolve().parents[4]
    other = subprocess.run([sys.executable, "-c", program], cwd=root, check=True, capture_output=True, text=True)
    assert other.stdout.strip() == tokenizer.backend_tokenizer.to_str()


def test_batches_are_padded_and_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = tokenizer(["Sie", "Wählen Sie Einfügen"], padding=True, truncation=True, max_length=3)
    assert [len(ids) for ids in batch["input_ids"]] == [3, 3]
    assert batch["input_ids"][0][-1] == 0
    assert batch["input_ids"][1][-1] == 1
    assert batch["attention_mask"] == [[1, 1, 0], [1, 1, 1]]


def test_a_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size: 320; give at least 321"):
        train_tokenizer(TEXTS, vocab_size=320, max_alphabet=60)
