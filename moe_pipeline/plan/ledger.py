"""Ledger: the bytes of every tensor of a call, on the device and on the host, before anything runs.

The device's peak is found by walking the schedule: every operation takes and gives back what the runtime takes and
gives back there. What is counted is what the layer adds: not its input, its parameters and the gradient it is given.

Legend: T tokens, K rows per token, S rows sent, R rows of a chunk received, M model width, G width of T_M.
"""

import functools
from dataclasses import dataclass

from moe_pipeline.config import PipelineConfig, Split
from moe_pipeline.plan.call import CallPlan, plan_call
from moe_pipeline.plan.partition import Partition, partition
from moe_pipeline.plan.rings import HiddenShape, RingSize, aligned, hidden_rings, row_rings, total_bytes
from moe_pipeline.plan.schedule import Op

INDEX_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Sizes of a layer on one rank.

    Source: MPipeMoE (arXiv:2506.22175) Table I.
    """

    tokens: int
    """T, the paper's B."""
    top_k: int
    d_model: int
    """M."""
    hidden: HiddenShape
    num_experts: int
    """Experts over all ranks, the paper's E."""
    num_ranks: int = 1
    """The paper's N."""
    element_bytes: int = 4
    """Bytes of an element of rows and experts."""
    weight_bytes: int = 4
    """Bytes of a row's weight."""
    bias: bool = False

    @property
    def parameter_bytes(self) -> int:
        """Bytes of this rank's experts.

        Source: MPipeMoE (arXiv:2506.22175) equation 1.
        """
        matrices = self.d_model * (self.hidden.width + self.hidden.d_hidden)
        biases = (self.hidden.width + self.d_model) * self.bias
        return self.num_experts // self.num_ranks * (matrices + biases) * self.element_bytes


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    Source: not in the paper.
    """

    name: str
    place: str
    """device or host."""
    lives: str
    """In which pass, or from forward to backward, or always (shared by all layers)."""
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Bytes of one call.

    Source: MPipeMoE (arXiv:2506.22175) equations 2-6, refined to what this runtime allocates.
    """

    entries: tuple[Entry, ...]
    pool_bytes: int
    """The block of shared buffers: one for all layers."""
    kept_bytes: int
    """Device memory of this layer from forward to backward, y included."""
    host_bytes: int
    """Host memory of this layer from forward to backward."""
    forward_peak_bytes: int
    backward_peak_bytes: int
    """Both with the shared block and the parameters' gradients."""
    gradient_bytes: int
    """The parameters' gradients: states, in the paper's terms, not activations or buffers."""

    @property
    def peak_bytes(self) -> int:
        """Most device memory at any time of a step; not in the paper."""
        return max(self.forward_peak_bytes, self.backward_peak_bytes)

    @property
    def activation_bytes(self) -> int:
        """The peak without the parameters' gradients: activations and buffers.

        Source: MPipeMoE (arXiv:2506.22175) section II-B.
        """
        return max(self.forward_peak_bytes, self.backward_peak_bytes - self.gradient_bytes)

    def __str__(self) -> str:
        lines = [f"{entry.num_bytes:>14,}  {entry.place:6} {entry.lives:20} {entry.name}" for entry in self.entries]
        totals = {"shared block": self.pool_bytes, "kept": self.kept_bytes, "host": self.host_bytes,
                  "peak in forward": self.forward_peak_bytes, "peak in backward": self.backward_peak_bytes}  # fmt: skip
        return "\n".join([*lines, *(f"{num_bytes:>14,}  {name}" for name, num_bytes in totals.items())])


def balanced_partition(shape: LayerShape, config: PipelineConfig) -> Partition:
    """The partition of a layer whose experts all get equally many rows (up to one).

    Args:
        shape: The layer.
        config: How it is cut.

    Returns:
        The partition on rank 0.

    Source: MPipeMoE (arXiv:2506.22175) section II-B, whose formulas assume it.
    """
    return _balanced(shape, config.fixed_chunks, config.split)


