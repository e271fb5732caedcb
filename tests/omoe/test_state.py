import pytest
import torch

from omoe import OMoEConfig, find_expert_linears
from omoe.start import start_EOI
from omoe.state import initial_state, loaded_state
from tests.omoe.small_moe import HIDDEN, MODEL, NUM_EXPERTS, SmallMoE

SPACES = ["update", "input"]


def saved(space: str) -> dict[str, object]:
    linears = find_expert_linears(SmallMoE())
    config = OMoEConfig(space=space)  # type: ignore[arg-type]
    return {"num_steps": 3, "linears": {linear.name: initial_state(linear, config) for linear in linears}}


def test_what_each_space_keeps() -> None:
    linears = find_expert_linears(SmallMoE().bfloat16())
    update = initial_state(linears[0], OMoEConfig())
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in update.items()} == {
        "removed_energy_E": (torch.float32, (NUM_EXPERTS,)),
        "leftover_E": (torch.float32, (NUM_EXPERTS,)),
        "start_EOI": (torch.bfloat16, (1, HIDDEN, MODEL)),
    }
    single = initial_state(find_expert_linears(SmallMoE())[0], OMoEConfig())
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in single.items()} == {
        "removed_energy_E": (torch.float32, (NUM_EXPERTS,)),
        "leftover_E": (torch.float32, (NUM_EXPERTS,)),
        "start_high_EOI": (torch.int16, (1, HIDDEN, MODEL)),
        "start_low_EOI": (torch.uint8, (1, HIDDEN, MODEL)),
        "start_step_EO1": (torch.float32, (1, HIDDEN, 1)),
    }
    inputs = initial_state(linears[1], OMoEConfig(space="input"))
    assert inputs["projector_EII"].dtype == torch.float32
    assert torch.equal(inputs["projector_EII"], torch.eye(HIDDEN).expand(NUM_EXPERTS, -1, -1))
    assert inputs["num_tokens_E"].tolist() == [0] * NUM_EXPERTS


def test_start_weights_do_not_follow_the_model() -> None:
    linear = find_expert_linears(SmallMoE())[0]
    for dtype in (torch.float32, torch.bfloat16):
        linear.parameters[0].data = linear.parameters[0].data.to(dtype)
        state = initial_state(linear, OMoEConfig())
        before_EOI = start_EOI(state).clone()
        linear.parameters[0].data.add_(1)
        assert torch.equal(start_EOI(state), before_EOI)


@pytest.mark.parametrize("copies", [True, False])
def test_whether_experts_were_copies_is_the_checkpoints_to_say(copies: bool) -> None:
    saved_model, other = SmallMoE(), SmallMoE()
    torch.nn.init.normal_((other if copies else saved_model).experts.up.weight)
    linears = find_expert_linears(saved_model)
    own = {"num_steps": 3, "linears": {linear.name: initial_state(linear, OMoEConfig()) for linear in linears}}
    _, states = loaded_state(own, find_expert_linears(other), OMoEConfig())
    assert len(start_EOI(states["experts.up"])) == (1 if copies else NUM_EXPERTS)
    assert torch.equal(start_EOI(states["experts.up"]), start_EOI(own["linears"]["experts.up"]))  # type: ignore[index]


@pytest.mark.parametrize("space", SPACES)
def test_loading_copies(space: str) -> None:
    own = saved(space)
    num_steps, states = loaded_state(own, find_expert_linears(SmallMoE()), OMoEConfig(space=space))  # type: ignore[arg-type]
    assert num_steps == 3
    for name, state in states.items():
        for key, tensor in state.items():
            original = own["linears"][name][key]  # type: ignore[index]
            assert torch.equal(tensor, original)
            assert tensor.data_ptr() != original.data_ptr()


def test_a_state_from_before_the_first_step_is_empty() -> None:
    linears = find_expert_linears(SmallMoE())
    assert loaded_state({"num_steps": 0, "linears": {}}, linears, OMoEConfig()) == (0, {})


@pytest.mark.parametrize(
    ("own", "match"),
    [
        (None, "expected num_steps and linears"),
        ([1], "expected num_steps and linears"),
        ({"num_steps": 1}, "expected num_steps and linears"),
        ({"num_steps": -1, "linears": {}}, "num_steps"),
        ({"num_steps": True, "linears": {}}, "num_steps"),
        ({"num_steps": "1", "linears": {}}, "num_steps"),
        ({"num_steps": 1, "linears": []}, "linears"),
        ({"num_steps": 1, "linears": {}}, r"linears.*experts.down"),
        ({"num_steps": 0, "linears": saved("update")["linears"]}, "after 0 steps"),
        ({"num_steps": 1, "linears": {"experts.up": {}, "other": {}}}, "other"),
        ({"num_steps": 1, "linears": {"experts.up": {}, "experts.down": {}}}, "'experts.up' has"),
        ({"num_steps": 1, "linears": {"experts.up": 3, "experts.down": {}}}, "'experts.up' has int"),
        (saved("input"), "expected .*start_high_EOI.* for space='update'"),
    ],
)
def test_bad_states_are_refused(own: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        loaded_state(own, find_expert_linears(SmallMoE()), OMoEConfig())


@pytest.mark.parametrize("wrong", [torch.zeros(1), torch.zeros(NUM_EXPERTS, HIDDEN, MODEL).half(), 1.0])
def test_bad_tensors_are_refused(wrong: object) -> None:
    own = saved("update")
    own["linears"]["experts.up"]["start_high_EOI"] = wrong  # type: ignore[index]
    with pytest.raises(ValueError, match=r"start_high_EOI of 'experts\.up'"):
        loaded_state(own, find_expert_linears(SmallMoE()), OMoEConfig())
