"""Networks in OpenVINO: python -m ...workers.networks_vino <threads>."""

from collections.abc import Callable
from functools import partial

import numpy as np
import openvino as ov
import torch

from scripts.testbed.peer_processes.network import Network
from scripts.testbed.peer_processes.problem import Array
from scripts.testbed.peer_processes.serve import DeclinedError, Loaded, fastest, serve
from scripts.testbed.peer_processes.workers.networks import HiddenStates, built
from scripts.testbed.peer_processes.workers.vino import settings


def load(network: Network) -> Loaded:
    """The best of its ways.

    Args:
        network: What to run.
    """
    if network.backward:
        raise DeclinedError("inference alone")
    ways: dict[str, Callable[[], Loaded]] = {name: partial(_ready, network, name) for name in ("eager", "sdpa")}
    return fastest(ways)


def _ready(network: Network, attention: str) -> Loaded:
    ids = network.tokens()
    encoder = HiddenStates(built(network, attention=attention)).float().eval()
    model = ov.convert_model(encoder, example_input=torch.from_numpy(ids))
    model.reshape(ids.shape)
    precision = {"fp32": "f32", "bf16": "bf16"}[network.dtype]
    request = ov.Core().compile_model(model, "CPU", settings(precision)).create_infer_request()
    tensor = ov.Tensor(ids)
    request.set_input_tensor(0, tensor)

    def outputs() -> list[Array]:
        request.infer()
        return [np.array(request.get_output_tensor(0).data, np.float32)]

    return Loaded(run=lambda: (request.infer(), tensor), outputs=outputs)


if __name__ == "__main__":
    serve(load, lambda: {"openvino": ov.__version__})
