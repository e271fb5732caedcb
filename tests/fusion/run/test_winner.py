import copy
import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion import attention, gemm_chain, mlp
from fusion.plan import Chain, Dim, Input, MatMul, Softmax
from fusion.plan.schedule import schedule
from fusion.run import winner as module
from fusion.run.winner import Key, Winner, WinnerError, code_version, decode, encode, encode_key

CHAIN = attention(M=100, N=48, K=32, H=64, heads=4, causal=True, keep="N", dtype="fp16")
WINNER = Winner(schedule(CHAIN, "mn(k,h)", {"M": 64, "N": 48, "K": 32, "H": 64}, num_warps=8, num_stages=3), 2.5, 3.5)


@pytest.mark.parametrize(
    ("chain", "expression"),
    [
        (CHAIN, "mn(k,h)"),
        (gemm_chain(M=64, N=32, K=16, H=48, P=80, batch=3, activation="gelu"), "mnkhp"),
        (mlp(M=33, K=16, N=32, gated=True, bias=True, residual=True, dtype="bf16"), "mnkh"),
        (attention(M=5, N=7, K=3, scale=-2.5, mask="MN", causal=True, diagonal=-4), "mnkh"),
    ],
)
def test_what_was_written_is_read_back(chain, expression):
    key = Key.of(chain, "some device")
    winner = Winner(schedule(chain, expression, dict.fromkeys(chain.loops, 16), num_warps=2), 0.125)
    if "mnkh" in expression and len(chain.products) == 2 and chain.softmax_over("C"):
        winner = Winner(schedule(chain, "mn(k,h)", dict.fromkeys(chain.loops, 16)), 0.125)
    text = json.dumps(encode(key, winner))
    assert decode(json.loads(text)) == (key, winner)


def test_inputs_in_another_order_are_the_same_key():
    other = Chain(CHAIN.dims, CHAIN.inputs[::-1], CHAIN.stages, CHAIN.dtype)
    assert Key.of(other, "x") == Key.of(CHAIN, "x")


def test_keys_of_one_structure_differ_in_sizes_and_numbers():
    structure = Key.of(CHAIN, "x").structure
    other = attention(M=1, N=7, K=9, heads=2, causal=True, diagonal=3, keep="N", scale=5.0, dtype="fp16")
    assert Key.of(other, "x").structure == structure
    for changed in (
        attention(M=1, N=7, K=9, heads=2, causal=True, keep="N"),
        attention(M=1, N=7, K=9, heads=2, keep="N", dtype="fp16"),
        attention(M=1, N=7, K=9, causal=True, keep="N", dtype="fp16"),
    ):
        assert Key.of(changed, "x").structure != structure
    assert Key.of(CHAIN, "y").structure != structure


@pytest.mark.parametrize("source", ["rules.py", "device.json", "include/product.h"])
def test_the_version_is_that_of_the_sources(source, monkeypatch, tmp_path):
    assert re.fullmatch("[0-9a-f]{16}", code_version())
    assert code_version.__wrapped__() == code_version()
    path = tmp_path / "plan" / source
    path.parent.mkdir(parents=True)
    path.write_text("a = 1")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "run" / "winner.py"))
    first = code_version.__wrapped__()
    path.write_text("a = 2")
    assert code_version.__wrapped__() != first != code_version()


def test_what_was_measured_is_better_than_what_was_not():
    predicted, measured = (dataclasses.replace(WINNER, measured_us=time) for time in (None, 9.0))
    assert measured.is_better(predicted)
    assert not predicted.is_better(measured)
    assert predicted.is_better(None)
    assert dataclasses.replace(WINNER, measured_us=8.0).is_better(measured)
    assert not predicted.is_better(predicted)


ENTRY = encode(Key.of(CHAIN, "x"), WINNER)
HOSTILE = [None, True, -1, 0, 1.5, 10**40, float("nan"), float("inf"), "", "text", [], {}, [[]]]


