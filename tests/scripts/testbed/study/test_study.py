"""A study in small: every kind of task, resumed, and with methods that start alike."""

import dataclasses
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from closeness import assert_equal_up_to_rounding

from configs.schema import Config, load
from configs.typed import ConfigError
from scripts.testbed import rows
from scripts.testbed.data import DATA_SETS, DataError
from scripts.testbed.launch import Outcome, Run, compose
from scripts.testbed.study import study
from scripts.testbed.study.record import Record, Records

SENTENCES = ["the red house stands in Bonn", "a dog barks", "Anna lives in Rome", "we saw the sea", "Rome is old"]


def folders(root: Path) -> Path:
    """Tiny sets in the layouts of WNUT-17 and SQuAD."""
    for split in ("train.conll", "dev.conll", "test.annotated"):
        lines = []
        for text in SENTENCES:
            lines += [f"{w}\t{'B-location' if w in ('Bonn', 'Rome') else 'O'}" for w in text.split()] + [""]
        (root / "wnut17").mkdir(parents=True, exist_ok=True)
        (root / "wnut17" / split).write_text("\n".join(lines) + "\n")
    articles = []
    for number in range(48):
        paragraphs = []
        for part in range(5):
            context = f"Text {number} {part}: {SENTENCES[part]}"
            answer = {"text": SENTENCES[part].split()[0], "answer_start": context.index(SENTENCES[part])}
            question = {"id": f"{number}-{part}", "question": "which word comes first", "answers": [answer]}
            paragraphs.append({"context": context, "qas": [question]})
        articles.append({"title": str(number), "paragraphs": paragraphs})
    (root / "xquad").mkdir(parents=True)
    (root / "xquad" / "xquad.en.json").write_text(json.dumps({"data": articles}))
    return root


def configured(*overrides: str) -> Config:
    return load(compose("train", ["experiment=omoe/glue_small", "debug=smoke", "study.seeds=[0]", *overrides]))


def run(config: Config, folder: Path) -> Outcome:
    return study.run(config, Run(folder=folder, rank=0))


def values(outcome: Outcome) -> dict[str, float]:
    return {f"{row.provider}/{row.metric}": row.value for row in outcome.rows}


