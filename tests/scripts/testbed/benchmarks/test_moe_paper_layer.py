"""The papers' layers: shapes, fp32 devices, and that overlap only ever moves work."""

from moe_pipeline.plan.device import load_device
from scripts.testbed.benchmarks.moe_paper_layer import (
    CLUSTER,
    SEQUENTIAL,
    best_chunks,
    busy_us,
    one_rank_at_a_time,
    paper_shape,
    pipelined,
    sides,
    time_us,
    without_tensor_cores,
)

DEVICE = load_device(CLUSTER)
SHAPE = paper_shape("MoE-GPT3-XL", 4096)


def test_a_layer_of_table_iii() -> None:
    assert (SHAPE.d_model, SHAPE.hidden.d_hidden, SHAPE.num_experts, SHAPE.num_ranks) == (2048, 8192, 64, 64)
    assert not SHAPE.hidden.gated


def test_a_sequential_step_is_the_sum_of_its_operations() -> None:
    busy = busy_us(SHAPE, SEQUENTIAL, DEVICE)
    assert busy["copy"] == 0
    total_us = sum(busy.values()) + DEVICE.outside.latency_us
    assert round(total_us) == round(time_us(SHAPE, SEQUENTIAL, DEVICE))


def test_without_tensor_cores_only_products_are_slower() -> None:
    slow = without_tensor_cores(DEVICE)
    ours, theirs = busy_us(SHAPE, SEQUENTIAL, DEVICE), busy_us(SHAPE, SEQUENTIAL, slow)
    assert theirs["compute"] > ours["compute"]
    assert round(theirs["comm"]) == round(ours["comm"])


def test_the_best_number_of_chunks_is_the_fastest() -> None:
    best = best_chunks(SHAPE, DEVICE)
    assert all(time_us(SHAPE, pipelined(best), DEVICE) <= time_us(SHAPE, pipelined(n), DEVICE) for n in (2, 4, 8))


def test_one_rank_at_a_time_has_a_chunk_for_every_rank() -> None:
    assert one_rank_at_a_time(8).num_chunks == 8


def test_only_the_papers_side_is_labelled_paper() -> None:
    assert [kind for _, kind, _ in sides("a", "b")] == [None, "paper"]
