"""Networks in ONNX Runtime, exported from torch: python -m ...workers.networks_onnx <threads>."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.transformers import optimizer

from scripts.testbed.peer_processes.network import Network
from scripts.testbed.peer_processes.problem import Array
from scripts.testbed.peer_processes.serve import DeclinedError, Loaded, fastest, serve
from scripts.testbed.peer_processes.workers.networks import HiddenStates, built
from scripts.testbed.peer_processes.workers.onnx_runtime import session_of


def load(network: Network) -> Loaded:
    """The best of its ways: as exported, and with the runtime's fusions for encoders.

    Args:
        network: What to run.
    """
    if network.backward:
        raise DeclinedError("inference alone")
    if network.dtype != "fp32":
        raise DeclinedError("its CPU provider has no products in bf16")
    ways: dict[str, Callable[[], Loaded]] = {
        f"{attention}{', fused' * fuse}": partial(_ready, network, attention, fuse)
        for attention in ("eager", "sdpa")
        for fuse in (False, True)
    }
    return fastest(ways)


def _ready(network: Network, attention: str, fuse: bool) -> Loaded:
    ids = network.tokens()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "network.onnx")
        encoder = HiddenStates(built(network, attention=attention)).eval()
        torch.onnx.export(
            encoder, (torch.from_numpy(ids),), path, input_names=["ids"], output_names=["hidden"], dynamo=True,
            external_data=True,
        )  # fmt: skip
        if fuse:
            fused = optimizer.optimize_model(
                path, model_type="bert", num_heads=network.num_heads, hidden_size=network.width, opt_level=1
            )
            fused.save_model_to_file(path, use_external_data_format=True)
        onnx.checker.check_model(path)
        session = session_of(path)
    values = {"ids": onnxruntime.OrtValue.ortvalue_from_numpy(ids)}
    hidden = np.empty((*ids.shape, network.width), np.float32)
    values["hidden"] = onnxruntime.OrtValue.ortvalue_from_numpy(hidden)
    binding = session.io_binding()
    binding.bind_ortvalue_input("ids", values["ids"])
    binding.bind_ortvalue_output("hidden", values["hidden"])

    def run() -> None:
        session.run_with_iobinding(binding)

    def outputs() -> list[Array]:
        run()
        return [values["hidden"].numpy()]

    return Loaded(run=run, outputs=outputs)


if __name__ == "__main__":
    serve(load, lambda: {"onnxruntime": onnxruntime.__version__})
