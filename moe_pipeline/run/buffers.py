"""Buffers: memory that chunks of a layer, and layers of a model, use one after the other.

A pass leases one block for all its rings and hands it back at its end, so a model's layers share one block as large as
the largest pass. Host memory is leased from forward until the backward that reads it.

Legend: R rows of a chunk, W width.
"""

import threading
import weakref
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from moe_pipeline.plan.rings import RingSize, aligned


class Lease:
    """A block of memory, handed back by `release` or, if nobody does, by its end.

    Source: not in the paper.
    """

    def __init__(self, workspace: "Workspace", kind: str, block: Tensor) -> None:
        self.block = block
        self._give_back = weakref.finalize(self, workspace.take_back, kind, block)

    def release(self) -> None:
        """Hand the block back; not in the paper."""
        self._give_back()

    def drop(self) -> None:
        """Never hand the block back: after an error somebody may still write into it; not in the paper."""
        self._give_back.detach()


class Workspace:
    """Blocks of device and host memory that passes lease, and the CUDA streams they run on; give one to all layers.

    Source: MPipeMoE (arXiv:2506.22175) section III-D; sharing between layers is our definition.
    """

    def __init__(self) -> None:
        self._free: dict[str, list[Tensor]] = {}
        self._streams: dict[torch.device, dict[str, torch.cuda.Stream]] = {}
        self._lock = threading.Lock()
        self._returned: deque[tuple[str, Tensor]] = deque()  # by garbage collection too, which may come at any time

    def __reduce__(self) -> tuple[type["Workspace"], tuple[()]]:
        return Workspace, ()  # a copied or saved model gets memory of its own

    def lease(self, num_bytes: int, device: torch.device, *, host: bool = False) -> Lease:
        """A block of at least this size: a free one that fits, or else a new one in place of the largest free one.

        Args:
            num_bytes: Size.
            device: Where the layer computes.
            host: Whether the block lies in host memory, pinned where the device is a GPU.

        Returns:
            The lease.

        Source: not in the paper.
        """
        kind = f"host of {device}" if host else str(device)
        with self._lock:
            self._collect()
            free = self._free.setdefault(kind, [])
            fitting = [block for block in free if block.numel() >= num_bytes]
            block = min(fitting, key=Tensor.numel, default=None)
            if block is None and free:
                _remove(free, max(free, key=Tensor.numel))
            if block is not None:
                _remove(free, block)
                return Lease(self, kind, block)
        where = torch.device("cpu") if host else device
        pinned = host and device.type == "cuda"
        return Lease(self, kind, torch.empty(num_bytes, dtype=torch.uint8, device=where, pin_memory=pinned))

    def take_back(self, kind: str, block: Tensor) -> None:
        """Put a block among the free ones; not in the paper."""
        self._returned.append((kind, block))

    def _collect(self) -> None:
        while self._returned:
            kind, block = self._returned.popleft()
            self._free.setdefault(kind, []).append(block)

    def free_bytes(self, device: torch.device, *, host: bool = False) -> int:
        """Bytes of blocks that nobody leases now.

        Args:
            device: Where the layers compute.
            host: Whether to count host memory.

        Source: not in the paper.
        """
        with self._lock:
            self._collect()
            return sum(block.numel() for block in self._free.get(f"host of {device}" if host else str(device), []))

    def streams(self, device: torch.device) -> dict[str, torch.cuda.Stream]:
        """The streams of messages and of copies on a GPU.

        Source: MPipeMoE (arXiv:2506.22175) section III-D.
        """
        with self._lock:
            if device not in self._streams:
                self._streams[device] = {name: torch.cuda.Stream(device) for name in ("comm", "copy")}
            return self._streams[device]


class Rings:
    """The rings of one pass.

    Args:
        sizes: Name -> size; None gives every chunk memory of its own (strategy none).
        workspace: Where the block is leased.
        device: Where the layer computes.

    Source: MPipeMoE (arXiv:2506.22175) section III-D and figure 6.
    """

    def __init__(self, sizes: Mapping[str, RingSize] | None, *, workspace: Workspace, device: torch.device) -> None:
        self._device, self._sizes = device, sizes
        self._offsets: dict[str, int] = {}
        self._streams = list(workspace.streams(device).values()) if device.type == "cuda" else []
        self._lease: Lease | None = None
        if sizes is not None:
            offset = 0
            for name, size in sizes.items():
                self._offsets[name] = offset
                offset += size.num_bytes
            self._lease = workspace.lease(offset, device)

    def buffer(self, name: str, chunk: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """The buffer of a chunk.

        Args:
            name: The ring.
            chunk: The chunk; with a ring of depth d it shares its buffer with chunk + d.
            rows: R, at most the ring's.
            width: W.
            dtype: Element type.

        Returns:
            (R, W), not initialised.

        Source: MPipeMoE (arXiv:2506.22175) section III-D.
        """
        if self._sizes is None or self._lease is None:
            fresh = torch.empty(rows, width, dtype=dtype, device=self._device)
            for stream in self._streams:
                fresh.record_stream(stream)
            return fresh
        size = self._sizes[name]
        start = self._offsets[name] + chunk % size.depth * size.buffer_bytes
        stop = start + rows * width * dtype.itemsize
        return self._lease.block[start:stop].view(dtype).view(rows, width)

    def free(self, tensor: Tensor) -> None:
        """Give back a chunk's own buffer at once, whoever still holds it: a finished message may for a while.

        Args:
            tensor: A buffer of `buffer`; in a ring it stays.

        Source: not in the paper.
        """
        if self._lease is None and self._device.type == "cpu":
            tensor.untyped_storage().resize_(0)

    def __enter__(self) -> "Rings":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.release()
        else:
            self.drop()

    def release(self) -> None:
        """Hand the memory back at the end of a pass; not in the paper."""
        if self._lease is not None:
            self._lease.release()

    def drop(self) -> None:
        """Let the memory go after an error: somebody may still write into it; not in the paper."""
        if self._lease is not None:
            self._lease.drop()


class HostCopies:
    """Host memory of one call, for what is copied off the device in forward and back in backward.

    Args:
        num_bytes: Room for all copies.
        workspace: Where the block is leased.
        device: Where the layer computes.

    Source: MPipeMoE (arXiv:2506.22175) section III-D, strategies S1 to S3.
    """

    def __init__(self, num_bytes: int, *, workspace: Workspace, device: torch.device) -> None:
        self._lease: Lease | None = workspace.lease(num_bytes, device, host=True)
        self._used_bytes = 0

    def release(self) -> None:
        """Hand the memory back after the backward that read it; not in the paper."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def check(self) -> None:
        """Refuse to be read after `release`.

        Raises:
            RuntimeError: If backward runs a second time.

        Source: not in the paper.
        """
        if self._lease is None:
            raise RuntimeError(
                "backward: runs a second time through a layer whose copies on the host were freed by the first; "
                "restore='none' or 'S4' keeps nothing there and can be run again"
            )

    def put(self, tensor: Tensor) -> Tensor:
        """Copy a contiguous tensor to the host, on the current stream.

        Args:
            tensor: What to copy.

        Returns:
            The copy.

        Source: MPipeMoE (arXiv:2506.22175) section III-D.
        """
        assert self._lease is not None, "copies are put in forward"
        start, self._used_bytes = self._used_bytes, self._used_bytes + aligned(tensor.nbytes)
        copy = self._lease.block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor, non_blocking=True)


def _remove(blocks: list[Tensor], block: Tensor) -> None:
    blocks[:] = [other for other in blocks if other is not block]
