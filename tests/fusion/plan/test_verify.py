import math
import re

import pytest

from fusion.plan import Causal, Chain, Dim, Elementwise, Input, MatMul, Softmax
from fusion.plan.verify import verify

DIMS = (Dim("Z", 2, batch=True), Dim("M", 3), Dim("N", 4), Dim("K", 5), Dim("H", 6))
INPUTS = (Input("A", "ZMK"), Input("B", "KN"), Input("D", "NH"))
C = MatMul("C", "A", "B", over="K")
E = MatMul("E", "C", "D", over="N")


def test_a_plain_chain_passes():
    verify(DIMS, INPUTS, (C, E))


def refused(error, message, *, dims=DIMS, inputs=INPUTS, stages=(C, E)):
    with pytest.raises(error, match=re.escape(message)):
        Chain(dims, inputs, stages)


@pytest.mark.parametrize("argument", ["dims", "inputs", "stages"])
def test_parts_come_as_tuples_of_their_kind(argument):
    refused(TypeError, f"{argument}=", **{argument: [*DIMS]})
    refused(TypeError, f"{argument}=", **{argument: ("K",)})


@pytest.mark.parametrize("name", ["k", "KK", "", "1", "Ä", "M", None])
def test_a_dimension_is_one_new_capital_letter(name):
    refused(ValueError, f"name={name!r}", dims=(*DIMS, Dim(name, 4)))


@pytest.mark.parametrize("size", [2.0, True, "2", None])
def test_a_size_is_an_int(size):
    refused(TypeError, f"size={size!r}", dims=(*DIMS[:-1], Dim("H", size)))


def test_a_size_is_not_negative():
    refused(ValueError, "size=-1", dims=(*DIMS[:-1], Dim("H", -1)))


def test_every_dimension_is_used():
    refused(ValueError, "no input is indexed by P", dims=(*DIMS, Dim("P", 2)))


@pytest.mark.parametrize("name", ["1a", "a b", "é", "x;y", "", 7])
def test_an_input_has_an_identifier_for_a_name(name):
    refused(ValueError, f"name={name!r}", inputs=(*INPUTS, Input(name, "N")))


def test_input_names_differ():
    refused(ValueError, "name='A' is taken", inputs=(*INPUTS, Input("A", "N")))


@pytest.mark.parametrize("dims", ["NX", "NN", ("N",)])
def test_an_inputs_letters_are_known_and_differ(dims):
    refused(ValueError, f"dims={dims!r}", inputs=(*INPUTS, Input("bias", dims)))


@pytest.mark.parametrize(
    ("product", "message"),
    [
        (MatMul("C", "A", "X", over="K"), "'X' is not defined yet; defined are A, B, D"),
        (MatMul("C", "A", "B", over="N"), "over='N' must be a letter of 'A'"),
        (MatMul("C", "A", "D", over="K"), "over='K' must be a letter of 'D'"),
        (MatMul("C", "A", "B", over="Z"), "over='Z' must be a letter of 'A' beside the batch's"),
        (MatMul("A", "A", "B", over="K"), "out='A' must be"),
        (MatMul("C;", "A", "B", over="K"), "out='C;' must be"),
        (MatMul("C", "A", "A", over="K"), "left and right must differ"),
    ],
)
def test_a_products_arguments(product, message):
    refused(ValueError, f"stage 0, {product}: ", stages=(product, E))
    refused(ValueError, message, stages=(product, E))


@pytest.mark.parametrize(("name", "dims"), [("A", "K"), ("B", "KNM"), ("B", "ZK")])
def test_a_product_multiplies_matrices(name, dims):
    argument = "left" if name == "A" else "right"
    inputs = tuple(Input(name, dims) if tensor.name == name else tensor for tensor in INPUTS)
    refused(ValueError, f"{argument}='{name}' must have two letters", inputs=(*inputs, Input("extra", "ZMN")))


def test_a_letter_is_summed_over_or_kept_but_not_both():
    back = (*INPUTS[:2], Input("D", "NK"))
    refused(ValueError, "K is summed over and indexes out='E' too", dims=DIMS[:-1], inputs=back)
    right = (C, MatMul("E", "D", "C", over="N"))
    refused(
        ValueError,
        "K is summed over and indexes out='E' too",
        dims=DIMS[:-1],
        inputs=(*INPUTS[:2], Input("D", "KN")),
        stages=right,
    )
    gate = (C, MatMul("U", "A", "V", over="K"), Elementwise("C", "mul", "U"), E)
    verify(DIMS, (*INPUTS, Input("V", "NK")), gate)


