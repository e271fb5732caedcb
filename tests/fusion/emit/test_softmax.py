import types

import pytest
import torch
from closeness import assert_equal_up_to_rounding

from fusion import attention
from fusion.emit.softmax import SoftmaxText, online_softmaxes
from fusion.emit.tiles import Tiles
from fusion.plan.schedule import schedule

CHAIN = attention(M=16, N=60, K=16, H=16)
REDUCE = {"max": lambda x, axis: x.amax(axis), "sum": lambda x, axis: x.sum(axis)}
TL = types.SimpleNamespace(
    where=lambda c, a, b: torch.where(c, torch.as_tensor(a).double(), torch.as_tensor(b).double()),
    exp=torch.exp, maximum=torch.maximum, full=lambda shape, value, dtype: torch.full(shape, value, dtype=dtype),
    float32=torch.float64, reduce=lambda x, axis, combine: REDUCE[combine](x, axis),
    standard=types.SimpleNamespace(_elementwise_max="max", _sum_combine="sum"),
)  # fmt: skip


def text(N):
    return SoftmaxText(
        Tiles(CHAIN, CHAIN.tensors, {"M": 16, "N": N, "K": 16, "H": 16}, {"C": "", "E": ""}, ""), "C", "N"
    )


def execute(lines, variables):
    exec("\n".join(lines), {"tl": TL}, variables)


@pytest.fixture
def scores():
    """Rows of all kinds: whole, some without an entry, in the first tile or in all."""
    scores = torch.randn(16, 60, dtype=torch.float64) * 10
    scores[3] = scores[4, :40] = scores[5, 20:] = scores[6, ::2] = -torch.inf
    return scores


def padded(scores, start, width):
    tile = torch.full((16, width), 7.0, dtype=torch.float64)  # what is outside must not count
    part = scores[:, start : start + width]
    tile[:, : part.shape[1]] = part
    return tile


def expected(scores):
    empty = torch.isneginf(scores).all(1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), 1).masked_fill(empty, 0.0)


@pytest.mark.parametrize("N", [16, 32])
def test_online_steps_make_the_average_of_a_whole_softmax(N, scores):
    values = torch.randn(60, 8, dtype=torch.float64)
    rows, variables = text(N), {"i_N": torch.arange(N), "average": torch.zeros(16, 8, dtype=torch.float64)}
    execute(rows.start("", {}), variables)
    for start in range(0, 60, N):
        variables["x"] = padded(scores, start, N)
        execute(rows.step("x", "", {"N": start}), variables)
        part = padded(values.T.contiguous()[:8].repeat(2, 1), start, N)[:8].T
        inside = (torch.arange(N) < 60 - start)[:, None]
        variables["average"] = variables["average"] * variables["scale_C_M"][:, None]
        variables["average"] += variables["x"] @ torch.where(inside, part, 0.0)
    average = eval(f"average / {rows.divisor('sum_C_M', 'MH')}", {"tl": TL}, variables)
    assert_equal_up_to_rounding("average", average, expected(scores) @ values, roundings=64)
    lse = variables["max_C_M"] + torch.log(variables["sum_C_M"])
    finite = torch.isfinite(lse)
    assert finite.sum() == 15
    assert_equal_up_to_rounding("lse", lse[finite], scores.logsumexp(1)[finite], roundings=8)


def test_a_whole_tile_is_normalized_in_place(scores):
    variables = {"i_N": torch.arange(64), "x": padded(scores, 0, 64)}
    execute(text(64).whole("x", {"N": 0}), variables)
    assert_equal_up_to_rounding("softmax", variables["x"][:, :60], expected(scores), roundings=8)
    assert not variables["x"][:, 60:].any()


@pytest.mark.parametrize(
    ("expression", "tiles", "found"),
    [
        ("mhnk", {"M": 16, "N": 16, "K": 16, "H": 16}, {"C": ("N", "")}),
        ("mn(k,h)", {"M": 16, "N": 16, "K": 16, "H": 16}, {"C": ("N", "")}),
        ("mnhk", {"M": 16, "N": 16, "K": 16, "H": 8}, {"C": ("N", "H")}),
        ("mhnk", {"M": 16, "N": 64, "K": 16, "H": 16}, {}),
    ],
)
def test_a_softmax_is_online_where_its_loop_turns(expression, tiles, found):
    program = schedule(CHAIN, expression, tiles).program(CHAIN)
    online = online_softmaxes(CHAIN, program)
    assert {value: (softmax.loop.letter, softmax.inner) for value, softmax in online.items()} == found
