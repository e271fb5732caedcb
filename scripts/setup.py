"""Make or refresh the virtual environment; run by `make` with whatever Python is there, so it stays old-Python plain.

Every way this can fail ends in one line that says what to do.
"""

import hashlib
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
STAMP = os.path.join(VENV, "quartet-installed")
OLDEST = (3, 11)


def main():  # noqa: ANN201, D103
    if sys.version_info < OLDEST:
        stop("Python %d.%d or newer is needed and %s is %d.%d; run: make PYTHON=python3.11 (or newer) ..."
             % (OLDEST + (sys.executable,) + tuple(sys.version_info[:2])))  # fmt: skip
    if os.path.isdir(VENV):
        check_venv()
    else:
        make_venv()
    if installed() != wanted():
        install()


def check_venv():  # noqa: ANN201, D103
    healthy = os.path.isfile(os.path.join(VENV, "pyvenv.cfg")) and os.path.exists(PYTHON)
    if not healthy or subprocess.call([PYTHON, "-m", "pip", "--version"], stdout=subprocess.DEVNULL,
                                      stderr=subprocess.DEVNULL):  # fmt: skip
        stop(".venv is half-made or its Python is gone; run: make clean, then this again")


def make_venv():  # noqa: ANN201, D103
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        stop("%s has no venv module; install it (Debian: apt-get install python3-venv) or run: make PYTHON=... with "
             "another Python" % sys.executable)  # fmt: skip
    if subprocess.call([sys.executable, "-m", "venv", VENV]):
        stop(".venv could not be made with %s; run: make clean, then make PYTHON=... with another Python" % sys.executable)


def install():  # noqa: ANN201, D103
    # torch first and by its exact version: on some indexes only that form finds the build for this machine.
    pin = re.search(r"^torch==\S+", read("constraints.txt"), re.MULTILINE).group()
    quiet = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    print("installing the pinned packages into .venv; this takes a minute or two", flush=True)
    for arguments in ([pin], ["--constraint", "constraints.txt", "--editable", ".[dev]"]):
        if subprocess.call(quiet + arguments, cwd=ROOT):
            stop("the packages could not be installed (pip's message stands above); mend that, then run this again")
    with open(STAMP, "w") as file:
        file.write(wanted())


def wanted():  # noqa: ANN201, D103
    return hashlib.sha256((read("pyproject.toml") + read("constraints.txt")).encode()).hexdigest()


def installed():  # noqa: ANN201, D103
    if not os.path.exists(STAMP):
        return ""
    with open(STAMP) as file:
        return file.read()


def read(name):  # noqa: ANN001, ANN201, D103
    with open(os.path.join(ROOT, name), "rb") as file:
        return file.read().decode("utf-8")


def stop(message):  # noqa: ANN001, ANN201, D103
    sys.exit("error: " + message)


if __name__ == "__main__":
    main()
