"""ONNX Runtime's CPU provider: python -m ...workers.onnx_runtime <threads>."""

import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import onnxruntime
from onnx import NodeProto, TensorProto, checker, helper

from scripts.testbed.peer_processes.problem import Problem
from scripts.testbed.peer_processes.serve import DeclinedError, Loaded, fastest, serve

OPSET = 23
THREADS = int(sys.argv[1]) if len(sys.argv) > 1 else 1
Nodes = tuple[list[NodeProto], list[TensorProto]]


def load(problem: Problem) -> Loaded:
    """The best of its ways.

    Args:
        problem: What to compute.
    """
    if problem.backward:
        raise DeclinedError("inference alone")
    if problem.dtype != "fp32":
        raise DeclinedError("its CPU provider has no products in bf16")
    ways: dict[str, Callable[[Problem], Nodes]] = {"products": _products}
    if problem.kind == "attention":
        ways = {"softmax": _softmax, "operator": _operator}
    return fastest({name: partial(_ready, problem, build) for name, build in ways.items()})


def _products(problem: Problem) -> Nodes:
    return [helper.make_node("MatMul", ["A", "B"], ["C"]), helper.make_node("MatMul", ["C", "D"], ["E"])], []


def _softmax(problem: Problem) -> Nodes:
    constants = [helper.make_tensor("scale", TensorProto.FLOAT, [], [problem.scale])]
    nodes = [
        helper.make_node("Transpose", ["B"], ["transposed"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["A", "transposed"], ["C"]),
        helper.make_node("Mul", ["C", "scale"], ["scores"]),
    ]
    if problem.causal:
        mask = np.triu(np.full((problem.M, problem.N), -np.inf, np.float32), 1)
        constants.append(helper.make_tensor("mask", TensorProto.FLOAT, mask.shape, mask.tobytes(), raw=True))
        nodes.append(helper.make_node("Add", ["scores", "mask"], ["masked"]))
    nodes.append(helper.make_node("Softmax", [nodes[-1].output[0]], ["P"], axis=-1))
    return [*nodes, helper.make_node("MatMul", ["P", "D"], ["E"])], constants


def _operator(problem: Problem) -> Nodes:
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [0])
    nodes = [helper.make_node("Unsqueeze", [name, "axis"], [f"{name}4"]) for name in "ABD"]
    settings = {"scale": problem.scale, "is_causal": int(problem.causal)}
    nodes.append(helper.make_node("Attention", ["A4", "B4", "D4"], ["E4"], **settings))
    return [*nodes, helper.make_node("Squeeze", ["E4", "axis"], ["E"])], [axis]


def _ready(problem: Problem, build: Callable[[Problem], Nodes]) -> Loaded:
    nodes, constants = build(problem)
    shapes = problem.shapes()
    ends = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in "ABDE"}
    graph = helper.make_graph(nodes, "problem", [ends[name] for name in "ABD"], [ends["E"]], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    checker.check_model(model)
    session = session_of(model.SerializeToString())
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in problem.inputs().items()}
    values["E"] = onnxruntime.OrtValue.ortvalue_from_numpy(np.empty(shapes["E"], np.float32))
    binding = session.io_binding()
    for name in "ABD":
        binding.bind_ortvalue_input(name, values[name])
    binding.bind_ortvalue_output("E", values["E"])

    def run() -> None:
        session.run_with_iobinding(binding)

    def outputs() -> list[np.ndarray]:
        run()
        return [values["E"].numpy()]

    return Loaded(run=run, outputs=outputs)


def session_of(model: str | bytes) -> onnxruntime.InferenceSession:
    """A session on the threads that there are, with every optimisation.

    Args:
        model: A file, or what would be in it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    serve(load, lambda: {"onnxruntime": onnxruntime.__version__})
