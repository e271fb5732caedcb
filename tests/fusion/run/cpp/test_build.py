import os
import shutil
import subprocess
import sys

import pytest

from fusion.run.cpp import build
from fusion.run.cpp.build import BuildError, load, target
from fusion.run.cpp.instructions import InstructionSet, this_machine

PLAIN = InstructionSet("plain", ())
ANSWER = 'extern "C" int answer() { return %d; }'


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "quartet" / "fusion" / "libraries"


def test_a_library_is_compiled_once_and_loaded_by_other_processes(folder):
    assert load(ANSWER % 41, PLAIN).answer() == 41
    (path,) = folder.glob("*.so")
    before = path.stat().st_mtime_ns
    code = f"from fusion.run.cpp.build import *; print(load({ANSWER % 41!r}, InstructionSet('plain', ())).answer())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "41", done.stderr
    assert path.stat().st_mtime_ns == before
    assert load(ANSWER % 42, PLAIN).answer() == 42


def test_a_damaged_library_is_compiled_again(folder):
    load(ANSWER % 43, PLAIN)
    (path,) = folder.glob("*.so")
    path.unlink()
    path.write_bytes(b"no library")
    assert load(ANSWER % 43, PLAIN).answer() == 43


def test_what_the_compiler_says_is_the_error(folder):
    with pytest.raises(BuildError, match="not_declared"):
        load("int f() { return not_declared; }", PLAIN)
    assert not list(folder.glob("building_*"))


def test_a_missing_compiler_is_named_with_what_to_do(folder, monkeypatch):
    build._compiler.cache_clear()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match="install g"):
        load(ANSWER % 44, PLAIN)
    build._compiler.cache_clear()


@pytest.mark.parametrize("unknown", ["-mamx-bf16", "-mavx512f", "-mavx2"])
def test_instructions_that_the_compiler_does_not_know_are_not_compiled_for(monkeypatch, tmp_path, unknown):
    known = shutil.which("g++")
    old = tmp_path / "old"
    old.write_text(f'#!/bin/sh\ncase " $* " in *" {unknown} "*) exit 1;; esac\nexec {known} "$@"\n')
    old.chmod(0o700)
    with monkeypatch.context() as patched:
        patched.setenv("CXX", str(old))
        build._compiler.cache_clear()
        target.cache_clear()
        assert target() == next(found for found in this_machine() if unknown not in found.flags)
    build._compiler.cache_clear()
    target.cache_clear()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners are those of POSIX")
def test_a_folder_that_others_may_write_to_is_refused(folder):
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(BuildError, match="chmod go-w"):
        load(ANSWER % 45, PLAIN)
