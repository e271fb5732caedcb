import pytest
import torch
from closeness import assert_equal_up_to_rounding
from torch import nn
from torch.nn import functional

from fusion import fuse
from fusion.graph import TraceError
from tests.fusion.counted import Executor, one_product

X, A, B = torch.randn(7, 6), torch.randn(6, 8), torch.randn(8, 6)


def mlp(x, a, b):
    """Two products."""
    return functional.gelu(x @ a) @ b


def attend(q, k, v):
    return functional.scaled_dot_product_attention(q, k, v)


def close(actual, expected, roundings=64):
    """Equal but for the order of sums, which have 20 terms at most, two or three behind each other."""
    assert_equal_up_to_rounding("result", actual, expected, roundings=roundings)


@pytest.fixture
def executor():
    return Executor()


def test_a_function_gives_what_it_gave_and_keeps_its_name(executor):
    fused = fuse(mlp, executor_for=executor)
    close(fused(X, A, B), mlp(X, A, B))
    assert (fused.__name__, fused.__doc__, fused.__wrapped__) == ("mlp", "Two products.", mlp)
    assert len(executor.ran) == 1


def test_decorators_with_and_without_arguments(executor):
    @fuse(executor_for=executor)
    def first(x, a, b):
        return x @ a @ b

    @fuse
    def second(x, a):
        return x @ a

    close(first(X, A, B), X @ A @ B)
    close(second(X, A), X @ A)
    assert len(executor.ran) == 1


def test_what_is_planned_is_planned_once(executor):
    fused = fuse(mlp, executor_for=executor)
    for _ in range(3):
        fused(X, A, B)
    assert (len(executor.asked), len(executor.ran)) == (1, 3)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, a, b: (x[:5], a, b),
        lambda x, a, b: (x.T.contiguous().T, a, b),
        lambda x, a, b: (x.half(), a.half(), b.half()),
        lambda x, a, b: (x.clone().requires_grad_(), a, b),
    ],
    ids=["shape", "strides", "dtype", "gradient"],
)
def test_another_signature_is_planned_anew(change, executor):
    fused = fuse(mlp, executor_for=executor)
    fused(X, A, B)
    changed = change(X, A, B)
    assert fused(*changed).dtype == changed[0].dtype
    assert len(executor.asked) == 2


def test_other_arguments_are_a_part_of_the_signature(executor):
    @fuse(executor_for=executor)
    def function(x, *, weights, scale=1.0, deep=False):
        y = functional.relu(x @ weights["a"]) @ weights["b"][0]
        return {"y": y * scale, "deep": (y @ weights["a"], None, scale) if deep else ()}

    weights = {"a": A, "b": [B]}
    assert function(X, weights=weights)["deep"] == ()
    close(function(X, weights=weights, scale=2.0)["y"], 2 * function(X, weights=weights)["y"])
    deep = function(X, weights=weights, deep=True)["deep"]
    assert deep[1:] == (None, 1.0)
    assert deep[0].shape == (7, 8)
    assert len(executor.asked) > 2
    with pytest.raises(
        TypeError, match="is a set, which cannot be told from another; accepted are tensors and hashable"
    ):
        function(X, weights=weights, deep={1, 2})


def test_gradients_flow_and_their_need_is_told(executor):
    fused = fuse(mlp, executor_for=executor)
    a, other = A.clone().requires_grad_(), A.clone().requires_grad_()
    fused(X, a, B).sum().backward()
    mlp(X, other, B).sum().backward()
    close(a.grad, other.grad)
    assert [needs for _, needs in executor.asked] == [{"B"}]
    with torch.no_grad():
        fused(X, a, B)
    assert [needs for _, needs in executor.asked] == [{"B"}, set()]


def test_modules_follow_their_parameters(executor):
    layers = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
    fused = fuse(layers, executor_for=executor)
    close(fused(X), layers(X))
    with torch.no_grad():
        layers[0].weight.mul_(2)  # in place: seen at once
    close(fused(X), layers(X))
    assert len(executor.asked) == 1
    layers[0].weight = nn.Parameter(torch.randn(8, 6))
    close(fused(X), layers(X))
    layers.half()
    assert fused(X.half()).dtype == torch.float16
    assert len(executor.asked) == 3


