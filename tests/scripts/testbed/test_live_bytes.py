"""Live bytes are the allocator's own account."""

import torch

from scripts.testbed.live_bytes import peak_bytes

KIB = 1024


def test_the_peak_counts_what_lives_at_once() -> None:
    before = torch.ones(64 * KIB, dtype=torch.uint8)

    def call() -> None:
        first = torch.ones(256 * KIB, dtype=torch.uint8)
        del first
        second, third = torch.ones(512 * KIB, dtype=torch.uint8), torch.ones(128 * KIB, dtype=torch.uint8)
        del second, third

    assert peak_bytes(call) == 640 * KIB
    assert len(before) == 64 * KIB
