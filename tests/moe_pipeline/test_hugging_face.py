"""The library's MoE models compute on our runtime what they compute on the library's own."""

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from closeness import assert_all_close
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe_pipeline import PipelineConfig
from moe_pipeline.experts import GroupedLinear
from moe_pipeline.hugging_face import experts_forward, spread_experts
from moe_pipeline.parallel import exclude_experts, gather_state
from moe_pipeline.run.ranks import ExpertRanks, expert_ranks

NAME = "moe_pipeline"
SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "Mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
    "Qwen2-MoE": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {"num_experts": 6, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 20},
    ),
    "Qwen3-MoE": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 16, "norm_topk_prob": True},
    ),
    "OLMoE": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 8}),
}
PIPELINES = [PipelineConfig(num_chunks=n, restore=restore) for n in (1, 2, 4) for restore in ("none", "S4")]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    ALL_EXPERTS_FUNCTIONS._global_mapping.pop(NAME, None)


def _register(**arguments: Any) -> None:
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward(**arguments))


def _model(family: str) -> PreTrainedModel:
    model_type, config_type, own = MODELS[family]
    model = model_type(config_type(**{**SIZES, **own}))
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.weight.data *= 3  # a trained router has opinions
    return model.train()


def _tokens(rows: int, length: int) -> Tensor:
    return torch.randint(1, SIZES["vocab_size"], (rows, length))


