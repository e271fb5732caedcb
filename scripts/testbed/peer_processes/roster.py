"""The peers by name: which worker, in which environment, with what settings."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from scripts.testbed.peer_processes.environments import python_of


@dataclass(frozen=True, kw_only=True)
class Peer:
    """How a worker is started."""

    worker: str
    """Module of the workers."""
    arguments: tuple[str, ...] = ()
    library: str | None = None
    """Its virtual environment; None is ours."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that the library reads."""
    computes: bool = True
    """Whether it computes the problem; the peaks compute nothing."""

    def python(self) -> Path:
        """The interpreter; its environment is made if it is not there."""
        return Path(sys.executable) if self.library is None else python_of(self.library)


def searching(own: Peer, compiled: int | None) -> Peer:
    """One of our processes that compiles and measures so many candidates of each search.

    Args:
        own: Of OWN or OWN_NETWORKS.
        compiled: How many; None leaves it to the library.
    """
    return own if compiled is None else replace(own, arguments=(*own.arguments, str(compiled)))


def _torch(variant: str) -> Peer:
    return Peer(worker="pytorch", arguments=(variant,))


OWN: dict[str, Peer] = {
    "fusion": Peer(worker="own", arguments=("fused",)),
    "fusion_unfused": Peer(worker="own", arguments=("unfused",)),
}
PEERS: dict[str, Peer] = {
    "torch_eager": _torch("eager"),
    "torch_out": _torch("out"),
    "torch_compile": _torch("compile"),
    "torch_sdpa": _torch("sdpa"),
    "openblas": Peer(worker="openblas"),
    "openblas_skylakex": Peer(worker="openblas", environment={"OPENBLAS_CORETYPE": "SkylakeX"}),
    "zentorch": Peer(worker="zen", library="zentorch"),
    "openvino": Peer(worker="vino", library="openvino"),
    "onnxruntime": Peer(worker="onnx_runtime", library="onnxruntime"),
    "jax": Peer(worker="xla", library="jax"),
}
OWN_NETWORKS: dict[str, Peer] = {
    "fusion": Peer(worker="networks", arguments=("fusion",)),
}
NETWORK_PEERS: dict[str, Peer] = {
    "torch_eager": Peer(worker="networks", arguments=("eager",)),
    "torch_compile": Peer(worker="networks", arguments=("compile",)),
    "zentorch": Peer(worker="networks", arguments=("zentorch",), library="zentorch"),
    "openvino": Peer(worker="networks_vino", library="openvino"),
    "onnxruntime": Peer(worker="networks_onnx", library="onnxruntime"),
}
PEAKS: dict[str, Peer] = {
    f"peak_{kind}": Peer(worker="peak", arguments=(kind,), computes=False) for kind in ("fp32", "bf16", "amx")
}
