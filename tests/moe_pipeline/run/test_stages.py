"""The pieces of an expert's computation against autograd."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from closeness import assert_all_close, assert_close
from torch import Tensor, nn
from torch.nn import functional

from moe_pipeline.plan.strategy import ring_depths, strategy
from moe_pipeline.run.buffers import Rings, Workspace
from moe_pipeline.run.stages import FeedForwardChunks, pointwise

CPU = torch.device("cpu")
WIDTH, HIDDEN = 6, 10
COUNTS = ((3, 0, 4), (1, 2, 0), (0, 0, 0), (5, 1, 1))  # of four chunks for three experts
RESTORES = ("none", "S1", "S2", "S3", "S4")
KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "ReLU": nn.ReLU(),
    "silu": functional.silu,
    "SiLU": nn.SiLU(),
    "gelu": functional.gelu,
    "GELU": nn.GELU(),
    "GELU tanh": nn.GELU(approximate="tanh"),
    "gelu tanh": partial(functional.gelu, approximate="tanh"),
    "gelu none": partial(functional.gelu, approximate="none"),
}
UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "Sigmoid": nn.Sigmoid(),
    "square of relu": lambda x: functional.relu(x).square(),
    "leaky": partial(functional.leaky_relu, negative_slope=0.2),
    "linear": lambda x: x,
}
ACTIVATIONS = {**KNOWN, **UNKNOWN}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_gradients_equal_autograd(name: str, dtype: torch.dtype, in_place: bool) -> None:
    activation, chosen = ACTIVATIONS[name], pointwise(ACTIVATIONS[name])
    value, grad = torch.randn(50, 7).to(dtype), torch.randn(50, 7).to(dtype)

    def by_autograd(to: torch.dtype) -> dict[str, Tensor]:
        leaf = value.to(to, copy=True).requires_grad_()
        result = activation(leaf)
        result.backward(grad.to(to))
        return {"result": result.detach().clone(), "gradient": leaf.grad}  # type: ignore[dict-item]

    given, out = value.clone(), torch.full_like(value, torch.nan)
    result = given if in_place else out
    chosen.apply(given, result)
    kept = result if chosen.from_result else value
    incoming = grad.clone()
    gradient = incoming if in_place else torch.full_like(grad, torch.nan)
    chosen.backward(incoming, kept.clone(), gradient)
    assert_all_close({"result": result, "gradient": gradient}, by_autograd(dtype), by_autograd(torch.float64))
    if not in_place:
        assert torch.equal(given, value)  # T_M is still there
        assert torch.equal(incoming, grad)


def test_known_activations_have_operations_of_their_own() -> None:
    """They need no copy: relu works on its result, the others write where they are told."""
    assert all(
        pointwise(activation).from_result == (name.lower() == "relu") for name, activation in ACTIVATIONS.items()
    )

    def counted(x: Tensor) -> Tensor:
        raise AssertionError("called")

    with pytest.raises(AssertionError, match="called"):
        pointwise(counted).apply(torch.zeros(1), torch.zeros(1))


def _weights(*, gated: bool, bias: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(7)
    wide = 2 * HIDDEN if gated else HIDDEN
    shapes = [(3, wide, WIDTH), (3, wide), (3, WIDTH, HIDDEN), (3, WIDTH)]
    up, up_bias, down, down_bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return (up, up_bias, down, down_bias) if bias else (up, None, down, None)


def _rows(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(8)
    rows, grads = ([torch.randn(sum(counts), WIDTH, generator=generator).to(dtype) for counts in COUNTS] for _ in "ab")
    return list(rows), list(grads)


def _by_autograd(
    activation: Callable[[Tensor], Tensor], dtype: torch.dtype, to: torch.dtype, **form: bool
) -> dict[str, Tensor]:
    weights = [None if weight is None else weight.to(to).requires_grad_() for weight in _weights(dtype=dtype, **form)]
    up, up_bias, down, down_bias = weights
    results: dict[str, Tensor] = {}
    leaves = []
    total = torch.zeros((), dtype=to)
    for chunk, (rows_RM, grad_RM, counts) in enumerate(zip(*_rows(dtype), COUNTS, strict=True)):
        leaf_RM = rows_RM.to(to).requires_grad_()
        leaves.append(leaf_RM)
        parts = []
        for e, part in enumerate(leaf_RM.split(counts)):
            hidden = functional.linear(part, up[e], None if up_bias is None else up_bias[e])  # type: ignore[index]
            if form["gated"]:
                gate, linear = hidden.chunk(2, -1)
                hidden = activation(gate) * linear
            else:
                hidden = activation(hidden)
            parts.append(functional.linear(hidden, down[e], None if down_bias is None else down_bias[e]))  # type: ignore[index]
        out_RM = torch.cat(parts)
        results[f"out {chunk}"] = out_RM.detach()
        total = total + (out_RM * grad_RM.to(to)).sum()
    total.backward()
    results.update({f"rows {chunk}": leaf.grad for chunk, leaf in enumerate(leaves)})  # type: ignore[misc]
    results.update({f"weight {i}": weight.grad for i, weight in enumerate(weights) if weight is not None})  # type: ignore[misc]
    return results


def _by_stages(
    activation: Callable[[Tensor], Tensor], restore: str, dtype: torch.dtype, *, gated: bool, bias: bool
) -> dict[str, Tensor]:
    """All pieces in the order of a schedule; the rings are real, so a piece that leaves its buffer is caught."""
    chosen, workspace = strategy(restore), Workspace()  # type: ignore[arg-type]
    weights = _weights(gated=gated, bias=bias, dtype=dtype)
    chunks = FeedForwardChunks(
        weights, pointwise(activation), gated=gated, strategy=chosen, depths=ring_depths(chosen, len(COUNTS)),
        num_chunks=len(COUNTS), workspace=workspace,
    )  # fmt: skip
    all_rows, grads = _rows(dtype)
    largest = max(map(len, all_rows))
    results: dict[str, Tensor] = {}
    shared = chosen.shares_buffers
    rings = Rings(chunks.rings(largest, backward=False) if shared else None, workspace=workspace, device=CPU)
    chunks.begin_forward(rings, [len(rows) for rows in all_rows], keep=True)
    for chunk, (rows_RM, counts) in enumerate(zip(all_rows, COUNTS, strict=True)):
        out_RM = results[f"out {chunk}"] = torch.full_like(rows_RM, torch.nan)
        chunks.up(chunk, rows_RM, counts)
        if chosen.hidden == "offload":
            chunks.offload_hidden(chunk)
        chunks.down(chunk, counts, out_RM=out_RM)
    kept = chunks.kept()
    in_place = pointwise(activation).from_result and not gated
    assert len(kept) == (len(COUNTS) * (1 if in_place else 2) if chosen.hidden == "keep" else 0)
    rings.release()
    rings = Rings(chunks.rings(largest, backward=True) if shared else None, workspace=workspace, device=CPU)
    needs = [True] * sum(weight is not None for weight in weights)
    chunks.begin_backward(rings, kept, needs)
    for chunk, (rows_RM, grad_RM, counts) in enumerate(zip(all_rows, grads, COUNTS, strict=True)):
        if chosen.hidden == "offload":
            chunks.fetch_hidden(chunk, counts)
        if chosen.hidden == "recompute":
            chunks.recompute(chunk, rows_RM, counts)
        out_RM = results[f"rows {chunk}"] = torch.full_like(rows_RM, torch.nan)
        chunks.dgrad(chunk, grad_RM, None, counts, out_RM=out_RM)
        chunks.wgrad(chunk, grad_RM, rows_RM, counts)
    found = iter(chunks.gradients())
    results.update({f"weight {i}": next(found) for i, weight in enumerate(weights) if weight is not None})  # type: ignore[misc]
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize(("gated", "bias"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("name", ["relu", "SiLU", "gelu tanh", "tanh"])
def test_pieces_equal_autograd(name: str, gated: bool, bias: bool, restore: str, dtype: torch.dtype) -> None:
    activation = ACTIVATIONS[name]
    actual = _by_stages(activation, restore, dtype, gated=gated, bias=bias)
    reference = _by_autograd(activation, dtype, dtype, gated=gated, bias=bias)
    assert_all_close(actual, reference, _by_autograd(activation, dtype, torch.float64, gated=gated, bias=bias))


@pytest.mark.parametrize("needed", range(5))
def test_only_needed_gradients_are_made(needed: int) -> None:
    chosen, workspace = strategy("none"), Workspace()
    weights = _weights(gated=False, bias=True, dtype=torch.float32)
    chunks = FeedForwardChunks(
        weights, pointwise(functional.relu), gated=False, strategy=chosen, depths=ring_depths(chosen, 1), num_chunks=1,
        workspace=workspace,
    )  # fmt: skip
    rows_RM, counts = torch.randn(7, WIDTH), COUNTS[0]
    rings = Rings(None, workspace=workspace, device=CPU)
    chunks.begin_forward(rings, [7], keep=True)
    chunks.up(0, rows_RM, counts)
    chunks.down(0, counts, out_RM=torch.empty(7, WIDTH))
    needs = [index == needed for index in range(4)]  # with 4: none
    chunks.begin_backward(rings, chunks.kept(), needs)
    grad_RM, out_RM = torch.randn(7, WIDTH), torch.empty(7, WIDTH)
    chunks.dgrad(0, grad_RM, None, counts, out_RM=out_RM)
    chunks.wgrad(0, grad_RM, rows_RM, counts)
    assert [grad is not None for grad in chunks.gradients()] == needs


def test_rings_are_as_wide_as_what_they_hold() -> None:
    for gated, restore in ((False, "S1"), (True, "S4")):
        chosen = strategy(restore)  # type: ignore[arg-type]
        for name in ("relu", "SiLU"):
            chunks = FeedForwardChunks(
                _weights(gated=gated, bias=True, dtype=torch.bfloat16), pointwise(ACTIVATIONS[name]),
                gated=gated, strategy=chosen, depths=ring_depths(chosen, 2), num_chunks=2, workspace=Workspace(),
            )  # fmt: skip
            forward, backward = chunks.rings(9, backward=False), chunks.rings(9, backward=True)
            in_place = name == "relu" and not gated  # the paper's: T_M is overwritten by the activation
            assert set(forward) == {"hidden"} | (set() if in_place else {"activated"})
            assert set(backward) == set(forward) | {"grad_hidden"} | ({"grad_activated"} if gated else set())
            assert forward["hidden"].depth == (2 if restore == "S1" else 1)
            assert forward["hidden"].width == (2 * HIDDEN if gated else HIDDEN)
            assert all((ring.rows, ring.element_bytes) == (9, 2) for ring in backward.values())


def test_low_precision_gradients_of_many_chunks_are_added_up_in_float32() -> None:
    """Adding sixteen equal chunks in bf16 would lose what is smaller than a half of the last place."""
    chosen, workspace = strategy("none"), Workspace()
    weights = _weights(gated=False, bias=False, dtype=torch.bfloat16)
    rows_RM, grad_RM = (torch.randn(7, WIDTH).bfloat16() for _ in "ab")
    counts, num_chunks = (7, 0, 0), 16

    def run(n: int) -> Tensor:
        chunks = FeedForwardChunks(
            weights, pointwise(functional.relu), gated=False, strategy=chosen, depths=ring_depths(chosen, n),
            num_chunks=n, workspace=workspace,
        )  # fmt: skip
        rings = Rings(None, workspace=workspace, device=CPU)
        chunks.begin_forward(rings, [7] * n, keep=True)
        for chunk in range(n):
            chunks.up(chunk, rows_RM, counts)
            chunks.down(chunk, counts, out_RM=torch.empty_like(rows_RM))
        chunks.begin_backward(rings, chunks.kept(), [True, True])
        for chunk in range(n):
            chunks.dgrad(chunk, grad_RM, None, counts, out_RM=torch.empty_like(rows_RM))
            chunks.wgrad(chunk, grad_RM, rows_RM, counts)
        down = chunks.gradients()[1]
        assert down is not None
        assert down.dtype == torch.bfloat16
        return down

    one = run(1)
    assert_close("gradient of down", run(num_chunks), num_chunks * one, num_chunks * one.double())
