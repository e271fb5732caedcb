"""What runs the chains of a backward pass: the reference, and Triton's interpreter with schedules drawn at random."""

import dataclasses
import math
import random

import torch

from fusion.emit.triton import emit
from fusion.plan import Causal, Chain, Softmax
from fusion.plan.expression import expressions
from fusion.plan.prune import repeated_finish, split_softmax
from fusion.plan.schedule import Schedule
from fusion.plan.stages import operands
from fusion.reference import run
from fusion.run.triton.launch import launch, launch_with_lse
from tests.fusion.computed import back, orders, shuffled

EXACT = (torch.float64, torch.bool)


class Interpreter:
    """Every chain by a kernel of another legal schedule, of few blocks and rounds."""

    def __init__(self, seed=0, max_rounds=8):
        self.random, self.max_rounds = random.Random(seed), max_rounds

    def __call__(self, chain, tensors, *, exact=False, save_lse=False):
        kernel = emit(chain, self.schedule(chain), exact=exact, save_lse=save_lse, upcast=chain.dtype == "bf16")
        return (launch_with_lse if save_lse else launch)(kernel, chain, tensors)

    def schedule(self, chain):
        every = expressions(chain)
        while True:
            most = {letter: max(math.ceil(chain.sizes[letter] / 16), 1) for letter in chain.loops}
            tiles = {letter: 16 * self.random.randint(1, most[letter]) for letter in chain.loops}
            rounds = math.prod(math.ceil(chain.sizes[letter] / tiles[letter]) for letter in chain.loops)
            schedule = Schedule(self.random.choice(every), tuple(tiles.items()))
            program = schedule.program(chain)
            if rounds <= self.max_rounds and not (repeated_finish(chain, program) or split_softmax(chain, program)):
                return schedule


def execute(chain, tensors, *, exact=False, save_lse=False):
    """The reference; what is not to be rounded it computes in fp32 at least."""
    wide = {name: tensor if tensor.dtype in EXACT else tensor.float() for name, tensor in tensors.items()}
    in_fp32 = dataclasses.replace(chain, dtype="fp32")
    output = run(in_fp32, wide) if exact else run(chain, tensors)
    return (output, log_sum_exp(in_fp32, wide)) if save_lse else output


class InAnyOrder:
    """The reference, every chain with its sums in another order."""

    def __init__(self, seed=0):
        self.random = random.Random(seed)

    def __call__(self, chain, tensors, *, exact=False, save_lse=False):
        order = orders(chain, self.random.randrange(2**32))
        given = {name: shuffled(tensor, chain.tensors[name], order) for name, tensor in tensors.items()}
        found = execute(chain, given, exact=exact, save_lse=save_lse)
        output = shuffled(found[0] if save_lse else found, chain.tensors[chain.output], back(order))
        return (output, shuffled(found[1], lse_letters(chain), back(order))) if save_lse else output


def lse_letters(chain):
    (softmax,) = (stage for stage in chain.stages if isinstance(stage, Softmax))
    return chain.tensors[softmax.x].replace(softmax.over, "")


def log_sum_exp(chain, tensors):
    """Of what the chain's one softmax runs over: the chain up to it without its masks, which are taken here."""
    (index,) = (index for index, stage in enumerate(chain.stages) if isinstance(stage, Softmax))
    value, over = chain.stages[index].x, chain.stages[index].over
    masks = [s for s in chain.epilogue(value) if isinstance(s, Causal) or getattr(s, "operation", "") == "mask"]
    kept = [stage for stage in chain.stages[:index] if stage not in masks]
    read = {name for stage in kept for name in operands(stage)}
    inputs = tuple(tensor for tensor in chain.inputs if tensor.name in read)
    letters = {letter for tensor in inputs for letter in tensor.dims}
    dims = tuple(dim for dim in chain.dims if dim.name in letters)
    scores = run(Chain(dims, inputs, tuple(kept)), {x.name: tensors[x.name] for x in inputs})
    own = chain.tensors[value]
    for mask in masks:
        scores = scores.masked_fill(~_seen(chain, mask, own, tensors), -torch.inf)
    return scores.logsumexp(own.index(over))


def _seen(chain, mask, own, tensors):
    if isinstance(mask, Causal):
        rows, columns = (torch.arange(chain.sizes[x]) for x in (mask.row, mask.column))
        seen, letters = columns <= rows[:, None] + mask.diagonal, mask.row + mask.column
    else:
        seen, letters = tensors[mask.operand], chain.tensors[mask.operand]
    ordered = seen.permute([letters.index(x) for x in own if x in letters])
    return ordered[tuple(slice(None) if x in letters else None for x in own)]
