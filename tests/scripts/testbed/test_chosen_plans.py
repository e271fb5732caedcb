"""The report shows what layers found for themselves, and nothing where they had nothing to choose."""

import torch
from torch import nn

from moe_pipeline import FeedForwardExperts, Gate, GateConfig, MoEFeedForward, MoELayer, PipelineConfig
from scripts.testbed.chosen_plans import sections


def _model(pipeline: PipelineConfig) -> nn.Module:
    gate = Gate(GateConfig(num_experts=2, top_k=2), 8)
    return nn.Sequential(MoEFeedForward(MoELayer(gate, FeedForwardExperts(2, 8, 16), pipeline=pipeline)))


def test_every_range_of_batches_is_a_line() -> None:
    model = _model(PipelineConfig(num_chunks="auto"))
    for tokens in (20, 20, 20, 20, 300):
        model(torch.randn(tokens, 8)).sum().backward()
    (section,) = sections(model)
    assert section.table is not None
    assert [row[:4] for row in section.table.rows] == [("0.moe", "20", "1", "none"), ("0.moe", "320", "1", "none")]
    assert section.table.rows[0][4].endswith(" ms")
    assert section.table.rows[0][5] == "-"


def test_fixed_layers_have_nothing_to_show() -> None:
    assert sections(_model(PipelineConfig(num_chunks=2))) == ()
    assert sections(nn.Linear(2, 2)) == ()
