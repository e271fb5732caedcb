"""The same chain in parts: a product by itself, and what is left of a chain when its first value is written out.

Source: our definition (MCFuser, arXiv:2506.22169, partitions a graph but our sources do not say how).
"""

import functools
from collections.abc import Sequence
from dataclasses import replace

from fusion.plan.chain import Chain
from fusion.plan.stages import Input, MatMul, Softmax, Stage, operands

MAX_KEPT = 1024


def alone(chain: Chain, value: str) -> Chain:
    """One product of a chain as a chain of its own, without the stages behind it.

    Args:
        chain: Any.
        value: Of the product.

    Returns:
        The chain; what the product reads are its inputs.
    """
    product = next(product for product in chain.products if product.out == value)
    return _of_stages(chain, (product,))


@functools.lru_cache(maxsize=MAX_KEPT)  # asked at every call, and to make a chain is to verify it
def after_first(chain: Chain) -> Chain:
    """What is left of a chain once its first product's value, all its stages behind it, is written out.

    Args:
        chain: Of two products at least.

    Returns:
        The chain with that value as an input.
    """
    first = chain.products[0].out
    return _of_stages(chain, tuple(stage for stage in chain.stages if not _changes(stage, first)))


@functools.lru_cache(maxsize=MAX_KEPT)
def first_alone(chain: Chain) -> Chain:
    """The first product of a chain with the stages behind it.

    Args:
        chain: Any.

    Returns:
        The chain that ends with the value that `after_first` has as an input.
    """
    first = chain.products[0].out
    return _of_stages(chain, tuple(stage for stage in chain.stages if _changes(stage, first)))


def can_be_cut(chain: Chain) -> bool:
    """Whether `first_alone` and `after_first` compute the same: the value between them is rounded in both ways.

    Args:
        chain: Any.

    Returns:
        Whether there is a second product, and products alone read the first one's value, which is no softmax.
    """
    if len(chain.products) < 2:
        return False
    first = chain.products[0].out
    readers = [stage for stage in chain.stages if first in operands(stage)]
    softmax = any(isinstance(stage, Softmax) for stage in chain.epilogue(first))
    return not softmax and all(isinstance(stage, MatMul) for stage in readers)


def without_last(chain: Chain) -> Chain:
    """What is left of a chain without its last product and the stages behind that.

    Args:
        chain: Whose last product reads all other values, or what is made of them.

    Returns:
        The chain that ends with the value that the last product reads.
    """
    return _of_stages(chain, tuple(stage for stage in chain.stages if not _changes(stage, chain.output)))


def last_alone(chain: Chain) -> Chain:
    """The last product of a chain with the stages behind it; what it reads are inputs.

    Args:
        chain: Any.
    """
    return _of_stages(chain, tuple(stage for stage in chain.stages if _changes(stage, chain.output)))


def _changes(stage: Stage, value: str) -> bool:
    return (stage.out if isinstance(stage, MatMul) else stage.x) == value


def _of_stages(chain: Chain, stages: Sequence[Stage]) -> Chain:
    """A chain of some of the stages; values that others make are inputs."""
    made = {stage.out for stage in stages if isinstance(stage, MatMul)}
    read = [name for stage in stages for name in operands(stage) if name not in made]
    tensors = chain.tensors
    inputs = tuple(Input(name, tensors[name]) for name in dict.fromkeys(read))
    letters = {letter for tensor in inputs for letter in tensor.dims}
    dims = tuple(dim for dim in chain.dims if dim.name in letters)
    return replace(chain, dims=dims, inputs=inputs, stages=tuple(stages))
