import pytest

from fusion import attention
from fusion.emit.tiles import Tiles, along, spread

CHAIN = attention(M=100, N=64, K=48, H=40, batch=3)
AT = {"Z": "z", "M": "m", "N": "n", "K": 0, "H": 48}


def tiles(live="", **sizes):
    sizes = {"M": 32, "N": 64, "K": 48, "H": 16} | sizes
    return Tiles(CHAIN, CHAIN.tensors, sizes, {"C": "", "E": live}, "ZM")


@pytest.mark.parametrize(
    ("tile", "block"), [(1, 16), (15, 16), (16, 16), (17, 32), (48, 64), (64, 64), (65, 128), (256, 256)]
)
def test_blocks_are_powers_of_two_that_a_dot_takes(tile, block):
    assert tiles(M=tile).block("M") == block


@pytest.mark.parametrize(
    ("size", "at", "expected"),
    [
        (32, "m", "i_M < 100 - m"),
        (20, "m", "i_M < 20"),  # 100 is a multiple of 20, but a block has 32
        (24, "m", "(i_M < 24) & (i_M < 100 - m)"),
        (32, 64, ""),  # the third of four tiles is whole
        (32, 96, "i_M < 4"),
        (128, 0, "i_M < 100"),
        (24, 0, "i_M < 24"),
        (16, 112, "i_M < 0"),
    ],
)
def test_only_what_may_be_outside_is_masked(size, at, expected):
    assert tiles(M=size).inside("M", {"M": at}) == expected


def test_masks_of_two_letters():
    assert tiles().mask("MN", AT) == "(i_M < 100 - m)[:, None]"
    assert tiles().mask("KM", AT) == "(i_K < 48)[:, None] & (i_M < 100 - m)[None, :]"
    assert tiles().mask("N", AT) == ""


def test_loads_are_in_storage_order_and_start_where_the_block_does():
    assert list(tiles().addresses("B", AT)) == [
        "B_base = B_ptr + z * B_Z_stride",
        "offset_B_NK = (i_N * B_N_stride)[:, None] + (i_K * B_K_stride)[None, :]",
    ]
    assert list(tiles().addresses("A", AT)) == [
        "A_base = A_ptr + z * A_Z_stride + tl.cast(m, tl.int64) * A_M_stride",
        "offset_A_MK = (i_M * A_M_stride)[:, None] + (i_K * A_K_stride)[None, :]",
    ]
    start = "tl.cast(n, tl.int64) * B_N_stride"
    assert tiles().load("B", AT) == f"tl.load(B_base + {start} + offset_B_NK, mask=(i_K < 48)[None, :], other=0)"
    assert tiles(K=16).load("B", AT) == f"tl.load(B_base + {start} + offset_B_NK)"


def test_stores_are_masked_alike():
    pointers = "E_base + tl.cast(48, tl.int64) * E_H_stride + offset_E_MH"
    mask = "(i_M < 100 - m)[:, None] & (i_H < 0)[None, :]"
    assert tiles().store("E", "x", AT) == f"tl.store({pointers}, x, mask={mask})"


def test_live_tiles_have_a_variable_each():
    assert tiles().value("E", AT) == "acc_E_MH"
    assert tiles(live="H").value("E", AT) == "acc_E_MH_3"
    assert [each["H"] for each in tiles().every("H", {"H": 3}, AT)] == [0, 16, 32]
    assert [(each["H"], each["K"]) for each in tiles().every("HK", {"H": 2, "K": 2}, AT)] == [
        (0, 0), (0, 48), (16, 0), (16, 48),
    ]  # fmt: skip
    assert list(tiles().every("", {}, AT)) == [AT]


def test_views_broadcast_by_letter():
    assert spread("x", "M", "MN") == "x[:, None]"
    assert spread("x + 1", "N", "MN") == "(x + 1)[None, :]"
    assert spread("x", "M", "M") == "x"
    assert along("x", "", "MN") == "x"
    assert along("x", "N", "MN") == "x[None, :]"
    assert along("x", "MN", "MN") == "x"
    assert along("x", "NM", "MN") == "tl.trans(x)"
