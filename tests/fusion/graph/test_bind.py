import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torch.nn.functional import linear

from fusion import attention, gemm_chain, mlp
from fusion.graph import Views, find, trace


def matched(function, *args):
    (match,) = find(trace(function, args, {}).graph_module).matches
    return match


X, A, B = torch.randn(7, 6), torch.randn(6, 8), torch.randn(8, 9)
HEADS = torch.randn(4, 7, 16), torch.randn(4, 5, 16), torch.randn(4, 5, 3)


@pytest.mark.parametrize(
    ("function", "args", "chain"),
    [
        (lambda x, a, b: x @ a @ b, (X, A, B), gemm_chain(M=7, N=8, K=6, H=9)),
        (
            lambda x, a, b, c: torch.relu(torch.relu(x @ a) @ b) @ c,
            (X, A, B, torch.randn(9, 2)),
            gemm_chain(M=7, N=8, K=6, H=9, P=2, activation="relu"),
        ),
        (
            lambda x, a, b: torch.bmm(torch.bmm(x, a), b),
            (torch.randn(3, 7, 6), torch.randn(3, 6, 8), torch.randn(3, 8, 9)),
            gemm_chain(M=7, N=8, K=6, H=9, batch=3),
        ),
        (
            functional.scaled_dot_product_attention,
            tuple(x.half() for x in HEADS),
            attention(M=7, N=5, K=16, H=3, batch=4, dtype="fp16"),
        ),
        (
            lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True),
            HEADS,
            attention(M=7, N=5, K=16, H=3, batch=4, causal=True),
        ),
        (
            lambda x, a, up, b: linear(functional.silu(linear(x, a)) * linear(x, up), b),
            (X, A.T.contiguous(), A.T.contiguous(), B.T.contiguous()),
            mlp(M=7, K=6, N=8, H=9, activation="silu", gated=True),
        ),
        (
            lambda x, a, p, b, q: x + linear(functional.gelu(linear(x, a, p)), b, q),
            (X, A.T.contiguous(), torch.randn(8), A, torch.randn(6)),
            mlp(M=7, K=6, N=8, activation="gelu", bias=True, residual=True),
        ),
    ],
)  # fmt: skip
def test_the_common_chains_are_those_of_the_workloads(function, args, chain):
    assert matched(function, *args).chain == chain


def test_masks_gates_and_side_products_have_names():
    def function(q, k, v, w, m, n, keep, rest):
        p = (q @ k.mT * m + n).masked_fill(keep, -torch.inf).softmax(-1)
        return p @ v + (q @ w) * 2 + rest[0, 0] + rest + m[0]

    rest = torch.randn(4, 7, 5)
    keep = torch.rand(4, 7, 5) > 2
    first = torch.randn(4, 7, 3), torch.randn(4, 5, 3), rest[:, :5], torch.randn(3, 5)
    match = matched(function, *first, torch.randn(7, 5), torch.randn(7, 5), keep, rest)
    assert str(match.chain).partition(" | ")[0].split("; ") == [
        "E_up[Z,M,N] = A[Z,M,K] D_up[K,N]", "E_up *= 2.0", "C[Z,M,H] = A[Z,M,K] B[Z,H,K]", "C *= gate[M,H]",
        "C += mask[M,H]", "C = mask(C, keep[Z,M,H])", "C = softmax(C, H)", "E[Z,M,N] = C[Z,M,H] D[Z,H,N]",
        "E += E_up[Z,M,N]", "E += bias_E[N]", "E += residual[Z,M,N]", "E += bias_E_2[N]",
    ]  # fmt: skip


def test_an_input_is_bound_to_what_lies_behind_its_views():
    def function(q, k, v):
        q, k, v = (x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    match = matched(function, *(torch.randn(3, 5, 8) for _ in range(3)))
    assert match.output == "flatten"
    assert [(binding.name, binding.node) for binding in match.bindings] == [
        ("A", "arg0_1"), ("B", "arg1_1"), ("D", "arg2_1"),
    ]  # fmt: skip
    assert {tensor.name: tensor.dims for tensor in match.chain.inputs} == {"A": "ZMGK", "B": "ZNGK", "D": "ZNGH"}
    assert match.chain.tensors["E"] == "ZMGH"
    assert match.views == Views((3, 5, 2, 4), (0, 1, 2, 3), (3, 5, 8))
    assert set(match.covered) == {"scaled_dot_product_attention", "transpose_3", "flatten"}
    assert match.intermediates == ()


def test_letters_come_in_storage_order():
    chain = matched(lambda x, a, b: x.T @ a.T @ b.T, X.T.contiguous(), A.T.contiguous(), B.T.contiguous()).chain
    assert [tensor.dims for tensor in chain.inputs] == ["KM", "NK", "HN"]
    strided = torch.randn(6, 7).T
    assert matched(lambda x, a, b: x @ a @ b, strided, A, B).chain.inputs[0].dims == "KM"
    repeated = torch.randn(6).expand(7, 6)
    assert matched(lambda x, a, b: x @ a @ b, repeated, A, B).chain.inputs[0].dims == "MK"


def test_intermediates_are_the_nodes_that_could_be_written_out():
    match = matched(lambda x, a, b: torch.relu(x @ a * 2).reshape(7, 8) @ b, X, A, B)
    assert match.intermediates == ("relu",)
    assert match.covered[-1] == match.output == "matmul_1"


def test_matches_print_what_they_are():
    mask = torch.rand(8) > 2
    text = str(matched(lambda x, a, b, m: (x @ a).masked_fill(m, -torch.inf).softmax(1) @ b, X, A, B, mask))
    assert text.startswith("matmul_1: C[M,N] = A[M,K] B[K,N]; C = mask(C, keep[N]); C = softmax(C, N); E[M,H] = ")
    assert "A = arg0_1.view(7, 6)" in text
    assert "keep = not arg3_1.view(8,)" in text


@given(st.permutations(range(3)), st.booleans())
def test_views_split_permute_and_join(order, join):
    tensor = torch.arange(24).reshape(4, 6)
    expected = tensor.reshape(4, 2, 3).permute(order)
    shape = tuple(expected.shape)
    if join and tuple(order) == (0, 1, 2):
        shape = (8, 3)
    views = Views((4, 2, 3), tuple(order), shape)
    assert torch.equal(views(tensor), expected.reshape(shape))
    assert views(tensor).data_ptr() == tensor.data_ptr()
    assert str(views).startswith(".view(4, 2, 3)")


def test_what_repeats_entries_ends_no_chain():
    found = find(trace(lambda x, a, b: (x @ a @ b)[:, None].expand(7, 2, 9), (X, A, B), {}).graph_module)
    assert [match.output for match in found.matches] == ["unsqueeze"]
