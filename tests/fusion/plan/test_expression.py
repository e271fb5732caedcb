"""Expressions in the paper's notation, and that all of them are found, each once."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.plan import Chain, Dim, Elementwise, Input, MatMul, gemm_chain, mlp
from fusion.plan.expression import Expression, Tree, expressions, parse, product_loops
from tests.fusion.drawn_chains import chains


def nests(letters):
    """Any loops with these letters: the first one around some of the next, then the rest beside it."""
    if not letters:
        return st.just(())
    return st.integers(1, len(letters)).flatmap(
        lambda end: st.tuples(nests(letters[1:end]), nests(letters[end:])).map(
            lambda parts: (Tree(letters[0], parts[0]), *parts[1])
        )
    )


def test_the_notation_is_the_papers():
    assert str(Expression((Tree("M", (Tree("N", (Tree("K"), Tree("H"))),)),))) == "mn(k,h)"
    assert str(Expression((Tree("M", (Tree("H", (Tree("N", (Tree("K"),)),)),)),))) == "mhnk"


@given(order=st.permutations("MNKHPQ"), data=st.data())
def test_text_and_trees_are_each_others_inverse(order, data):
    expression = Expression(data.draw(nests("".join(order))))
    assert parse(str(expression)) == expression


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mhnm", r"text='mhnm': the loop 'm' appears twice"),
        ("m(n,n)", "the loop 'n' appears twice"),
        ("mN", r"text='mN': position 1 holds 'N', accepted is a lower-case letter or '\('"),
        ("m)", r"position 1 holds '\)'"),
        ("m,n", "position 1 holds ','"),
        ("m(n,k", "the parenthesis at 1 must hold two siblings or more and be closed"),
        ("m(n)", "the parenthesis at 1 must hold two siblings or more"),
        ("m(n,)", "a sibling that ends at position 4 must be one nest of loops"),
        ("m(,n)", "a sibling that ends at position 2 must be one nest of loops"),
        ("(m,n)k", "position 5 holds 'k'"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_two_products_have_26():
    found = [str(expression) for expression in expressions(gemm_chain(M=1, N=1, K=1, H=1))]
    deep = {"".join(order) for order in itertools.permutations("mnkh")}
    assert len(found) == 26
    assert set(found) == deep | {"mn(k,h)", "nm(k,h)"}


def test_the_counts_of_longer_chains():
    counts = [len(expressions(chain)) for chain in (
        gemm_chain(M=1, N=1, K=1), gemm_chain(M=1, N=1, K=1, H=1, P=1), mlp(M=1, N=1, K=1, gated=True)
    )]  # fmt: skip
    assert counts == [6, 146, 26]


def test_deep_expressions_nest_all_loops():
    assert [parse(text).is_deep for text in ("mhnk", "mn(k,h)", "(m,n)")] == [True, False, False]


def test_the_loops_of_products():
    chain = mlp(M=1, N=1, K=1, batch=2, gated=True)
    assert product_loops(chain) == {"C_up": "MNK", "C": "MNK", "E": "MNH"}


def test_siblings_stand_in_the_order_of_data_flow():
    """G = (A B) * (F I), then E = G D: the sum of the gate's product comes first where it is written first."""
    chain = Chain(
        tuple(Dim(letter, 1) for letter in "MNKPH"),
        (Input("A", "MK"), Input("B", "KN"), Input("F", "MP"), Input("I", "PN"), Input("D", "NH")),
        (
            MatMul("U", "F", "I", over="P"),
            MatMul("C", "A", "B", over="K"),
            Elementwise("C", "mul", "U"),
            MatMul("E", "C", "D", over="N"),
        ),
    )
    found = {str(expression) for expression in expressions(chain)}
    assert "mn(p,k,h)" in found
    assert not any(text in found for text in ("mn(k,p,h)", "mn(h,p,k)", "mn(p,h,k)"))


@settings(max_examples=50)
@given(chain=chains())
def test_every_expression_is_whole_different_and_nests_products(chain):
    found = expressions(chain)
    assert len(set(found)) == len({str(expression) for expression in found}) == len(found)
    for expression in found:
        paths = expression.paths
        assert sorted(paths) == sorted(chain.loops)
        for loops in product_loops(chain).values():
            innermost = max((paths[letter] for letter in loops), key=len)
            assert set(loops) <= set(innermost)


def test_the_deep_ones_are_all_orders():
    for chain in (gemm_chain(M=1, N=1, K=1, H=1), gemm_chain(M=1, N=1, K=1, H=1, P=1)):
        deep = [expression for expression in expressions(chain) if expression.is_deep]
        assert len(deep) == len(list(itertools.permutations(chain.loops)))
