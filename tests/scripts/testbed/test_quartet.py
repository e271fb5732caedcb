"""The wrapper adds what the methods ask for, and without them nothing at all."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import moe_pipeline
from configs.schema import Config, load
from configs.typed import ConfigError
from scripts.testbed import experts, quartet
from scripts.testbed.launch import compose
from scripts.testbed.tasks.build import build as build_task
from scripts.testbed.tasks.task import Task


def smoke(*overrides: str) -> Config:
    return load(compose("train", ["experiment=quartet/demo", "debug=smoke", *overrides]))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return build_task(smoke(), tmp_path_factory.mktemp("run"))


def batch(task: Task, count: int = 6) -> dict[str, Tensor]:
    return task.collate([{**example, "epoch": 2} for example in task.splits.train[:count]])


def test_without_methods_it_is_the_network_bit_for_bit(task: Task) -> None:
    config = smoke("moe=off", "omoe=off", "bliss=off", "fusion=off", "trainer.label_smoothing=0.0")
    model, plain = quartet.build(config, task, moe=False), task.network()
    inputs = batch(task)
    torch.manual_seed(3)
    loss = model.train()(**inputs)["loss"]
    torch.manual_seed(3)
    expected = plain.train()(**{name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    for (name, own), other in zip(model.network.named_parameters(), plain.parameters(), strict=True):
        if own.requires_grad:  # sinusoidal positions do not learn
            assert torch.equal(own.grad, other.grad), name


def test_padding_changes_neither_the_loss_nor_the_load(task: Task) -> None:
    model = quartet.build(smoke("bliss=off"), task, moe=True).eval()
    inputs = batch(task)
    filling = {"input_ids": task.tokenizer.pad_token_id, "labels": -100}
    longer = {
        name: functional.pad(value, (0, 8), value=filling.get(name, 0)) if value.ndim == 2 else value
        for name, value in inputs.items()
    }

    def loads(data: dict[str, Tensor]) -> dict[str, list[int]]:
        with torch.no_grad(), model.routed(data["attention_mask"], data["labels"]) as records:
            model(**data)
        return {name: calls[0].load_E.tolist() for name, calls in records.items()}

    assert loads(inputs) == loads(longer)
    real = int(inputs["attention_mask"].sum())
    assert all(sum(load) == 2 * real for name, load in loads(inputs).items() if "encoder" in name)


def test_training_reports_its_terms_and_they_add_up(task: Task) -> None:
    config = smoke()
    outputs = quartet.build(config, task, moe=True).train()(**batch(task))
    terms = outputs["terms"]
    total = terms["loss_sequence"] + config.bliss.weight * (terms["loss_token"] + terms["loss_position"])
    assert torch.equal(outputs["loss"].detach(), total + terms["loss_routing"])


def test_the_noise_depends_on_the_sentence_and_the_epoch_alone(task: Task) -> None:
    model = quartet.build(smoke("model.dropout=0.0"), task, moe=False).train()

    def token_loss(**changes: Tensor) -> float:
        return float(model(**{**batch(task), **changes})["terms"]["loss_token"])

    assert token_loss() == token_loss()
    assert token_loss() != token_loss(epoch=torch.tensor(3))
    assert token_loss() != token_loss(sentence_id=torch.arange(100, 106))


@pytest.mark.parametrize("mode", ["clean", "corrected"])
def test_it_generates_with_the_networks_own_search(task: Task, mode: str) -> None:
    model = quartet.build(smoke(f"bliss.mode={mode}"), task, moe=True).eval()
    inputs = batch(task, 2)
    generated = model.generate(**inputs, num_beams=2, max_length=12)
    plain = model.network.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], num_beams=2, max_length=12
    )
    assert generated.shape[0] == 2
    if mode == "clean":
        assert torch.equal(generated, plain)


def test_experts_are_measured_without_touching_the_network(task: Task) -> None:
    model = quartet.build(smoke("moe.expert_noise_std=0.0"), task, moe=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measures = experts.measure(model, task)
    layers = [module for module in model.modules() if isinstance(module, moe_pipeline.MoELayer)]
    assert len(measures) == len(layers)
    assert all(measure.similarity == 1.0 and measure.variation == 0.0 for measure in measures)
    assert all(abs(sum(measure.load_share_E) - 1) < torch.finfo(torch.float32).eps * 8 for measure in measures)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert experts.summary(measures) == {"expert_similarity": 1.0}
    assert len(experts.sections(measures, measures)) == 2


def test_a_dense_network_has_no_experts_to_measure(task: Task) -> None:
    model = quartet.build(smoke(), task, moe=False)
    assert experts.measure(model, task) == []
    assert experts.summary([]) == {}
    assert experts.sections([], []) == ()


def test_layers_that_do_not_exist_are_named_beside_those_that_do(task: Task) -> None:
    with pytest.raises(ConfigError, match=r"moe: layers: .*nowhere.*model\.encoder\.layers\.0"):
        quartet.build(smoke("moe.layers=[nowhere]"), task, moe=True)


@pytest.mark.parametrize("gate", ["kind=switch", "kind=gshard", "kind=expert_choice"])
def test_every_gate_trains_from_scratch(task: Task, gate: str) -> None:
    settings = {"kind=switch": ["moe.gate.top_k=1"], "kind=gshard": ["moe.gate.capacity_factor=1.0"]}
    extra = settings.get(gate, ["moe.gate.capacity_factor=1.0"])
    model = quartet.build(smoke(f"moe.gate.{gate}", *extra), task, moe=True).train()
    model(**batch(task))["loss"].backward()
    without = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert without == []


@pytest.mark.gpu
@pytest.mark.parametrize(
    "objective", ["plain", "bliss_both", "bliss_corrected", "bliss_token_cutoff", "rep_sim", "switchout", "vat"]
)
def test_a_gpu_trains_by_every_kind_of_objective(task: Task, objective: str) -> None:
    config = load(compose("train", ["experiment=bliss/multi30k", "debug=smoke", f"objective={objective}"]))
    model = quartet.build(config, task, moe=False).train().cuda()
    model(**{name: value.cuda() for name, value in batch(task).items()})["loss"].backward()
    gradients = [p.grad for p in model.network.parameters() if p.requires_grad]
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in gradients)
