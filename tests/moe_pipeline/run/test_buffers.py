"""Blocks are leased, shared and handed back; what nobody hands back comes back with the garbage."""

import copy
import gc
import io
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from closeness import assert_all_close
from torch import Tensor, nn

from moe_pipeline import FeedForwardExperts, Gate, GateConfig, ModuleExperts, MoELayer, PipelineConfig
from moe_pipeline.plan.rings import ALIGNMENT_BYTES, RingSize
from moe_pipeline.run.buffers import HostCopies, Rings, Workspace

CPU = torch.device("cpu")
WIDTH = 6
RESTORES = ("none", "S1", "S2", "S3", "S4")
ON_HOST = ("S1", "S2", "S3")


def _layer(restore: str, workspace: Workspace | None = None, *, hidden: int = 10) -> MoELayer:
    torch.manual_seed(1)
    gate, experts = Gate(GateConfig(num_experts=4), WIDTH), FeedForwardExperts(4, WIDTH, hidden)
    config = PipelineConfig(num_chunks=3, restore=restore)  # type: ignore[arg-type]
    return MoELayer(gate, experts, pipeline=config, workspace=workspace)


def _modules(restore: str) -> MoELayer:
    torch.manual_seed(1)
    experts = ModuleExperts([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)])
    config = PipelineConfig(num_chunks=3, restore=restore)  # type: ignore[arg-type]
    return MoELayer(Gate(GateConfig(num_experts=4), WIDTH), experts, pipeline=config)


def test_a_released_block_is_leased_again() -> None:
    workspace = Workspace()
    first = workspace.lease(100, CPU)
    pointer = first.block.data_ptr()
    first.release()
    assert workspace.free_bytes(CPU) == 100
    second = workspace.lease(60, CPU)
    assert second.block.data_ptr() == pointer
    assert workspace.free_bytes(CPU) == 0


def test_blocks_under_lease_are_different_and_nest() -> None:
    workspace = Workspace()
    outer = workspace.lease(64, CPU)
    inner = workspace.lease(64, CPU)
    outer.block.fill_(1)
    inner.block.fill_(2)
    assert (outer.block == 1).all()
    inner.release()
    outer.release()
    assert workspace.free_bytes(CPU) == 128


def test_the_smallest_block_that_fits_is_taken() -> None:
    workspace = Workspace()
    leases = [workspace.lease(size, CPU) for size in (300, 100, 200)]
    for lease in leases:
        lease.release()
    assert workspace.lease(150, CPU).block.numel() == 200


def test_a_larger_block_replaces_the_largest_free_one() -> None:
    workspace = Workspace()
    for size in (100, 300, 200):
        workspace.lease(size, CPU).release()
    assert workspace.free_bytes(CPU) == 300  # each took the place of the one before; 200 fitted
    grown = workspace.lease(400, CPU)
    assert workspace.free_bytes(CPU) == 0
    grown.release()
    assert workspace.free_bytes(CPU) == 400


def test_host_memory_is_kept_apart() -> None:
    workspace = Workspace()
    workspace.lease(100, CPU).release()
    workspace.lease(70, CPU, host=True).release()
    assert (workspace.free_bytes(CPU), workspace.free_bytes(CPU, host=True)) == (100, 70)


def test_a_dropped_block_never_comes_back() -> None:
    workspace = Workspace()
    lease = workspace.lease(100, CPU)
    lease.drop()
    del lease
    gc.collect()
    assert workspace.free_bytes(CPU) == 0


def test_a_forgotten_lease_comes_back_with_the_garbage_and_a_released_one_only_once() -> None:
    workspace = Workspace()
    lease = workspace.lease(100, CPU)
    lease.release()
    lease.release()
    assert workspace.free_bytes(CPU) == 100
    lease = workspace.lease(100, CPU)
    assert workspace.free_bytes(CPU) == 0
    del lease
    assert workspace.free_bytes(CPU) == 100


