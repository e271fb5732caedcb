import pytest
import torch
from closeness import assert_all_close, assert_equal_up_to_rounding
from torch.utils.checkpoint import checkpoint

from fusion import mlp
from fusion.run.executors import executors
from fusion.run.form import form_of
from fusion.run.grouped import call_grouped, is_run_grouped
from tests.fusion.counted import Executor

CHAIN = mlp(M=1, K=6, N=8, gated=True, bias=True, activation="silu")
FORM = form_of(CHAIN)
COUNTS = (3, 0, 5, 1)


@pytest.fixture
def executor():
    made = Executor(lambda chain, needs: None)
    executors.add("grouped", made)
    return made


def drawn(counts=COUNTS):
    torch.manual_seed(0)
    sizes = {tensor.name: CHAIN.shape(tensor.name) for tensor in CHAIN.inputs}
    return {
        name: torch.randn(sum(counts), 6) if name == "A" else torch.randn(len(counts), *shape)
        for name, shape in sizes.items()
    }


def plain(A, B_up, bias_C_up, B, bias_C, D, bias_E, counts=COUNTS):
    outputs = []
    for e, rows in enumerate(A.split(counts)):
        hidden = torch.nn.functional.silu(rows @ B[e].T + bias_C[e]) * (rows @ B_up[e].T + bias_C_up[e])
        outputs.append(hidden @ D[e].T + bias_E[e])
    return torch.cat(outputs)


def results(function, tensors):
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    output = function(**leaves)
    found = torch.autograd.grad(output.square().sum(), leaves.values())
    return {"output": output.detach(), **dict(zip(leaves, found, strict=True))}


def grouped(counts=COUNTS):
    return lambda **tensors: call_grouped(FORM, [tensors[x.name] for x in CHAIN.inputs], counts, "grouped")


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("counts", [COUNTS, (4, 4, 4), (0, 0), (7,)], ids=str)
def test_it_is_every_groups_chain(counts, refused, executor):
    executor.refuses = lambda chain, needs: "never" if refused else None
    tensors = drawn(counts)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    truth = results(lambda **t: plain(**t, counts=counts), wide)
    assert_all_close(results(grouped(counts), tensors), results(lambda **t: plain(**t, counts=counts), tensors), truth)
    assert bool(executor.ran) == (not refused and any(counts))


def test_groups_of_one_size_are_planned_once(executor):
    tensors = drawn((2, 4, 2, 4))
    grouped((2, 4, 2, 4))(**tensors)
    assert sorted(chain.sizes["M"] for chain, _ in executor.asked) == [2, 4]
    assert len(executor.ran) == 4


def test_the_largest_group_tells_whether_chains_run(executor):
    executor.refuses = lambda chain, needs: "too few" if chain.sizes["M"] < 5 else None
    given = [drawn()[x.name] for x in CHAIN.inputs]
    assert is_run_grouped(FORM, given, COUNTS, "grouped")
    output = call_grouped(FORM, given, COUNTS, "grouped")
    assert_equal_up_to_rounding("output", output, plain(**drawn()), roundings=256)
    assert [chain.sizes["M"] for chain in executor.ran] == [5]


def test_what_does_not_fit_is_named(executor):
    given = [drawn()[x.name] for x in CHAIN.inputs]
    with pytest.raises(ValueError, match=r"tensors\['A'\] has shape \(9, 6\); counts=\(3, 0, 5\) makes it 8 rows long"):
        call_grouped(FORM, given, (3, 0, 5), "grouped")
    with pytest.raises(ValueError, match=r"tensors\['B_up'\] has shape \(4, 8, 6\); counts=\(9,\) makes it 1 groups"):
        call_grouped(FORM, given, (9,), "grouped")


def test_a_checkpoint_around_it_gives_the_same(executor):
    tensors = drawn()
    expected = results(grouped(), tensors)
    actual = results(lambda **t: checkpoint(grouped(), use_reentrant=False, **t), tensors)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_gradients_are_not_differentiated_again(executor):
    leaves = [drawn()[x.name].requires_grad_() for x in CHAIN.inputs]
    output = call_grouped(FORM, leaves, COUNTS, "grouped")
    (gradient,) = torch.autograd.grad(output.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
