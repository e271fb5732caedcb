import threading

import pytest
import torch
from closeness import assert_all_close, assert_equal_up_to_rounding

from fusion import attention, gemm_chain, mlp
from fusion.plan.derived import GradientError
from fusion.reference import run
from fusion.run.executors import executors
from fusion.run.form import form_of
from fusion.run.operator import call_chain, needs_text
from tests.fusion.computed import draw, results
from tests.fusion.counted import Executor

CHAINS = {
    "gemm_chain": gemm_chain(M=5, N=7, K=3, H=4, activation="gelu"),
    "one": gemm_chain(M=5, N=7, K=3, dtype="bf16"),
    "attention": attention(M=5, N=7, K=4, batch=2, heads=4, kv_heads=2, keep="ZN", causal=True),
    "bf16": attention(M=5, N=7, K=4, heads=2, dtype="bf16"),
    "mlp": mlp(M=5, K=3, N=8, gated=True, bias=True, residual=True, activation="silu"),
}


@pytest.fixture
def reference():
    """An executor that runs everything, under a name."""
    executor = Executor(lambda chain, needs: None)
    executors.add("reference", executor)
    return executor


@pytest.fixture
def refuses():
    executors.add("refuses", Executor(lambda chain, needs: "never"))


def listed(chain, *, requires_grad=True):
    tensors = draw(chain)
    own = [tensors[x.name] if x.name in chain.boolean_inputs else tensors[x.name].float() for x in chain.inputs]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[chain.dtype]
    return [t if t.dtype == torch.bool else t.to(dtype).requires_grad_(requires_grad) for t in own]


def arguments(chain, executor, *, requires_grad=True):
    names = frozenset(tensor.name for tensor in chain.inputs) - chain.boolean_inputs
    needs = needs_text(chain, names if requires_grad else frozenset())
    return listed(chain, requires_grad=requires_grad), form_of(chain), needs, executor


@pytest.mark.parametrize("executor", ["reference", "refuses"])
@pytest.mark.parametrize("name", CHAINS)
def test_it_is_the_reference_with_its_gradients(name, executor, reference, refuses):
    chain = CHAINS[name]
    form, tensors = form_of(chain), draw(chain)
    dtype = torch.bfloat16 if chain.dtype == "bf16" else torch.float32
    truth = results(lambda t: run(chain, t), tensors, torch.float64)
    expected = results(lambda t: run(chain, t), tensors, dtype)
    actual = results(lambda t: call_chain(form, [t[x.name] for x in chain.inputs], executor), tensors, dtype)
    assert_all_close(actual, expected, truth)


@pytest.mark.parametrize("executor", ["reference", "refuses"])
@pytest.mark.parametrize("name", ["attention", "mlp", "bf16"])
def test_torch_accepts_the_operator(name, executor, reference, refuses):
    for requires_grad in (True, False):
        given = arguments(CHAINS[name], executor, requires_grad=requires_grad)
        assert set(torch.library.opcheck(torch.ops.mcfuser.chain.default, given).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["attention", "bf16"])
def test_torch_accepts_the_gradients_operator(name, reference):
    chain = CHAINS[name]
    tensors, form, needs, executor = arguments(chain, "reference")
    saved = torch.ops.mcfuser.chain(tensors, form, needs, executor)
    given = torch.randn_like(saved[0]), [x.detach() for x in saved[-2:]], [x.detach() for x in tensors], form, needs
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    found = torch.library.opcheck(torch.ops.mcfuser.chain_backward.default, (*given, executor), test_utils=tests)
    assert set(found.values()) == {"SUCCESS"}


def test_only_the_gradients_that_are_needed_are_asked_for(reference):
    chain = CHAINS["gemm_chain"]
    tensors = listed(chain, requires_grad=False)
    tensors[1].requires_grad_()
    call_chain(form_of(chain), tensors, "reference").sum().backward()
    with torch.no_grad():
        call_chain(form_of(chain), tensors, "reference")
    assert [needs for _, needs in reference.asked] == [{"B"}, set()]


