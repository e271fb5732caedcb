"""Chains of many spellings: found as expected, and with the meaning of a chain in their place nothing changes."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from closeness import assert_all_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from fusion.graph import find, replace, trace
from fusion.reference import run

INF = math.inf


@dataclass
class Case:
    """A function, the shapes of its tensors (of masks in words), and each chain's letters and number of products."""

    function: Callable
    shapes: dict
    chains: list = field(default_factory=list)
    kwargs: dict = field(default_factory=dict)


def scores(q, k, scale=0.3):
    return q @ k.transpose(-1, -2) * scale


def heads(x, number):
    return x.unflatten(-1, (number, -1)).transpose(1, 2)


class Feed(nn.Module):
    def __init__(self, activation, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 10), activation, nn.Dropout(dropout), nn.Linear(10, 5))

    def forward(self, x):
        return self.layers(x)


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x):
        q, k, v = (heads(t, 3) for t in self.qkv(x).chunk(3, dim=-1))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.tokens = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5))
        self.channels = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))

    def forward(self, x):
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm(x))


def grouped_by_expand(q, k, v):
    k, v = (x[:, :, None].expand(2, 2, 3, 5, 4).reshape(2, 6, 5, 4) for x in (k, v))
    return functional.softmax(scores(q, k), dim=-1) @ v


def grouped_by_repeat(q, k, v):
    k, v = (x.repeat_interleave(3, dim=1) for x in (k, v))
    return functional.softmax(scores(q, k), dim=-1) @ v


def half_softmax(q, k, v):
    p = functional.softmax(scores(q, k).float(), dim=-1, dtype=torch.float32)
    return p.to(q.dtype) @ v


def causal_by_arange(q, k, v):
    rows, columns = torch.arange(7)[:, None], torch.arange(5)[None, :]
    return torch.where(columns <= rows + 1, scores(q, k), -INF).softmax(-1) @ v


def causal_by_addition(q, k, v):
    return (scores(q, k) + torch.full((7, 5), -INF).triu(1)).softmax(-1) @ v


def in_place(x, a, b):
    h = x @ a
    h *= 0.5
    h.relu_()
    return h @ b


def several_results(q, k, v):
    y = functional.scaled_dot_product_attention(q, k, v)
    return {"y": y, "pair": (y.sum(), 3, None), "q": q * 2}


def two_chains(x, a, b):
    y = functional.layer_norm(functional.gelu(x @ a) @ b, (6,))
    return functional.gelu(y @ a) @ b


QKV = {"q": (2, 3, 7, 4), "k": (2, 3, 5, 4), "v": (2, 3, 5, 6)}
GROUPED = {"q": (2, 6, 7, 4), "k": (2, 2, 5, 4), "v": (2, 2, 5, 4)}
FLAT = {"x": (7, 6), "a": (6, 8), "b": (8, 6)}
sdpa = functional.scaled_dot_product_attention

