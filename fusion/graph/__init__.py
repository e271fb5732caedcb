"""From a Python function to the chains in it, and back to a function that runs them as one kernel each.

trace -> find -> choose -> replace

    trace.py        a function as a graph of torch operations
    axes.py         what dimensions are made of, so that views can be followed
    views.py        operations that only show a tensor in another way
    constants.py    what a graph computes from nothing: numbers, causal masks
    products.py     products of all spellings
    activation.py   activations that are spelled out
    operations.py   what every other operation is in a chain, or why it is none
    uses.py         who reads a node, and how many products lie behind it
    draft.py        a chain with axes in place of letters
    reader.py       a graph, read backwards from where a chain ends
    dimensions.py   axes that are one dimension
    letters.py      dimensions that are loops or batches, and their letters
    bind.py         the chain, and what of the graph its inputs are
    find.py         all chains of a graph, and reasons for what is not fused
    choose.py       what runs each chain
    symbols.py      sizes that are not known yet
    outside.py      tensors that a function reads from outside
    replace.py      the graph with a call in place of each chain
"""

from fusion.graph.bind import Binding, Match, Views
from fusion.graph.choose import Choice, choose
from fusion.graph.find import Decline, Found, find
from fusion.graph.replace import Kernel, replace, replace_by_operator
from fusion.graph.symbols import Symbols
from fusion.graph.trace import Trace, TraceError, needs_gradient, simplify, trace

__all__ = [
    "Binding",
    "Choice",
    "Decline",
    "Found",
    "Kernel",
    "Match",
    "Symbols",
    "Trace",
    "TraceError",
    "Views",
    "choose",
    "find",
    "needs_gradient",
    "replace",
    "replace_by_operator",
    "simplify",
    "trace",
]
