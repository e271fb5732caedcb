"""The tensors that a function reads from outside, so that a graph of it can tell when they are no longer the same.

Source: our definition (the paper has no front end for Python).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn


def outside_tensors(function: Callable[..., Any], arguments: Iterable[object]) -> tuple[Tensor, ...]:
    """Parameters and buffers of the modules that a function is or names, and tensors that it names.

    Args:
        function: A function, a module, or a method.
        arguments: Of a call; modules among them count too.

    Returns:
        The tensors, in an order that depends on nothing else. What is reached in other ways, such as a module in a
        list, is not among them.
    """
    found: dict[int, Tensor] = {}
    for value in (*_named(function), *arguments):
        if isinstance(value, nn.Module):
            found |= {id(tensor): tensor for tensor in (*value.parameters(), *value.buffers())}
    for value in _named(function):
        if isinstance(value, Tensor):
            found[id(value)] = value
    return tuple(found.values())


def _named(function: Callable[..., Any]) -> Iterator[object]:
    """What a function is bound to, closes over, and names among its module's globals."""
    yield function
    yield getattr(function, "__self__", None)
    function = getattr(function, "__func__", function)
    for cell in getattr(function, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not bound yet
            continue
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    yield from (function.__globals__[name] for name in names if name in getattr(function, "__globals__", {}))
