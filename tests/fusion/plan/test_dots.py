"""Which values stay in registers: the cases that Triton's passes tell apart, as they were seen in compiled kernels."""

from dataclasses import replace

import pytest

from fusion import Chain, gemm_chain
from fusion.plan import Dim, Input, MatMul
from fusion.plan.device import load_device
from fusion.plan.dots import Dots

CHAIN = gemm_chain(M=256, N=256, K=128, H=64, dtype="fp16")


def dots(
    device: str, first: tuple[int, int], second: tuple[int, int], *, num_warps: int = 4, one_body: bool = True
) -> Dots:
    bodies = {"C": 0, "E": 0 if one_body else 1}
    return Dots(CHAIN, load_device(device), num_warps, {"C": first, "E": second}, bodies)


@pytest.mark.parametrize(
    ("device", "first", "second", "num_warps", "one_body", "stays"),
    [
        ("a100", (64, 64), (64, 64), 4, True, True),
        ("a100", (16, 32), (16, 16), 8, True, True),
        ("a100", (16, 16), (16, 64), 4, True, False),  # the reader's warps lie side by side
        ("a100", (16, 16), (16, 64), 1, True, True),
        ("a100", (512, 128), (512, 128), 4, False, True),  # alone, both have all warps below each other
        ("a100", (128, 64), (128, 32), 4, False, False),  # 2 x 2 warps against 4
        ("h100", (64, 256), (64, 64), 8, True, True),
        ("h100", (128, 64), (128, 64), 8, False, True),
        ("h100", (64, 64), (64, 64), 8, False, False),  # two warp groups side by side
        ("h100", (16, 16), (16, 64), 4, True, False),  # too few rows for a warp group
        ("mi300", (128, 32), (128, 64), 4, True, True),
        ("mi300", (32, 32), (32, 32), 8, True, True),
        ("mi300", (64, 64), (64, 64), 4, True, False),  # 4 warps against 2 x 2
        ("mi300", (128, 128), (128, 16), 4, True, False),  # squares of 32 against 16
        ("mi300", (128, 32), (128, 64), 4, False, False),
    ],
)
def test_a_value_stays_where_its_reader_wants_the_same_rows(
    device: str, first: tuple[int, int], second: tuple[int, int], num_warps: int, one_body: bool, stays: bool
) -> None:
    found = dots(device, first, second, num_warps=num_warps, one_body=one_body)
    assert found.stays_in_registers("C", "E") is stays


def test_warp_groups_need_rows_warps_and_half_precision() -> None:
    assert dots("h100", (64, 64), (64, 64)).is_warp_group("C")
    assert not dots("h100", (32, 64), (32, 64)).is_warp_group("C")
    assert not dots("h100", (64, 64), (64, 64), num_warps=2).is_warp_group("C")
    assert not dots("a100", (64, 64), (64, 64)).is_warp_group("C")
    half = dots("h100", (64, 64), (64, 64))
    assert not replace(half, chain=replace(CHAIN, dtype="fp32")).is_warp_group("C")


def test_fp32_has_no_tensor_cores_on_cuda() -> None:
    same = dots("a100", (64, 64), (64, 64))
    assert same.stays_in_registers("C", "E")
    assert not replace(same, chain=replace(CHAIN, dtype="fp32")).stays_in_registers("C", "E")


def test_what_counts_is_whose_rows_the_result_has() -> None:
    shapes, bodies, device = dict.fromkeys(("C", "E"), (64, 64)), dict.fromkeys(("C", "E"), 0), load_device("a100")
    letters = (Dim("M", 64), Dim("N", 64), Dim("K", 64), Dim("H", 64))
    first = MatMul("C", "A", "B", over="K")
    inputs = (Input("A", "MK"), Input("B", "KN"))
    written_second = (first, MatMul("E", "D", "C", over="N"))
    rows = Chain(letters, (*inputs, Input("D", "NH")), written_second, "fp16")
    assert Dots(rows, device, 4, shapes, bodies).stays_in_registers("C", "E")
    columns = Chain(letters, (*inputs, Input("D", "MH")), (first, MatMul("E", "C", "D", over="M")), "fp16")
    assert not Dots(columns, device, 4, shapes, bodies).stays_in_registers("C", "E")
