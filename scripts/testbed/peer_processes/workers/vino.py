"""OpenVINO's CPU plugin: python -m ...workers.vino <threads>."""

import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from scripts.testbed.peer_processes.problem import Array, Problem
from scripts.testbed.peer_processes.serve import DeclinedError, Loaded, fastest, serve

TYPES = {"fp32": ov.Type.f32, "bf16": ov.Type.bf16}
THREADS = int(sys.argv[1]) if len(sys.argv) > 1 else 1


def load(problem: Problem) -> Loaded:
    """The best of its ways.

    Args:
        problem: What to compute.
    """
    if problem.backward:
        raise DeclinedError("inference alone")
    ways: dict[str, Callable[..., ov.Node]] = {"products": _products}
    if problem.kind == "attention":
        ways = {"softmax": _softmax, "operator": _operator}
    return fastest({name: partial(_ready, problem, build) for name, build in ways.items()})


def _products(problem: Problem, A: ov.Node, B: ov.Node, D: ov.Node) -> ov.Node:
    return ops.matmul(ops.matmul(A, B, False, False), D, False, False)


def _softmax(problem: Problem, A: ov.Node, B: ov.Node, D: ov.Node) -> ov.Node:
    scores = ops.multiply(ops.matmul(A, B, False, True), _constant(problem, np.float32(problem.scale)))
    if problem.causal:
        scores = ops.add(scores, _constant(problem, np.triu(np.full((problem.M, problem.N), -np.inf, np.float32), 1)))
    return ops.matmul(ops.softmax(scores, -1), D, False, False)


def _operator(problem: Problem, A: ov.Node, B: ov.Node, D: ov.Node) -> ov.Node:
    zero, axis = _constant(problem, np.float32(0)), ops.constant(np.array([0], np.int64))
    four = [ops.unsqueeze(each, axis) for each in (A, B, D)]
    scale = _constant(problem, np.float32(problem.scale))
    return ops.squeeze(ops.scaled_dot_product_attention(*four, zero, scale, causal=problem.causal), axis)


def _constant(problem: Problem, value: Array | np.float32) -> ov.Node:
    constant = ops.constant(value)
    return constant if problem.dtype == "fp32" else ops.convert(constant, "bf16")


def _ready(problem: Problem, build: Callable[..., ov.Node]) -> Loaded:
    shapes, kind = problem.shapes(), TYPES[problem.dtype]
    parameters = [ops.parameter(shapes[name], kind, name=name) for name in "ABD"]
    precision = {"fp32": "f32", "bf16": "bf16"}[problem.dtype]
    model = ov.Model([build(problem, *parameters)], parameters)
    request = ov.Core().compile_model(model, "CPU", settings(precision)).create_infer_request()
    inputs = problem.inputs()
    tensors = [_tensor(inputs[name], problem) for name in "ABD"]
    for index, tensor in enumerate(tensors):
        request.set_input_tensor(index, tensor)

    def outputs() -> list[Array]:
        request.infer()
        return [_output(request, problem)]

    return Loaded(run=request.infer, outputs=outputs)


def settings(precision: str) -> dict[str, object]:
    """One request at a time on the threads that there are.

    Args:
        precision: f32 or bf16; by itself the plugin takes bf16 where it can.
    """
    return {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": THREADS,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }


def _tensor(x: Array, problem: Problem) -> ov.Tensor:
    if problem.dtype == "fp32":
        return ov.Tensor(x)
    bits = (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16)
    tensor = ov.Tensor(ov.Type.bf16, x.shape)
    tensor.data.view(np.uint16)[:] = bits
    return tensor


def _output(request: ov.InferRequest, problem: Problem) -> Array:
    data = request.get_output_tensor(0).data
    if problem.dtype == "fp32":
        return data
    return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


if __name__ == "__main__":
    capabilities = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    serve(load, lambda: {"openvino": ov.__version__, "openvino_isa": " ".join(capabilities)})
