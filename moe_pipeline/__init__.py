"""Mixture-of-Experts layers (MPipeMoE, IPDPS 2023): x -> gate -> routing -> [dispatch, experts, combine] x n -> y.

config.py      what a user chooses: the gate, the chunks, what is kept for backward
plan/          what is decided before anything runs: partition, strategy, schedule, ledger; no torch
losses.py      the router's losses: balance, z, importance
gate.py        tokens -> (token, expert, weight) entries and the router's losses
routing.py     entries -> rows in the order they travel
grouped.py     rows sorted by expert times each expert's matrix, and the gradients
experts.py     rows -> rows: one grouped feed-forward for all experts, or any modules
run/           what carries a plan out: messages, buffers, streams, timeline
dispatch.py    assignment -> results: [dispatch, experts, combine] for experts of any kind, here or spread over ranks
parallel.py    spread experts inside DistributedDataParallel, FSDP and DeepSpeed; clipping, whole weights
layer.py       gate, routing and experts as one layer; records of layers buried in a model
upcycle.py     a dense Hugging Face model -> the same function with MoE layers
hugging_face.py  Hugging Face's experts interface: that library's MoE models on this runtime, unchanged
reference.py   the meaning of gate and layer, in loops
"""

from moe_pipeline.config import GateConfig, PipelineConfig
from moe_pipeline.experts import FeedForwardExperts, ModuleExperts
from moe_pipeline.gate import Gate
from moe_pipeline.layer import MoEFeedForward, MoELayer, MoERecord, routed
from moe_pipeline.upcycle import upcycle

__all__ = [
    "FeedForwardExperts",
    "Gate",
    "GateConfig",
    "MoEFeedForward",
    "MoELayer",
    "MoERecord",
    "ModuleExperts",
    "PipelineConfig",
    "routed",
    "upcycle",
]
