"""What an emitted kernel takes of a device that need not be there: it is compiled ahead of time and read back.

Source: not in the paper, which measures on its devices; that a kernel has to fit is its shared-memory rule.
"""

import contextlib
import itertools
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fusion.emit.triton import Kernel
from fusion.plan.chain import Chain
from fusion.plan.device import Device
from fusion.run.triton.signature import signature

PROGRAM = Path(__file__).with_name("compiler.py")
REASON_LINES = 6


class CompileError(RuntimeError):
    """A kernel that cannot be compiled, with a few lines of the reason; not in the paper."""


class CompilerMissingError(RuntimeError):
    """No kernel can be compiled here: Triton or its assembler is missing or too old; not in the paper."""


@dataclass(frozen=True)
class Resources:
    """What the compiler gave a kernel.

    Source: not in the paper.
    """

    shared_bytes: int
    """Of a block."""
    registers: int
    """Of a thread, 32 bits each."""
    spilled_bytes: int
    """Written to memory by a thread for want of registers; scalar registers, which spill into others, do not count."""
    num_warps: int
    seconds: float
    """The compiler's time."""

    def fits(self, device: Device) -> bool:
        """Whether the device's shared memory has room for a block."""
        return self.shared_bytes <= device.shared_bytes_per_block


def resources(kernel: Kernel, chain: Chain, device: Device, *, timeout_s: float = 60.0) -> Resources:
    """Compile one kernel; for several take `Compilers`, which start processes once.

    Args:
        kernel: As emitted.
        chain: That it computes.
        device: Of the kind cuda or hip; it need not be there.
        timeout_s: Seconds after which compilation is given up.

    Returns:
        What it takes.

    Raises:
        ValueError: The device is none that kernels are compiled for.
        CompileError: It does not compile, or not in time.
        CompilerMissingError: Nothing compiles here.

    Source: not in the paper.
    """
    with Compiler(timeout_s=timeout_s) as compiler:
        return compiler.resources(kernel, chain, device)


class Compiler:
    """A process that compiles one kernel after the other; it is started again after a crash or a timeout.

    Source: not in the paper.
    """

    def __init__(self, *, timeout_s: float = 60.0) -> None:
        """Start nothing yet.

        Args:
            timeout_s: Seconds after which a kernel is given up.

        Raises:
            ValueError: The timeout is not positive.
        """
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s}: accepted is a positive number of seconds")
        self._timeout_s = timeout_s
        self._folder = Path(tempfile.mkdtemp(prefix="fusion_compiler_"))
        self._errors = self._folder / "errors"
        self._count = itertools.count()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def resources(self, kernel: Kernel, chain: Chain, device: Device) -> Resources:
        """What a kernel takes; arguments and errors are those of the function of this name."""
        path = self._folder / f"{kernel.name}_{next(self._count)}.py"  # a name that Python's caches have not seen
        path.write_text(kernel.source, encoding="utf-8")
        request = {
            "path": str(path),
            "name": kernel.name,
            "target": _target(device),
            "options": {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages},
            **signature(kernel, chain, device),
        }
        answer = self._ask(json.dumps(request))
        path.unlink()
        if "unusable" in answer:
            raise CompilerMissingError(f"{answer['unusable']}: install a triton that has it")
        if "error" in answer:
            raise CompileError(f"{kernel.name} for {device.name}: {_short(answer['error'] + self._complaints())}")
        return Resources(**answer)

    def _ask(self, request: str) -> dict[str, Any]:
        if self._process is None:
            self._process = self._started()
        process, late = self._process, threading.Event()
        assert process.stdin is not None
        assert process.stdout is not None

        def give_up() -> None:
            late.set()
            _kill(process)

        self._errors.write_text("", encoding="utf-8")
        timer = threading.Timer(self._timeout_s, give_up)
        timer.start()
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            return json.loads(line)
        self._stop()
        if late.is_set():
            return {"error": f"gave up after {self._timeout_s:g} s"}
        return {"error": f"the compiler died with status {process.returncode}"}

    def _started(self) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_ALWAYS_COMPILE": "1",
            "TRITON_DUMP_PTXAS_LOG": "1",
            "TRITON_CACHE_DIR": str(self._folder / "cache"),
        }
        with self._errors.open("a") as errors:
            process = subprocess.Popen(  # noqa: S603 - this Python and a file of this package
                [sys.executable, "-P", str(PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                encoding="utf-8",
                start_new_session=True,  # so that the assembler, its child, ends with it
            )
        assert process.stdout is not None
        if not process.stdout.readline():
            process.communicate()
            raise CompilerMissingError(f"the compiler does not start; install triton{_short(self._complaints())}")
        return process

    def _stop(self) -> None:
        if self._process is not None:
            _kill(self._process)
            self._process.communicate()
            self._process = None

    def _complaints(self) -> str:
        """What it wrote to stderr since the last request, on lines of its own."""
        text = self._errors.read_text(encoding="utf-8", errors="replace").strip()
        return f"\n{text}" if text else ""


class Compilers:
    """Several processes that compile side by side, for callers in several threads.

    Source: not in the paper.
    """

    def __init__(self, number: int = 2, *, timeout_s: float = 60.0) -> None:
        """Start nothing yet.

        Args:
            number: Kernels that are compiled at once.
            timeout_s: Seconds after which one of them is given up.

        Raises:
            ValueError: A number is not positive.
        """
        if number < 1:
            raise ValueError(f"number={number}: accepted is at least 1")
        self.number = number
        self._all = [Compiler(timeout_s=timeout_s) for _ in range(number)]
        self._idle: queue.SimpleQueue[Compiler] = queue.SimpleQueue()
        for compiler in self._all:
            self._idle.put(compiler)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for compiler in self._all:
            compiler.__exit__(*error)

    def resources(self, kernel: Kernel, chain: Chain, device: Device) -> Resources:
        """What a kernel takes, as soon as a process is idle; arguments and errors are those of the function."""
        compiler = self._idle.get()
        try:
            return compiler.resources(kernel, chain, device)
        finally:
            self._idle.put(compiler)


def _target(device: Device) -> tuple[str, int | str, int]:
    """Backend, architecture and threads in a warp, as Triton takes them."""
    if device.kind == "cpu":
        raise ValueError(f"device={device.name!r} is a cpu: kernels are compiled for the kinds cuda and hip")
    return device.kind, int(device.arch) if device.kind == "cuda" else device.arch, device.warp_size


def _short(text: str) -> str:
    """The first line and the last ones: compilers quote the source between a headline and the reason."""
    lines = text.strip().splitlines()
    return "\n".join(lines if len(lines) <= REASON_LINES else [lines[0], *lines[1 - REASON_LINES :]])


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
