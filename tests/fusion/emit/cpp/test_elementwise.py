from fusion import attention, mlp
from fusion.emit.cpp.elementwise import is_fixed, operand_text, stage_line
from fusion.emit.cpp.storage import Storage
from fusion.plan import Causal, Elementwise


def storage_of(chain):
    values = [product.out for product in chain.products]
    return Storage(chain, chain.tensors, {"M": 16, "N": 16, "K": 16, "H": 16}, "MN", dict.fromkeys(values, ""), 4, {})


def line(chain, stage, row="M", column="N"):
    storage = storage_of(chain)
    return stage_line(stage, operand_text(stage, storage, column), row, column)


def test_numbers_vectors_of_columns_and_numbers_of_rows_are_operands():
    chain = attention(M=40, N=40, K=40, mask="MN", keep="N")
    (mask,) = (x.operand for x in chain.stages if isinstance(x, Elementwise) and x.operation == "add")
    (keep,) = chain.boolean_inputs
    assert line(chain, Elementwise("C", "mul", 0.5)) == "x = x * splat(0.5f);"
    assert line(chain, Elementwise("C", "add", mask)) == (
        f"x = x + load({mask}_data + M_at * {mask}_M + N_at + r * {mask}_M + c, inside);"
    )
    assert line(chain, Elementwise("C", "mask", keep)) == (
        f"x = select(load({keep}_data + N_at + c, inside), x, splat(-INF));"
    )


def test_a_causal_mask_is_a_number_of_columns_in_either_direction():
    chain = attention(M=40, N=40, K=40)
    down = line(chain, Causal("C", row="M", column="N", diagonal=3))
    assert down == "x = select(first((M_at + r) - (N_at + c) + 4), x, splat(-INF));"
    across = line(chain, Causal("C", row="N", column="M", diagonal=3))
    assert across == "x = select(first((M_at + r) - (N_at + c) - 3), splat(-INF), x);"


def test_activations_and_gates_are_functions():
    chain = mlp(M=40, K=40, N=40, gated=True, activation="silu")
    gate = next(x.operand for x in chain.stages if isinstance(x, Elementwise) and x.operation == "mul")
    assert line(chain, Elementwise("C", "silu")) == "x = silu(x);"
    assert line(chain, Elementwise("C", "mul", gate)) == f"x = x * load({gate}_tile + r * 32 + c);"


def test_what_is_the_same_along_a_row_is_told_from_what_is_not():
    chain = attention(M=40, N=40, K=40, mask="MN", keep="N")
    storage = storage_of(chain)
    (mask,) = (x.operand for x in chain.stages if isinstance(x, Elementwise) and x.operation == "add")
    (keep,) = chain.boolean_inputs
    stages = [Elementwise("C", "mask", keep), Elementwise("C", "add", mask), Elementwise("C", "mul", 0.5)]
    assert [is_fixed(stage, storage, "M") for stage in stages] == [True, False, False]
    assert not any(is_fixed(stage, storage, "N") for stage in stages)