CASES = {
    "attention": Case(lambda q, k, v: (scores(q, k)).softmax(-1) @ v, QKV, [("ZMNKH", 2)]),
    "divided": Case(
        lambda q, k, v: functional.softmax(q @ k.mT / math.sqrt(4), dim=-1) @ v, QKV, [("ZMNKH", 2)]
    ),
    "two dimensions": Case(
        lambda q, k, v: (scores(q, k)).softmax(-1) @ v, {"q": (7, 4), "k": (5, 4), "v": (5, 6)}, [("MNKH", 2)]
    ),
    "bmm": Case(
        lambda q, k, v: torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), 2), v),
        {"q": (3, 7, 4), "k": (3, 5, 4), "v": (3, 5, 6)},
        [("ZMNKH", 2)],
    ),
    "einsum": Case(
        lambda q, k, v: torch.einsum("bhqk,bkhd->bqhd", torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1), v),
        {"q": (2, 7, 3, 4), "k": (2, 5, 3, 4), "v": (2, 5, 3, 6)},
        [("ZGMNKH", 2)],
    ),
    "additive mask": Case(
        lambda q, k, v, m: (scores(q, k) + m).softmax(-1) @ v, {**QKV, "m": (7, 5)}, [("ZMNKH", 2)]
    ),
    "additive mask of a batch": Case(
        lambda q, k, v, m: (m + scores(q, k)).softmax(-1) @ v, {**QKV, "m": (2, 1, 1, 5)}, [("ZGMNKH", 2)]
    ),
    "masked_fill": Case(
        lambda q, k, v, m: scores(q, k).masked_fill(m, -INF).softmax(-1) @ v, {**QKV, "m": "drop 7 5"}, [("ZMNKH", 2)]
    ),
    "masked_fill of the contrary": Case(
        lambda q, k, v, m: scores(q, k).masked_fill(~m[:, None, None], -INF).softmax(-1) @ v,
        {**QKV, "m": "keep 2 5"},
        [("ZGMNKH", 2)],
    ),
    "where": Case(
        lambda q, k, v, m: torch.where(m, scores(q, k), torch.tensor(-INF)).softmax(-1) @ v,
        {**QKV, "m": "keep 3 7 5"},
        [("ZGMNKH", 2)],
    ),
    "tril": Case(
        lambda q, k, v: scores(q, k).masked_fill(torch.ones(7, 5).tril() == 0, -INF).softmax(-1) @ v,
        QKV,
        [("ZMNKH", 2)],
    ),
    "arange": Case(causal_by_arange, QKV, [("ZMNKH", 2)]),
    "triu": Case(causal_by_addition, QKV, [("ZMNKH", 2)]),
    "sdpa": Case(sdpa, {"query": QKV["q"], "key": QKV["k"], "value": QKV["v"]}, [("ZMNKH", 2)]),
    "sdpa causal": Case(lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=0.2), QKV, [("ZMNKH", 2)]),
    "sdpa with a bias": Case(lambda q, k, v, m: sdpa(q, k, v, m), {**QKV, "m": (3, 1, 5)}, [("ZGMNKH", 2)]),
    "sdpa with a mask": Case(
        lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), {**QKV, "m": "keep 2 1 7 5"}, [("ZGMNKH", 2)]
    ),
    "sdpa of groups": Case(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), GROUPED, [("ZMNKH", 2)]),
    "sdpa of causal groups": Case(
        lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), GROUPED, [("ZGMNKH", 2)]
    ),
    "sdpa of one query": Case(
        lambda q, k, v: sdpa(q, k, v), {**QKV, "q": (2, 3, 1, 4)}, [("ZMNKH", 2)]
    ),
    "sdpa before transposes": Case(
        lambda q, k, v: sdpa(q, k, v).transpose(1, 2).reshape(2, 7, 18), QKV, [("ZMGNKH", 2)]
    ),
    "groups by expand": Case(grouped_by_expand, GROUPED, [("ZMNKH", 2)]),
    "groups by repeat_interleave": Case(grouped_by_repeat, GROUPED, [("ZMNKH", 2)]),
    "softmax in fp32": Case(half_softmax, QKV, [("ZMNKH", 2)]),
    "mlp": Case(lambda x, a, b: functional.gelu(x @ a) @ b, FLAT, [("MNKH", 2)]),
    "mlp of sequences": Case(
        lambda x, a, b: functional.gelu(x @ a, approximate="tanh") @ b, {**FLAT, "x": (2, 7, 6)}, [("MNKH", 2)]
    ),
    "mlp of strided sequences": Case(
        lambda x, a, b: functional.relu(x.transpose(0, 1) @ a) @ b, {**FLAT, "x": (7, 2, 6)}, [("ZMNKH", 2)]
    ),
    "mlp of one row": Case(lambda x, a, b: functional.silu(x @ a) @ b, {**FLAT, "x": (1, 6)}, [("MNKH", 2)]),
    "addmm": Case(
        lambda x, a, b, c: torch.addmm(c, functional.relu(torch.mm(x, a)), b, alpha=0.5),
        {**FLAT, "c": (6,)},
        [("MNKH", 2)],
    ),
    "swish by hand": Case(lambda x, a, b: ((h := x @ a) * torch.sigmoid(h)) @ b, FLAT, [("MNKH", 2)]),
    "in place": Case(in_place, FLAT, [("MNKH", 2)]),
    "modules": Case(Feed(nn.ReLU(inplace=True)), {"x": (2, 7, 6)}, [("MNKH", 2)]),
    "modules in evaluation": Case(Feed(nn.GELU(), dropout=0.5).eval(), {"x": (2, 7, 6)}, [("MNKH", 2)]),
    "gated": Case(
        lambda x, a, b, up: (functional.silu(x @ a) * (x @ up)) @ b, {**FLAT, "up": (6, 8)}, [("MNKH", 3)]
    ),
    "gated the other way": Case(
        lambda x, a, up, b: (functional.linear(x, up) * functional.gelu(functional.linear(x, a))) @ b,
        {"x": (2, 7, 6), "a": (8, 6), "up": (8, 6), "b": (8, 6)},
        [("MNKH", 3)],
    ),
    "residual": Case(lambda x, a, b: x + functional.gelu(x @ a) @ b, FLAT, [("MNKH", 2)]),
    "difference": Case(
        lambda x, a, b, c: c - (functional.gelu(x @ a - c) @ b - x) * 2,
        {"x": (7, 8), "a": (8, 8), "b": (8, 8), "c": (7, 8)},
        [("MNKH", 2)],
    ),
    "low rank": Case(
        lambda x, w, a, b: x @ w + (x @ a) @ b * 0.5,
        {"x": (7, 6), "w": (6, 8), "a": (6, 2), "b": (2, 8)},
        [("MKHN", 3)],
    ),
    "three products": Case(
        lambda x, a, b, c: functional.relu(functional.relu(x @ a) @ b) @ c, {**FLAT, "c": (6, 3)}, [("MNKHP", 3)]
    ),
    "experts": Case(
        lambda x, a, b: functional.gelu(x @ a) @ b, {"x": (3, 7, 6), "a": (3, 6, 8), "b": (3, 8, 6)}, [("ZMNKH", 2)]
    ),
    "values on the right": Case(lambda x, a, b: x @ (a @ b + 1), FLAT | {"x": (7, 6)}, [("HMKN", 2)]),
    "named results": Case(
        several_results, QKV, [("ZMNKH", 2)]
    ),
    "keyword arguments": Case(
        lambda x, *, weights: functional.gelu(x @ weights["a"]) @ weights["b"],
        {"x": (7, 6)},
        [("MNKH", 2)],
        {"weights": {"a": (6, 8), "b": (8, 6)}},
    ),
    "two chains": Case(two_chains, FLAT, [("MNKH", 2), ("MNKH", 2)]),
    "mixer": Case(Mixer(), {"x": (2, 5, 6)}, [("MNKH", 2), ("ZHNKM", 2)]),
    "self-attention": Case(SelfAttention(), {"x": (2, 7, 12)}, [("ZMGNKH", 2)]),
}  # fmt: skip


