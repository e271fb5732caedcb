"""What a pair takes is the ledger's, and a limit that is no number of bytes is refused."""

from itertools import product

import pytest

from moe_pipeline.config import PipelineConfig
from moe_pipeline.plan.budget import RESTORES, Budget, BudgetError, Footprint, footprints, nothing_fits
from moe_pipeline.plan.ledger import LayerShape, ledger
from moe_pipeline.plan.rings import HiddenShape

SHAPE = LayerShape(
    tokens=100,
    top_k=2,
    d_model=8,
    hidden=HiddenShape(d_hidden=16, gated=True, in_place=False),
    num_experts=4,
    num_ranks=2,
)


def test_footprints_are_the_ledgers() -> None:
    found = footprints(SHAPE, (1, 3), RESTORES)
    assert [(one.restore, one.num_chunks) for one in found] == list(product(RESTORES, (1, 3)))
    for one in found:
        account = ledger(SHAPE, PipelineConfig(num_chunks=one.num_chunks, restore=one.restore))
        assert (one.device_bytes, one.host_bytes) == (account.activation_bytes, account.host_bytes)


@pytest.mark.parametrize(
    ("device_bytes", "host_bytes", "missing"),
    [
        (None, None, ""),
        (1000, 2000, ""),
        (1000, 1999, "1 bytes are missing on the host"),
        (None, 0, "2,000 bytes are missing on the host"),
        (999, 2000, "1 bytes are missing on the device"),
        (0, 500, "1,000 bytes are missing on the device and 1,500 bytes are missing on the host"),
    ],
)
def test_what_is_missing_in_words(device_bytes: int | None, host_bytes: int | None, missing: str) -> None:
    footprint = Footprint(num_chunks=2, restore="S1", device_bytes=1000, host_bytes=2000)
    assert footprint.missing(Budget(device_bytes=device_bytes, host_bytes=host_bytes)) == missing


@pytest.mark.parametrize("field", ["device_bytes", "host_bytes"])
@pytest.mark.parametrize("value", [-1, 1.5, True, "4GB"])
def test_a_budget_is_a_number_of_bytes(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{field}: got {value!r}; accepted is a number of bytes of at least 0, or"):
        Budget(**{field: value})  # type: ignore[arg-type]


def test_the_error_names_the_pair_that_takes_least() -> None:
    budget = Budget(device_bytes=10)
    pairs = [
        Footprint(num_chunks=n, restore="S4", device_bytes=size, host_bytes=host)
        for n, size, host in ((1, 40, 0), (2, 30, 5), (4, 30, 4))
    ]
    error = nothing_fits([(one, one.missing(budget)) for one in pairs], budget)
    assert isinstance(error, BudgetError)
    assert str(error) == (
        "device_budget_bytes: got 10 with host_budget_bytes=None; none of 3 pairs of num_chunks and restore may be "
        "taken. The one that takes least is num_chunks=4 with restore='S4': 20 bytes are missing on the device. It "
        "fits with device_budget_bytes=30 and host_budget_bytes=4; or pass fewer tokens at once"
    )
