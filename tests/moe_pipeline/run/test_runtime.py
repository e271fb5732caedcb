"""What calls of a layer share cannot be changed under them."""

import dataclasses

import pytest

from moe_pipeline.run.buffers import Workspace
from moe_pipeline.run.runtime import Runtime


def test_a_runtime_alone_averages_records_and_chooses_nothing() -> None:
    runtime = Runtime(name="moe", ranks=None, workspace=Workspace())
    assert (runtime.average, runtime.recorder, runtime.adaptive) == (False, None, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        runtime.name = "other"  # type: ignore[misc]
