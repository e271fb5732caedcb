import pytest
import torch
import transformers
from closeness import assert_all_close, assert_close
from ranks import run_ranks
from torch import Tensor, nn

from moe_pipeline import GateConfig, MoEFeedForward, MoELayer, PipelineConfig, routed, upcycle
from moe_pipeline.parallel import gather_state
from moe_pipeline.run.ranks import expert_ranks

CONFIG = GateConfig(num_experts=4, top_k=2)
_SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_PAIR = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 20,
    "pad_token_id": 1,
    "decoder_start_token_id": 1,
    "dropout": 0.0,
}
_T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
_DISTIL = {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 20}
_IMAGE = {"image_size": 8, "patch_size": 4}
FAMILIES = {
    "BERT": lambda: transformers.BertModel(transformers.BertConfig(**_SHAPE)),
    "BERT in chunks": lambda: transformers.BertModel(transformers.BertConfig(**_SHAPE, chunk_size_feed_forward=1)),
    "RoBERTa": lambda: transformers.RobertaModel(transformers.RobertaConfig(**_SHAPE)),
    "DistilBERT": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(**_DISTIL, dropout=0.0, attention_dropout=0.0)
    ),
    "BART": lambda: transformers.BartModel(transformers.BartConfig(**_PAIR)),
    "mBART": lambda: transformers.MBartModel(transformers.MBartConfig(**_PAIR, activation_function="relu")),
    "Marian": lambda: transformers.MarianModel(transformers.MarianConfig(**_PAIR, activation_function="swish")),
    "T5": lambda: transformers.T5Model(transformers.T5Config(**_T5, feed_forward_proj="relu")),
    "gated T5": lambda: transformers.T5Model(transformers.T5Config(**_T5, feed_forward_proj="gated-gelu")),
    "ViT": lambda: transformers.ViTModel(transformers.ViTConfig(**_SHAPE, **_IMAGE)),
    "Llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**_SHAPE, mlp_bias=True)),
}
MOE_NAMES = {
    "BERT": "encoder.layer.0.intermediate.moe.experts.up.weight",
    "BART": "decoder.layers.0.fc1.moe.experts.down.weight",
    "DistilBERT": "transformer.layer.1.ffn.lin1.moe.experts.up.weight",
    "gated T5": "encoder.block.0.layer.1.DenseReluDense.moe.experts.up.weight",
    "Llama": "layers.1.mlp.moe.experts.up.weight",
}


