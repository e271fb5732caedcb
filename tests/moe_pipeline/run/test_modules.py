"""Any modules as experts: what is kept, copied or computed again gives the same gradients, dropout included."""

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from closeness import assert_all_close
from ranks import run_ranks
from torch import Tensor, nn

from moe_pipeline import FeedForwardExperts, Gate, GateConfig, ModuleExperts, MoELayer, PipelineConfig
from moe_pipeline.dispatch import local_part
from moe_pipeline.plan.strategy import strategy
from moe_pipeline.run.buffers import Rings, Workspace
from moe_pipeline.run.modules import ModuleChunks
from moe_pipeline.run.ranks import expert_ranks

CPU = torch.device("cpu")
NUM_EXPERTS, WIDTH = 4, 6
RESTORES = ("none", "S1", "S2", "S3", "S4")
SAVED = {"S1", "S2"}  # autograd's saved tensors go to the host


def _modules(*, dropout: float = 0.0) -> ModuleExperts:
    torch.manual_seed(1)
    return ModuleExperts(
        [
            nn.Sequential(nn.Linear(WIDTH, 9), nn.GELU(), nn.Dropout(dropout), nn.Linear(9, WIDTH)),
            nn.Identity(),
            nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.LayerNorm(WIDTH)),
            nn.Sequential(nn.Dropout(dropout), nn.Linear(WIDTH, WIDTH)),
        ]
    )


def _gate() -> Gate:
    torch.manual_seed(2)
    gate = Gate(GateConfig(num_experts=NUM_EXPERTS), WIDTH)
    nn.init.normal_(gate.router.weight)
    return gate


def _tokens(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3 + rank)
    shape = ((13, 7, 0, 1)[rank], WIDTH)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def _run(layer: MoELayer, rank: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    layer.zero_grad()
    x_TM, grad_TM = (tensor.to(dtype) for tensor in _tokens(rank))
    x_TM.requires_grad_()
    torch.manual_seed(5)  # what dropout draws
    y_TM, _ = layer(x_TM)
    (y_TM * grad_TM).sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}  # type: ignore[union-attr]
    return {"y": y_TM.detach(), "x": x_TM.grad, **grads}  # type: ignore[dict-item]


def _config(restore: str, num_chunks: int) -> PipelineConfig:
    return PipelineConfig(num_chunks=num_chunks, restore=restore)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_chunks", [1, 2, 5, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_every_strategy_gives_the_same_results_and_gradients(num_chunks: int, dropout: float) -> None:
    layer = MoELayer(_gate(), _modules(dropout=dropout), pipeline=_config("none", num_chunks))
    kept = _run(layer)
    for restore in RESTORES:
        actual = _run(MoELayer(_gate(), _modules(dropout=dropout), pipeline=_config(restore, num_chunks)))
        assert_all_close(actual, kept, kept)


def test_dropout_in_training_leaves_the_random_numbers_that_follow_alone() -> None:
    """Computing again in backward draws nothing that other layers would have drawn."""
    following = []
    for restore in RESTORES:
        _run(MoELayer(_gate(), _modules(dropout=0.5), pipeline=_config(restore, 3)))
        following.append(torch.rand(3))
    assert all(torch.equal(numbers, following[0]) for numbers in following)


@pytest.mark.parametrize("restore", RESTORES)
def test_feed_forward_experts_with_dropout_repeat_what_they_dropped(restore: str) -> None:
    def make(restore: str) -> MoELayer:
        torch.manual_seed(1)
        experts = FeedForwardExperts(NUM_EXPERTS, WIDTH, 10, dropout=0.5)
        return MoELayer(_gate(), experts, pipeline=_config(restore, 3))

    kept = _run(make("none"))
    assert_all_close(_run(make(restore)), kept, kept)


