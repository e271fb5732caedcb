import pytest
import torch
from torch.nn import functional

from fusion.graph.dimensions import dimensions, tensors
from fusion.graph.draft import CutError
from fusion.graph.letters import letters, size
from fusion.graph.reader import read
from fusion.graph.trace import trace
from fusion.graph.uses import Uses


def lettered(function, *args, cuts=()):
    """Letter -> size, in the chain's order, and the batch's letters."""
    graph = trace(function, args, {}).graph_module.graph
    nodes = {node.name: node for node in graph.nodes}
    draft = read(Uses(list(graph.nodes)), {nodes[name] for name in cuts}, list(graph.nodes)[-1].args[0][0])
    found = tensors(draft)
    named = letters(draft, found, dimensions(found))
    return {letter: size(group) for group, letter in named.of.items()}, named.batch


X, A, B = torch.randn(7, 6), torch.randn(6, 8), torch.randn(8, 9)
Q, K, V = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 6)


@pytest.mark.parametrize(
    ("function", "args", "expected", "batch"),
    [
        (lambda x, a, b: x @ a @ b, (X, A, B), {"M": 7, "N": 8, "K": 6, "H": 9}, ""),
        (lambda x, a, b: (x @ a @ b).T.contiguous(), (X, A, B), {"H": 9, "N": 8, "K": 6, "M": 7}, ""),
        (lambda x, a, b: x @ (a @ b), (X, A, B), {"H": 7, "M": 6, "K": 8, "N": 9}, ""),
        (
            lambda q, k, v: functional.scaled_dot_product_attention(q, k, v),
            (Q, K, V.transpose(0, 1).contiguous().transpose(0, 1)),
            {"Z": 2, "G": 3, "M": 7, "N": 5, "K": 4, "H": 6},
            "ZG",
        ),
        (
            lambda x, a, b: x @ a @ b @ b.T,
            (X, A, B),
            {"M": 7, "N": 8, "K": 6, "H": 9, "P": 8},
            "",
        ),
    ],
)
def test_rows_sum_and_columns_of_the_first_product_come_first(function, args, expected, batch):
    found, batches = lettered(function, *args)
    assert (list(found.items()), batches) == (list(expected.items()), batch)


def test_of_two_dimensions_that_a_product_does_not_need_the_larger_is_a_loop():
    rows = torch.randn(7, 2, 6).transpose(0, 1)
    assert lettered(lambda x, a, b: (x @ a @ b).contiguous(), rows, A, B)[1] == "Z"
    found, batch = lettered(lambda x, a, b: (x @ a @ b).contiguous(), torch.randn(3, 4, 6).transpose(0, 1), A, B)
    assert (found["Z"], found["M"], batch) == (3, 4, "Z")


def test_a_causal_mask_says_which_dimension_is_the_loop():
    grouped, keys = torch.randn(2, 24, 7, 4), torch.randn(2, 3, 5, 4)
    attend = lambda q, k: functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)  # noqa: E731
    found, batch = lettered(attend, grouped, keys)
    assert (found["M"], found[batch[-1]]) == (7, 8)


def test_a_sum_over_dimensions_that_are_not_one_cuts_off_what_it_reads():
    def function(q, k, v, w):
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 7, 18) @ w

    w = torch.randn(18, 5)
    with pytest.raises(CutError, match="it sums over 2 dimensions that cannot be one") as error:
        lettered(function, Q, K, V, w)
    assert error.value.node.name == "reshape"
    with pytest.raises(CutError) as error:
        lettered(function, Q, K, V, w, cuts=["scaled_dot_product_attention"])
    assert error.value.node.name == "reshape"
    assert lettered(function, Q, K, V, w, cuts=["reshape"])[0] == {"M": 14, "K": 18, "N": 5}


def test_a_value_that_every_block_would_compute_again_is_cut_off():
    with pytest.raises(CutError, match="matmul_1 has no loop that all other products have") as error:
        lettered(lambda q, k, v: functional.softmax((q @ k.T) @ (k @ v), dim=-1) @ (q @ v)[:5].clone(), *QKV)
    assert error.value.node.name == "matmul_1"


QKV = torch.randn(8, 6), torch.randn(6, 6), torch.randn(6, 5)


def test_longer_chains_are_cut_at_their_beginning():
    square = torch.randn(6, 6)
    with pytest.raises(CutError, match="5 products: a chain has at most 4, so matmul is written out") as error:
        lettered(lambda x, a: x @ a @ a @ a @ a @ a, X, square)
    assert error.value.node.name == "matmul"


def test_an_operand_with_two_loops_of_its_own_is_cut_off():
    def function(x, a, b):
        y = (x @ a).unflatten(0, (2, 3))  # rows that are a batch and rows of what follows
        return y.transpose(0, 1) @ b[None].expand(3, 8, 9) if b is None else torch.einsum("ijk,jkl->il", y, b)

    with pytest.raises(CutError, match="it sums over 2 dimensions that cannot be one"):
        lettered(function, torch.randn(6, 6), A, torch.randn(3, 8, 9))
