import torch
from closeness import assert_equal_up_to_rounding

from omoe.control import along_own, random_like, rotation, seed_of, shortened


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_shortened_step_keeps_its_direction_and_takes_the_others_length() -> None:
    step_EOI, removed_EOI = drawn(3, 4, 5), 0.3 * drawn(3, 4, 5, seed=1)
    step_EOI[2] = removed_EOI[2] = 0
    kept_EOI = step_EOI - shortened(step_EOI, removed_EOI)
    for expert in range(2):
        assert_equal_up_to_rounding(
            "length", kept_EOI[expert].norm(), (step_EOI - removed_EOI)[expert].norm(), roundings=32
        )
        cosine = (kept_EOI[expert] * step_EOI[expert]).sum() / (kept_EOI[expert].norm() * step_EOI[expert].norm())
        assert_equal_up_to_rounding("direction", cosine, torch.tensor(1.0, dtype=torch.float64), roundings=16)
    assert torch.equal(kept_EOI[2], torch.zeros(4, 5, dtype=torch.float64))


def test_random_directions_span_as_much_and_repeat() -> None:
    change_EK = drawn(4, 50)
    change_EK[1] = 0
    random_EK = random_like(change_EK, seed=5)
    assert torch.equal(random_EK, random_like(change_EK, seed=5))
    assert not torch.equal(random_EK, random_like(change_EK, seed=6))
    assert torch.linalg.matrix_rank(random_EK) == 3
    assert not random_EK[1].any()


def test_a_rotation_is_another_basis_that_repeats() -> None:
    order_I, sign_I = rotation(6, seed=3, like=drawn(1))
    assert sorted(order_I.tolist()) == list(range(6))
    assert torch.equal(sign_I.abs(), torch.ones(6, dtype=torch.float64))
    assert torch.equal(order_I, rotation(6, seed=3, like=drawn(1))[0])
    assert not torch.equal(rotation(40, seed=3, like=drawn(1))[1], rotation(40, seed=4, like=drawn(1))[1])


def test_along_own_is_the_projection_on_the_own_change() -> None:
    step_EK, change_EK = drawn(3, 40), drawn(3, 40, seed=2)
    change_EK[0] = 0
    removed_EK = along_own(step_EK, change_EK)
    assert not removed_EK[0].any()
    for expert in (1, 2):
        unit_K = change_EK[expert] / change_EK[expert].norm()
        expected_K = unit_K * (unit_K @ step_EK[expert])
        assert_equal_up_to_rounding("projection", removed_EK[expert], expected_K, roundings=64)


def test_seeds_differ_by_step_and_by_linear() -> None:
    names = ["a", "b", "c"]
    assert len({seed_of(step, names, name) for step in range(4) for name in names}) == 12
