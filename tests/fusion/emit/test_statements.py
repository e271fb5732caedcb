import pytest

from fusion import Chain, attention, mlp
from fusion.emit.softmax import online_softmaxes
from fusion.emit.statements import StatementText
from fusion.emit.tiles import Tiles
from fusion.plan import Elementwise, Input, MatMul
from fusion.plan.placement import live_tiles
from fusion.plan.schedule import schedule
from fusion.plan.statements import Statement

SIZES = {"M": 64, "N": 40, "K": 32, "H": 16}
AT = {"M": "m", "N": "n", "K": 0, "H": 0}


def lines(chain, kind, tensor, *, summed=(), lse="", exact=False, upcast=False, **tiles):
    plan = schedule(chain, "mhnk", dict.fromkeys("MNKH", 16) | {"K": 32} | tiles)
    program = plan.program(chain)
    layout = Tiles(chain, chain.tensors | {"lse": "M"}, dict(plan.tiles), live_tiles(program, chain), "MH")
    text = StatementText(layout, online_softmaxes(chain, program), frozenset(summed), lse, exact, upcast)
    return list(text.lines(Statement(kind, tensor), AT))


@pytest.mark.parametrize(
    ("dtype", "upcast", "expected"),
    [
        ("fp32", False, 'tl.dot(tile_A_MK, tl.trans(tile_B_NK), input_precision="ieee")'),
        ("fp16", False, "tl.dot(tile_A_MK, tl.trans(tile_B_NK))"),
        (
            "bf16",
            True,
            'tl.dot(tile_A_MK.to(tl.float32), tl.trans(tile_B_NK.to(tl.float32)), input_precision="ieee")',
        ),
    ],
)
def test_operands_are_turned_to_the_order_of_a_dot(dtype, upcast, expected):
    assert lines(mlp(**SIZES, dtype=dtype), "C", "C", upcast=upcast) == [f"acc_C_MN = {expected}"]


def test_either_operand_may_have_the_rows():
    chain = mlp(**SIZES, dtype="fp16")
    turned = tuple(
        MatMul(stage.out, stage.right, stage.left, over=stage.over) if isinstance(stage, MatMul) else stage
        for stage in chain.stages
    )
    assert lines(Chain(chain.dims, chain.inputs, turned, "fp16"), "C", "C") == lines(chain, "C", "C")


def test_a_value_is_rounded_only_as_an_operand():
    chain = mlp(**SIZES, dtype="bf16", gated=True)
    assert lines(chain, "C", "E", summed="E") == [
        "acc_E_MH = tl.dot(acc_C_MN.to(tl.bfloat16), tl.trans(tile_D_HN), acc_E_MH)"
    ]
    assert lines(chain, "F", "C")[-1] == "acc_C_MN = acc_C_MN * acc_C_up_MN"
    assert lines(chain, "S", "E") == ["tl.store(E_base + offset_E_MH, acc_E_MH.to(tl.bfloat16))"]
    assert lines(chain, "S", "E", exact=True) == ["tl.store(E_base + offset_E_MH, acc_E_MH.to(tl.float32))"]


def test_epilogue_operands_broadcast_by_letter():
    chain = attention(M=64, N=40, K=32, H=16, mask="NM", keep="N", causal=True, diagonal=3)
    finish = lines(chain, "F", "C", N=48)
    assert finish[1] == "acc_C_MN = acc_C_MN + tl.trans(tile_mask_NM).to(tl.float32)"
    assert finish[2] == 'acc_C_MN = tl.where(tile_keep_N[None, :], acc_C_MN, float("-inf"))'
    rows, columns = "(m + i_M[:, None])", "(n + i_N[None, :])"
    assert finish[3] == f'acc_C_MN = tl.where({columns} <= {rows} + 3, acc_C_MN, float("-inf"))'
    assert finish[4] == "# softmax over N"


def test_an_online_softmax_rescales_its_reader():
    chain = attention(**SIZES)
    assert "# softmax over N, online" in lines(chain, "F", "C")
    assert lines(chain, "C", "E", summed="E")[0] == "acc_E_MH = acc_E_MH * scale_C_M[:, None]"


def test_what_is_no_entry_is_cleared_only_where_it_would_count():
    plain = mlp(**SIZES)
    first, second = plain.products

    def finish(*stages, N=16):
        inputs = (*plain.inputs, *((Input("row", "M"),) if any(stage.operand == "row" for stage in stages) else ()))
        return lines(Chain(plain.dims, inputs, (first, *stages, second)), "F", "C", N=N)

    clear = "acc_C_MN = tl.where((i_N < 40 - n)[None, :], acc_C_MN, 0.0)"
    assert finish(Elementwise("C", "add", 1.0))[-1] == clear
    assert finish(Elementwise("C", "add", "row"))[-1] == clear
    assert len(finish(Elementwise("C", "relu"))) == 1
    assert len(finish(Elementwise("C", "add", 1.0), N=40)) == 2  # a block has 64
    assert len(finish(Elementwise("C", "add", 1.0), N=8)) == 2


def test_the_log_sum_exp_is_stored_where_it_is_complete():
    whole = lines(attention(**SIZES), "F", "C", lse="lse", N=48)
    assert whole[-1] == "tl.store(lse_base + offset_lse_M, max_C_M + tl.log(sum_C_M))"
    assert not any("lse" in line for line in lines(attention(**SIZES), "F", "C", lse="lse"))
