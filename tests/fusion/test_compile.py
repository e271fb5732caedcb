import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from closeness import assert_all_close, assert_equal_up_to_rounding
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fusion import report
from fusion.compile import Backend, mcfuser
from fusion.plan.derived import GradientError
from fusion.plan.gradient import gradients
from fusion.run.executors import executors
from tests.fusion.counted import Executor
from tests.fusion.models import MODELS, tensor_of

ROOT = Path(__file__).parents[2]
KINDS = {  # products of the chains that inference finds
    "BERT": {3, 2, 1}, "ViT": {3, 2, 1}, "Marian": {3, 2, 1}, "Llama": {3, 2, 1}, "MLP-Mixer": {2}, "LoRA": {3},
}  # fmt: skip


def without_gradients(chain, needs):
    """Why an executor refuses a chain whose gradients are no chains."""
    try:
        return None if not needs or gradients(chain, needs) else ""
    except GradientError as error:
        return str(error)


@pytest.fixture
def executor():
    made = Executor(without_gradients)
    executors.add("reference", made)
    torch._dynamo.reset()
    return made


def compiled(model, *, rest="eager", backend=None, **options):
    return torch.compile(
        model, backend=backend or Backend(), options={"executor": "reference", "rest": rest}, **options
    )


def results(model, arguments, call):
    """A model's output and the gradients of all its parameters, by name."""
    output = tensor_of(call(**arguments))
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(output.square().sum(), named.values(), allow_unused=True)
    return {"output": output.detach()} | {
        name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None
    }


def wide(arguments):
    return {name: x.double() if x.is_floating_point() else x for name, x in arguments.items()}


@pytest.mark.parametrize("name", MODELS)
def test_models_learn_as_they_did(name, executor):
    make, arguments_of = MODELS[name]
    model = make()
    call = compiled(model)
    sizes = ((2, 6), (3, 8)) if name in ("BERT", "MLP-Mixer") else ((2, 6),)
    for batch, length in sizes:  # the second graph has symbols as sizes
        arguments = arguments_of(batch, length)
        expected = results(model, arguments, model)
        actual = results(model, arguments, call)
        truth = results(model.double(), wide(arguments), model)
        model.float()
        assert_all_close(actual, expected, truth)
    assert {len(chain.products) for chain, _ in executor.asked} >= KINDS[name]
    assert executor.ran


