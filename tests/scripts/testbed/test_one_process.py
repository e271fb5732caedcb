"""The control is the same training in one process, and the differences say which run is how far from which."""

import pytest

from configs.schema import Config, load
from scripts.testbed import one_process
from scripts.testbed.launch import compose


def spread() -> Config:
    return load(compose("train", ["experiment=moe_pipeline/expert_parallel", "trainer.accumulation_steps=3"]))


def test_the_control_accumulates_what_ranks_share() -> None:
    control = one_process.alone(spread())
    assert control.trainer.accumulation_steps == 6
    assert (control.cluster.num_ranks, control.moe.expert_ranks, control.moe.pipeline.num_chunks) == (1, 1, 1)
    assert control.moe.gate == spread().moe.gate


STEPS = tuple(float(step) for step in range(1, 61))
ONE = (STEPS, (1.0,) * 60)
OTHER = (STEPS, (1.0, 1.25, *(1.0,) * 57, 9.0))  # what comes after step 50 is not compared
REORDERED = (STEPS, (1.125, *(1.0,) * 59))
FURTHER = (STEPS, (0.625, *(1.0,) * 59))


def test_differences_have_stable_names() -> None:
    controls = {"one_process": ONE, "one_process_reordered_1": REORDERED, "one_process_reordered_2": FURTHER}
    figures = one_process.summary(OTHER, controls)
    assert figures == {"loss_difference_max": 0.25, "reordering_difference_max": 0.5, "loss_difference_ratio": 0.5}
    assert [row.metric for row in one_process.rows(figures)] == list(figures)
    assert one_process.summary(OTHER, {"one_process": ONE}) == {"loss_difference_max": 0.25}
    assert one_process.summary(OTHER, {"one_process": ONE, "one_process_reordered_1": ONE}) == {
        "loss_difference_max": 0.25,
        "reordering_difference_max": 0.0,
    }
    assert one_process.summary(OTHER, {}) == {}


def test_the_report_shows_all_curves() -> None:
    (section,) = one_process.sections(OTHER, {"one_process": ONE, "one_process_reordered_1": REORDERED}, 2)
    assert len(section.plots) == 2
    assert all(name in section.plots[0] for name in ("2 ranks", "one process", "one process reordered 1"))
    assert one_process.sections(OTHER, {}, 2) == ()


def test_losses_of_other_steps_are_not_compared() -> None:
    with pytest.raises(ValueError, match="right: got losses of steps"):
        one_process.difference(ONE, ((1.0,), (1.0,)))
