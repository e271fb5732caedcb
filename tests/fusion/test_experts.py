import pytest
import torch
from closeness import assert_all_close, assert_equal_up_to_rounding

from fusion.experts import feed_forward
from fusion.run.executors import executors
from moe_pipeline import FeedForwardExperts
from tests.fusion.counted import Executor

COUNTS = (3, 0, 5, 1)


@pytest.fixture
def executor():
    made = Executor(lambda chain, needs: None)
    executors.add("experts", made)
    return made


def results(experts, rows, call):
    output = call(rows)
    parameters = dict(experts.named_parameters())
    found = torch.autograd.grad(output.square().sum(), [rows, *parameters.values()])
    return {"output": output.detach(), **dict(zip(("rows", *parameters), found, strict=True))}


def fused(experts, activation):
    up, down = experts.up, experts.down
    return lambda rows: feed_forward(
        rows, COUNTS, up.weight, up.bias, down.weight, down.bias,
        activation=activation, gated=experts.gated, executor="experts",
    )  # fmt: skip


@pytest.mark.parametrize("most", [3, 2, 1, 0], ids="at most {} products".format)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_it_is_the_experts_of_a_layer(gated, bias, most, executor):
    executor.refuses = lambda chain, needs: "too long" if len(chain.products) > most else None
    torch.manual_seed(0)
    experts = FeedForwardExperts(4, 6, 8, activation="silu", gated=gated, bias=bias)
    rows = torch.randn(9, 6).requires_grad_()
    actual, expected = (
        results(experts, rows, fused(experts, "silu")),
        results(experts, rows, lambda x: experts(x, COUNTS)),
    )
    wide = rows.detach().double().requires_grad_()
    assert_all_close(actual, expected, results(experts.double(), wide, lambda x: experts(x, COUNTS)))
    assert bool(executor.ran) == bool(most)


def test_a_chain_that_is_refused_runs_map_by_map(executor):
    executor.refuses = lambda chain, needs: (
        "better kept than computed again" if needs and len(chain.products) > 1 else None
    )
    experts = FeedForwardExperts(4, 6, 8, activation="gelu")
    rows = torch.randn(9, 6)
    with torch.no_grad():
        fused(experts, "gelu")(rows)
    assert {len(chain.products) for chain in executor.ran} == {2}
    executor.ran.clear()
    fused(experts, "gelu")(rows)
    assert {len(chain.products) for chain in executor.ran} == {1}


def test_where_no_kernel_runs_the_callers_own_way_does(executor):
    experts = FeedForwardExperts(4, 6, 8, activation="gelu")
    rows, asked = torch.randn(9, 6), []

    def otherwise():
        asked.append(True)
        return experts(rows, COUNTS)

    up, down = experts.up, experts.down
    for most, times in ((2, 0), (1, 0), (0, 1)):
        executor.refuses = lambda chain, needs, most=most: "too long" if len(chain.products) > most else None
        executors.call.cache_clear()
        feed_forward(
            rows, COUNTS, up.weight, up.bias, down.weight, down.bias,
            activation="gelu", executor="experts", otherwise=otherwise,
        )  # fmt: skip
        assert len(asked) == times


def test_autocast_computes_in_its_dtype(executor):
    experts = FeedForwardExperts(4, 6, 8, activation="relu")
    rows = torch.randn(9, 6).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = fused(experts, "relu")(rows)
        expected = experts(rows, COUNTS)
    assert output.dtype == expected.dtype == torch.bfloat16
    assert_equal_up_to_rounding("output", output, expected, roundings=8)
    output.sum().backward()
    assert rows.grad.dtype == experts.up.weight.grad.dtype == torch.float32


def test_what_does_not_fit_is_named(executor):
    experts = FeedForwardExperts(4, 6, 8).double()
    with pytest.raises(TypeError, match=r"rows_RM: computed in torch.float64; accepted are \[torch.float32"):
        fused(experts, "relu")(torch.randn(9, 6))
    up, down = experts.float().up, experts.down
    given = [torch.randn(9, 6), COUNTS, up.weight, up.bias, down.weight, down.bias]
    wrong = {
        0: (torch.randn(8, 6), r"rows_RM: got shape \(8, 6\); accepted is \(9, 6\), for counts=\(3, 0, 5, 1\)"),
        2: (up.weight[:, :7], r"up_weight_EGM: got shape \(4, 7, 6\); accepted is \(4, 8, 6\)"),
        3: (up.bias[:3], r"up_bias_EG: got shape \(3, 8\); accepted is \(4, 8\)"),
        4: (down.weight[:3], r"down_weight_EMH: got shape \(3, 6, 8\); accepted is \(4, 6, 8\)"),
        5: (None, "up_bias_EG and down_bias_EM: got one of them; accepted are both or none"),
    }
    for place, (tensor, reason) in wrong.items():
        with pytest.raises(ValueError, match=reason):
            feed_forward(*given[:place], tensor, *given[place + 1 :], activation="relu")
    with pytest.raises(ValueError, match="up_weight_EGM: got a tensor on meta; accepted is rows_RM's device, cpu"):
        feed_forward(*given[:2], up.weight.to("meta"), *given[3:], activation="relu")


def test_nan_stays_with_its_row_and_strides_are_fine(executor):
    experts = FeedForwardExperts(4, 6, 8, activation="relu")
    rows = torch.randn(6, 9).T
    expected = fused(experts, "relu")(rows.contiguous())
    assert_equal_up_to_rounding("strides", fused(experts, "relu")(rows), expected, roundings=64)
    rows[4, 2] = float("nan")
    found = fused(experts, "relu")(rows)
    assert found[4].isnan().all()
    assert not found[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()
    with torch.inference_mode():
        assert torch.equal(fused(experts, "relu")(rows).isnan(), found.isnan())