def changed(path, value):
    entry = copy.deepcopy(ENTRY)
    inner = entry
    for step in path[:-1]:
        inner = inner[step]
    if value is KeyError:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return entry


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["key"], KeyError, "entry: got .* accepted is an object with the fields"),
        (["extra"], 1, "entry: got"),
        (["winner"], [], "winner is a list, accepted is a dict"),
        (["winner", "tiles"], KeyError, "winner: got"),
        (["winner", "tiles", "M"], KeyError, "winner: tiles of"),
        (["winner", "tiles", "Q"], 16, "winner: tiles of"),
        (["winner", "tiles", "M"], 24, "a tile of 24 for M=100; accepted are range"),
        (["winner", "tiles", "M"], 128, "a tile of 128 for M=100"),
        (["winner", "tiles", "M"], 16.0, "a tile of 16.0"),
        (["winner", "tiles", "M"], True, "a tile of True"),
        (["winner", "expression"], "mnkhp", "must have the loops"),
        (["winner", "expression"], "mn(k,h", "must hold two siblings or more and be closed"),
        (["winner", "expression"], "(" * 5000, "winner: "),
        (["winner", "num_warps"], 3, "3 warps"),
        (["winner", "num_warps"], True, "num_warps is a bool, accepted is a int"),
        (["winner", "num_stages"], 0, "0 stages"),
        (["winner", "num_stages"], 99, "99 stages"),
        (["winner", "predicted_us"], None, "a time of None"),
        (["winner", "predicted_us"], float("nan"), "a time of nan"),
        (["winner", "measured_us"], float("inf"), "a time of inf"),
        (["winner", "measured_us"], -1.0, "a time of -1.0"),
        (["winner", "measured_us"], "1", "a time of '1'"),
        (["winner", "parts_us"], float("nan"), "a time of nan"),
        (["winner", "parts_us"], KeyError, "winner: got"),
        (["key", "device"], 3, "device is a int, accepted is a str"),
        (["key", "dtype"], "fp8", "dtype='fp8' must be one of"),
        (["key", "dims", 1, "size"], -4, "size=-4 must not be negative"),
        (["key", "dims", 1, "size"], "4", "size is a str"),
        (["key", "dims", 1, "batch"], 1, "batch is a int"),
        (["key", "inputs", 0, "dims"], "QQ", "must be different letters"),
        (["key", "stages"], [], "accepted are 1 to 4"),
        (["key", "stages", 0, "stage"], "exec", "stage 'exec': accepted are"),
        (["key", "stages", 0, "stage"], ["MatMul"], "accepted are"),
        (["key", "stages", 0, "over"], KeyError, "MatMul: got"),
        (["key", "stages", 0, "over"], "Q", "must be a letter of"),
        (["key", "stages", 1, "operand"], float("nan"), "finite float"),
        (["key", "stages", 1, "operand"], [1], "an operand of"),
        (["key", "stages", 1, "operation"], ["mul"], "an operation of"),
        (["key", "stages", 3, "diagonal"], 0.5, "diagonal is a float"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(path, value, message):
    with pytest.raises(WinnerError, match=message):
        decode(changed(path, value))


def test_a_schedule_that_is_not_legal_is_refused():
    product = (MatMul("C", "A", "B", over="K"), Softmax("C", over="N"))
    dims = tuple(Dim(letter, size) for letter, size in {"M": 32, "N": 32, "K": 32}.items())
    chain = Chain(dims, (Input("A", "MK"), Input("B", "KN")), product)
    whole = Winner(schedule(chain, "mnk", {"M": 16, "N": 32, "K": 16}), 1.0)
    assert decode(encode(Key.of(chain, "x"), whole))[1] == whole
    split = Winner(schedule(chain, "mnk", {"M": 16, "N": 16, "K": 16}), 1.0)
    with pytest.raises(WinnerError, match="softmax of C over N: n must be a single tile"):
        decode(encode(Key.of(chain, "x"), split))


def paths(content, before=()):
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for step, value in items:
        yield (*before, step)
        yield from paths(value, (*before, step))


@given(st.sampled_from(list(paths(ENTRY))), st.sampled_from(HOSTILE))
def test_hostile_values_are_refused_or_mean_a_valid_winner(path, value):
    try:
        key, winner = decode(changed(path, value))
    except WinnerError:
        return
    assert winner.schedule.program(key.chain)
    assert decode(json.loads(json.dumps(encode(key, winner)))) == (key, winner)


@pytest.mark.parametrize("content", HOSTILE)
def test_what_is_no_object_is_refused(content):
    with pytest.raises(WinnerError):
        decode(content)


def test_a_key_says_all_of_its_chain():
    assert encode_key(Key.of(CHAIN, "x"))["dims"][1] == {"name": "M", "size": 100, "batch": False}