def drawn(shape):
    if isinstance(shape, str):
        kind, *sizes = shape.split()
        mask = torch.rand([int(size) for size in sizes]) < 0.7
        mask[..., 0] = kind == "keep"  # every query has a key
        return mask
    return torch.randn(shape)


def leaves_of(tree, dtype):
    """A copy of a tree whose floating tensors are leaves that want gradients."""

    def leaf(tensor):
        wanted = torch.is_tensor(tensor) and tensor.is_floating_point()
        return tensor.detach().to(dtype).clone().requires_grad_() if wanted else tensor

    return pytree.tree_map(leaf, tree)


def results(function, args, kwargs, parameters):
    """Every floating tensor that comes out and every gradient, by name."""
    outputs = [x for x in pytree.tree_leaves(function(*args, **kwargs)) if torch.is_tensor(x)]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
    inputs = [x for x in pytree.tree_leaves((args, kwargs)) if torch.is_tensor(x) and x.requires_grad]
    gradients = torch.autograd.grad(outputs, [*inputs, *parameters], upstream)
    named = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    return named | {f"gradient {index}": gradient for index, gradient in enumerate(gradients)}


@pytest.mark.parametrize("name", CASES)
def test_replaced_chains_change_nothing(name):
    case = CASES[name]
    torch.manual_seed(0)
    args = [drawn(shape) for shape in case.shapes.values()]
    kwargs = {key: {k: drawn(shape) for k, shape in value.items()} for key, value in case.kwargs.items()}
    function = case.function
    traced = trace(function, args, kwargs)
    found = find(traced.graph_module)
    chains = [("".join(match.chain.sizes), len(match.chain.products)) for match in found.matches]
    assert [chain for chain in chains if chain[1] > 1] == case.chains, str(found)
    replaced = replace(traced.graph_module, found, lambda match: lambda tensors: run(match.chain, tensors))
    assert len([node for node in replaced.graph.nodes if node.op == "call_module"]) == len(chains)

    def through_graph(*args, **kwargs):
        return traced.result(replaced(*(x for x in pytree.tree_leaves((args, kwargs)) if torch.is_tensor(x))))

    is_module = isinstance(function, nn.Module)
    parameters = list(function.parameters()) if is_module else []
    double = copy.deepcopy(function).double() if is_module else function
    own, wide = (leaves_of((args, kwargs), dtype) for dtype in (torch.float32, torch.float64))
    actual = results(through_graph, *leaves_of((args, kwargs), torch.float32), parameters)
    expected = results(function, *own, parameters)
    assert_all_close(actual, expected, results(double, *wide, list(double.parameters()) if is_module else []))