class Block(nn.Module):
    """A little of everything: views, attention, norms, what is only torch's."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, x):
        heads = self.up(x).unflatten(-1, (2, 8)).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return self.norm(x + self.down(functional.gelu(mixed.transpose(1, 2).flatten(2)))).cumsum(1)


@pytest.mark.parametrize("rest", ["aot_eager", "inductor"])
def test_what_is_left_is_compiled_too(rest, executor):
    model, x = Block(), torch.randn(3, 5, 8)
    actual = results(model, {"x": x}, compiled(model, rest=rest))
    expected = results(model, {"x": x}, model)
    assert_all_close(actual, expected, results(model.double(), {"x": x.double()}, model))
    assert executor.ran


def test_sizes_that_change_are_compiled_once_more_and_then_no_more(executor):
    model, backend = Block(), Backend()
    call = compiled(model, backend=backend)
    for batch, length in ((3, 5), (4, 6), (5, 9), (2, 17), (7, 3)):
        x = torch.randn(batch, length, 8)
        assert_equal_up_to_rounding("output", call(x), model(x), roundings=512)
    assert backend.report().count("graph ") == 2


def test_inference_autocast_and_training_are_compiled_apart(executor):
    model, x = Block(), torch.randn(3, 5, 8)
    call = compiled(model)
    with torch.inference_mode():
        assert_equal_up_to_rounding("inference", call(x), model(x), roundings=512)
    assert {needs for _, needs in executor.asked} == {frozenset()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = call(x)
        assert output.dtype == model(x).dtype
        output.sum().backward()
    assert "bf16" in {chain.dtype for chain in executor.ran}
    assert model.up.weight.grad.dtype == torch.float32


def test_executors_are_asked_outside_of_whatever_the_caller_is_in(executor):
    seen = []
    executor.refuses = lambda chain, needs: seen.append((torch.eye(2) @ torch.eye(2)).dtype)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        compiled(Block())(torch.randn(3, 5, 8))
    assert set(seen) == {torch.float32}


def test_writes_and_casts_in_a_model_are_no_obstacle(executor):
    class Model(Block):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                y = functional.relu(self.up(x))
            y = self.down(y)
            y[0] = 0
            return functional.relu(self.up(y))

    model, x = Model(), torch.randn(3, 5, 8)
    with torch.no_grad():
        assert_equal_up_to_rounding("output", compiled(model)(x), model(x), roundings=512)
    assert executor.ran


def test_autocast_inside_a_model_keeps_its_dtypes(executor):
    class Model(Block):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.down(functional.gelu(self.up(x)))
            return y, self.down(functional.relu(self.up(x)))

    model, x = Model(), torch.randn(5, 8)
    call = compiled(model)
    for actual, expected in zip(call(x), model(x), strict=True):
        assert_equal_up_to_rounding("output", actual, expected, roundings=64)
    assert [chain.dtype for chain in executor.ran] == ["bf16", "fp32"]
    sum(output.float().sum() for output in call(x)).backward()
    assert model.up.weight.grad.dtype == torch.float32


class Checkpointed(Block):
    """Computes its inside again in the backward pass."""

    def forward(self, x):
        return self.down(checkpoint(lambda y: functional.gelu(self.up(y)), x, use_reentrant=False)).cumsum(0)


class Branching(Block):
    """Holds graphs of its own."""

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda y: self.down(self.up(y)), lambda y: y * 2, (x,))


@pytest.mark.parametrize("rest", ["eager", "aot_eager"])
def test_what_is_computed_again_is_fused_inside(rest, executor):
    model, x, backend = Checkpointed(), torch.randn(5, 8), Backend()
    call = compiled(model, rest=rest, backend=backend)
    actual, expected = (
        torch.autograd.grad(f(x).square().sum(), (model.up.weight, model.down.bias)) for f in (call, model)
    )
    for one, other in zip(actual, expected, strict=True):
        assert_equal_up_to_rounding("gradient", one, other, roundings=512)
    assert "inside tag_activation_checkpoint, and nothing beside it\nfused 1 x" in backend.report()
    assert executor.ran


def test_graphs_inside_of_a_graph_are_left_alone(executor):
    model, x, backend = Branching(), torch.randn(5, 8), Backend()
    assert_equal_up_to_rounding("output", compiled(model, backend=backend)(x), model(x), roundings=512)
    assert "not fused: cond holds a graph of its own: compile the parts around it" in backend.report()
    assert not executor.asked


def test_dropout_stays_random_and_outside(executor):
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 8))
    call = compiled(model)
    x = torch.randn(4, 8)
    assert not torch.equal(call(x), call(x))
    assert {len(chain.products) for chain, _ in executor.asked} == {1}
    model.eval()
    assert_equal_up_to_rounding("output", call(x), model(x), roundings=512)
    assert 2 in {len(chain.products) for chain, _ in executor.asked}


def test_reports_say_what_was_fused_and_why_not(executor, caplog):
    backend = Backend()
    assert "no graph was compiled yet" in backend.report()
    executor.refuses = lambda chain, needs: "too small" if len(chain.products) == 1 else None
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)))
    model.append(nn.LayerNorm(8)).append(nn.Linear(8, 4))
    with caplog.at_level("INFO", logger="fusion"):
        compiled(model, backend=backend)(torch.randn(4, 8))
    text = backend.report()
    assert "fused 1 x C[M,N] = A[M,K] B[N,K]" in text
    assert "4 products at once" in text
    assert "not fused 1 x linear: too small" in text
    assert "not fused 1 x layer_norm: operation aten.layer_norm.default is no stage of a chain" in text
    assert caplog.text.count("graph 0") == 1


def test_options_are_inductors_or_ours(executor):
    with pytest.raises(Exception, match=r"options: \['max_autotune'\] are Inductor's, but rest='eager'"):
        torch.compile(Block(), backend=Backend(), options={"rest": "eager", "max_autotune": True})(torch.randn(1, 2, 8))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"executor='unknown': known are"):
        torch.compile(Block(), backend=Backend(), options={"executor": "unknown"})(torch.randn(1, 2, 8))


def test_a_graph_without_chains_runs_as_it_was(executor):
    call = compiled(lambda x: x.cumsum(0) + 1)
    x = torch.randn(3)
    assert torch.equal(call(x), x.cumsum(0) + 1)
    assert not executor.asked


def test_torch_finds_the_backend_by_its_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (name, value), = project["entry-points"]["torch_dynamo_backends"].items()  # fmt: skip
    assert name == "mcfuser"
    assert EntryPoint(name, value, "torch_dynamo_backends").load() is mcfuser
    assert "graph" in report()


def test_a_process_that_only_imports_torch_may_name_the_backend(tmp_path):
    installed = tmp_path / "quartet-0.dist-info"  # what an installation leaves, for one of another version lacks it
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: quartet\nVersion: 0\n")
    (installed / "entry_points.txt").write_text("[torch_dynamo_backends]\nmcfuser = fusion.compile:mcfuser\n")
    script = """
import torch
call = torch.compile(torch.nn.Linear(4, 3), backend="mcfuser", options={"rest": "eager"})
assert call(torch.ones(2, 4)).shape == (2, 3)
import fusion
print(fusion.report())
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    )
    assert "not fused 1 x linear: one product" in run.stdout  # as Triton's, for its interpreter is on
