"""torch.compile(model, backend="mcfuser"): chains of a model's graph as kernels, the rest by Inductor.

Dynamo hands over a graph of a model, sizes that change between calls as symbols. Its chains are found at the level that
the model calls; those that the executor takes become operators that later stages of the compiler see as one node each.

Source: not in the paper, whose front end is TVM's.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

from fusion.graph import Choice, Match, Symbols, choose, needs_gradient, replace_by_operator, simplify
from fusion.plan.chain import Chain
from fusion.run.autograd import Execution
from fusion.run.executors import DEFAULT, executors
from fusion.run.form import form_of, of_sizes

logger = logging.getLogger(__name__)

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


class Backend:
    """A backend of torch.compile, and what it did with every graph so far.

    Source: not in the paper.
    """

    def __init__(self) -> None:
        """Of no graphs yet."""
        self._reports: list[str] = []

    def __call__(
        self,
        graph_module: GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile a graph that Dynamo captured.

        Args:
            graph_module: The graph.
            example_inputs: Its arguments.
            mode: Of torch.compile, for Inductor.
            options: Of torch.compile: `executor` names what runs chains, as `fusion.run.operator.executors.add` got it;
                `rest` names the backend that compiles what is left, by default inductor, which takes all other options.

        Returns:
            What runs it.
        """
        settings = dict(options or {})
        executor, rest = settings.pop("executor", DEFAULT), settings.pop("rest", "inductor")
        fused, text = fuse_graph(graph_module, executor)
        self._reports.append(f"graph {len(self._reports)}\n{text}")
        logger.info("%s", self._reports[-1])
        if rest == "inductor":
            return torch._TorchCompileInductorWrapper(mode, settings, None)(fused, list(example_inputs))
        if settings:
            raise ValueError(f"options: {sorted(settings)} are Inductor's, but rest={rest!r}: leave them or it out")
        return torch._dynamo.lookup_backend(rest)(fused, list(example_inputs))

    def report(self) -> str:
        """What was fused in every graph compiled so far, what was not, and why."""
        return "\n".join(self._reports) or "no graph was compiled yet: call the model that torch.compile returned"


mcfuser = Backend()


def report() -> str:
    """What torch.compile(model, backend="mcfuser") fused in every graph compiled so far, what it did not, and why.

    Source: not in the paper.
    """
    return mcfuser.report()


def fuse_graph(graph_module: GraphModule, executor: str = DEFAULT) -> tuple[GraphModule, str]:
    """Replace the chains of a graph that Dynamo captured by operators.

    Args:
        graph_module: The graph, its parameters among its arguments.
        executor: Name of what runs chains.

    Returns:
        A graph of the same arguments and results, and in words what was fused.

    Source: not in the paper.
    """
    executors.get(executor)  # an unknown name is refused before anything is traced
    inner = [node for node in graph_module.graph.nodes if isinstance(node.target, torch._ops.HigherOrderOperator)]
    if inner:
        return graph_module, "\n".join(_fuse_inside(graph_module, node, executor) for node in inner)
    values = [node.meta.get("example_value") for node in graph_module.graph.find_nodes(op="placeholder")]
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors or list(graph_module.parameters()) or any(type(tensor) is not FakeTensor for tensor in tensors):
        return graph_module, "not fused: it has no tensors, ones of a kind of their own, or parameters not as arguments"
    original = traced(graph_module, values)
    given = [isinstance(value, Tensor) and value.requires_grad for value in values]
    differentiated = needs_gradient(original, given) if torch.is_grad_enabled() else frozenset()
    symbols = Symbols(original)

    def sized(match: Match) -> Chain:
        sizes = {letter: symbols.hint(size) for letter, size in match.chain.sizes.items()}
        return of_sizes(form_of(match.chain), sizes)

    def execution_for(match: Match) -> Execution | str:
        return executors.ask(executor, sized(match), match.needs(differentiated), tensors[0].device)

    choice = choose(symbols.concrete(original), execution_for, differentiated)
    text = _described(choice, sized)
    if not choice.found.matches:
        return graph_module, text
    return replace_by_operator(original, choice.found, symbols, executor, differentiated), text


def _fuse_inside(graph_module: GraphModule, node: Node, executor: str) -> str:
    """Fuse what a checkpoint computes again; a graph that holds others is not looked at itself."""
    name = str(node.args[0].target) if isinstance(node.args[0], Node) else ""
    body = graph_module.get_submodule(name) if node.target is CHECKPOINT else None
    if not isinstance(body, GraphModule):
        return f"not fused: {node.target} holds a graph of its own: compile the parts around it by themselves"
    fused, text = fuse_graph(body, executor)
    graph_module.set_submodule(name, fused)
    return f"inside {node.name}, and nothing beside it\n{text}"


def traced(graph_module: GraphModule, values: Sequence[Any]) -> GraphModule:
    """A graph that Dynamo captured in torch's operations, before autograd, with its symbols.

    Args:
        graph_module: The graph.
        values: Of its arguments: fake tensors, and symbols.

    Source: not in the paper.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    tracer = make_fx(_casting(graph_module), tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)
    with mode:
        made = tracer(*(value.detach() if isinstance(value, Tensor) else value for value in values))
    simplify(made)
    return made


def _casting(graph_module: GraphModule) -> GraphModule:
    """The graph with autocast as Python contexts: those take effect while they are traced, Dynamo's calls do not."""
    graph = Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    for node in graph.nodes:
        if node.target is torch.amp.autocast_mode._enter_autocast:
            node.target = _enter
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            node.target = _exit
    return GraphModule(graph_module, graph)


def _enter(*settings: Any) -> torch.autocast:
    context = torch.autocast(*settings)
    context.__enter__()
    return context


def _exit(context: torch.autocast) -> None:
    context.__exit__(None, None, None)


def _described(choice: Choice, sized: Callable[[Match], Chain]) -> str:
    """The choice, with what several layers share said once."""
    fused = Counter(f"{sized(match)}: {choice.executions[match.output].text}" for match in choice.found.matches)
    reasons = Counter(re.sub(r"_\d+\b", "", str(decline)) for decline in choice.found.declines)
    lines = [f"fused {count} x {text}" for text, count in fused.items()]
    return "\n".join([*lines, *(f"not fused {count} x {text}" for text, count in reasons.items())]) or "no products"
