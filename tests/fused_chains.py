"""Random chains with schedules and tensors, and what is asked of a fused kernel: as right as the unfused chain."""

import ast
import functools
import math

import torch
from closeness import FUSED_FACTOR, allowed_error, assert_close, largest_error
from hypothesis import assume, reject
from hypothesis import strategies as st

from fusion import Chain, attention, gemm_chain, mlp
from fusion.emit.triton import emit
from fusion.plan import Causal, Dim, Elementwise, Input, MatMul, Softmax
from fusion.plan.expression import expressions
from fusion.plan.prune import repeated_finish, split_softmax
from fusion.plan.schedule import Schedule, schedule
from fusion.reference import run
from fusion.run.check import DTYPES
from fusion.run.triton.launch import launch
from tests.fusion.computed import ORDERS, in_another_order

MAX_SIZE = 80
MAX_ROUNDS = 32  # of all loops and blocks together: the interpreter takes milliseconds for each
MIN_ENTRIES = 512  # of an output: the largest error of a few entries is luck
ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu")
GRADIENTS = ("relu_grad", "gelu_grad", "gelu_tanh_grad", "silu_grad")


def draw_tensors(chain, seed=0, scale=0.4):
    """Inputs of a chain in float64 that its dtype holds exactly, of a size that keeps long chains within fp16."""
    generator = torch.Generator().manual_seed(seed)
    exponents = {s.operand for s in chain.stages if isinstance(s, Elementwise) and s.operation == "exp_minus"}
    tensors = {}
    for name in (tensor.name for tensor in chain.inputs):
        if name in chain.boolean_inputs:
            tensors[name] = torch.rand(chain.shape(name), generator=generator) < 0.7
        else:
            drawn = scale * torch.randn(chain.shape(name), generator=generator, dtype=torch.float64)
            drawn += 6.0 * (name in exponents)
            tensors[name] = drawn.to(DTYPES[chain.dtype]).double()
    return tensors


def to(tensors, dtype):
    """Tensors in a dtype, masks as they are."""
    return {name: t if t.dtype == torch.bool else t.to(dtype) for name, t in tensors.items()}


def assert_fused(chain, plan, tensors=None):
    """The kernel of a schedule is at most twice as wrong as the unfused chain in its dtype, its sums in any order."""
    tensors = draw_tensors(chain) if tensors is None else tensors
    own, truth = to(tensors, DTYPES[chain.dtype]), run(chain, tensors)
    kernel = emit(chain, plan, upcast=chain.dtype == "bf16")
    assert_scoped(kernel.source)
    output = launch(kernel, chain, own)
    unfused = (in_another_order(lambda t: run(chain, t), chain, order)(own) for order in range(ORDERS))
    worst = next((x for x in unfused if largest_error(output, truth) <= allowed_error(x, truth, FUSED_FACTOR)), None)
    assert_close(f"{chain} | {plan}", output, run(chain, own) if worst is None else worst, truth, factor=FUSED_FACTOR)


def assert_scoped(source):
    """Every variable is assigned before it is read, and not only inside a loop that has ended: Triton has no others."""
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    _assert_scoped(function.body, {"tl", "float", "range"} | {argument.arg for argument in function.args.args})


def _assert_scoped(body, known):
    for statement in body:
        read = statement.iter if isinstance(statement, ast.For) else statement.value
        names = {node.id for node in ast.walk(read) if isinstance(node, ast.Name)}
        assert names <= known, f"line {statement.lineno} reads {names - known}"
        if isinstance(statement, ast.For):
            _assert_scoped(statement.body, known | {statement.target.id})
        elif isinstance(statement, ast.Assign):
            known = known | {target.id for target in statement.targets}


def assert_fused_by(chain, expression, tensors=None, **tiles):
    """`assert_fused` for a schedule in the paper's notation."""
    assert_fused(chain, schedule(chain, expression, tiles), tensors)


every_expression = functools.cache(expressions)


sizes = st.integers(1, MAX_SIZE)
dtypes = st.sampled_from(["fp32", "fp16", "bf16"])


@st.composite
def schedules(draw, chain):
    """A legal schedule whose loops turn a few times."""
    expression = draw(st.sampled_from(every_expression(chain)))
    tiles = {letter: 16 * draw(st.integers(1, math.ceil(max(chain.sizes[letter], 1) / 16))) for letter in chain.loops}
    assume(math.prod(chain.shape(chain.output)) >= MIN_ENTRIES)
    plan = Schedule(expression, tuple(tiles.items()))
    program = plan.program(chain)
    rounds = math.prod(math.ceil(chain.sizes[letter] / tiles[letter]) for letter in chain.loops)
    assume(rounds * math.prod(chain.sizes[letter] for letter in chain.batch) <= MAX_ROUNDS)
    assume(repeated_finish(chain, program) is None)
    assume(split_softmax(chain, program) is None)
    return plan


@st.composite
def gemm_chains(draw):
    H = draw(st.none() | sizes)
    P = draw(st.none() | sizes) if H is not None else None
    return gemm_chain(
        M=draw(sizes), N=draw(sizes), K=draw(sizes), H=H, P=P, batch=draw(st.none() | st.integers(1, 3)),
        activation=draw(st.sampled_from(ACTIVATIONS)), dtype=draw(dtypes),
    )  # fmt: skip