@functools.lru_cache(maxsize=8)  # strategies share it, and that of thousands of ranks takes its time
def _balanced(shape: LayerShape, num_chunks: int, split: Split) -> Partition:
    rows, local = shape.tokens * shape.top_k, shape.num_experts // shape.num_ranks
    counts = [(rows * (e + 1)) // shape.num_experts - (rows * e) // shape.num_experts for e in range(shape.num_experts)]
    sent = tuple(tuple(counts[rank * local : (rank + 1) * local]) for rank in range(shape.num_ranks))
    return partition(sent, (sent[0],) * shape.num_ranks, num_chunks=num_chunks, split=split)


def ledger(shape: LayerShape, config: PipelineConfig, cut: Partition | None = None) -> Ledger:
    """Account for a call of a layer of feed-forward experts.

    Args:
        shape: The layer.
        config: Chunks and strategy.
        cut: Rows of every chunk, where they are known; None takes equal shares.

    Returns:
        The ledger; exact for the rows it is given.

    Source: MPipeMoE (arXiv:2506.22175) equations 2-6 and Table II.
    """
    plan = plan_call("ledger", config, cut or balanced_partition(shape, config))
    forward_pool, backward_pool = (_pool(plan, shape, backward=backward) for backward in (False, True))
    pool_bytes = max(total_bytes(forward_pool), total_bytes(backward_pool))
    sizes = _Sizes(plan, shape)
    host = _host_entries(plan, sizes)
    forward = _Walk(plan, sizes, backward=False)
    backward = _Walk(plan, sizes, backward=True)
    kept = _kept_entries(plan, sizes)
    rings = backward_pool if total_bytes(backward_pool) == pool_bytes else forward_pool
    pool = [
        Entry(f"ring of {size.depth} {name}", "device", "always (shared)", size.num_bytes)
        for name, size in rings.items()
    ]
    whole = [Entry(name, "device", "backward", size) for name, size in sizes.whole_in_backward().items()]
    return Ledger(
        entries=(*pool, *kept, *whole, *host),
        pool_bytes=pool_bytes,
        kept_bytes=sum(entry.num_bytes for entry in kept),
        host_bytes=sum(entry.num_bytes for entry in host),
        forward_peak_bytes=pool_bytes + forward.peak_bytes,
        backward_peak_bytes=pool_bytes + backward.peak_bytes,
        gradient_bytes=shape.parameter_bytes,
    )


class _Sizes:
    """Bytes of each tensor."""

    def __init__(self, plan: CallPlan, shape: LayerShape) -> None:
        self.plan, self.shape, self.cut = plan, shape, plan.partition
        self.chunks = range(plan.partition.num_chunks)
        self.row_bytes = shape.d_model * shape.element_bytes
        self.sent = [sum(self.cut.sent_rows(chunk)) for chunk in self.chunks]
        self.received = [sum(self.cut.received_rows(chunk)) for chunk in self.chunks]
        self.padding_rows = int(sum(self.sent) != shape.tokens * shape.top_k)

    def hidden(self, chunk: int) -> int:
        return self.received[chunk] * self.shape.hidden.width * self.shape.element_bytes

    def activation(self, chunk: int) -> int:
        """What the activation writes beside T_M; nothing where it writes in place."""
        hidden = self.shape.hidden
        return 0 if hidden.in_place else self.received[chunk] * hidden.d_hidden * self.shape.element_bytes

    @property
    def output(self) -> int:
        """T_O, or the gradient of T_I."""
        return (sum(self.sent) + self.padding_rows) * self.row_bytes

    @property
    def tokens(self) -> int:
        return self.shape.tokens * self.row_bytes

    @property
    def routing(self) -> int:
        """Indices and weights that live from forward to backward."""
        indices = sum(self.sent) + self.shape.tokens * self.shape.top_k
        if self.plan.sorts:
            indices += 2 * sum(self.received)
        return indices * INDEX_BYTES + sum(self.sent) * self.shape.weight_bytes

    def whole_in_backward(self) -> dict[str, int]:
        return {
            "gradient of T_I": self.output,
            "gradient of x": self.tokens,
            "gradients of parameters": self.shape.parameter_bytes,
            "gradients of row weights": sum(self.sent) * self.shape.weight_bytes,
        }


class _Walk:
    """Takes and gives back memory as a pass does, and remembers the most."""

    def __init__(self, plan: CallPlan, sizes: _Sizes, *, backward: bool) -> None:
        self._plan, self._sizes = plan, sizes
        self._live: dict[tuple[str, int], int] = {}
        self._travelling: dict[int, tuple[str, int]] = {}
        self._now_bytes = self.peak_bytes = 0
        if backward:
            kept = sum(entry.num_bytes for entry in _kept_entries(plan, sizes))
            whole = sizes.whole_in_backward()
            self._take("whole", 0, kept + sum(whole.values()) - whole["gradient of x"])
        else:
            self._take("whole", 0, sizes.output + sizes.routing)
        stage = self._backward_stage if backward else self._forward_stage
        schedule = plan.backward if backward else plan.forward
        for position, op in enumerate(schedule.ops):
            for wait in op.waits:
                self._give(*self._travelling.pop(wait, ("", 0)))
            stage(position, op)

    def _forward_stage(self, position: int, op: Op) -> None:
        plan, sizes, chunk = self._plan, self._sizes, op.chunk
        if op.stage == "sum":
            self._take("y", 0, sizes.tokens)
            self._passing(sizes.tokens if sizes.shape.top_k > 1 else 0)
        elif not plan.strategy.shares_buffers:
            if op.stage == "up":
                self._sort(chunk)
                self._take("hidden", chunk, sizes.hidden(chunk))
            elif op.stage == "down":
                self._take("activated", chunk, sizes.activation(chunk))
                self._take("product", chunk, sizes.activation(chunk) if sizes.shape.hidden.gated else 0)
                self._result(chunk)
                self._give("product", chunk)
            else:
                self._travel(
                    position, op, {"gather": "gather", "dispatch": "send", "combine": "back"}.get(op.stage, "")
                )

    def _backward_stage(self, position: int, op: Op) -> None:
        plan, sizes, chunk, hidden = self._plan, self._sizes, op.chunk, self._sizes.shape.hidden
        if op.stage == "sum_grad":
            self._take("gradient of x", 0, sizes.tokens)
            self._passing(sizes.tokens if sizes.shape.top_k > 1 else 0)
            return
        shared = plan.strategy.shares_buffers
        if not shared:
            self._travel(
                position,
                op,
                {"gather_grad": "gather", "dispatch_grad": "send", "combine_grad": "back"}.get(op.stage, ""),
            )
        if op.stage == "gather_grad":
            self._passing(
                sizes.sent[chunk] * sizes.shape.d_model * max(sizes.shape.element_bytes, sizes.shape.weight_bytes)
            )
        elif op.stage == "dgrad" and not shared:
            self._sort(chunk)
            self._take("grad_hidden", chunk, sizes.hidden(chunk))
            if hidden.gated:
                self._take("grad_activated", chunk, sizes.activation(chunk))
                self._give("grad_activated", chunk)
            self._result(chunk)
        elif op.stage == "wgrad" and not shared:
            if hidden.gated:
                self._take("product", chunk, sizes.activation(chunk))
            for name in ("product", "grad_hidden", "arrived", "sorted"):
                self._give(name, chunk)

    def _travel(self, position: int, op: Op, move: str) -> None:
        """Rows without shared buffers: gathered, sent to the experts, sent back."""
        chunk, row_bytes = op.chunk, self._sizes.row_bytes
        if move == "gather":
            rows = "staging" if self._plan.exchanges else "arrived"
            self._take(rows, chunk, self._sizes.sent[chunk] * row_bytes)
        elif move == "send":
            self._take("arrived", chunk, self._sizes.received[chunk] * row_bytes)
            self._travelling[position] = ("staging", chunk)
        elif move == "back":
            self._travelling[position] = ("result", chunk)

    def _sort(self, chunk: int) -> None:
        if self._plan.sorts:
            self._take("sorted", chunk, self._sizes.received[chunk] * self._sizes.row_bytes)
            self._give("arrived", chunk)

    def _result(self, chunk: int) -> None:
        num_bytes = self._sizes.received[chunk] * self._sizes.row_bytes
        if self._plan.exchanges:
            self._take("result", chunk, num_bytes)
        if self._plan.sorts:
            self._passing(num_bytes)

    def _take(self, name: str, chunk: int, num_bytes: int) -> None:
        self._live[name, chunk] = num_bytes
        self._now_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self._now_bytes)

    def _give(self, name: str, chunk: int) -> None:
        self._now_bytes -= self._live.pop((name, chunk), 0)

    def _passing(self, num_bytes: int) -> None:
        self.peak_bytes = max(self.peak_bytes, self._now_bytes + num_bytes)