def _use(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    model.set_experts_implementation(implementation)
    return model


def _step(
    model: PreTrainedModel, implementation: str, *batches: Tensor, wrapper: nn.Module | None = None
) -> dict[str, Tensor]:
    """Logits of each batch, and every parameter's gradient of the mean of their losses."""
    _use(model, implementation).zero_grad()
    found = {}
    for number, batch in enumerate(batches):
        output = (wrapper or model)(batch, labels=batch)
        (output.loss / len(batches)).backward()
        found[f"logits {number}"] = output.logits.detach()
    return found | {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", MODELS)
def test_logits_and_gradients_equal_the_librarys_own(family: str) -> None:
    model, batch = _model(family), _tokens(3, 7)
    truth = _step(copy.deepcopy(model).double(), "eager", batch)
    references = [_step(model, implementation, batch) for implementation in ("eager", "grouped_mm")]
    for pipeline in PIPELINES:
        _register(pipeline=pipeline)
        actual = _step(model, NAME, batch)
        for reference in references:
            assert_all_close(actual, reference, truth)


def test_the_choice_at_construction_reaches_our_function() -> None:
    calls, forward = [], experts_forward()
    ALL_EXPERTS_FUNCTIONS.register(NAME, lambda *args: calls.append(args) or forward(*args))
    config = MixtralConfig(**SIZES, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=NAME)
    model(_tokens(1, 3))
    assert len(calls) == SIZES["num_hidden_layers"]
    config = MixtralConfig(**SIZES, num_local_experts=4)
    config._experts_implementation = NAME
    MixtralForCausalLM(config)(_tokens(1, 3))
    assert len(calls) == 2 * SIZES["num_hidden_layers"]


def test_other_implementations_stay_what_they_were() -> None:
    model, batch = _model("Mixtral"), _tokens(2, 5)
    names, functions = sorted(ALL_EXPERTS_FUNCTIONS), dict(ALL_EXPERTS_FUNCTIONS)
    before = {name: _step(model, name, batch) for name in ("eager", "grouped_mm")}
    _register()
    _step(model, NAME, batch)
    assert sorted(ALL_EXPERTS_FUNCTIONS) == sorted([*names, NAME])
    assert all(ALL_EXPERTS_FUNCTIONS[name] is function for name, function in functions.items())
    for implementation, expected in before.items():
        again = _step(model, implementation, batch)
        assert all(torch.equal(again[name], value) for name, value in expected.items())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_checkpointing_gives_the_same_gradients() -> None:
    model, batch = _model("Qwen3-MoE"), _tokens(2, 6)
    _register(pipeline=PipelineConfig(num_chunks=2, restore="S4"))
    plain = _step(model, NAME, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = _step(model, NAME, batch)
    assert all(torch.equal(checkpointed[name], value) for name, value in plain.items())


@pytest.mark.parametrize("family", MODELS)
def test_one_token_decodes(family: str) -> None:
    model, batch = _model(family).eval(), _tokens(1, 6)
    _register(pipeline=PipelineConfig(num_chunks=2))

    def decode(to: PreTrainedModel, implementation: str) -> dict[str, Tensor]:
        _use(to, implementation)
        with torch.inference_mode():
            cache = to(batch[:, :5], use_cache=True).past_key_values
            return {"logits": to(batch[:, 5:], past_key_values=cache).logits}

    assert decode(model, NAME)["logits"].shape == (1, 1, SIZES["vocab_size"])
    truth = decode(copy.deepcopy(model).double(), "eager")
    assert_all_close(decode(model, NAME), decode(model, "eager"), truth)


def _experts(*, num_experts: int = 4, act: str = "silu") -> Any:
    config = MixtralConfig(**SIZES, num_local_experts=num_experts, hidden_act=act)
    module = MixtralExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def _choices(num_tokens: int, *, num_experts: int = 4, top_k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    x_TM = torch.randn(num_tokens, SIZES["hidden_size"])
    weight_TK, index_TK = torch.randn(num_tokens, num_experts).softmax(-1).topk(top_k)
    return x_TM, index_TK, weight_TK


def _call(module: Any, implementation: str, x_TM: Tensor, index_TK: Tensor, weight_TK: Tensor) -> dict[str, Tensor]:
    module.config._experts_implementation = implementation
    module.zero_grad()
    x_TM, weight_TK = x_TM.clone().requires_grad_(), weight_TK.clone().requires_grad_()
    y_TM = module(x_TM, index_TK, weight_TK)
    functional.mse_loss(y_TM.double(), torch.ones_like(y_TM).double(), reduction="sum").backward()
    gradients = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    return {"y": y_TM.detach(), "x": x_TM.grad, "weights": weight_TK.grad, **gradients}


def _compare(module: Any, x_TM: Tensor, index_TK: Tensor, weight_TK: Tensor, reference: str = "eager") -> None:
    to = module.down_proj.dtype
    given = x_TM.to(to), index_TK, weight_TK
    truth = _call(copy.deepcopy(module).double(), "eager", given[0].double(), index_TK, weight_TK.double())
    assert_all_close(_call(module, NAME, *given), _call(module, reference, *given), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_python", "relu", "swish", "relu2"])
def test_activations_and_precisions(act: str, dtype: torch.dtype) -> None:
    _register(pipeline=PipelineConfig(num_chunks=2))
    _compare(_experts(act=act).to(dtype), *_choices(17))


def test_weights_in_low_precision() -> None:
    _register()
    module, (x_TM, index_TK, weight_TK) = _experts().bfloat16(), _choices(17)
    _compare(module, x_TM, index_TK, weight_TK.bfloat16())


def test_a_hook_on_the_activation_is_heard() -> None:
    _register()
    module, heard = _experts(), []
    module.act_fn.register_forward_hook(lambda *_: heard.append(1))
    _compare(module, *_choices(5))
    heard.clear()
    _call(module, NAME, *_choices(5))
    assert heard


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "swish"])
def test_common_activations_are_computed_in_place(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _register()
    module, refuse = _experts(act=act), pytest.fail
    monkeypatch.setattr(type(module.act_fn), "forward", lambda *_: refuse("the activation is called as a module"))
    monkeypatch.setattr(GroupedLinear, "forward", lambda *_: refuse("the experts are called as a module"))
    _call(module, NAME, *_choices(5))


def test_a_compiled_model_leaves_its_graph_at_the_experts() -> None:
    _register(pipeline=PipelineConfig(num_chunks=2, restore="S4"))
    module, (x_TM, index_TK, weight_TK) = _experts(), _choices(6)
    module.config._experts_implementation = NAME

    def function(x_TM: Tensor) -> Tensor:
        return module(x_TM * 2, index_TK, weight_TK) * 3

    found = []
    for run in (function, torch.compile(function, backend="eager")):
        module.zero_grad()
        y_TM = run(x_TM)
        y_TM.sum().backward()
        found.append([y_TM, module.gate_up_proj.grad, module.down_proj.grad])
    assert all(torch.equal(plain, compiled) for plain, compiled in zip(*found, strict=True))


def test_sentinel_entries_are_left_out() -> None:
    _register(pipeline=PipelineConfig(num_chunks=2))
    module, (x_TM, index_TK, weight_TK) = _experts(), _choices(9)
    index_TK[0], index_TK[3, 1], index_TK[8, 0] = 4, 4, 4
    _compare(module, x_TM, index_TK, weight_TK)
    module._is_expert_parallel = True  # as where the library spread the experts
    _compare(module, x_TM, index_TK, weight_TK, reference="grouped_mm")
    result = _call(module, NAME, x_TM, index_TK, weight_TK)
    assert (result["y"][0] == 0).all()
    assert (result["weights"][index_TK == 4] == 0).all()
    index_TK.fill_(4)
    result = _call(module, NAME, x_TM, index_TK, weight_TK)
    assert all((result[name] == 0).all() for name in ("y", "x", "weights", "gate_up_proj", "down_proj"))


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_no_tokens(num_chunks: int) -> None:
    _register(pipeline=PipelineConfig(num_chunks=num_chunks, restore="S4"))
    module = _experts()
    result = _call(module, NAME, *_choices(0))
    assert result["y"].shape == (0, SIZES["hidden_size"])
    assert (result["gate_up_proj"] == 0).all()
    assert (result["down_proj"] == 0).all()


def test_parameters_are_not_copied_and_frozen_ones_stay_without_gradient() -> None:
    _register()
    module, (x_TM, index_TK, weight_TK) = _experts(), _choices(5)
    module.down_proj.requires_grad_(False)
    module.config._experts_implementation = NAME
    y_TM = module(x_TM, index_TK, weight_TK)
    y_TM.sum().backward()
    assert module.down_proj.grad is None
    assert module.gate_up_proj.grad is not None
    module.down_proj.data.zero_()
    assert (module(x_TM, index_TK, weight_TK) == 0).all()
    assert sorted(dict(module.named_parameters())) == ["down_proj", "gate_up_proj"]


def test_result_has_the_tokens_dtype_under_autocast() -> None:
    _register()
    module, (x_TM, index_TK, weight_TK) = _experts(), _choices(5)
    module.config._experts_implementation = NAME
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_TM = module(x_TM, index_TK, weight_TK)
    assert y_TM.dtype == torch.float32
    y_TM.sum().backward()
    assert module.gate_up_proj.grad.dtype == torch.float32


def _odd_experts(**flags: bool) -> Any:
    """Experts of any layout that the library's decorator describes."""

    class OddExperts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, width, hidden = 3, 10, 6
            up = 2 * hidden if flags.get("has_gate", True) else hidden
            name = "gate_up_proj" if flags.get("has_gate", True) else "up_proj"
            shapes = {name: (3, up, width), "down_proj": (3, width, hidden)}
            if flags.get("is_transposed"):
                shapes = {part: (e, i, o) for part, (e, o, i) in shapes.items()}
            if flags.get("has_bias"):
                shapes |= {f"{name}_bias": (3, up), "down_proj_bias": (3, width)}
            for part, shape in shapes.items():
                setattr(self, part, nn.Parameter(torch.randn(shape)))
            self.act_fn = functional.silu

    return use_experts_implementation(OddExperts, **flags)(SimpleNamespace(_experts_implementation=NAME))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_gate", [False, True])
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_layouts(num_chunks: int, has_gate: bool, is_transposed: bool, has_bias: bool) -> None:
    _register(pipeline=PipelineConfig(num_chunks=num_chunks))
    module = _odd_experts(has_gate=has_gate, is_transposed=is_transposed, has_bias=has_bias)
    weight_TK, index_TK = torch.randn(11, 3).softmax(-1).topk(2)
    x_TM = torch.randn(11, 10)
    truth = _call(copy.deepcopy(module).double(), "batched_mm", x_TM.double(), index_TK, weight_TK.double())
    reference = _call(module, "batched_mm", x_TM, index_TK, weight_TK)
    actual = _call(module, NAME, x_TM, index_TK, weight_TK)
    assert_all_close(actual, reference, truth)


def test_unknown_experts_are_declined() -> None:
    _register()
    x_TM, index_TK, weight_TK = _choices(4, num_experts=3)
    x_TM = x_TM[:, :10]

    def declined(module: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match) as error:
            module(x_TM, index_TK, weight_TK)
        assert "accepted are" in str(error.value)
        assert type(module).__name__ in str(error.value)

    declined(_odd_experts(has_post_expert_norm=True), "has_post_expert_norm")
    declined(_odd_experts(is_concatenated=False), "interleaved")
    module = _odd_experts()
    module._apply_gate = lambda value: value
    declined(module, "_apply_gate")
    module = _odd_experts()
    module.act_fn = nn.PReLU()
    declined(module, "PReLU")
    module.act_fn = None
    declined(module, "act_fn=None")
    module = _odd_experts(is_transposed=True)
    module.is_transposed = False
    declined(module, r"shapes .*gate_up_proj.*\(3, 10, 12\)")
    module = _odd_experts()
    module.has_bias = True
    declined(module, r"'has_bias': True")
    module = _odd_experts()
    del module.gate_up_proj
    declined(module, "shapes")
    gpt_oss = GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, head_dim=16))
    with pytest.raises(ValueError, match="GptOssExperts with a gate of its own"):
        _use(gpt_oss, NAME)(_tokens(1, 3))


def test_an_index_of_no_expert_is_an_error() -> None:
    _register()
    module, (x_TM, index_TK, weight_TK) = _experts(), _choices(4)
    index_TK[1, 1] = 5
    module.config._experts_implementation = NAME
    with pytest.raises(ValueError, match="names expert 5"):
        module(x_TM, index_TK, weight_TK)


def test_chunks_by_ranks_are_as_many_as_ranks() -> None:
    with pytest.raises(ValueError, match=r"num_chunks: got 2 .* number of ranks, 1"):
        experts_forward(pipeline=PipelineConfig(num_chunks=2, split="ranks"))


def _spread_step(
    rank: int, world_size: int, family: str, pipeline: PipelineConfig, ranks: ExpertRanks, *, wrapped: bool
) -> None:
    torch.manual_seed(3)
    model, batches = _model(family), [_tokens(2, 5), _tokens(1, 8)]
    reference = _step(model, "eager", *batches)
    truth = _step(copy.deepcopy(model).double(), "eager", *batches)
    whole_state = copy.deepcopy(model.state_dict())
    total = model.get_submodule("model.layers.0.mlp.experts").num_experts
    spread = spread_experts(model, ranks)
    parts = ("gate_up_proj", "down_proj")
    assert spread == [f"model.layers.{layer}.mlp.experts.{part}" for layer in (0, 1) for part in parts]
    local = total // world_size
    _register(pipeline=pipeline, ranks=ranks)
    if wrapped:
        assert exclude_experts(model) == spread
    wrapper = DistributedDataParallel(model) if wrapped else None
    actual = _step(model, NAME, batches[rank], wrapper=wrapper)
    mine = slice(rank * local, (rank + 1) * local)
    expected = []
    for whole in (reference, truth):
        part = {name: value[mine] if name in spread else value for name, value in whole.items()}
        part["logits 0"] = part[f"logits {rank}"]
        del part["logits 1"]
        expected.append(part)
    for name, value in actual.items():
        if not wrapped and name not in spread and name != "logits 0":
            dist.all_reduce(value)
            value /= world_size
    assert_all_close(actual, *expected)
    gathered = gather_state(model)
    assert gathered.keys() == whole_state.keys()
    assert all(torch.equal(gathered[name], value) for name, value in whole_state.items())
    with torch.inference_mode():  # the other rank may have no token at all
        experts = model.get_submodule("model.layers.0.mlp.experts")
        x_TM, index_TK, weight_TK = _choices(1 - rank, num_experts=total)
        assert experts(x_TM, index_TK, weight_TK).shape == x_TM.shape
    _wrong_shares(model, ranks)


def _wrong_shares(model: PreTrainedModel, ranks: ExpertRanks) -> None:
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts' is spread over ranks already"):
        spread_experts(model, ranks)
    _register()
    with pytest.raises(ValueError, match=r"^model.layers.0.mlp.experts: got . of . experts .* ranks to spread_experts"):
        model(_tokens(1, 2))
    _register(ranks=ranks)
    whole = _use(_model("Mixtral"), NAME)
    with pytest.raises(ValueError, match=r"^experts: got 4 of 4 experts in this process; accepted is 2"):
        whole(_tokens(1, 2))
    whole.get_submodule("model.layers.0.mlp.experts")._is_expert_parallel = True
    with pytest.raises(ValueError, match="the library has spread itself"):
        whole(_tokens(1, 2))
    with pytest.raises(ValueError, match="is spread over ranks already"):
        spread_experts(whole, ranks)
    with pytest.raises(ValueError, match="Linear contains no stacked experts"):
        spread_experts(nn.Linear(2, 2), ranks)
    three = _odd_experts()
    with pytest.raises(ValueError, match="num_experts: got 3 for 2 ranks"):
        spread_experts(three, ranks)
    assert len(three.down_proj) == 3
    clamped = nn.ModuleList([_experts(), _odd_experts(is_concatenated=False)])
    with pytest.raises(ValueError, match=r"^experts: got OddExperts with gate and up interleaved"):
        spread_experts(clamped[1], ranks)
    with pytest.raises(ValueError, match=r"^1: got OddExperts with gate and up interleaved"):
        spread_experts(clamped, ranks)
    assert len(clamped[0].down_proj) == 4
    alone = _experts()
    assert spread_experts(alone, ranks) == ["gate_up_proj", "down_proj"]
    alone.config._experts_implementation = NAME
    with pytest.raises(RuntimeError, match="layer 'experts': DistributedDataParallel has taken its experts for copies"):
        DistributedDataParallel(alone)(*_choices(3))


def _on_two_ranks(rank: int, world_size: int) -> None:
    ranks = expert_ranks()
    for family in MODELS:
        for pipeline, wrapped in ((PIPELINES[0], False), (PipelineConfig(num_chunks=2, restore="S4"), True)):
            _spread_step(rank, world_size, family, pipeline, ranks, wrapped=wrapped)


def test_experts_spread_over_two_ranks() -> None:
    run_ranks(2, _on_two_ranks)
