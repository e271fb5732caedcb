"""Source text of C++ -> a library in the cache folder, compiled once and loaded by any number of processes.

A library's name is the hash of all that it is made of: source, headers, flags, compiler. It is written whole, under a
name of its own first, so nothing is locked; beside it stands its own hash, and what does not match is compiled again.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import fusion.emit.cpp
from fusion.run.cpp.instructions import InstructionSet, this_machine
from fusion.run.files import cache_root

HEADERS = Path(fusion.emit.cpp.__file__).parent / "include"
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fopenmp", "-fno-math-errno", "-Wno-ignored-attributes", "-Wno-psabi")
TIMEOUT_S = 300.0


class BuildError(RuntimeError):
    """A kernel cannot be compiled here; the message says what is missing, or what the compiler said.

    Source: not in the paper.
    """


def load(source: str, instructions: InstructionSet) -> ctypes.CDLL:
    """Compile a source, unless a library of it is there, and load it.

    Args:
        source: Of one translation unit.
        instructions: What to compile for: of this machine.

    Returns:
        The library.

    Raises:
        BuildError: There is no compiler, or it failed or took too long.
        OSError: The cache folder cannot be written; XDG_CACHE_HOME says where it is.

    Source: not in the paper.
    """
    command = [_compiler(), *FLAGS, *instructions.flags, "-I", str(HEADERS)]
    digest = hashlib.sha256()
    for part in (source, _headers(), _version(command[0]), *FLAGS, *instructions.flags):
        digest.update(part.encode() + b"\0")
    folder = _folder()
    path = folder / f"{digest.hexdigest()[:32]}.so"
    if not _is_intact(path):
        _compile(command, source, path)
    _share_openmp()
    return ctypes.CDLL(str(path))


def _compile(command: list[str], source: str, path: Path) -> None:
    """Write a library and its hash, in that order."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="building_") as name:
        folder = Path(name)
        (folder / "kernel.cpp").write_text(source, encoding="utf-8")
        _run([*command, "-c", "kernel.cpp", "-o", "kernel.o"], folder)
        _run([command[0], "-shared", "kernel.o", "-o", "kernel.so", *_link_flags()], folder)
        digest = hashlib.sha256((folder / "kernel.so").read_bytes()).hexdigest()
        (folder / "digest").write_text(digest, encoding="utf-8")
        os.replace(folder / "kernel.so", path)
        os.replace(folder / "digest", path.with_suffix(".sha256"))
        os.replace(folder / "kernel.cpp", path.with_suffix(".cpp"))


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{' '.join(command)} did not end within {TIMEOUT_S:.0f} s") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed with code {done.returncode}:\n{done.stderr[-4000:]}")


def _is_intact(path: Path) -> bool:
    try:
        expected = path.with_suffix(".sha256").read_text(encoding="utf-8")
        return hashlib.sha256(path.read_bytes()).hexdigest() == expected
    except (OSError, UnicodeDecodeError):
        return False


def _folder() -> Path:
    """Where libraries lie: code that is run, so nobody else may write there."""
    folder = cache_root() / "libraries"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise BuildError(
            f"{folder} belongs to another user or others may write there, and code is loaded from it: "
            f"chmod go-w {folder}, or set XDG_CACHE_HOME to a folder of your own"
        )
    return folder


@functools.cache
def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise BuildError("there is no C++ compiler: install g++ or clang++, or set CXX to one; chains run unfused without")


@functools.cache
def target() -> InstructionSet:
    """What kernels are compiled for here: the best of this machine's instruction sets that its compiler knows.

    Returns:
        The set; plain C++ if it knows none of them.

    Raises:
        BuildError: There is no compiler.

    Source: not in the paper.
    """
    return next(found for found in this_machine() if _knows(_compiler(), found.flags))


def _knows(compiler: str, flags: tuple[str, ...]) -> bool:
    command = [compiler, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, timeout=TIMEOUT_S).returncode == 0  # noqa: S603


@functools.cache
def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT_S)  # noqa: S603
    return done.stdout


@functools.cache
def _headers() -> str:
    return "\0".join(path.name + "\0" + path.read_text(encoding="utf-8") for path in sorted(HEADERS.glob("*.h")))


@functools.cache
def _openmp() -> str | None:
    """The OpenMP library that torch has loaded, if it is one that GCC's calls fit: two pools would fight for cores."""
    import torch  # noqa: F401

    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/" in line}
    return next((path for path in sorted(paths) if Path(path).name.startswith(("libgomp", "libiomp5"))), None)


def _link_flags() -> tuple[str, ...]:
    return ("-fopenmp",) if _openmp() is None else ()


@functools.cache
def _share_openmp() -> None:
    """Let kernels find the functions of torch's OpenMP."""
    path = _openmp()
    if path is not None:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