def test_gradients_are_not_differentiated_again(reference):
    tensors = listed(CHAINS["mlp"])
    output = call_chain(form_of(CHAINS["mlp"]), tensors, "reference")
    (gradient,) = torch.autograd.grad(output.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(GradientError, match="cannot be differentiated again: run the chain unfused"):
        gradient.sum().backward()


def test_empty_tensors_and_strides_are_fine(reference):
    chain = gemm_chain(M=5, N=7, K=3, H=4)
    form = form_of(chain)
    tensors = [x.T.contiguous().T for x in listed(chain, requires_grad=False)]
    dense = call_chain(form, [x.contiguous() for x in tensors], "reference")
    assert_equal_up_to_rounding("strides", call_chain(form, tensors, "reference"), dense, roundings=16)
    empty = [tensors[0][:0], *tensors[1:]]
    assert call_chain(form, [x.detach().requires_grad_() for x in empty], "reference").shape == (0, 4)
    nothing = [tensors[0][:, :0], tensors[1][:0], tensors[2]]
    assert not call_chain(form, nothing, "reference").any()


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize("executor", ["reference", "refuses"])
def test_nan_and_infinity_are_torchs(special, executor, reference, refuses):
    chain = gemm_chain(M=5, N=7, K=3, H=4, activation="relu")
    a, b, d = listed(chain, requires_grad=False)
    a[2, 1] = special
    expected = torch.relu(a @ b) @ d
    actual = call_chain(form_of(chain), [a, b, d], executor)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())


def test_wrong_tensors_are_named(reference):
    chain = CHAINS["gemm_chain"]
    a, b, d = listed(chain, requires_grad=False)
    form = form_of(chain)
    with pytest.raises(TypeError, match=r"tensors\['B'\] is torch.float64, not torch.float32"):
        call_chain(form, [a, b.double(), d], "reference")
    with pytest.raises(ValueError, match=r"tensors\['B'\] has shape \(4, 7\); in B\[K,N\], K is 3"):
        call_chain(form, [a, torch.randn(4, 7), d], "reference")
    with pytest.raises(ValueError, match=r"tensors\['B'\] is on meta, 'A' on cpu; use one device"):
        call_chain(form, [a, b.to("meta"), d], "reference")


def test_inference_mode_and_autocast(reference):
    chain = CHAINS["gemm_chain"]
    tensors = listed(chain)
    expected = call_chain(form_of(chain), tensors, "reference").detach()
    with torch.inference_mode():
        assert torch.equal(call_chain(form_of(chain), tensors, "reference"), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = call_chain(form_of(chain), tensors, "reference")
        assert torch.equal(output, expected)
        output.sum().backward()
    assert tensors[0].grad.dtype == torch.float32


def test_threads_share_what_is_planned(reference):
    chain, found = CHAINS["attention"], []
    given = listed(chain)

    def work():
        tensors = [x.detach().requires_grad_(x.requires_grad) for x in given]
        output = call_chain(form_of(chain), tensors, "reference")
        output.sum().backward()
        found.append((output.detach(), tensors[0].grad))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(one, other) for pair in found for one, other in zip(pair, found[0], strict=True))


def test_it_exports(reference):
    chain = CHAINS["mlp"]
    form, tensors = form_of(chain), tuple(listed(chain, requires_grad=False))

    class Module(torch.nn.Module):
        def forward(self, *given):
            return call_chain(form, given, "reference")

    rows = torch.export.Dim("rows", min=2)
    shapes = [{0: rows if letters.dims[0] == "M" else None} for letters in chain.inputs]
    exported = torch.export.export(Module(), tensors, dynamic_shapes={"given": tuple(shapes)})
    assert torch.ops.mcfuser.chain.default in [node.target for node in exported.graph.nodes]
    assert torch.equal(exported.module()(*tensors), call_chain(form, tensors, "reference"))
    more = tuple(x[:2] if shape.get(0) else x for x, shape in zip(tensors, shapes, strict=True))
    assert exported.module()(*more).shape == (2, 3)
