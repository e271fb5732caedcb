"""Make or refresh the virtual environment; run by `make` with whatever Python is there, so it stays old-Python plain.

Every way this can fail ends in one line that says what to do.
"""

import hashlib
import os
import subprocess
import sys
from typing import NoReturn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
STAMP = os.path.join(VENV, "quartet-installed")
OLDEST = (3, 11)


def main() -> None:
    if sys.version_info < OLDEST:
        found = ".".join(map(str, sys.version_info[:2]))
        stop("Python 3.11 or newer is needed and %s is %s; run make with PYTHON=python3.11" % (sys.executable, found))
    if os.path.isdir(VENV):
        check_venv()
    else:
        make_venv()
    if installed() != wanted():
        install()


def check_venv() -> None:
    healthy = os.path.isfile(os.path.join(VENV, "pyvenv.cfg")) and os.path.exists(PYTHON)
    if not healthy or subprocess.call([PYTHON, "-m", "pip", "--version"], stdout=subprocess.DEVNULL,
                                      stderr=subprocess.DEVNULL):  # fmt: skip
        stop(".venv is half-made or its Python is gone; run: make clean, then this again")


def make_venv() -> None:
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        stop("%s has no venv module; install it (Debian: apt-get install python3-venv) or run: make PYTHON=... with "
             "another Python" % sys.executable)  # fmt: skip
    if subprocess.call([sys.executable, "-m", "venv", VENV]):
        stop(
            ".venv could not be made with %s; run: make clean, then make PYTHON=... with another Python"
            % sys.executable
        )


def install() -> None:
    # torch first and by its exact version: on some indexes only that form finds the build for this machine.
    pin = next(line for line in read("constraints.txt").splitlines() if line.startswith("torch=="))
    # Old pips build some packages in a way of their own, which does not install what the build needs.
    quiet = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--use-pep517"]
    print("installing the pinned packages into .venv; this takes a minute or two", flush=True)
    for arguments in ([pin], ["--constraint", "constraints.txt", "--editable", ".[dev]"]):
        if subprocess.call(quiet + arguments, cwd=ROOT):
            stop("the packages could not be installed (pip's message stands above); mend that, then run this again")
    with open(STAMP, "w") as file:
        file.write(wanted())


def wanted() -> str:
    return hashlib.sha256((read("pyproject.toml") + read("constraints.txt")).encode()).hexdigest()


def installed() -> str:
    if not os.path.exists(STAMP):
        return ""
    with open(STAMP) as file:
        return file.read()


def read(name: str) -> str:
    with open(os.path.join(ROOT, name), "rb") as file:
        return file.read().decode("utf-8")


def stop(message: str) -> NoReturn:
    sys.exit("error: " + message)


if __name__ == "__main__":
    main()