def test_the_result_has_the_same_structure_and_strides():
    args = [torch.randn(2, 3, 5, 4) for _ in range(3)]
    traced = trace(several_results, args, {})
    replaced = replace(traced.graph_module, find(traced.graph_module), lambda m: lambda t: run(m.chain, t))
    result, expected = traced.result(replaced(*args)), several_results(*args)
    assert result["pair"][1:] == expected["pair"][1:] == (3, None)
    assert result["y"].stride() == expected["y"].stride()


def test_a_kernel_is_asked_for_each_chain_and_gets_its_tensors_as_views():
    args = [torch.randn(2, 7, 6), torch.randn(6, 8), torch.randn(8, 6)]
    traced = trace(two_chains, args, {})
    seen = []

    def kernel_for(match):
        def kernel(tensors):
            seen.append({name: tensor.untyped_storage().data_ptr() for name, tensor in tensors.items()})
            return run(match.chain, tensors)

        return kernel

    replace(traced.graph_module, find(traced.graph_module), kernel_for)(*args)
    first, second = seen
    assert first == {name: x.untyped_storage().data_ptr() for name, x in zip("ABD", args, strict=True)}
    assert second.keys() == {"A", "B", "D"}
    assert second["B"] == first["B"]


def test_the_graph_itself_stays_as_it_is():
    args = [torch.randn(7, 6), torch.randn(6, 8), torch.randn(8, 6)]
    traced = trace(CASES["mlp"].function, args, {})
    before = str(traced.graph_module.graph)
    replace(traced.graph_module, find(traced.graph_module), lambda m: lambda t: run(m.chain, t))
    assert str(traced.graph_module.graph) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["attention", "sdpa with a bias", "softmax in fp32", "gated", "low rank", "residual"])
def test_replaced_chains_change_nothing_in_low_precision(name, dtype):
    case = CASES[name]
    torch.manual_seed(0)
    args = [drawn(shape).to(dtype) for shape in case.shapes.values()]
    traced = trace(case.function, args, {})
    found = find(traced.graph_module)
    assert [len(match.chain.products) for match in found.matches] == [number for _, number in case.chains]
    replaced = replace(traced.graph_module, found, lambda match: lambda tensors: run(match.chain, tensors))
    wide = [tensor.double() for tensor in args]
    actual, expected, truth = (
        {"result": result} for result in (traced.result(replaced(*args)), case.function(*args), case.function(*wide))
    )
    assert_all_close(actual, expected, truth)


def transformers_layers():
    """Layers of that library's models, their arguments, and the products of their chains."""
    from transformers import BertConfig, GPT2Config, LlamaConfig
    from transformers.models.bert.modeling_bert import BertLayer
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
    from transformers.models.llama.modeling_llama import LlamaMLP

    sizes = {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 20}
    for attention in ("eager", "sdpa"):
        layer = BertLayer(BertConfig(**sizes, attn_implementation=attention))
        mask = torch.zeros(2, 1, 1, 7)
        mask[0, 0, 0, 5:] = -INF
        yield f"BERT, {attention}", layer, {"attention_mask": mask}, [2, 3]
    yield "GPT-2", GPT2MLP(20, GPT2Config(n_embd=12)), {}, [2]
    yield "Llama", LlamaMLP(LlamaConfig(**sizes)), {}, [3]


