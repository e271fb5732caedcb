from fusion import attention, gemm_chain
from fusion.plan.packing import packed_operands
from fusion.plan.schedule import schedule

ALL = 64


def packed(chain, **tiles):
    plan = schedule(chain, "mnkh", {letter: tiles.get(letter, ALL) for letter in chain.loops})
    return packed_operands(chain, plan.program(chain))


def test_a_right_operand_is_packed_if_it_is_transposed_wide_or_not_fp32():
    assert not packed(gemm_chain(M=64, N=64, K=64, H=64))
    assert packed(gemm_chain(M=64, N=640, K=64, H=64), N=640).keys() == {"B"}
    assert packed(attention(M=64, N=64, K=64, H=64)).keys() == {"B"}
    assert packed(gemm_chain(M=64, N=64, K=64, H=64, dtype="bf16")).keys() == {"B", "D"}


def test_an_operand_is_read_once_for_each_round_that_does_not_index_it():
    chain = gemm_chain(M=64, N=64, K=64, H=64, batch=3, dtype="bf16")
    found = packed(chain, M=16, N=16, K=32)
    rounds = {"Z": 3, "M": 4, "N": 4, "K": 2, "H": 1}
    assert found["B"].times_read(rounds) == 4  # blocks of rows; the batch has a B each
    assert found["D"].times_read(rounds) == 4
    assert not found["B"].by_panel(rounds)
    assert packed(chain)["B"].by_panel({"Z": 3, "M": 1, "N": 1, "K": 1, "H": 1})


def test_the_column_is_the_one_of_its_products_value():
    found = packed(attention(M=64, N=48, K=32, H=80), N=48, K=32, H=80)["B"]
    assert (found.column, found.over) == ("N", "K")
