"""From a Python function to a graph of torch operations, at the level that the function calls.

make_fx traces on fake tensors before autograd and before torch takes operations apart: linear, matmul, softmax and
scaled_dot_product_attention stay whole, and any Python over tensors may stand around them. symbolic_trace, the other
choice, cannot follow Python that looks at shapes; a level below, torch takes attention apart as the device asks.

Source: our definition (the paper's front end is TVM's).
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fusion.graph.constants import LITERALS
from fusion.graph.operations import recognize
from fusion.graph.products import PRODUCTS, Product
from fusion.graph.views import viewed

aten = torch.ops.aten


class TraceError(ValueError):
    """A function that is no fixed sequence of operations; the message says what to change."""


@dataclass(frozen=True)
class Trace:
    """A function for arguments of fixed shapes, as a graph over their tensors."""

    graph_module: GraphModule
    """From the arguments' tensors, in pytree order, to the result's tensors."""
    outputs: pytree.TreeSpec
    constants: tuple[Any, ...]
    """For each leaf of the result what it is if it is no tensor."""
    is_tensor: tuple[bool, ...]

    def result(self, tensors: Sequence[Tensor]) -> Any:
        """What the function returns.

        Args:
            tensors: From the graph.
        """
        remaining = iter(tensors)
        leaves = zip(self.is_tensor, self.constants, strict=True)
        return pytree.tree_unflatten([next(remaining) if tensor else value for tensor, value in leaves], self.outputs)

    def needs_gradient(self, tensors: Sequence[Tensor]) -> frozenset[str]:
        """Names of the nodes whose tensors require a gradient if these arguments do.

        Args:
            tensors: Arguments of the graph.
        """
        return needs_gradient(self.graph_module, [tensor.requires_grad for tensor in tensors])


def needs_gradient(graph_module: GraphModule, given: Sequence[bool]) -> frozenset[str]:
    """Names of the nodes whose tensors require a gradient.

    Args:
        graph_module: As `trace` makes it.
        given: For every argument of the graph whether it requires one.
    """
    found: set[Node] = set()
    remaining, is_on = iter(given), True
    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        if node.target is torch._C._set_grad_enabled:
            is_on = bool(node.args[0])
        match node.op:
            case "placeholder":
                needs = next(remaining)
            case "get_attr":
                needs = operator.attrgetter(node.target)(graph_module).requires_grad
            case _:
                detached = node.target in (aten.detach.default, aten.detach_.default)
                made_of = any(source in found for source in node.all_input_nodes)
                needs = made_of and not detached and (is_on or _may_alias(node))
        if needs and (not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex()):
            found.add(node)
    return frozenset(node.name for node in found if node.op != "output")


def trace(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Trace:
    """Trace a function.

    Args:
        function: Any over tensors; modules and tensors that it reads from outside are taken as they are now.
        args: Positional arguments, tensors in any nesting of tuples, lists and dicts; what is no tensor is fixed.
        kwargs: Arguments by name, likewise.

    Returns:
        The graph.

    Raises:
        TraceError: What runs depends on the tensors' values, so there is no one graph.
    """
    # Only who traces pays for importing symbolic algebra.
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    seen: list[tuple[pytree.TreeSpec, list[Any]]] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        filled = list(leaves)
        for index, tensor in zip(places, tensors, strict=True):
            filled[index] = tensor
        inner_args, inner_kwargs = pytree.tree_unflatten(filled, spec)
        results, outputs = pytree.tree_flatten(function(*inner_args, **inner_kwargs))
        seen.append((outputs, results))
        return [result for result in results if isinstance(result, Tensor)]

    tracer = make_fx(flat, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)
    try:
        graph_module = tracer(*(leaves[index].detach() for index in places))
    except (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode) as error:
        name = getattr(function, "__qualname__", type(function).__name__)
        raise TraceError(
            f"function={name}: what it runs depends on the values of tensors, so it is no fixed graph; branch with "
            "torch.where, or pass what decides as a Python number, or fuse only the parts around it "
            f"({str(error).partition(chr(10))[0]})"
        ) from error
    simplify(graph_module)
    outputs, results = seen[-1]
    is_tensor = tuple(isinstance(result, Tensor) for result in results)
    constants = tuple(None if isinstance(result, Tensor) else result for result in results)
    return Trace(graph_module, outputs, constants, is_tensor)


def simplify(graph_module: GraphModule) -> None:
    """Take out what writes into tensors that nothing else can see, and write out the casts that autocast makes.

    Args:
        graph_module: Traced before autograd; it is changed in place.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target is aten.detach_.default and node.args[0].target in LITERALS:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target._schema.is_mutable and _is_private(node):
            name, overload = node.target._schema.name.removeprefix("aten::"), node.target._overloadname
            functional = getattr(getattr(aten, name.removesuffix("_"), None), overload, None)
            if name.endswith("_") and functional is not None and not functional._schema.is_mutable:
                node.target = functional
    for node in list(graph.nodes):
        if node.target in PRODUCTS and isinstance(node.meta.get("val"), Tensor):
            _cast_operands(node)
    graph_module.recompile()


def _cast_operands(node: Node) -> None:
    """Autocast computes a product in its own dtype, whatever its operands are in."""
    dtype = node.meta["val"].dtype

    def cast(operand: Node) -> Node:
        value = operand.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return operand
        with node.graph.inserting_before(node):
            copy = node.graph.call_function(aten._to_copy.default, (operand,), {"dtype": dtype})
        copy.meta["val"] = value.to(dtype)
        return copy

    if dtype in (torch.float16, torch.bfloat16):
        node.args, node.kwargs = map_arg(node.args, cast), map_arg(node.kwargs, cast)


def _may_alias(node: Node) -> bool:
    """Whether a node may be what it is made of, or a part of it."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    return any(result.alias_info is not None for result in node.target._schema.returns)


def _is_private(node: Node) -> bool:
    """Whether an operation in place changes a tensor that was just made and that nothing else reads."""
    x = node.args[0]
    if not isinstance(x, Node) or len(x.users) != 1 or not isinstance(x.target, torch._ops.OpOverload):
        return False
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(x.target.name(), "CompositeImplicitAutograd")
    return isinstance(recognize(x), Product) or (viewed(x) is None and not _may_alias(x) and not composite)
