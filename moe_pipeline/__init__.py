"""Mixture-of-Experts layers (MPipeMoE, IPDPS 2023): x -> gate -> routing -> [dispatch, experts, combine] -> y.

config.py      what a gate is: experts, choices per token, capacity, noise, weights of its losses
losses.py      the router's losses: balance, z, importance
gate.py        tokens -> (token, expert, weight) entries and the router's losses
routing.py     entries -> rows sorted by expert; dispatch and combine
experts.py     rows -> rows: one grouped feed-forward for all experts, or any modules
layer.py       gate, routing and experts as one layer; records of layers buried in a model
upcycle.py     a dense Hugging Face model -> the same function with MoE layers
reference.py   the meaning of gate and layer, in loops
"""

from moe_pipeline.config import GateConfig
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
    "routed",
    "upcycle",
]
