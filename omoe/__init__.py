"""OMoE: an optimizer that keeps experts from becoming copies of each other.

expert inputs -> projectors -> base step -> projected step

    config.py       OMoEConfig, every choice of the method
    schedule.py     accumulating and orthogonal phases
    spread.py       experts spread over ranks
    experts.py      which parameters of a model are experts' linears
    inputs.py       mean inputs of experts, observed by hooks, or mean rows of weights and gradients
    projector.py    space=input: projectors from mean inputs, and the others' projector
    low_rank.py     the same with a few columns instead of a square matrix
    start.py        space=update: the weights before the first step, in three bytes each
    cost.py         memory, arithmetic and traffic, known before the first step
    subspace.py     space=update: the span of the other experts' changes
    control.py      controls: smaller steps, random directions, own directions
    base_step.py    the base optimizer's finished step, decoupled decay apart
    state.py        what is remembered of every expert linear
    input_space.py  space=input: steps and mean inputs of one linear
    leftover.py     what a finished step leaves in the others' subspace
    optimizer.py    OMoE around any torch optimizer
    diversity.py    how different experts are
    rivals.py       losses by which others keep experts apart
    reference.py    the meaning, one matrix at a time
"""

from omoe.config import OMoEConfig
from omoe.cost import cost
from omoe.diversity import change_cosine, expert_outputs, mean_pairwise, output_cosine, variation
from omoe.experts import ExpertLinear, find_expert_linears
from omoe.optimizer import OMoE

__all__ = [
    "ExpertLinear",
    "OMoE",
    "OMoEConfig",
    "change_cosine",
    "cost",
    "expert_outputs",
    "find_expert_linears",
    "mean_pairwise",
    "output_cosine",
    "variation",
]
