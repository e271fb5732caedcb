import pytest

from fusion import attention, gemm_chain, mlp
from fusion.run.form import form_of, of_sizes, read_form, sizes_of

CHAINS = [gemm_chain(M=5, N=7, K=3, H=4), attention(M=5, N=7, K=4, heads=4, kv_heads=2, keep="N"), mlp(M=5, K=3, N=4)]


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_a_form_and_the_sizes_of_tensors_are_the_chain(chain):
    form = form_of(chain)
    sizes = sizes_of(read_form(form), [chain.shape(tensor.name) for tensor in chain.inputs])
    assert list(sizes.items()) == list(chain.sizes.items())
    assert of_sizes(form, sizes) == chain
    assert form_of(of_sizes(form, dict.fromkeys(sizes, 9))) == form


def test_what_does_not_fit_is_named():
    chain = CHAINS[0]
    with pytest.raises(ValueError, match=r"tensors: 2 of them; this chain needs 3: \['A', 'B', 'D'\]"):
        sizes_of(chain, [(5, 3), (3, 7)])
    with pytest.raises(ValueError, match=r"tensors\['B'\] has shape \(3,\); B\[K,N\] has 2 sizes"):
        sizes_of(chain, [(5, 3), (3,), (7, 4)])
    with pytest.raises(
        ValueError, match=r"tensors\['D'\] has shape \(8, 4\); in D\[N,H\], N is 7 in the inputs before"
    ):
        sizes_of(chain, [(5, 3), (3, 7), (8, 4)])


@pytest.mark.parametrize("form", ["", "{", "[]", '{"dtype":"fp32"}', form_of(CHAINS[0]).replace("fp32", "fp99")])
def test_what_is_no_form_is_refused(form):
    with pytest.raises(ValueError, match=r"form='.*pass what fusion.run.form.form_of returns"):
        read_form(form)