def roberta(folder: Path) -> Path:
    """A tiny random RoBERTa with its own kind of tokenizer, in the library's format."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(SENTENCES, vocab_size=400, special_tokens=special)
    folder.mkdir()
    trained.save_model(str(folder))
    RobertaTokenizerFast.from_pretrained(str(folder)).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    known = {"vocab_size": trained.get_vocab_size(), "max_position_embeddings": 80, "pad_token_id": 1}
    RobertaModel(RobertaConfig(**sizes, **known, bos_token_id=0, eos_token_id=2)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("task", ["wnut17", "xquad"])
def test_a_roberta_is_studied_like_a_bert(task: str, tmp_path: Path) -> None:
    config = configured(
        f"study.tasks=[{task}]",
        f"data.root={folders(tmp_path / 'data')}",
        f"model.pretrained={roberta(tmp_path / 'roberta')}",
        "study.methods=[adamw,'omoe_input:alpha=1.0']",
        "trainer.max_steps=5",
    )
    found = values(run(config, tmp_path))
    assert found[f"adamw/{task}_variation_before"] == 0
    assert found[f"omoe_input:alpha=1.0/{task}_change_cosine"] < 1
    assert 0 < found[f"omoe_input:alpha=1.0/{task}_leftover"] <= 1
    assert f"adamw/{task}_leftover" not in found


def test_suites_are_all_of_their_sets() -> None:
    assert study.data_sets(("sst2", "glue", "rte")) == (
        *("sst2", "cola", "mrpc", "qqp", "stsb", "mnli", "mnli_mismatched", "qnli", "rte", "wnli"),
    )
    for name in study.data_sets(("glue", "super_glue", "squad", "conll2003")):
        assert DATA_SETS[name].hub is not None


def test_a_set_that_cannot_be_had_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    config = dataclasses.replace(configured("study.tasks=[conll2003]"), smoke=False)
    with pytest.raises(
        DataError, match=r"data conll2003: hub:eriktks/conll2003 cannot be fetched.*Fix: data\.root=PATH"
    ):
        run(config, tmp_path)


def test_the_first_runs_of_a_format_have_no_leftover(tmp_path: Path) -> None:
    """Committed runs from before it was measured are read, and are not run again."""
    config = configured("study.methods=[omoe]", "study.seeds=[0,1]", "trainer.max_steps=3")
    first = values(run(config, tmp_path))
    assert first["omoe/vader_movie_leftover"] < 1e-4
    kept = sorted((tmp_path / "runs").rglob("*.json"))
    for path in kept:
        content = json.loads(path.read_text())
        del content["finished"]["leftover"]
        path.write_text(json.dumps(content))
    second = values(run(config, tmp_path))
    assert second == {name: value for name, value in first.items() if not name.endswith("_leftover")}


@pytest.mark.parametrize("task", ["wnut17", "xquad"])
def test_tags_and_answers_are_studied_too(task: str, tmp_path: Path) -> None:
    config = configured(
        f"study.tasks=[{task}]", f"data.root={folders(tmp_path / 'data')}", "study.methods=[adamw,omoe]"
    )
    found = values(run(config, tmp_path))
    metric = {"wnut17": "entity_f1", "xquad": "answer_f1"}[task]
    assert 0 <= found[f"omoe/{task}_{metric}"] <= 100
    assert found[f"adamw/{task}_output_cosine_before"] == 1
    assert found[f"adamw/{task}_variation_before"] == 0


def test_a_finished_run_is_kept_a_damaged_one_repeated_and_both_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = configured("study.methods=[adamw,omoe,same_length]", "trainer.max_steps=3")
    first = values(run(config, tmp_path))
    files = sorted((tmp_path / "runs").rglob("*.json"))
    assert len(files) == 3
    files[0].write_text("{")
    repeated: list[str] = []
    real = Records.put

    def put(records: Records, name: str, done: Record) -> Record:
        repeated.append(done.method)
        return real(records, name, done)

    monkeypatch.setattr(Records, "put", put)
    assert values(run(config, tmp_path)) == first
    assert len(repeated) == 1
    assert "run again" in caplog.text
    assert values(run(config, tmp_path)) == first
    assert len(repeated) == 1


def test_committed_runs_are_found_without_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    config = dataclasses.replace(configured("study.methods=[adamw]", "trainer.max_steps=2"), smoke=False, record=True)
    config = dataclasses.replace(
        config, study=dataclasses.replace(config.study, tasks=("vader_movie",), folder=str(tmp_path / "runs"))
    )
    first = values(run(config, tmp_path))
    for path in (tmp_path / "runs").iterdir():
        path.unlink()
    finished = dataclasses.replace(config, study=dataclasses.replace(config.study, only_finished=True))
    assert values(run(finished, tmp_path)) == first


def test_what_was_not_run_is_not_made_up(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished run"):
        run(configured("study.only_finished=true"), tmp_path)


def test_methods_start_alike_and_differ_by_what_they_are(tmp_path: Path) -> None:
    """Before an expert has changed nothing is taken out, so the losses of the first two steps are the same."""
    methods = "study.methods=[adamw,omoe,same_length,'expert_lr:factor=0.1',output_orthogonality]"
    config = configured(methods, "trainer.max_steps=4")
    run(config, tmp_path)
    records = Records(tmp_path / "runs", tmp_path / "none")
    kept = [records.get(path.stem) for path in (tmp_path / "runs").rglob("*.json")]
    losses = {done.method: done.finished.losses for done in kept if done is not None}
    assert losses["adamw"][:2] == losses["omoe"][:2] == losses["same_length"][:2]
    assert losses["adamw"][0] == losses["expert_lr:factor=0.1"][0] == losses["output_orthogonality"][0]
    assert len({tuple(loss) for loss in losses.values()}) == 5


def test_outputs_that_do_not_fit_are_computed_when_they_are_read(tmp_path: Path) -> None:
    config = configured("study.methods=[adamw,omoe]", "trainer.max_steps=3", "trainer.precision=fp32")
    kept = values(run(config, tmp_path / "kept"))
    study_section = dataclasses.replace(config.study, features_gb=0.0)
    read = values(run(dataclasses.replace(config, study=study_section), tmp_path / "read"))
    assert read.keys() == kept.keys()
    for name in ("adamw/vader_movie_variation", "omoe/vader_movie_change_size"):
        pair = torch.tensor([[read[name]], [kept[name]]])
        assert_equal_up_to_rounding(name, pair[0], pair[1], roundings=2**16)  # other paddings, three steps of AdamW


def test_a_study_leaves_the_random_stream_alone(tmp_path: Path) -> None:
    config = configured("study.methods=[adamw]", "trainer.max_steps=2")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    run(config, tmp_path)
    assert torch.equal(torch.rand(2), expected)


def test_too_many_frozen_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="frozen_layers: got 2, accepts 0 to 1"):
        run(configured("study.frozen_layers=2"), tmp_path)