@st.composite
def attentions(draw):
    causal = draw(st.booleans())
    kv_heads, repeats = draw(st.sampled_from([(None, None), (1, 1), (1, 2), (2, 1)]))
    letters = ("Z" if (batch := draw(st.none() | st.just(2))) else "") + ("G" if kv_heads else "")
    subset = st.sampled_from([None, "MN", "N", letters + "N", "NM", letters[::-1] + "NM"])
    return attention(
        M=draw(sizes), N=draw(sizes), K=draw(sizes), H=draw(st.none() | sizes), batch=batch,
        heads=kv_heads and kv_heads * repeats, kv_heads=kv_heads, mask=draw(subset), keep=draw(subset),
        causal=causal, diagonal=draw(st.integers(-40, 40)) if causal else 0, dtype=draw(dtypes),
    )  # fmt: skip


@st.composite
def mlps(draw):
    return mlp(
        M=draw(sizes), K=draw(sizes), N=draw(sizes), H=draw(st.none() | sizes), batch=draw(st.none() | st.just(2)),
        activation=draw(st.sampled_from(ACTIVATIONS)), gated=draw(st.booleans()), bias=draw(st.booleans()),
        residual=draw(st.booleans()), dtype=draw(dtypes),
    )  # fmt: skip


class _Growing:
    """A chain in the making, each of whose values gets random stages."""

    def __init__(self, draw, batch):
        self.draw, self.batch = draw, batch
        self.inputs, self.stages, self.letters = [], [], {}

    def input(self, letters, kind="x"):
        name = f"{kind}{len(self.inputs)}"
        self.letters[name] = self.draw(st.permutations(letters))
        self.inputs.append(Input(name, "".join(self.letters[name])))
        return name

    def operand(self, letters):
        return self.input([*letters, *(self.batch if self.draw(st.booleans()) else "")])

    def product(self, out, left, right, over):
        pair = (left, right) if self.draw(st.booleans()) else (right, left)
        self.stages.append(MatMul(out, *pair, over=over))
        self.letters[out] = sorted({*self.letters[left], *self.letters[right]} - {over})
        self.epilogue(out)

    def epilogue(self, x):
        """Up to three stages, then a softmax or an exponent if one of them leaves -inf, or a softmax anyway."""
        masked = False
        for _ in range(self.draw(st.integers(0, 3))):
            kinds = ["add", "number"] if masked else ["add", "mul", "number", "activation", "gradient"]
            kind = self.draw(st.sampled_from([*kinds, "mask", "causal"]))
            masked = masked or kind in ("mask", "causal")
            self.stages.append(self.stage(x, kind))
        if masked and x == "C" and self.draw(st.booleans()):  # of a longer sum it would overflow
            self.stages.append(Elementwise(x, "exp_minus", self.some(x, "lse")))
        elif masked or self.draw(st.booleans()):
            self.stages.append(Softmax(x, self.draw(st.sampled_from(self.loops(x)))))
        if self.draw(st.booleans()):
            self.stages.append(self.stage(x, "mul"))

    def stage(self, x, kind):
        match kind:
            case "number":
                return Elementwise(x, "add", self.draw(st.sampled_from([0.5, -1.25])))
            case "activation":
                return Elementwise(x, self.draw(st.sampled_from(ACTIVATIONS[1:])))
            case "gradient":
                return Elementwise(x, self.draw(st.sampled_from(GRADIENTS)), self.some(x))
            case "causal":
                row, column = self.draw(st.permutations(self.loops(x)))
                return Causal(x, row, column, self.draw(st.integers(-20, 20)))
            case "mask":
                return Elementwise(x, "mask", self.some(x, "keep"))
            case _:
                return Elementwise(x, kind, self.some(x))

    def some(self, x, kind="x"):
        """A new input over some of a value's letters."""
        letters = self.draw(st.lists(st.sampled_from(self.letters[x]), unique=True))
        return self.input(letters, kind)

    def loops(self, x):
        return [letter for letter in self.letters[x] if letter not in self.batch]

    def chain(self):
        used = sorted({letter for tensor in self.inputs for letter in tensor.dims})
        dims = tuple(
            Dim(x, 2 if x in self.batch else self.draw(sizes), batch=x in self.batch)
            for x in self.draw(st.permutations(used))
        )
        return Chain(dims, tuple(self.inputs), tuple(self.stages), self.draw(dtypes))


@st.composite
def any_chains(draw):
    """Two to four products of any orientation, with any stages, operands in any storage order, gates among them."""
    grow = _Growing(draw, draw(st.sampled_from(["", "Z"])))
    grow.product("C", grow.input(["M", "K", *grow.batch]), grow.operand("KN"), "K")
    if draw(st.booleans()):
        grow.product("Q", grow.input(["M", "T"]), grow.operand("TN"), "T")
        if set(grow.letters["Q"]) <= set(grow.letters["C"]):
            grow.stages.append(Elementwise("C", draw(st.sampled_from(["mul", "add", "silu_grad"])), "Q"))
    over = draw(st.sampled_from("MN"))
    grow.product("E", "C", grow.operand(over + "H"), over)
    if draw(st.booleans()):
        over = draw(st.sampled_from(grow.loops("E")))
        grow.product("G", "E", grow.operand(over + "P"), over)
    try:
        return grow.chain()
    except ValueError:  # no chain, such as a value that nothing reads
        reject()