def _whole(num_ranks: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Every rank's results from one process that holds all experts; gradients are those of the mean over ranks."""
    layer = MoELayer(_gate(), _modules()).to(dtype)
    results = [_run(layer, rank, dtype) for rank in range(num_ranks)]
    for name, _ in layer.experts.named_parameters():
        mean = sum(result[f"experts.{name}"] for result in results) / num_ranks
        for result in results:
            result[f"experts.{name}"] = mean
    return results


def _check_ranks(rank: int, num_ranks: int) -> None:
    ranks = expert_ranks()
    reference, truth = _whole(num_ranks, torch.float32)[rank], _whole(num_ranks, torch.float64)[rank]
    local = NUM_EXPERTS // num_ranks
    for restore, num_chunks in product(RESTORES, (1, 3) if num_ranks == 2 else (3,)):
        layer = MoELayer(_gate(), local_part(_modules(), ranks), pipeline=_config(restore, num_chunks), ranks=ranks)
        actual = {}
        for name, value in _run(layer, rank).items():
            parts = name.split(".")
            if name.startswith("experts."):  # experts.experts.<local index>.
                parts[2] = str(int(parts[2]) + rank * local)
            actual[".".join(parts)] = value
        assert actual, restore
        mine = [{name: values[name] for name in actual} for values in (reference, truth)]
        assert_all_close(actual, *mine)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_equal_one_process(num_ranks: int) -> None:
    run_ranks(num_ranks, _check_ranks)


class _Seen(nn.Module):
    """sin(rows times a weight), which remembers the tensor that autograd keeps for the sine."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.hidden: list[Tensor] = []

    def forward(self, rows_RM: Tensor, counts: Sequence[int]) -> Tensor:
        hidden_RM = rows_RM @ self.weight
        self.hidden.append(hidden_RM)
        return hidden_RM.sin()


@pytest.mark.parametrize("restore", sorted(SAVED))
def test_saved_tensors_lie_on_the_host_but_for_rows_and_parameters(restore: str) -> None:
    """Rows come back in another buffer and the device's hidden values are gone, as after another layer's pass."""
    experts, rows_RM, grad_RM = _Seen(), torch.randn(5, WIDTH), torch.randn(5, WIDTH)
    leaf_RM = rows_RM.clone().requires_grad_()
    expected = torch.autograd.grad(experts(leaf_RM, (5,)), [leaf_RM, experts.weight], grad_RM)
    experts.hidden.clear()
    workspace = Workspace()
    chunks = ModuleChunks(experts, [experts.weight], strategy=strategy(restore), device=CPU)  # type: ignore[arg-type]
    rings = Rings(chunks.rings(5, backward=False), workspace=workspace, device=CPU)
    buffer_RM, out_RM = rows_RM.clone(), torch.empty(5, WIDTH)
    chunks.begin_forward(rings, [5], keep=True)
    chunks.up(0, buffer_RM, (5,))
    chunks.offload_hidden(0)
    chunks.down(0, (5,), out_RM=out_RM)
    buffer_RM.fill_(torch.nan)
    experts.hidden.pop().data.fill_(torch.nan)
    chunks.begin_backward(rings, chunks.kept(), [True])
    grad_rows_RM = torch.empty(5, WIDTH)
    chunks.fetch_hidden(0, (5,))
    chunks.dgrad(0, grad_RM, rows_RM.clone(), (5,), out_RM=grad_rows_RM)
    chunks.wgrad(0, grad_RM, rows_RM, (5,))
    (grad_weight,) = chunks.gradients()
    assert grad_weight is not None
    actual = {"rows": grad_rows_RM, "weight": grad_weight}
    wanted = {"rows": expected[0], "weight": expected[1]}
    assert_all_close(actual, wanted, wanted)


@pytest.mark.parametrize("restore", ["S3", "S4"])
def test_what_is_computed_again_keeps_no_graph_in_forward(restore: str) -> None:
    experts = _Seen()
    chunks = ModuleChunks(experts, [experts.weight], strategy=strategy(restore), device=CPU)  # type: ignore[arg-type]
    chunks.begin_forward(Rings(None, workspace=Workspace(), device=CPU), [5], keep=True)
    chunks.up(0, torch.randn(5, WIDTH), (5,))
    assert not experts.hidden[0].requires_grad


def test_modules_bring_their_own_memory() -> None:
    chunks = ModuleChunks(nn.Identity(), [], strategy=strategy("S1"), device=CPU)
    assert chunks.rings(100, backward=False) == chunks.rings(100, backward=True) == {}
    assert chunks.kept() == []


def test_experts_without_rows_have_gradients_of_zero() -> None:
    """Every rank then has the same ones, as those who average them expect."""
    for restore in RESTORES:
        layer = MoELayer(_gate(), _modules(), pipeline=_config(restore, 2))
        y, _ = layer(torch.randn(0, WIDTH))
        y.sum().backward()
        assert all(parameter.grad is not None for parameter in layer.experts.parameters())
        assert all((parameter.grad == 0).all() for parameter in layer.experts.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("restore", RESTORES)
def test_autocast_holds_when_something_is_computed_again(restore: str) -> None:
    """Backward runs outside autocast, as users call it; what is computed again must be what was computed."""

    def run(restore: str) -> dict[str, Tensor]:
        layer = MoELayer(_gate(), _modules(), pipeline=_config(restore, 2))
        x_TM, grad_TM = _tokens(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y_TM, _ = layer(x_TM.requires_grad_())
        (y_TM * grad_TM).sum().backward()
        grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
        return {"y": y_TM.detach(), "x": x_TM.grad, **grads}  # type: ignore[dict-item]

    kept = run("none")
    assert_all_close(run(restore), kept, kept)


def test_hooks_on_parameters_see_each_gradient_once() -> None:
    """A scaling or averaging hook must act on the whole gradient, not again on each chunk's part of it."""
    for restore in RESTORES:
        layer = MoELayer(_gate(), _modules(), pipeline=_config(restore, 3))
        plain = _run(layer)
        calls: list[str] = []
        handles = [
            parameter.register_hook(lambda grad, name=name, calls=calls: calls.append(name) or 2 * grad)
            for name, parameter in layer.experts.named_parameters()
        ]
        scaled = _run(layer)
        for handle in handles:
            handle.remove()
        names = [name for name, _ in layer.experts.named_parameters()]
        assert sorted(calls) == sorted(names), restore
        for name in names:
            plain[f"experts.{name}"] *= 2
        assert_all_close(scaled, plain, plain)
