"""The process that compiles kernels without a device: a request in JSON per line in, an answer per line out.

It is its own program because the compiler may crash or hang, and because kernels that are defined under
TRITON_INTERPRET, as tests do, can never be compiled. Its parent is `resources.py`; it imports nothing of this package.

Source: not in the paper, which measures on its devices.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

FIGURES = {
    "cuda": {"registers": r"Used (\d+) registers", "spilled_bytes": r"(\d+) bytes spill stores"},
    "hip": {"registers": r"\.vgpr_count:\s+(\d+)", "spilled_registers": r"\.vgpr_spill_count:\s+(\d+)"},
}
REGISTER_BYTES = 4


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Compile a kernel and read what it takes, or say why it cannot be compiled.

    Args:
        request: `path` and `name` of the kernel's source, `signature`, `constants`, `attributes` and `options` as
            Triton takes them, by argument, and `target` as its backend, architecture and threads in a warp.

    Returns:
        The fields of `Resources`; or `error`, which is the kernel's; or `unusable`, which is this installation's.
    """
    start = time.perf_counter()
    backend, architecture, _ = request["target"]
    with contextlib.redirect_stdout(io.StringIO()) as log:  # the assembler's report, which the parent asks for
        try:
            if backend == "cuda":
                get_ptxas(architecture)
        except RuntimeError as error:
            return {"unusable": f"{error}, the assembler that comes with Triton {triton.__version__}"}
        try:
            compiled = _compile(request)
        except Exception as error:  # whatever the compiler raises is the answer
            return {"error": f"{type(error).__name__}: {error}"}
    text = log.getvalue() if backend == "cuda" else compiled.asm["amdgcn"]
    found = {name: re.search(pattern, text) for name, pattern in FIGURES[backend].items()}
    missing = [name for name, match in found.items() if match is None]
    if missing:
        return {"unusable": f"Triton {triton.__version__} does not report {missing} for {backend}"}
    figures = {name: int(match.group(1)) for name, match in found.items() if match is not None}
    if "spilled_registers" in figures:
        figures["spilled_bytes"] = REGISTER_BYTES * figures.pop("spilled_registers")
    metadata = compiled.metadata
    seconds = time.perf_counter() - start
    return {"shared_bytes": metadata.shared, "num_warps": metadata.num_warps, "seconds": seconds, **figures}


def _compile(request: dict[str, Any]) -> Any:
    spec = importlib.util.spec_from_file_location(Path(request["path"]).stem, request["path"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, request["name"])
    attributes = {(function.arg_names.index(name),): values for name, values in request["attributes"].items()}
    source = ASTSource(function, request["signature"], request["constants"], attributes)
    return triton.compile(source, target=GPUTarget(*request["target"]), options=request["options"])


def main() -> None:
    """Say that it is ready, and answer requests until there are no more; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    answers.write(json.dumps({"triton": triton.__version__}) + "\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