def test_garbage_collected_in_the_middle_of_a_lease_blocks_nobody() -> None:
    """A lease inside a cycle ends whenever Python collects, be it while the same thread asks for another one."""
    script = """
import gc, torch
from moe_pipeline.run.buffers import Workspace
workspace, cpu = Workspace(), torch.device("cpu")
gc.disable()
for allocations in range(1, 60):  # the collection falls on one step of `lease` after the other
    gc.collect()
    cycle = [workspace.lease(64, cpu)]
    cycle.append(cycle)
    workspace.lease(64, cpu).release()
    del cycle
    gc.set_threshold(allocations)
    gc.enable()
    held = [workspace.lease(8, cpu) for _ in range(4)]
    gc.disable()
print("done")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout == "done\n"


def test_copies_and_saved_models_get_memory_of_their_own() -> None:
    workspace = Workspace()
    workspace.lease(100, CPU).release()
    assert copy.deepcopy(workspace).free_bytes(CPU) == 0
    layer = _layer("S1", workspace)
    layer(torch.randn(9, WIDTH))[0].sum().backward()
    other = copy.deepcopy(layer)
    assert other.workspace is not workspace
    assert other.workspace.free_bytes(CPU) == 0
    x_TM = torch.randn(9, WIDTH)
    assert torch.equal(other(x_TM)[0], layer(x_TM)[0])
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x_TM)[0], layer(x_TM)[0])


def test_copied_layers_that_shared_a_workspace_share_one_again() -> None:
    workspace = Workspace()
    model = copy.deepcopy(nn.ModuleList([_layer("S1", workspace), _layer("S1", workspace)]))
    assert model[0].workspace is model[1].workspace
    assert model[0].workspace is not workspace


def test_buffers_of_a_ring_are_apart_and_come_round_again() -> None:
    workspace = Workspace()
    sizes = {"a": RingSize(2, 5, 3, 4), "b": RingSize(1, 5, 7, 2)}
    rings = Rings(sizes, workspace=workspace, device=CPU)
    buffers = [rings.buffer("a", chunk, 5, 3, torch.float32) for chunk in range(3)]
    other = rings.buffer("b", 0, 5, 7, torch.bfloat16)
    for value, buffer in enumerate((*buffers[:2], other)):
        buffer.fill_(value)
    assert [buffer.unique().tolist() for buffer in (*buffers[:2], other)] == [[0], [1], [2]]
    assert buffers[2].data_ptr() == buffers[0].data_ptr()
    small = rings.buffer("a", 4, 2, 3, torch.float32)
    assert (small.shape, small.data_ptr()) == ((2, 3), buffers[0].data_ptr())
    assert all(buffer.data_ptr() % ALIGNMENT_BYTES == buffers[0].data_ptr() % ALIGNMENT_BYTES for buffer in buffers)
    rings.release()
    assert workspace.free_bytes(CPU) == sum(size.num_bytes for size in sizes.values())


def test_without_sharing_every_buffer_is_new() -> None:
    workspace = Workspace()
    rings = Rings(None, workspace=workspace, device=CPU)
    first, second = (rings.buffer("a", 0, 5, 3, torch.float32) for _ in "ab")
    assert first.data_ptr() != second.data_ptr()
    rings.release()
    rings.drop()
    assert workspace.free_bytes(CPU) == 0


def test_host_copies_hold_what_was_put() -> None:
    workspace = Workspace()
    tensors = [torch.randn(3, 5), torch.randn(0, 5), torch.randn(4, 2).bfloat16()]
    copies = HostCopies(
        sum(RingSize(1, *t.shape, t.element_size()).num_bytes for t in tensors), workspace=workspace, device=CPU
    )
    held = [copies.put(tensor) for tensor in tensors]
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, held, strict=True))
    copies.check()
    copies.release()
    copies.release()
    assert workspace.free_bytes(CPU, host=True) == 2 * ALIGNMENT_BYTES
    with pytest.raises(RuntimeError, match="backward: runs a second time"):
        copies.check()


def test_layers_with_one_workspace_hold_one_block() -> None:
    workspace = Workspace()
    x_TM, alone = torch.randn(20, WIDTH), _layer("S4")
    sum(_layer("S4", workspace)(x_TM)[0] for _ in range(3)).sum().backward()
    alone(x_TM)[0].sum().backward()
    assert workspace.free_bytes(CPU) == alone.workspace.free_bytes(CPU) > 0


def test_a_larger_layer_makes_the_block_grow_and_a_smaller_one_fits_in() -> None:
    workspace = Workspace()
    small, large = _layer("S4", workspace), _layer("S4", workspace, hidden=40)
    x_TM, sizes = torch.randn(20, WIDTH), []
    for layer in (small, large, small):
        layer(x_TM)[0].sum().backward()
        sizes.append(workspace.free_bytes(CPU))
    assert sizes[0] < sizes[1] == sizes[2]


@pytest.mark.parametrize("restore", ON_HOST)
def test_host_copies_live_from_forward_to_backward(restore: str) -> None:
    layer = _layer(restore)
    free = lambda: layer.workspace.free_bytes(CPU, host=True)  # noqa: E731
    y, _ = layer(torch.randn(20, WIDTH))
    assert free() == 0
    y.sum().backward()
    held = free()
    assert held > 0
    first, second = (layer(torch.randn(20, WIDTH))[0] for _ in "ab")
    assert free() == 0
    second.sum().backward()
    assert free() > 0
    first.sum().backward()
    assert free() > held  # two forwards were under way, so there are two blocks


@pytest.mark.parametrize("restore", ON_HOST)
def test_host_copies_come_back_where_backward_never_runs(restore: str) -> None:
    layer = _layer(restore)
    y, record = layer(torch.randn(20, WIDTH))
    del y, record
    gc.collect()
    assert layer.workspace.free_bytes(CPU, host=True) > 0


@pytest.mark.parametrize("restore", ["none", "S4"])
def test_strategies_without_offload_take_no_host_memory(restore: str) -> None:
    layer = _layer(restore)
    layer(torch.randn(20, WIDTH))[0].sum().backward()
    assert layer.workspace.free_bytes(CPU, host=True) == 0


def _gradients(layer: MoELayer) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}  # type: ignore[union-attr]


@pytest.mark.parametrize("restore", ON_HOST)
@pytest.mark.parametrize("make", [_layer, _modules])
def test_a_second_backward_is_refused_where_copies_are_gone(make: Callable[[str], MoELayer], restore: str) -> None:
    layer = make(restore)
    y, _ = layer(torch.randn(20, WIDTH))
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward: runs a second time"):
        y.sum().backward()


@pytest.mark.parametrize(("make", "restore"), [(_layer, "none"), (_layer, "S4"), (_modules, "S4")])
def test_a_second_backward_gives_the_same_where_nothing_was_copied(
    make: Callable[[str], MoELayer], restore: str
) -> None:
    layer = make(restore)
    y, _ = layer(torch.randn(20, WIDTH))
    y.square().sum().backward(retain_graph=True)
    first = _gradients(layer)
    layer.zero_grad()
    y.square().sum().backward()
    assert_all_close(_gradients(layer), first, first)


def test_a_second_backward_through_modules_that_were_kept_is_refused() -> None:
    """Their graphs are gone after the first, as those of any module are; the error says so."""
    layer = _modules("none")
    y, _ = layer(torch.randn(20, WIDTH))
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_passes_that_are_under_way_together_do_not_share() -> None:
    """An expert that runs the same layer again, on a workspace that its pass has leased from."""
    workspace = Workspace()
    inner = _layer("S4", workspace)

    class Nested(nn.Module):
        def forward(self, rows_RM: Tensor) -> Tensor:
            return inner(rows_RM)[0] + rows_RM

    torch.manual_seed(1)
    gate = Gate(GateConfig(num_experts=2), WIDTH)
    outer = MoELayer(
        gate, ModuleExperts([Nested(), Nested()]), pipeline=PipelineConfig(num_chunks=3, restore="S4"),
        workspace=workspace,
    )  # fmt: skip
    x_TM = torch.randn(20, WIDTH)

    def run(separate: bool) -> dict[str, Tensor]:
        outer.workspace = Workspace() if separate else workspace
        outer.zero_grad()
        leaf_TM = x_TM.clone().requires_grad_()
        y_TM, _ = outer(leaf_TM)
        y_TM.square().sum().backward()
        return {"y": y_TM.detach(), "x": leaf_TM.grad, **_gradients(outer)}  # type: ignore[dict-item]

    apart = run(True)
    assert_all_close(run(False), apart, apart)


@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_dropped_after_an_error(backward: bool) -> None:
    """Somebody may still write into it; the next pass gets a block that nobody knows."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, rows_RM: Tensor) -> Tensor:
            if not backward:
                raise ValueError("inside")
            return rows_RM.clone()

        @staticmethod
        def backward(ctx: object, grad_RM: Tensor) -> Tensor:
            raise ValueError("inside")

    class Expert(nn.Module):
        def forward(self, rows_RM: Tensor) -> Tensor:
            return Fails.apply(rows_RM)

    gate = Gate(GateConfig(num_experts=2), WIDTH)
    layer = MoELayer(gate, ModuleExperts([Expert(), Expert()]), pipeline=PipelineConfig(num_chunks=2, restore="S4"))
    x_TM = torch.randn(20, WIDTH)
    with pytest.raises(ValueError, match="inside"):
        layer(x_TM)[0].sum().backward()
    gc.collect()
    assert layer.workspace.free_bytes(CPU) == 0  # a block from forward was replaced by backward's, which is larger
    with torch.no_grad():
        layer.experts = ModuleExperts([nn.Identity(), nn.Identity()])
        assert_all_close({"y": layer(x_TM)[0]}, {"y": x_TM}, {"y": x_TM})


@pytest.mark.parametrize("restore", RESTORES)
def test_outputs_and_gradients_outlive_the_memory_they_were_made_in(restore: str) -> None:
    layer, x_TM = _layer(restore), torch.randn(20, WIDTH, requires_grad=True)
    y_TM, _ = layer(x_TM)
    y_TM.square().sum().backward()
    before = {"y": y_TM.detach().clone(), "x": x_TM.grad.clone(), **_gradients(layer)}  # type: ignore[union-attr]
    for _ in range(2):
        layer.workspace.lease(layer.workspace.free_bytes(CPU), CPU).block.fill_(255)
    after = {"y": y_TM.detach(), "x": x_TM.grad, **_gradients(layer)}
    assert all(torch.equal(before[name], after[name]) for name in before)  # type: ignore[arg-type]
