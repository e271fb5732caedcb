"""Source text -> a kernel's function: Triton reads the source of what it compiles, so it has to lie in a file."""

import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from fusion.emit.triton import Kernel
from fusion.run.files import cache_root


def load(kernel: Kernel) -> Any:
    """The function of a kernel, as Triton made it when the kernel was first loaded in this process.

    With TRITON_INTERPRET=1 in the environment it is the interpreter's, without it the compiler's; a process may load
    both.

    Args:
        kernel: Its source is written to `kernels` in the cache folder, under a name with a hash of its content.

    Returns:
        The function, which takes a grid in brackets and then the kernel's arguments.

    Raises:
        OSError: The cache folder cannot be written; XDG_CACHE_HOME says where it is.

    Source: not in the paper, which loads PTX into TVM.
    """
    from triton import knobs

    digest = hashlib.sha256(kernel.source.encode()).hexdigest()[:32]
    mode = "interpreted" if knobs.runtime.interpret else "compiled"
    name = f"{kernel.name}_{digest}"
    qualified = f"fusion_kernels_{mode}.{name}"
    if qualified not in sys.modules:
        sys.modules[qualified] = _imported(qualified, _written(name, kernel.source))
    return getattr(sys.modules[qualified], kernel.name)


def kernel_folder() -> Path:
    """Where sources of kernels lie; not in the paper."""
    return cache_root() / "kernels"


def _written(name: str, source: str) -> Path:
    """A file that holds the source: written whole or not at all, whoever else writes the same."""
    path = kernel_folder() / f"{name}.py"
    if path.exists() and path.read_text(encoding="utf-8") == source:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False) as file:
        file.write(source)
    os.replace(file.name, path)
    return path


def _imported(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise OSError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