def test_a_method_may_be_fused_in_place(executor):
    block = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
    expected = block(X)
    block.forward = fuse(block.forward, executor_for=executor)
    close(block(X), expected)
    assert len(executor.ran) == 1
    assert list(block.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_methods_of_a_class_may_be_decorated(executor):
    class Block(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.up, self.down, self.factor = nn.Linear(6, 8), nn.Linear(8, 6), factor

        @fuse(executor_for=executor)
        def forward(self, x):
            return self.down(functional.relu(self.up(x))) * self.factor

    one, two = Block(1.0), Block(2.0)
    two.load_state_dict(one.state_dict())
    close(2 * one(X), two(X))
    assert len(executor.ran) == 2
    assert "1 products" not in Block.forward.explain(one, X)


def test_what_is_refused_is_tried_again_in_parts():
    executor = Executor(lambda chain, needs: "too long" if len(chain.products) > 2 else one_product(chain, needs))
    fused = fuse(lambda x, a, b: functional.relu(functional.relu(x @ a) @ b) @ a, executor_for=executor)
    close(fused(X, A, B), functional.relu(functional.relu(X @ A) @ B) @ A)
    assert [len(chain.products) for chain in executor.ran] == [2]
    assert [len(chain.products) for chain, _ in executor.asked] == [3, 2, 1]
    text = fused.explain(X, A, B)
    assert "not fused: relu: too long" in text
    assert "matmul_2 runs as: 2 products at once" in text


def test_where_nothing_runs_the_function_runs_as_it_was():
    executor = Executor(lambda chain, needs: "no reason")
    calls = []

    @fuse(executor_for=executor)
    def function(q):
        calls.append(q)
        return attend(q, q, q)

    q = torch.randn(2, 5, 4)
    assert torch.equal(function(q), attend(q, q, q))
    assert function(q) is not function(q)
    assert calls[1] is q
    assert function.explain(q).splitlines() == ["no chain", "not fused: scaled_dot_product_attention: no reason"]


def test_explanations_name_chains_and_reasons(executor):
    fused = fuse(lambda x, a, b: mlp(x, a, b).cumsum(0) @ a, executor_for=executor)
    text = fused.explain(X, A, B)
    assert not executor.ran
    assert "chain at matmul_1: C[M,N] = A[M,K] B[K,N]; C = gelu(C); E[M,H] =" in text
    assert "not fused: cumsum: operation aten.cumsum.default is no stage of a chain" in text
    assert text.splitlines()[-1] == "matmul_1 runs as: 2 products at once"


def test_control_flow_on_values_says_what_to_do():
    fused = fuse(lambda x: x * 2 if x.sum() > 0 else x)
    with pytest.raises(TraceError, match=r"branch with torch.where, or pass what decides as a Python number"):
        fused(X)


def test_autocast_is_a_part_of_the_signature(executor):
    fused = fuse(mlp, executor_for=executor)
    fused(X, A, B)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(fused(X, A, B), mlp(X, A, B))
    assert [chain.dtype for chain in executor.ran] == ["fp32", "bf16"]


def test_executors_are_asked_outside_of_whatever_the_caller_is_in():
    seen = []

    def executor_for(chain, needs, device):
        seen.append((chain.dtype, (X @ A).dtype, torch.is_inference_mode_enabled()))
        return "only looking"

    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        fuse(mlp, executor_for=executor_for)(X, A, B)
    assert set(seen) == {("bf16", torch.float32, False)}


def test_kernels_are_planned_emitted_and_run_by_default(tmp_path):
    fused = fuse(attend, device="a100", cache_folder=tmp_path)
    q, k, v = (torch.randn(2, 20, 16).requires_grad_() for _ in range(3))
    text = fused.explain(q, k, v)
    assert "memory-bound in fp32 on a100" in text
    assert list(tmp_path.glob("*/*.json"))
    close(fused(q, k, v), attend(q, k, v))
    actual, expected = (torch.autograd.grad(f(q, k, v).square().sum(), (q, k, v)) for f in (fused, attend))
    for one, other in zip(actual, expected, strict=True):
        close(one, other)
