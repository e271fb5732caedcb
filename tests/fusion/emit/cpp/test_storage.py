from fusion import gemm_chain
from fusion.emit.cpp.storage import PAD, Storage
from fusion.plan.packing import Packing


def storage_of(chain, sizes, turning="", live=None, packings=None):
    values = [product.out for product in chain.products]
    return Storage(chain, chain.tensors, sizes, turning, live or dict.fromkeys(values, ""), 4, packings or {})


def test_what_one_or_two_blocks_read_is_packed_by_them_and_what_more_read_before():
    chain = gemm_chain(M=64, N=64, K=64, H=64, dtype="bf16")
    packings = {"B": Packing("N", "K", ("M",)), "D": Packing("H", "N", ("M", ""))}
    few, more = ({"M": m, "N": 64, "K": 64, "H": 64} for m in (32, 16))
    assert storage_of(chain, few, "M", packings=packings).by_panel == ("B",)
    assert storage_of(chain, few, "M", packings=packings).packed == ("D",)
    assert storage_of(chain, more, "M", packings=packings).packed == ("B", "D")
    sizes = dict(storage_of(chain, few, "M", packings=packings).buffers())
    assert sizes["panel_wide"] == str(4 * 16 * 64)
    assert "panel_wide" not in dict(storage_of(chain, more, "M", packings=packings).buffers())


def test_left_operands_are_copied_as_fp32_where_they_are_not():
    sizes = {"M": 16, "N": 32, "K": 48, "H": 16}
    packings = {"B": Packing("N", "K", ("M",)), "D": Packing("H", "N", ("M",))}
    storage = storage_of(gemm_chain(M=64, N=64, K=64, H=64, dtype="fp16"), sizes, packings=packings)
    assert storage.widened == ("A", "C")
    assert dict(storage.buffers())["A_wide"] == str(16 * (48 + PAD))
    assert storage_of(gemm_chain(M=64, N=64, K=64), sizes).widened == ()


def test_pointers_move_along_the_letters_that_turn():
    chain = gemm_chain(M=64, N=64, K=64, H=64, batch=2)
    storage = storage_of(chain, {"M": 16, "N": 16, "K": 64, "H": 64}, turning="MN")
    assert storage.pointer("A") == "A_data + Z_at * A_Z + M_at * A_M"
    assert storage.pointer("B") == "B_data + Z_at * B_Z + N_at"


def test_a_value_with_several_live_tiles_is_indexed_by_them():
    chain = gemm_chain(M=64, N=64, K=64, H=64)
    storage = storage_of(chain, {"M": 16, "N": 16, "K": 64, "H": 32}, turning="MNH", live={"C": "", "E": "H"})
    assert storage.tile("C") == "C_tile"
    assert storage.tile("E") == "E_tile + H_at / H_tile * E_floats"
    assert dict(storage.buffers())["E_tile"] == f"{16 * (32 + PAD)} * H_tiles"
