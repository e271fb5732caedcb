import re

import pytest
import torch
from torch.nn import functional

from fusion.graph.products import PRODUCTS, Attention, Product
from fusion.graph.trace import trace

X, Y, Z = torch.randn(7, 6), torch.randn(6, 8), torch.randn(7, 8)
BATCH = torch.randn(3, 7, 6), torch.randn(3, 6, 8)


def recognized(function, *args):
    """What the node of a function's result is as a product."""
    node = list(trace(function, args, {}).graph_module.graph.nodes)[-1].args[0][0]
    return PRODUCTS[node.target](node)


@pytest.mark.parametrize(
    ("function", "args", "labels", "summed"),
    [
        (lambda x, y: x @ y, (X, Y), ("mk", "kn", "mn"), "k"),
        (lambda x, y: x @ y, BATCH, ("Amk", "Akn", "Amn"), "k"),
        (lambda x, y: x @ y, (BATCH[0], Y), ("Amk", "kn", "Amn"), "k"),
        (lambda x, y: x @ y, (X, torch.randn(2, 3, 6, 8)), ("mk", "ABkn", "ABmn"), "k"),
        (torch.mm, (X, Y), ("mk", "kn", "mn"), "k"),
        (torch.bmm, BATCH, ("amk", "akn", "amn"), "k"),
        (functional.linear, (BATCH[0], Y.T), ("Amk", "nk", "Amn"), "k"),
        (lambda x, y: torch.einsum("ij,jk->ki", x, y), (X, Y), ("ij", "jk", "ki"), "j"),
        (lambda x, y: torch.einsum("ij, jk", x, y), (X, Y), ("ij", "jk", "ik"), "j"),
        (lambda x, y: torch.einsum("bij,bjk->bik", x, y), BATCH, ("bij", "bjk", "bik"), "j"),
    ],
)
def test_products_have_labels(function, args, labels, summed):
    product = recognized(function, *args)
    assert isinstance(product, Product)
    assert (product.labels, product.summed) == (labels, summed)
    assert (product.scale, product.addend) == (1.0, None)


def test_products_may_scale_and_add():
    product = recognized(lambda z, x, y: torch.addmm(z, x, y, alpha=0.5), Z, X, Y)
    assert (product.scale, product.addend.name) == (0.5, "arg0_1")
    assert recognized(lambda z, x, y: torch.addmm(z, x, y, beta=0), Z, X, Y).addend is None
    assert recognized(functional.linear, X, Y.T, torch.randn(8)).addend.name == "arg2_1"
    assert isinstance(recognized(torch.baddbmm, torch.randn(3, 7, 8), *BATCH), Product)


def test_attention_has_its_options():
    q, k, v = (torch.randn(2, 4, 5, 16) for _ in range(3))
    plain = recognized(functional.scaled_dot_product_attention, q, k, v)
    assert isinstance(plain, Attention)
    assert (plain.mask, plain.causal, plain.scale, plain.grouped) == (None, False, 0.25, False)
    options = {"is_causal": True, "scale": 0.5, "enable_gqa": True}
    chosen = recognized(lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, **options), q, k, v)
    assert (chosen.causal, chosen.scale, chosen.grouped) == (True, 0.5, True)
    masked = recognized(functional.scaled_dot_product_attention, q, k, v, torch.ones(5, 5, dtype=torch.bool))
    assert masked.mask.name == "arg3_1"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, y: x @ y[:, 0], "a product with a vector is no matrix product"),
        (lambda x, y: functional.linear(x[0], y.T), "linear of a vector is no matrix product"),
        (lambda x, y: torch.einsum("ij,jk,ik->i", x, y, x @ y), "has 3 operands: write products of two"),
        (lambda x, y: torch.einsum("...j,jk->...k", x, y), "write it without dots and diagonals"),
        (lambda x, y: torch.einsum("ij,kl->il", x, y), "is no matrix product: sum over labels of both"),
        (lambda x, y: torch.addmm(x @ y, x, y, beta=2), "with beta=2.0: scale what is added beforehand"),
    ],
)
def test_what_is_no_product_of_a_chain_says_why(function, reason):
    found = recognized(function, X, Y)
    assert isinstance(found, str)
    assert re.search(reason, found), found


def test_attention_with_dropout_says_what_to_do():
    q = torch.randn(2, 5, 16)
    assert "set dropout_p=0" in recognized(lambda q: functional.scaled_dot_product_attention(q, q, q, dropout_p=0.1), q)
