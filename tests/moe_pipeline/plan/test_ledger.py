"""The ledger against the paper's formulas, and against what the allocator reports."""

import pytest
import torch
from ranks import run_ranks

from moe_pipeline import FeedForwardExperts, Gate, GateConfig, MoELayer, PipelineConfig
from moe_pipeline.config import Restore
from moe_pipeline.dispatch import local_part
from moe_pipeline.plan.ledger import LayerShape, balanced_partition, ledger
from moe_pipeline.plan.partition import partition
from moe_pipeline.plan.rings import HiddenShape
from moe_pipeline.run.ranks import expert_ranks
from scripts.testbed.live_bytes import peak_bytes

RESTORES: tuple[Restore, ...] = ("none", "S1", "S2", "S3", "S4")
LARGEST_ERROR = 0.03  # of the peak: the gate, and tensors of a few bytes, are not in the ledger
TOKENS, WIDTH, HIDDEN = 2048, 128, 512


def _shape(**changes: object) -> LayerShape:
    sizes: dict[str, object] = {
        "tokens": TOKENS,
        "top_k": 1,
        "d_model": WIDTH,
        "hidden": HiddenShape(d_hidden=HIDDEN, gated=False, in_place=True),
        "num_experts": 2,
    }
    return LayerShape(**{**sizes, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("num_chunks", [2, 4, 8])
def test_rings_are_the_papers_equation_5(num_chunks: int) -> None:
    """Shared T_DI (2), T_M (1) and T_DO (2) of one chunk each, per pass: 4BM/n + BH/n elements."""
    shape = _shape(num_ranks=2)
    account = ledger(shape, PipelineConfig(num_chunks=num_chunks, restore="S3"))
    rings = {entry.name.split()[-1]: entry.num_bytes for entry in account.entries if entry.lives.startswith("always")}
    elements = TOKENS * (4 * WIDTH + HIDDEN) // num_chunks
    assert rings["arrived"] + rings["result"] + rings["hidden"] == 4 * elements
    assert rings["grad_hidden"] == 4 * TOKENS * HIDDEN // num_chunks


@pytest.mark.parametrize(
    ("restore", "host_elements"),
    [("none", 0), ("S1", WIDTH + HIDDEN), ("S2", HIDDEN), ("S3", WIDTH), ("S4", 0)],
)
def test_host_memory_is_table_2(restore: Restore, host_elements: int) -> None:
    account = ledger(_shape(), PipelineConfig(num_chunks=4, restore=restore))
    assert account.host_bytes == 4 * TOKENS * host_elements


def test_without_reuse_t_di_and_t_m_are_kept_and_nothing_is_shared() -> None:
    account = ledger(_shape(), PipelineConfig(num_chunks=4))
    kept = {entry.name: entry.num_bytes for entry in account.entries if entry.lives == "forward to backward"}
    assert kept["T_DI"] == 4 * TOKENS * WIDTH
    assert kept["T_M"] == 4 * TOKENS * HIDDEN
    assert account.pool_bytes == 0


def test_a_balanced_partition_has_every_row_once() -> None:
    shape = _shape(tokens=1001, num_experts=8, num_ranks=4, top_k=3)
    cut = balanced_partition(shape, PipelineConfig(num_chunks=3))
    assert sum(sum(cut.sent_rows(chunk)) for chunk in range(3)) == 3 * 1001


def test_it_prints_every_tensor_and_the_totals() -> None:
    text = str(ledger(_shape(num_ranks=2), PipelineConfig(num_chunks=2, restore="S1")))
    for part in ("ring of 2 arrived", "T_O", "host", "shared block", "peak in backward"):
        assert part in text


def _measure(layer: MoELayer, top_k: int, rank: int) -> int:
    generator = torch.Generator().manual_seed(rank)
    x_TM, grad_TM = torch.randn(TOKENS, WIDTH, generator=generator), torch.randn(TOKENS, WIDTH, generator=generator)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        y_TM, _ = layer(x_TM.detach().requires_grad_())
        y_TM.backward(grad_TM)

    step()
    layer.zero_grad(set_to_none=True)
    return layer.workspace.free_bytes(x_TM.device) + peak_bytes(step)


def _layer(top_k: int, activation: str, gated: bool, num_experts: int) -> tuple[Gate, FeedForwardExperts]:
    torch.manual_seed(0)
    config = GateConfig(num_experts=num_experts, top_k=top_k, normalize=top_k > 1)
    return Gate(config, WIDTH), FeedForwardExperts(
        num_experts, WIDTH, HIDDEN, activation=activation, gated=gated, bias=False
    )


@pytest.mark.parametrize(("activation", "gated", "top_k"), [("relu", False, 1), ("gelu", False, 2), ("silu", True, 2)])
def test_one_process_takes_what_the_ledger_says(activation: str, gated: bool, top_k: int) -> None:
    for num_chunks in (1, 4):
        for restore in RESTORES:
            config = PipelineConfig(num_chunks=num_chunks, restore=restore)
            gate, experts = _layer(top_k, activation, gated, 2)
            found = _measure(MoELayer(gate, experts, pipeline=config), top_k, 0)
            hidden = HiddenShape(d_hidden=HIDDEN, gated=gated, in_place=activation == "relu" and not gated)
            said = ledger(_shape(top_k=top_k, hidden=hidden), config).peak_bytes
            assert abs(said / found - 1) <= LARGEST_ERROR, f"n={num_chunks} {restore}: {said} against {found}"


def _check_ranks(rank: int, num_ranks: int) -> None:
    ranks = expert_ranks()
    for num_chunks in (1, 4):
        for restore in RESTORES:
            config = PipelineConfig(num_chunks=num_chunks, restore=restore)
            gate, experts = _layer(1, "relu", False, 4)
            layer = MoELayer(gate, local_part(experts, ranks), pipeline=config, ranks=ranks)
            counts = [None] * num_ranks
            generator = torch.Generator().manual_seed(rank)
            _, record = layer(torch.randn(TOKENS, WIDTH, generator=generator))
            torch.distributed.all_gather_object(counts, record.load_E.tolist())
            sent = tuple(tuple(counts[rank][2 * other : 2 * other + 2]) for other in range(num_ranks))  # type: ignore[index]
            received = tuple(tuple(counts[other][2 * rank : 2 * rank + 2]) for other in range(num_ranks))  # type: ignore[index]
            found = _measure(layer, 1, rank)
            cut = partition(sent, received, num_chunks=num_chunks, rank=rank)
            said = ledger(_shape(num_experts=4, num_ranks=num_ranks), config, cut).peak_bytes
            assert abs(said / found - 1) <= LARGEST_ERROR, f"n={num_chunks} {restore}: {said} against {found}"


def test_two_ranks_take_what_the_ledger_says_for_their_rows() -> None:
    run_ranks(2, _check_ranks)