def test_a_gate_brings_the_letters_it_is_summed_over():
    inputs = (*INPUTS[:2], Input("X", "MP"), Input("Y", "PN"), Input("D", "NP"))
    stages = (C, MatMul("U", "X", "Y", over="P"), Elementwise("C", "mul", "U"), E)
    refused(
        ValueError,
        "P is summed over and indexes out='E' too",
        dims=(*DIMS[:-1], Dim("P", 6)),
        inputs=inputs,
        stages=stages,
    )


BIASED = (*INPUTS, Input("bias", "N"), Input("wide", "NH"), Input("keep", "N"))
READ = (Elementwise("C", "add", "bias"), Elementwise("C", "mask", "keep"), Softmax("C", over="N"), E)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((Elementwise("C", "relu"), C, E), "x='C' must be a product's value: none"),
        ((C, Elementwise("A", "relu"), E), "x='A' must be a product's value: C"),
        ((C, E, Elementwise("C", "relu")), "x='C' is read by this or an earlier stage"),
        ((C, Elementwise("C", "mul", "C"), E), "x='C' is read by this or an earlier stage"),
        ((C, Elementwise("C", "tanh"), E), "operation='tanh' must be one of"),
        ((C, Elementwise("C", "relu", 1.0), E), "operand=1.0 must be None for 'relu'"),
        ((C, Elementwise("C", "mul"), E), "operand=None must be a tensor's name"),
        ((C, Elementwise("C", "mul", math.inf), E), "operand=inf must be"),
        ((C, Elementwise("C", "mul", 2), E), "operand=2 must be"),
        ((C, Elementwise("C", "mask", 1.0), E), "operand=1.0 must be"),
        ((C, Elementwise("C", "add", "bais"), E), "'bais' is not defined yet"),
        ((C, Elementwise("C", "add", "wide"), E), "operand='wide' is indexed by 'NH', which must be among x's 'ZMN'"),
        ((C, Elementwise("C", "add", "keep"), *READ), "operand='keep' must be either a boolean input"),
        ((C, MatMul("U", "A", "B", over="K"), Elementwise("C", "mask", "U"), *READ), "operand='U' must be either"),
        ((C, Causal("C", row="M", column="K"), E), "column='K' must be a letter of 'C'"),
        ((C, Causal("C", row="Z", column="N"), E), "row='Z' must be a letter of 'C' beside the batch's"),
        ((C, Causal("C", row="N", column="N"), E), "row and column must be different"),
        ((C, Causal("C", row="M", column="N", diagonal=0.5), E), "diagonal=0.5 must be an int"),
        ((C, Softmax("C", over="K"), E), "over='K' must be a letter of 'C'"),
        ((C, Elementwise("C", "mask", "keep"), E), "'C' holds -inf; put its Softmax before"),
        ((C, Causal("C", row="M", column="N"), Elementwise("C", "relu"), *READ), "which 'relu' would spoil"),
    ],
)
def test_a_stages_arguments(stages, message):
    refused(ValueError, message, inputs=BIASED, stages=stages)


def test_a_mask_does_not_multiply():
    stages = (C, Elementwise("C", "mask", "keep"), Softmax("C", over="N"), MatMul("E", "C", "keep", over="N"))
    refused(ValueError, "right='keep' is boolean", inputs=(*INPUTS, Input("keep", "N")), stages=stages)


def test_a_masked_output_needs_its_softmax():
    refused(ValueError, "E hold -inf; end with their Softmax", stages=(C, E, Causal("E", row="M", column="H")))


def test_adding_after_a_mask_is_harmless():
    masked = (Causal("C", row="M", column="N"), Elementwise("C", "add", "bias"), Elementwise("C", "mask", "keep"))
    verify(DIMS, (*INPUTS, Input("bias", "N"), Input("keep", "N")), (C, *masked, Softmax("C", over="N"), E))


def test_a_chain_has_one_to_four_products_and_no_leftovers():
    refused(ValueError, "0 products; accepted are 1 to 4", stages=())
    copies = tuple(MatMul(f"C{i}", "A", "B", over="K") for i in range(4))
    refused(ValueError, "5 products; accepted are 1 to 4", stages=(*copies, C))
    refused(ValueError, "nothing reads D", stages=(C,))
    refused(ValueError, "nothing reads U", stages=(C, MatMul("U", "A", "B", over="K"), E))
