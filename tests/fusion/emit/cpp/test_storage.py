from fusion import attention, gemm_chain
from fusion.emit.cpp.storage import PAD, Storage


def storage_of(chain, sizes, turning="", live=None):
    values = [product.out for product in chain.products]
    return Storage(chain, chain.tensors, sizes, turning, live or dict.fromkeys(values, ""))


def test_a_right_operand_is_packed_if_it_is_transposed_wide_or_not_fp32():
    sizes = {"M": 16, "N": 16, "K": 16, "H": 16}
    assert storage_of(gemm_chain(M=64, N=64, K=64, H=64), sizes).packed == ()
    assert storage_of(gemm_chain(M=64, N=640, K=64, H=64), sizes).packed == ("B",)
    assert storage_of(attention(M=64, N=64, K=64, H=64), sizes).packed == ("B",)
    assert storage_of(gemm_chain(M=64, N=64, K=64, H=64, dtype="bf16"), sizes).packed == ("B", "D")


def test_left_operands_are_copied_as_fp32_where_they_are_not():
    sizes = {"M": 16, "N": 32, "K": 48, "H": 16}
    storage = storage_of(gemm_chain(M=64, N=64, K=64, H=64, dtype="fp16"), sizes)
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
