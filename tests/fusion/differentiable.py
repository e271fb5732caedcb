"""Random chains that have gradients: what stands between and after products, on which side, in which storage order."""

from hypothesis import strategies as st

from fusion.plan import Causal, Chain, Dim, Elementwise, Input, MatMul, Softmax
from fusion.plan.verify import MAX_PRODUCTS

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


@st.composite
def chains(draw, *, min_size=1, max_size=5, num_products=(1, 2, 3), dtypes=("fp32",)):
    """C = A B, E = C D, G = E F up to some product; every tensor may lack any of the batch's letters."""
    parts = _Parts(draw, min_size, max_size)
    count = draw(st.sampled_from(num_products))
    parts.num_gates = MAX_PRODUCTS - count
    value = parts.product("C", parts.tensor("MK"), parts.tensor("KN"), "K")
    for out, over, column in (("E", "N", "H"), ("G", "H", "P"))[: count - 1]:
        parts.stand_between(value, "M", over)
        value = parts.product(out, value, parts.tensor(over + column), over)
    parts.stand_between(value, "M", "NHP"[count - 1])
    used = {letter for tensor in parts.inputs for letter in tensor.dims}
    dims = tuple(dim for dim in parts.dims if dim.name in used)
    return Chain(
        dims, tuple(draw(st.permutations(parts.inputs))), tuple(parts.stages), draw(st.sampled_from(tuple(dtypes)))
    )


class _Parts:
    def __init__(self, draw, min_size, max_size):
        self.draw = draw
        self.dims = [Dim(letter, draw(st.integers(1, 2)), batch=True) for letter in "ZG"]
        self.dims += [Dim(letter, draw(st.integers(min_size, max_size))) for letter in "MNKHPJ"]
        self.letters = {}
        self.inputs = []
        self.stages = []

    def some(self, letters):
        return "".join(letter for letter in letters if self.draw(st.booleans()))

    def tensor(self, loops, batch="ZG"):
        letters = "".join(self.draw(st.permutations(loops + self.some(batch))))
        name = f"x{len(self.inputs)}"
        self.inputs.append(Input(name, letters))
        self.letters[name] = letters
        return name

    def product(self, out, one, other, over):
        left, right = self.draw(st.permutations((one, other)))
        self.stages.append(MatMul(out, left, right, over))
        read = self.letters[one] + self.letters[other]
        self.letters[out] = "".join(dim.name for dim in self.dims if dim.name in read and dim.name != over)
        return out

    def add(self, x, operation, operand=None):
        self.stages.append(Elementwise(x, operation, operand))

    def change(self, x, operations=("add", "mul"), most=1):
        for operation in self.draw(st.lists(st.sampled_from(operations), max_size=most)):
            number = self.draw(st.sampled_from([None, None, 0.5, -1.25]))
            self.add(x, operation, self.tensor(self.some(self.letters[x]), "") if number is None else number)

    def stand_between(self, x, row, column):
        kind = self.draw(st.sampled_from(["changes", "activation", "gate", "softmax"]))
        if kind == "gate" and self.num_gates:
            self.num_gates -= 1
            self.gate(x, row, column)
        else:
            self.change(x, most=2)
        if kind == "activation":
            self.add(x, self.draw(st.sampled_from(ACTIVATIONS)))
            self.change(x)
        if kind == "softmax":
            if self.draw(st.booleans()):
                self.stages.append(Causal(x, row, column, self.draw(st.integers(-2, 2))))
            if self.draw(st.booleans()):
                self.add(x, "mask", self.tensor(self.some(self.letters[x]), ""))
            self.change(x, operations=("add",))
            self.stages.append(Softmax(x, column))
            self.change(x, operations=("mul",))

    def gate(self, x, row, column):
        """x takes part with another product of its letters, which stands before it and has stages too."""
        index = next(i for i, stage in enumerate(self.stages) if isinstance(stage, MatMul) and stage.out == x)
        self.stages, rest = self.stages[:index], self.stages[index:]
        batch = [letter for letter in "ZG" if letter in self.letters[x]]
        gate = self.product(f"{x}_up", self.tensor(row + "J", batch), self.tensor("J" + column, batch), "J")
        self.draw(st.sampled_from([lambda: None, lambda: self.add(gate, "relu"), lambda: self.change(gate)]))()
        self.stages += rest
        self.change(x)
        self.draw(st.sampled_from([lambda: None, lambda: self.add(x, "silu")]))()
        self.add(x, self.draw(st.sampled_from(["mul", "add"])), gate)