def _model(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases start at zero, where a lost one would not show
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def _inputs(family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    if family == "ViT":
        return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8, dtype=dtype).view(2, 3, 8, 8)}
    inputs = {"input_ids": torch.arange(2, 16).view(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    inputs["attention_mask"][1, 5:] = 0
    if family in ("BART", "mBART", "Marian", "T5", "gated T5"):
        inputs["decoder_input_ids"] = torch.arange(20, 30).view(2, 5)
    return inputs


def _run(family: str, dtype: torch.dtype, *, sparse: bool, training: bool) -> dict[str, Tensor]:
    """The model's output and the gradient of everything that dense and upcycled models share."""
    model = _model(family)
    if sparse:
        upcycle(model, CONFIG)
    model.to(dtype).train(training)
    y = model(**_inputs(family, dtype))[0]
    weights = torch.linspace(-1, 2, y.numel(), dtype=dtype).view(y.shape)
    (y * weights).sum().backward()
    shared = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and ".moe." not in name}
    return {"y": y.detach(), **shared}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_dense_function_with_its_gradients(family: str, training: bool) -> None:
    truth = _run(family, torch.float64, sparse=False, training=training)
    reference = _run(family, torch.float32, sparse=False, training=training)
    actual = _run(family, torch.float32, sparse=True, training=training)
    assert set(actual) < set(reference)
    assert len(actual) > len(reference) / 2
    for name in actual:  # a gradient that is 0 in truth (a bias under a softmax) is compared at the scale of 1
        assert_close(name, *(run[name] + (truth[name].abs().max() < 1e-12) for run in (actual, reference, truth)))


def test_the_experts_gradients_sum_to_the_dense_gradient() -> None:
    """Weights sum to 1, so the copies share out the gradient of what they are copies of."""

    def run(dtype: torch.dtype, *, sparse: bool) -> dict[str, Tensor]:
        model = _model("BART")
        if sparse:
            upcycle(model, CONFIG)
        layer = model.to(dtype).eval().encoder.layers[0]
        model(**_inputs("BART", dtype))[0].square().sum().backward()
        if not sparse:
            return {"up": layer.fc1.weight.grad, "down": layer.fc2.weight.grad, "bias": layer.fc2.bias.grad}
        up, down = layer.fc1.moe.experts.up, layer.fc1.moe.experts.down
        return {"up": up.weight.grad.sum(0), "down": down.weight.grad.sum(0), "bias": down.bias.grad.sum(0)}

    assert_all_close(
        *(
            run(dtype, sparse=sparse)
            for dtype, sparse in ((torch.float32, True), (torch.float32, False), (torch.float64, False))
        )
    )


@pytest.mark.parametrize("family", MOE_NAMES)
def test_parameters_are_where_others_look_for_them(family: str) -> None:
    model = _model(family)
    before = sum(parameter.numel() for parameter in model.parameters())
    upcycle(model, CONFIG)
    assert MOE_NAMES[family] in dict(model.named_parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) > 2 * before - 16 * 50 * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_state_round_trips(family: str) -> None:
    trained, fresh = _model(family), FAMILIES[family]()
    upcycle(trained, CONFIG, expert_noise_std=0.5, seed=1)
    upcycle(fresh, CONFIG, seed=2)
    fresh.load_state_dict(trained.state_dict())
    inputs = _inputs(family, torch.float32)
    assert torch.equal(trained.eval()(**inputs)[0], fresh.eval()(**inputs)[0])


def test_a_sequence_model_generates_as_before() -> None:
    torch.manual_seed(0)
    config = transformers.MarianConfig(**_PAIR, eos_token_id=0, forced_eos_token_id=0)
    model = transformers.MarianMTModel(config).eval()
    source = torch.arange(2, 16).view(2, 7)
    dense = model.generate(source, max_new_tokens=6, num_beams=2)
    upcycle(model, CONFIG)
    assert torch.equal(model.generate(source, max_new_tokens=6, num_beams=2), dense)


def test_masks_reach_encoder_and_decoder() -> None:
    model = _model("BART").eval()
    names = upcycle(model, CONFIG)
    inputs = _inputs("BART", torch.float32)
    mask = inputs["attention_mask"].bool()
    plain = model(**inputs)[0]
    with routed(model, {"encoder": mask, "decoder": torch.ones(2, 5, dtype=torch.bool)}) as records:
        masked = model(**inputs)[0]
    assert [records[f"{name}.fc1.moe"][0].load_E.sum().item() for name in names] == [24, 24, 20]
    assert_close("y", masked, plain, plain)  # nothing attends to the padding that the experts now skip


def test_patterns_choose_layers() -> None:
    model = _model("BART")
    assert upcycle(model, CONFIG, layers=["encoder.layers.1", "*decoder*"]) == ["encoder.layers.1", "decoder.layers.0"]
    assert isinstance(model.encoder.layers[0].fc1, nn.Linear)
    assert upcycle(model, CONFIG) == ["encoder.layers.0"]
    assert all(isinstance(layer.fc1, MoEFeedForward) for layer in (*model.encoder.layers, *model.decoder.layers))


def test_dropout_moves_into_the_experts() -> None:
    bart = transformers.BartModel(transformers.BartConfig(**_PAIR, activation_dropout=0.25))
    upcycle(bart, CONFIG)
    assert bart.encoder.layers[0].activation_dropout == 0
    assert bart.encoder.layers[0].fc1.moe.experts.dropout.p == 0.25
    t5 = transformers.T5Model(transformers.T5Config(**{**_T5, "dropout_rate": 0.125}))
    upcycle(t5, CONFIG)
    assert t5.encoder.block[0].layer[1].DenseReluDense.moe.experts.dropout.p == 0.125


def test_seed_decides_and_the_global_stream_stays() -> None:
    models = [_model("BERT") for _ in range(3)]
    before = torch.get_rng_state()
    for model, seed in zip(models, (5, 5, 6), strict=True):
        upcycle(model, CONFIG, expert_noise_std=0.1, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    router, up = "encoder.layer.0.intermediate.moe.gate.router.weight", MOE_NAMES["BERT"]
    assert not torch.equal(first[router], other[router])
    assert not torch.equal(first[up], other[up])


def test_noise_is_relative_to_each_weight() -> None:
    model = transformers.T5Model(transformers.T5Config(**{**_T5, "d_ff": 512}, feed_forward_proj="gated-gelu"))
    feed_forward = model.encoder.block[0].layer[1].DenseReluDense
    feed_forward.wi_1.weight.data *= 7
    gate, linear, down = feed_forward.wi_0.weight, feed_forward.wi_1.weight, feed_forward.wo.weight
    upcycle(model, CONFIG, expert_noise_std=0.5)
    experts = model.encoder.block[0].layer[1].DenseReluDense.moe.experts
    for noise, weight in (
        (experts.up.weight[:, :512] - gate, gate),
        (experts.up.weight[:, 512:] - linear, linear),
        (experts.down.weight - down, down),
    ):
        ratio = (noise.std() / weight.std()).item()
        assert abs(ratio - 0.5) < 6 * 0.5 / (2 * noise.numel()) ** 0.5  # six deviations of an estimated deviation
    assert not torch.equal(experts.up.weight[0], experts.up.weight[1])


def test_keeps_device_dtype_and_mode() -> None:
    model = _model("Llama").bfloat16().eval()
    upcycle(model, CONFIG)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    "config",
    [
        GateConfig(num_experts=4, top_k=1, kind="switch"),
        GateConfig(num_experts=4, normalize=False),
        GateConfig(num_experts=4, capacity_factor=2.0),
        GateConfig(num_experts=4, kind="gshard", capacity_factor=2.0),
        GateConfig(num_experts=4, kind="expert_choice", capacity_factor=1.0),
    ],
)
def test_refuses_a_gate_that_changes_the_function(config: GateConfig) -> None:
    model = _model("BERT")
    with pytest.raises(ValueError, match=r"config: .*exact=False"):
        upcycle(model, config)
    assert isinstance(model.encoder.layer[0].intermediate.dense, nn.Linear)
    assert len(upcycle(model, config, exact=False)) == 2
    assert torch.isfinite(model(**_inputs("BERT", torch.float32))[0]).all()


class _ScaledMLP(nn.Module):
    """Llama's parts, and a factor that no part shows."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class _NormedFeedForward(nn.Module):
    """BART's parts, and a normalisation of the hidden values."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)
        self.ffn_layernorm = nn.LayerNorm(8)


def test_refuses_what_it_would_change() -> None:
    model = nn.Sequential(_ScaledMLP())
    with pytest.raises(ValueError, match=r"model: '0' \(_ScaledMLP\).*computes something else"):
        upcycle(model, CONFIG)
    assert isinstance(model[0], _ScaledMLP)
    with pytest.raises(ValueError, match="model: no feed-forward layer found in Sequential"):
        upcycle(nn.Sequential(_NormedFeedForward()), CONFIG)
    wider = _NormedFeedForward()
    wider.ffn_layernorm, wider.fc2 = nn.Identity(), nn.Linear(8, 5)
    with pytest.raises(ValueError, match="model: no feed-forward layer found in Sequential"):
        upcycle(nn.Sequential(wider), CONFIG)


def test_refuses_what_does_not_match() -> None:
    with pytest.raises(ValueError, match=r"model: no feed-forward layer found in Linear.*fc1.*gate_proj"):
        upcycle(nn.Linear(2, 2), CONFIG)
    with pytest.raises(ValueError, match=r"layers: 'encoder.layers.9' matches no.*encoder.layers.1"):
        upcycle(_model("BART"), CONFIG, layers=["encoder.layers.9"])
    with pytest.raises(TypeError, match="layers: got the string"):
        upcycle(_model("BART"), CONFIG, layers="*")
    with pytest.raises(ValueError, match="layers: got no pattern"):
        upcycle(_model("BART"), CONFIG, layers=[])
    with pytest.raises(ValueError, match=r"expert_noise_std: got -0\.1"):
        upcycle(_model("BART"), CONFIG, expert_noise_std=-0.1)


def _check_ranks(rank: int, num_ranks: int) -> None:
    ranks, pipeline = expert_ranks(), PipelineConfig(num_chunks=2)
    whole, spread = _model("BART"), _model("BART")
    names = upcycle(whole, CONFIG, expert_noise_std=0.1)
    assert upcycle(spread, CONFIG, expert_noise_std=0.1, pipeline=pipeline, ranks=ranks) == names
    gathered, state = gather_state(spread), whole.state_dict()
    assert [name for name in state if not torch.equal(gathered[name], state[name])] == []
    layers = [module for module in spread.modules() if isinstance(module, MoELayer)]
    assert [layer.name for layer in layers] == names
    assert len({id(layer.workspace) for layer in layers}) == 1
    assert {layer.pipeline for layer in layers} == {pipeline}
    truth = whole.double().eval()(**_inputs("BART", torch.float64))[0]
    y = whole.float().eval()(**_inputs("BART", torch.float32))[0]
    assert_close("y", spread.eval()(**_inputs("BART", torch.float32))[0], y, truth)
    with pytest.raises(ValueError, match="num_experts: got 3 for 2 ranks"):
        upcycle(_model("BART"), GateConfig(num_experts=3), ranks=ranks)


def test_ranks_share_the_experts_that_one_process_would_have() -> None:
    run_ranks(2, _check_ranks)