@pytest.mark.parametrize("case", transformers_layers(), ids=lambda case: case[0])
def test_layers_of_transformers(case):
    _, layer, kwargs, products = case
    layer.eval()
    torch.manual_seed(0)
    x = torch.randn(2, 7, 12)
    traced = trace(layer, [x], kwargs)
    found = find(traced.graph_module)
    numbers = [len(match.chain.products) for match in found.matches]
    assert [number for number in numbers if number > 1] == products, str(found)
    replaced = replace(traced.graph_module, found, lambda match: lambda tensors: run(match.chain, tensors))

    def through_graph(x, **kwargs):
        return traced.result(replaced(x, *kwargs.values()))

    double = copy.deepcopy(layer).double()
    wide = {name: tensor.double() for name, tensor in kwargs.items()}
    parameters, doubles = list(layer.parameters()), list(double.parameters())
    actual = results(through_graph, [leaves_of(x, torch.float32)], kwargs, parameters)
    expected = results(layer, [leaves_of(x, torch.float32)], kwargs, parameters)
    assert_all_close(actual, expected, results(double, [leaves_of(x, torch.float64)], wide, doubles))


def stepped(x, kinds, weight):
    """A random function of a tensor of three dimensions; `weight` gives its weights by their sizes."""
    first, kept = x, []
    for kind in kinds:
        kept.append(x)
        b, m, k = x.shape
        match kind:
            case "linear":
                x = functional.linear(x, weight(4, k), weight(4))
            case "matmul":
                x = x @ weight(k, 5)
            case "batched":
                x = torch.bmm(x, weight(b, k, 3))
            case "scores":
                x = x @ x.transpose(1, 2) * 0.5
            case "left":
                x = weight(6, m) @ x
            case "softmax":
                x = x.softmax(-1)
            case "causal":
                x = x.masked_fill(torch.ones(m, k, dtype=torch.bool).triu(1), -INF).softmax(-1)
            case "gelu":
                x = functional.gelu(x)
            case "scale":
                x = (1 - x) / 3
            case "bias":
                x = x + weight(k)
            case "residual":
                x = next((x + y for y in reversed(kept) if y.shape == x.shape), x)
            case "gate":
                x = x * (first @ weight(first.shape[2], k)) if first.shape[:2] == x.shape[:2] else x
            case "transpose":
                x = x.transpose(1, 2)
            case "turn":
                x = x.permute(1, 0, 2)
            case "rows":
                x = x.reshape(1, b * m, k)
            case "copy":
                x = x.transpose(0, 1).contiguous()
            case "split":
                x = x.unflatten(1, (2, -1)).flatten(0, 1) if m % 2 == 0 else x
    return x


def strides(tensor):
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


STEPS = [
    "linear", "matmul", "batched", "scores", "left", "softmax", "causal", "gelu", "scale", "bias", "residual", "gate",
    "transpose", "turn", "rows", "copy", "split",
]  # fmt: skip


@settings(max_examples=80)
@given(kinds=st.lists(st.sampled_from(STEPS), min_size=3, max_size=9), seed=st.integers(0, 2**20))
def test_random_functions_stay_what_they_are(kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = []

    def draw(*sizes):
        weights.append(torch.randn(sizes, generator=generator))
        return weights[-1]

    def function(x, *weights):
        remaining = iter(weights)
        return stepped(x, kinds, lambda *sizes: next(remaining))

    x = torch.randn(2, 6, 4, generator=generator)
    stepped(x, kinds, draw)
    traced = trace(function, [x, *weights], {})
    found = find(traced.graph_module)
    inner = {node for match in found.matches for node in match.covered if node != match.output}
    assert not inner & {binding.node for match in found.matches for binding in match.bindings}
    replaced = replace(traced.graph_module, found, lambda match: lambda tensors: run(match.chain, tensors))
    actual, expected = traced.result(replaced(x, *weights)), function(x, *weights)
    assert strides(actual) == strides(expected)
    truth = function(*(tensor.double() for tensor in (x, *weights)))
    assert_all_close({"result": actual}, {"result": expected}, {"result": truth})
