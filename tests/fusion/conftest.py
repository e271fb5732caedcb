"""Kernels run in Triton's interpreter here, and leave nothing in the user's cache folder."""

import pytest
import triton  # before the variable is set: what is defined when Triton is first imported can be compiled too  # noqa: F401


@pytest.fixture(autouse=True)
def interpreter(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
