import os

import pytest
import torch
from closeness import assert_equal_up_to_rounding

from fusion import gemm_chain
from fusion.run.executors import executors
from fusion.run.form import form_of
from fusion.run.operator import call_chain, is_due
from tests.fusion.counted import Executor

CHAIN = gemm_chain(M=5, N=7, K=3, H=4, activation="relu")


def drawn(rows=5):
    return [torch.randn(rows, 3), torch.randn(3, 7), torch.randn(7, 4)]


@pytest.fixture
def counted():
    executor = Executor(lambda chain, needs: None)
    executors.add("counted", executor)
    return executor


def test_a_form_serves_every_size_and_each_is_planned_once(counted):
    for rows in (3, 8, 3, 8):
        call_chain(form_of(CHAIN), drawn(rows), "counted")
    assert [chain.sizes["M"] for chain, _ in counted.asked] == [3, 8]


def test_another_executor_of_a_name_is_asked_again(counted):
    call_chain(form_of(CHAIN), drawn(), "counted")
    other = Executor(lambda chain, needs: None)
    executors.add("counted", other)
    call_chain(form_of(CHAIN), drawn(), "counted")
    assert (len(counted.ran), len(other.ran)) == (1, 1)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"executor='none': known are \['.*; add it with executors.add first"):
        executors.get("none")


def test_a_forked_process_may_plan_while_its_parent_did(counted):
    """A lock that another thread holds when the process is forked is not held for ever in the child."""
    with executors._lock:
        child = os.fork()
        if not child:
            call_chain(form_of(CHAIN), drawn(), "counted")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_where_nothing_runs_torch_does_and_says_so_once(caplog):
    executors.add("refuses", Executor(lambda chain, needs: "never, and said by this test alone"))
    a, b, d = drawn()
    with caplog.at_level("INFO", logger="fusion"):
        for _ in range(3):
            executors.call.cache_clear()
            output = call_chain(form_of(CHAIN), (a, b, d), "refuses")
            assert_equal_up_to_rounding("output", output, torch.relu(a @ b) @ d, roundings=16)
    assert len(caplog.records) == 1
    assert "fp32: never, and said by this test alone; torch runs it" in caplog.text


@pytest.mark.parametrize(
    "around",
    [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu")],
    ids=["inference", "no_grad", "autocast"],
)
def test_executors_are_asked_outside_of_whatever_the_caller_is_in(around):
    """They try kernels, and differentiate them, when a chain comes first: inside of an operator, or of autocast."""
    seen = []

    def executor_for(chain, needs, device):
        weight = torch.ones(2, 2, requires_grad=True)
        with torch.enable_grad():
            product = weight @ weight
        seen.append((product.dtype, torch.autograd.grad(product.sum(), weight)[0].is_inference()))
        return "only trying"

    executors.add("trying", executor_for)
    a, b, d = drawn()
    with around():
        call_chain(form_of(CHAIN), (a, b, d), "trying")
    call_chain(form_of(CHAIN), (a.requires_grad_(), b, d), "trying").sum().backward()
    assert seen == [(torch.float32, False)] * 2


def test_a_patient_executor_is_asked_once_an_interval_has_been_run_enough(counted):
    form, flops = form_of(CHAIN), gemm_chain(M=5, N=7, K=3, H=4, activation="relu").flops
    executors.be_patient("counted", 2.5 * flops)
    try:
        assert [is_due(form, drawn(), "counted") for _ in range(4)] == [False, False, False, True]
        assert is_due(form, drawn(4), "counted")  # of the same interval
        assert not is_due(form, drawn(40), "counted")  # of another one, that has not been run yet
    finally:
        executors.be_patient("counted", 0)
    assert is_due(form, drawn(40), "counted")


def test_another_executor_of_a_name_is_not_patient_because_the_last_one_was(counted):
    executors.be_patient("counted", 1e12)
    executors.add("counted", Executor(lambda chain, needs: None))
    assert is_due(form_of(CHAIN), drawn(), "counted")


def test_gradients_are_searched_for_too_so_they_take_as_many_runs(counted):
    form, flops = form_of(CHAIN), CHAIN.flops
    executors.be_patient("counted", 1.5 * flops)
    try:
        tensors = [tensor.requires_grad_() for tensor in drawn()]
        assert [is_due(form, tensors, "counted") for _ in range(3)] == [False, False, True]
    finally:
        executors.be_patient("counted", 0)
