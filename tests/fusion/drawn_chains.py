"""Random chains, and tensors for them: products in a row from either side, gates, and every kind of stage between."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from fusion.plan import Causal, Chain, Dim, Elementwise, Input, MatMul, Softmax

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BATCH = "ZG"
LETTERS = "MNKHPQUVW"
GATES = ("mul", "add", "relu_grad", "gelu_grad", "gelu_tanh_grad", "silu_grad", "exp_minus")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


def draw_tensors(chain: Chain, seed: int = 0, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Values that the chain's dtype has, in that dtype or in another that holds them."""
    generator, own = torch.Generator().manual_seed(seed), DTYPES[chain.dtype]
    tensors = {}
    for name in (tensor.name for tensor in chain.inputs):
        values = torch.randn(chain.shape(name), generator=generator, dtype=torch.float64)
        masked = name in chain.boolean_inputs
        tensors[name] = values > -0.5 if masked else (0.5 * values).to(own).to(own if dtype is None else dtype)
    return tensors


@st.composite
def chains(draw: st.DrawFn, max_size: int = 7, dtype: str = "fp32") -> Chain:
    """Any chain of one to three products in a row, gated or not."""
    return _Drawing(draw, max_size, dtype).chain()


class _Drawing:
    def __init__(self, draw: st.DrawFn, max_size: int, dtype: str) -> None:
        self.draw, self.max_size, self.dtype = draw, max_size, dtype
        self.batch = "".join(letter for letter in BATCH if draw(st.booleans()))
        self.letters: list[str] = []
        self.inputs: list[Input] = []
        self.stages: list[MatMul | Elementwise | Causal | Softmax] = []
        self.dims: dict[str, str] = {}

    def chain(self) -> Chain:
        number, value = self.draw(st.integers(1, 3)), ""
        for index in range(number):
            gated = number < 3 and self.draw(st.booleans())
            value = self.product(value, f"V{index}", gated=gated)
            self.epilogue(value)
        used = set("".join(tensor.dims for tensor in self.inputs))
        order = self.draw(st.permutations(self.letters))
        dims = [Dim(letter, self.draw(st.integers(1, 3)), batch=True) for letter in self.batch if letter in used]
        dims += [Dim(letter, self.draw(st.integers(1, self.max_size))) for letter in order]
        return Chain(tuple(dims), tuple(self.inputs), tuple(self.stages), self.dtype)

    def product(self, before: str, out: str, *, gated: bool) -> str:
        """A product of the value before, or of two inputs; a gate is another one of the same letters before it."""
        if before:
            over = self.draw(st.sampled_from([letter for letter in self.dims[before] if letter not in BATCH]))
            row = next(letter for letter in self.dims[before] if letter not in BATCH + over)
        else:
            row, over = self.letter(), self.letter()
        column = self.letter()
        left = before or self.input(row + over)
        if gated:
            self.multiply(f"{out}_gate", *self.gate(left, row, over, column))
        self.multiply(out, left, self.input(over + column), over)
        if gated:
            x = self.dims[f"{out}_gate"]
            if set(x) <= set(self.dims[out]):
                self.stages.append(Elementwise(out, self.draw(st.sampled_from(GATES)), f"{out}_gate"))
            else:
                raise AssertionError("a gate has no batch letter that its value lacks")
        return out

    def gate(self, left: str, row: str, over: str, column: str) -> tuple[str, str, str]:
        """Operands of a gate: what the product itself reads and another input, or two inputs of their own."""
        if self.draw(st.booleans()):
            return left, self.input(over + column, batch=False), over
        own = self.letter()
        return self.input(row + own, batch=False), self.input(own + column, batch=False), own

    def multiply(self, out: str, left: str, right: str, over: str) -> None:
        operands = self.draw(st.permutations([left, right]))
        self.stages.append(MatMul(out, *operands, over=over))
        indexed = set(self.dims[left]) | set(self.dims[right])
        self.dims[out] = "".join(letter for letter in self.batch + LETTERS if letter in indexed and letter != over)

    def epilogue(self, value: str) -> None:
        letters = self.dims[value]
        loops = [letter for letter in letters if letter not in BATCH]
        for kind in self.draw(st.lists(st.sampled_from(["number", "tensor", "activation", "softmax"]), max_size=2)):
            if kind == "number":
                operation = self.draw(st.sampled_from(["add", "mul"]))
                self.stages.append(Elementwise(value, operation, self.draw(st.sampled_from([0.5, -1.25]))))
            elif kind == "tensor":
                operand = self.input("".join(letter for letter in letters if self.draw(st.booleans())), batch=False)
                self.stages.append(Elementwise(value, self.draw(st.sampled_from(GATES)), operand))
            elif kind == "activation":
                self.stages.append(Elementwise(value, self.draw(st.sampled_from(ACTIVATIONS))))
            else:
                self.masks(value, letters, loops)
                self.stages.append(Softmax(value, over=self.draw(st.sampled_from(loops))))

    def masks(self, value: str, letters: str, loops: list[str]) -> None:
        if self.draw(st.booleans()):
            operand = self.input("".join(letter for letter in letters if self.draw(st.booleans())), batch=False)
            self.stages.append(Elementwise(value, "mask", operand))
        if self.draw(st.booleans()):
            row, column = self.draw(st.permutations(loops))
            self.stages.append(Causal(value, row=row, column=column, diagonal=self.draw(st.integers(-2, 2))))

    def letter(self) -> str:
        self.letters.append(LETTERS[len(self.letters)])
        return self.letters[-1]

    def input(self, letters: str, *, batch: bool = True) -> str:
        """A new input in any storage order; with `batch` also along some of the batch's letters."""
        if batch:
            letters += "".join(letter for letter in self.batch if self.draw(st.booleans()))
        name = f"X{len(self.inputs)}"
        self.inputs.append(Input(name, "".join(self.draw(st.permutations(letters)))))
        self.dims[name] = self.inputs[-1].dims
        return name