def _pool(plan: CallPlan, shape: LayerShape, *, backward: bool) -> dict[str, RingSize]:
    if not plan.strategy.shares_buffers:
        return {}
    resends = plan.strategy.dispatched == "resend"
    size = shape.element_bytes
    rows = row_rings(
        plan.partition, plan.depths, width=shape.d_model, element_bytes=size, backward=backward, resends=resends
    )
    received = plan.partition.max_received_rows
    return {**rows, **hidden_rings(received, plan.depths, shape.hidden, element_bytes=size, backward=backward)}


def _kept_entries(plan: CallPlan, sizes: _Sizes) -> list[Entry]:
    kept = {"T_O": sizes.output, "indices and weights of rows": sizes.routing, "y": sizes.tokens}
    if plan.strategy.dispatched == "keep":
        kept["T_DI"] = sum(sizes.received) * sizes.row_bytes
    if plan.strategy.hidden == "keep":
        kept["T_M"] = sum(sizes.hidden(chunk) for chunk in sizes.chunks)
        kept["activation of T_M"] = sum(sizes.activation(chunk) for chunk in sizes.chunks)
    return [Entry(name, "device", "forward to backward", num_bytes) for name, num_bytes in kept.items() if num_bytes]


def _host_entries(plan: CallPlan, sizes: _Sizes) -> list[Entry]:
    host = {}
    if plan.strategy.dispatched == "offload":
        host["T_DI"] = sum(aligned(rows * sizes.row_bytes) for rows in sizes.received)
    if plan.strategy.hidden == "offload":
        host["T_M"] = sum(aligned(sizes.hidden(chunk)) for chunk in sizes.chunks)
    return [Entry(name, "host", "forward to backward", num_bytes) for name, num_bytes in host.items()]
