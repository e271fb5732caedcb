"""Markers that skip with a reason, settings that hold for every test, and the seed each starts from."""

import random

import pytest
import torch
from hypothesis import settings


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # tensors here are tiny, and two test processes may share two cores
    settings.register_profile("house", deadline=None, derandomize=True)  # a slow machine is no failure
    settings.load_profile("house")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip_gpu = pytest.mark.skip(reason="needs a CUDA device")
    skip_slow = pytest.mark.skip(reason="takes minutes; run with: pytest -m slow")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip_gpu)
        if "slow" in item.keywords and "slow" not in (config.getoption("-m") or ""):
            item.add_marker(skip_slow)


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    torch.manual_seed(0)
