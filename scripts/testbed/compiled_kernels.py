"""What kernels take when they are compiled, kept in a run's folder: a run that was stopped goes on where it was."""

import dataclasses
import hashlib
import json
import threading
from pathlib import Path

from fusion.emit.triton import Kernel
from fusion.plan.chain import Chain
from fusion.plan.device import Device
from fusion.run.triton.resources import CompileError, Compilers, Resources


class CompiledKernels:
    """Compiles each kernel once for each architecture, for several threads."""

    def __init__(self, compilers: Compilers, path: Path) -> None:
        """Take up what an earlier run of the same folder found.

        Args:
            compilers: Started on demand.
            path: Of the file to keep findings in, a line of JSON each.
        """
        self._compilers, self._path, self._lock = compilers, path, threading.Lock()
        self._found: dict[str, Resources | str] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            record = _record(line)
            if record is not None:
                self._found.update([record])

    def find(self, kernel: Kernel, chain: Chain, device: Device) -> Resources | str:
        """What a kernel takes, or the reason why it does not compile.

        Args:
            kernel: As emitted.
            chain: That it computes.
            device: Of the kind cuda or hip.
        """
        key = _key(kernel, device)
        if key not in self._found:
            found: Resources | str
            try:
                found = self._compilers.resources(kernel, chain, device)
            except CompileError as error:
                found = str(error)
            line = json.dumps([key, found if isinstance(found, str) else dataclasses.asdict(found)])
            with self._lock, self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            self._found[key] = found
        return self._found[key]


def _key(kernel: Kernel, device: Device) -> str:
    parts = (kernel.source, kernel.num_warps, kernel.num_stages, device.kind, device.arch)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _record(line: str) -> tuple[str, Resources | str] | None:
    """A line of the file; None where a run was stopped in the middle of it."""
    try:
        key, found = json.loads(line)
        return key, found if isinstance(found, str) else Resources(**found)
    except (ValueError, TypeError):
        return None
