"""Virtual environments of peers: made on demand in the cache folder, with pinned packages from the package index."""

import fcntl
import hashlib
import logging
import subprocess
import sys
from pathlib import Path

from scripts.testbed.files import cache_folder, write_text

logger = logging.getLogger(__name__)

INSTALL_TIMEOUT_S = 1800.0
LOG_LINES = 12  # of the installer's, that an error shows
STAMP = "installed"
TORCH = "torch==2.13.0"
MODELS = ("transformers==5.23.0", "numpy==2.4.6")
TVM = (  # its newest apache-tvm-ffi crashes
    "apache-tvm==0.27.0.post1", "apache-tvm-ffi==0.1.14.post1", "numpy==2.4.6", "psutil==7.2.2", "cloudpickle==3.1.2",
    "tornado==6.6.1", "scipy==1.17.1", "xgboost==3.2.0",
)  # fmt: skip

# Name -> packages, in steps: torch's exact version alone, which on some indexes finds the build for this machine.
PACKAGES: dict[str, tuple[tuple[str, ...], ...]] = {
    "zentorch": ((TORCH,), ("zentorch==2.13.0.2", *MODELS)),
    "openvino": ((TORCH,), ("openvino==2026.4.1", *MODELS)),
    "onnxruntime": ((TORCH,), ("onnxruntime==1.32.0", "onnx==1.23.2", "onnxscript==0.7.2", *MODELS)),
    "jax": (("jax==0.10.2", "numpy==2.4.6"),),
    "tvm": (TVM,),
}


class PeerEnvironmentError(RuntimeError):
    """An environment cannot be made; the message says what was tried and how to do without it."""


def python_of(name: str) -> Path:
    """The interpreter of an environment, which is made if it is not there; of processes that ask at once, one makes it.

    Args:
        name: A name of PACKAGES.

    Raises:
        PeerEnvironmentError: If the packages cannot be installed.
    """
    steps = PACKAGES[name]
    wanted = f"python {sys.version_info[0]}.{sys.version_info[1]}: " + " ".join(sum(steps, ()))
    folder = cache_folder() / "peers" / f"{name}-{hashlib.sha256(wanted.encode()).hexdigest()[:12]}"
    python, stamp = folder / "bin" / "python", folder / STAMP
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists():
            logger.info("installing %s into %s, which takes a minute or two", " ".join(sum(steps, ())), folder)
            _run(name, [sys.executable, "-m", "venv", "--clear", str(folder)])
            for packages in steps:
                _run(name, [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages])
            write_text(stamp, wanted)
    return python


def _run(name: str, command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=INSTALL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerEnvironmentError(_message(name, command, str(error))) from error
    if done.returncode:
        raise PeerEnvironmentError(_message(name, command, "\n".join(done.stdout.splitlines()[-LOG_LINES:])))


def _message(name: str, command: list[str], reason: str) -> str:
    return (
        f"the peer {name} cannot be installed: {' '.join(command)}\n{reason}\n"
        "mend that, or leave the peer out of bench.cpu.peers"
    )
