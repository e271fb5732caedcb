"""Both passes with the simplest experts there are, so that what is left is gathering, sorting and summing."""

from collections.abc import Sequence

import pytest
import torch
from closeness import assert_all_close
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_pipeline.config import PipelineConfig
from moe_pipeline.gate import Assignment
from moe_pipeline.losses import RouterLosses
from moe_pipeline.plan.call import plan_call
from moe_pipeline.plan.partition import partition
from moe_pipeline.plan.rings import RingSize
from moe_pipeline.routing import expert_counts, route
from moe_pipeline.run.buffers import Rings, Workspace
from moe_pipeline.run.passes import BackwardPass, Call, ForwardPass
from moe_pipeline.run.runtime import Runtime

NO_LOSSES = RouterLosses(balance=torch.zeros(()), z=torch.zeros(()), importance=torch.zeros(()))
NUM_EXPERTS, WIDTH = 3, 5
RESTORES = ("none", "S1", "S2", "S3", "S4")


class _Scaling:
    """Expert e multiplies its rows by e + 2; notes what it is told."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def rings(self, rows: int, *, backward: bool) -> dict[str, RingSize]:
        self.log.append(f"{'backward' if backward else 'forward'} rings for {rows}")
        return {}

    def begin_forward(self, rings: Rings, chunk_rows: Sequence[int], *, keep: bool) -> None:
        self.rows: dict[int, Tensor] = {}

    def begin_backward(self, rings: Rings, kept: Sequence[Tensor], needs: Sequence[bool]) -> None:
        self.log.append(f"needs {list(needs)}")

    def _scaled(self, rows_RM: Tensor, counts: Sequence[int]) -> Tensor:
        owner_R = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return rows_RM * (owner_R + 2)[:, None]

    def up(self, chunk: int, rows_RM: Tensor, counts: Sequence[int]) -> None:
        assert len(rows_RM) == sum(counts)
        self.rows[chunk] = self._scaled(rows_RM, counts)

    recompute = up

    def offload_hidden(self, chunk: int) -> None:
        pass

    def down(self, chunk: int, counts: Sequence[int], *, out_RM: Tensor) -> None:
        out_RM.copy_(self.rows[chunk])

    def kept(self) -> list[Tensor]:
        return []

    def fetch_hidden(self, chunk: int, counts: Sequence[int]) -> None:
        pass

    def dgrad(
        self, chunk: int, grad_RM: Tensor, rows_RM: Tensor | None, counts: Sequence[int], *, out_RM: Tensor
    ) -> None:
        out_RM.copy_(self._scaled(grad_RM, counts))

    def wgrad(self, chunk: int, grad_RM: Tensor, rows_RM: Tensor, counts: Sequence[int]) -> None:
        scaled = self._scaled(rows_RM, counts)
        assert torch.equal(scaled, self.rows[chunk]), "T_DI did not come back"

    def gradients(self) -> list[Tensor | None]:
        return []


def _assignment(num_tokens: int, num_entries: int) -> Assignment:
    entries = num_entries if num_tokens else 0
    token_A = torch.randint(0, max(num_tokens, 1), (entries,))
    expert_A = torch.randint(0, NUM_EXPERTS, (entries,))
    return Assignment(
        token_A=token_A, expert_A=expert_A, weight_A=torch.rand(entries), num_chosen=entries, losses=NO_LOSSES
    )


def _passes(
    x_TM: Tensor, grad_TM: Tensor, assignment: Assignment, config: PipelineConfig
) -> tuple[dict[str, Tensor], _Scaling]:
    counts = (expert_counts(assignment, num_experts=NUM_EXPERTS),)
    cut = partition(counts, counts, num_chunks=config.num_chunks)
    routing = route(assignment, cut, num_tokens=len(x_TM))
    plan, experts = plan_call("moe", config, cut), _Scaling()
    call = Call(
        plan=plan, experts=experts, token_S=routing.token_S, row_TK=routing.row_TK, sort_R=None, unsort_R=None,
        runtime=Runtime(name="moe", ranks=None, workspace=Workspace()),
    )  # fmt: skip
    passed = ForwardPass(call, x_TM, routing.weight_S, keep=True).run()
    resent_TM = x_TM if plan.strategy.dispatched == "resend" else None
    back = BackwardPass(call, grad_TM, resent_TM, routing.weight_S, passed, needs=[True])
    grad_x_TM, grad_weight_S, grads = back.run()
    assert grads == []
    order = torch.arange(len(assignment.token_A))  # weights' gradients in the assignment's order
    index = route(
        Assignment(
            token_A=assignment.token_A, expert_A=assignment.expert_A, weight_A=order, num_chosen=0, losses=NO_LOSSES
        ),
        cut, num_tokens=len(x_TM),
    ).weight_S  # fmt: skip
    grad_weight_A = torch.empty_like(grad_weight_S).index_copy_(0, index, grad_weight_S)
    return {"y": passed.y_TM, "x": grad_x_TM, "weights": grad_weight_A}, experts


def _by_hand(x_TM: Tensor, grad_TM: Tensor, assignment: Assignment) -> dict[str, Tensor]:
    y_TM, grad_x_TM = torch.zeros_like(x_TM), torch.zeros_like(x_TM)
    grad_weight_A = torch.zeros(len(assignment.token_A), dtype=x_TM.dtype)
    entries = zip(assignment.token_A.tolist(), assignment.expert_A.tolist(), assignment.weight_A.to(x_TM), strict=True)
    for entry, (token, expert, weight) in enumerate(entries):
        y_TM[token] += weight * (expert + 2) * x_TM[token]
        grad_x_TM[token] += weight * (expert + 2) * grad_TM[token]
        grad_weight_A[entry] = (grad_TM[token] * (expert + 2) * x_TM[token]).sum()
    return {"y": y_TM, "x": grad_x_TM, "weights": grad_weight_A}


@given(st.integers(0, 9), st.integers(0, 30), st.integers(1, 8), st.sampled_from(RESTORES), st.booleans())
def test_rows_go_out_and_come_back(
    num_tokens: int, num_entries: int, num_chunks: int, restore: str, overlap: bool
) -> None:
    torch.manual_seed(num_tokens + 100 * num_entries)
    assignment = _assignment(num_tokens, num_entries)
    x_TM, grad_TM = torch.randn(num_tokens, WIDTH), torch.randn(num_tokens, WIDTH)
    config = PipelineConfig(num_chunks=num_chunks, restore=restore, overlap=overlap)  # type: ignore[arg-type]
    actual, _ = _passes(x_TM, grad_TM, assignment, config)
    assert_all_close(actual, _by_hand(x_TM, grad_TM, assignment), _by_hand(x_TM.double(), grad_TM.double(), assignment))


@pytest.mark.parametrize("restore", RESTORES)
def test_experts_are_told_the_largest_chunk_and_what_is_needed(restore: str) -> None:
    torch.manual_seed(0)
    assignment = _assignment(6, 20)
    x_TM = torch.randn(6, WIDTH)
    _, experts = _passes(x_TM, x_TM, assignment, PipelineConfig(num_chunks=3, restore=restore))  # type: ignore[arg-type]
    counts = expert_counts(assignment, num_experts=NUM_EXPERTS)
    largest = partition((counts,), (counts,), num_chunks=3).max_received_rows
    rings = [f"forward rings for {largest}", f"backward rings for {largest}"] if restore != "none" else []
    assert experts.log == [*rings, "needs [True]"]


@pytest.mark.parametrize("num_chunks", [1, 4])
def test_repeats_bitwise(num_chunks: int) -> None:
    torch.manual_seed(0)
    assignment, x_TM, grad_TM = _assignment(9, 40), torch.randn(9, WIDTH), torch.randn(9, WIDTH)
    first, second = (_passes(x_TM, grad_TM, assignment, PipelineConfig(num_chunks=num_chunks))[0] for _ in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_low_precision_rows_are_weighted_in_float32_and_rounded_once() -> None:
    torch.manual_seed(0)
    assignment = _assignment(7, 40)
    x_TM, grad_TM = torch.randn(7, WIDTH).bfloat16(), torch.randn(7, WIDTH).bfloat16()
    actual, _ = _passes(x_TM, grad_TM, assignment, PipelineConfig(num_chunks=3, restore="S4"))
    reference = _by_hand(x_TM, grad_TM, assignment)
    truth = _by_hand(x_TM.double(), grad_TM.double(), assignment)
    reference["weights"] = reference["weights"].to(actual["weights"].dtype)
    assert actual["weights"].dtype == torch.float32
    assert_all_close(actual, reference, truth)
