import pytest
import torch
from closeness import assert_all_close, assert_equal_up_to_rounding
from torch import nn
from transformers import MistralConfig, MistralModel

from fusion import hugging_face
from fusion.hugging_face import NAME, _Said, attention_forward
from fusion.run.executors import DEFAULT, executors
from fusion.run.planned import planned_executor
from tests.fusion.counted import Executor
from tests.fusion.models import WIDTHS, bert, llama, marian, padded, t5, tensor_of, tokens, translated


@pytest.fixture
def executor(monkeypatch):
    """What runs every chain where nothing is named."""
    made = Executor(lambda chain, needs: None)
    executors.add(DEFAULT, made)
    monkeypatch.setattr(hugging_face, "_SAID", _Said())
    yield made
    executors.add(DEFAULT, planned_executor())


def pair(make, **options):
    """A model that attends by chains, and one of the same weights that attends as the library spells it out."""
    torch.manual_seed(0)
    model, plain = make(attn_implementation=NAME, **options), make(attn_implementation="eager", **options)
    plain.load_state_dict(model.state_dict())
    return model, plain


def results(model, arguments):
    """The output and all gradients beside each other: the bias of keys has none, which its own size does not tell."""
    output = tensor_of(model(**arguments))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(output.square().mean(), parameters, allow_unused=True)
    gradients = torch.cat([gradient.flatten() for gradient in found if gradient is not None])
    return {"output": output.detach(), "gradients": gradients}


@pytest.mark.parametrize(
    ("make", "arguments"),
    [(bert, padded), (bert, tokens), (llama, padded), (llama, tokens), (marian, translated), (t5, translated)],
    ids=["BERT, padded", "BERT", "Llama, padded", "Llama", "Marian", "T5, which learns a bias"],
)
def test_models_learn_as_they_did(make, arguments, executor):
    model, plain = pair(make)
    given = arguments()
    mine, expected = results(model, given), results(plain, given)
    assert_all_close(mine, expected, results(plain.double(), given))
    assert executor.ran
    assert all(len(chain.products) == 2 for chain in executor.ran)


def test_grouped_heads_and_causal_masks_are_stages(executor):
    model, _ = pair(llama)
    model(**tokens())
    (chain,) = set(executor.ran)
    assert "causal(C, N <= M)" in str(chain)
    assert str(chain).startswith("C[Z,M,G,R,N] = A[Z,M,G,R,K] B[Z,N,G,K]")


def test_padding_is_a_mask_of_keys(executor):
    model, _ = pair(bert)
    model(**padded())
    assert {x.dims for chain in executor.ran for x in chain.inputs if x.name == "keep"} <= {"ZN", "ZMN"}


class Layer(nn.Module):
    is_causal = False


def drawn(dtype=torch.float32, *, kv_heads=2):
    return [torch.randn(2, heads, n, 8, dtype=dtype) for heads, n in ((4, 5), (kv_heads, 7), (kv_heads, 7))]


def torchs(query, key, value, mask=None, **options):
    grouped = {"enable_gqa": query.shape[1] != key.shape[1]}
    found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, **grouped, **options)
    return found.transpose(1, 2)


@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (1, 1, 5, 7), (2, 1, 1, 7), (1, 4, 1, 7), (2, 1, 5, 1)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_every_shape(shape, kind, executor):
    mask = torch.rand(shape) < 0.7 if kind == "bool" else torch.randn(shape)
    query, key, value = drawn()
    output, weights = attention_forward(Layer(), query, key, value, mask, scaling=0.3)
    assert weights is None
    assert output.is_contiguous()
    assert_equal_up_to_rounding("output", output, torchs(query, key, value, mask, scale=0.3), roundings=128)
    assert executor.ran


def test_a_mask_that_is_expanded_is_read_once(executor):
    mask = (torch.rand(2, 1, 1, 7) < 0.7).expand(2, 4, 5, 7)
    attention_forward(Layer(), *drawn(), mask)
    assert [tensor.dims for tensor in executor.ran[0].inputs if tensor.name == "keep"] == ["ZN"]


def test_autocast_casts_as_torch_does(executor):
    query, key, value = drawn()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = attention_forward(Layer(), query, key.bfloat16(), value, None)
        assert output.dtype == torch.bfloat16
        assert_equal_up_to_rounding("output", output, torchs(query, key, value), roundings=4)
    assert [chain.dtype for chain in executor.ran] == ["bf16"]


@pytest.mark.parametrize(
    ("given", "options", "reason"),
    [
        ({}, {"dropout": 0.1}, "dropout=0.1 of the weights: set attention dropout to 0, or call eval()"),
        ({}, {"sliding_window": 4}, "a sliding window of 4 keys"),
        ({"dtype": torch.float64}, {}, "dtypes torch.float64, torch.float64, torch.float64: accepted is one of"),
    ],
    ids=["dropout", "window", "dtype"],
)
def test_what_no_chain_computes_is_torchs_with_a_reason_once(given, options, reason, executor, caplog):
    tensors = drawn(kv_heads=4, **given)
    for _ in range(2):
        output, _ = attention_forward(Layer(), *tensors, None, **options)
    if "dropout" not in options:
        assert_equal_up_to_rounding("output", output, torchs(*tensors), roundings=4)
    assert not executor.asked
    assert caplog.text.count(reason) == 1


def test_where_no_kernel_runs_torchs_attention_does(executor, caplog):
    executor.refuses = lambda chain, needs: "never"
    query, key, value = drawn(kv_heads=4)
    output, _ = attention_forward(Layer(), query, key, value, None)
    assert torch.equal(output, torchs(query, key, value))
    assert "no kernel runs it on this device" in caplog.text


def test_a_window_wider_than_the_keys_is_none(executor):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "num_key_value_heads": 1, "use_cache": False, **WIDTHS}
    for window, runs in ((64, True), (3, False)):
        executor.ran.clear()
        MistralModel(MistralConfig(sliding_window=window, attn_implementation=NAME, **sizes))(**tokens())
        assert bool(executor.ran) == runs


def test_generation_uses_it_with_its_cache(executor):
    model, plain = pair(llama)
    given = tokens()
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    mine, expected = (m.eval().generate(**given, **settings) for m in (model, plain))
    assert torch.equal(mine, expected)
    assert executor.ran


def test_it_compiles_as_one_graph_with_other_sizes(executor):
    model, plain = pair(bert)
    torch._dynamo.reset()
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch, length in ((2, 6), (3, 8), (4, 9)):
        given = padded(batch, length)
        actual, expected = tensor_of(call(**given)), tensor_of(plain(**given))
        assert_equal_up_to_rounding("output", actual, expected, roundings=1024)
    actual.sum().backward()
    assert executor.ran


def test_wrong_tensors_are_named(executor):
    query, key, value = drawn()
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    for given, reason in (
        ((query[0], key, value, None), r"query: got shape \(4, 5, 8\); accepted are 4 dimensions"),
        (
            (query, key[:, :, :, :7], value, None),
            r"key: got shape \(2, 2, 7, 7\); accepted is \(2, a divisor of 4, keys, 8",
        ),
        ((query[:, :3], key, value, None), r"key: got shape \(2, 2, 7, 8\); accepted is \(2, a divisor of 3"),
        ((query, key, value[:, :, :6], None), r"value: got shape \(2, 2, 6, 8\); accepted is \(2, 2, 7, any\)"),
        ((query, key, value, mask[..., :6]), r"attention_mask: got shape \(2, 1, 5, 6\); accepted is what broadcasts"),
        ((query, key.to("meta"), value, None), "key: got a tensor on meta; accepted is the query's device, cpu"),
    ):
        with pytest.raises(ValueError, match=reason):
            attention_forward(Layer(), *given)


def test_empty_batches_strides_nan_and_inference_mode(executor):
    query, key, value = drawn(kv_heads=4)
    assert attention_forward(Layer(), query[:0], key[:0], value[:0], None)[0].shape == (0, 5, 4, 8)
    strided = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (query, key, value)]
    dense = attention_forward(Layer(), query, key, value, None)[0]
    with torch.inference_mode():
        found = attention_forward(Layer(), *strided, None)[0]
    assert_equal_up_to_rounding("strides", found, dense, roundings=64)
    query[1, 2, 3, 4] = float("nan")
    found = attention_forward(Layer(), query, key, value, None)[0]
    spelled_out = (query @ key.mT).softmax(-1) @ value  # torch's own kernel for CPUs loses the nan
    assert torch.equal(found.isnan(), spelled_out.transpose(1, 2).isnan())


def test_queries_without_keys_get_zeros_as_from_torch(executor):
    query, key, value = drawn(kv_heads=4)
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, 0, 2] = False
    output, _ = attention_forward(Layer(), query, key, value, mask)
    assert not output[0, 2].any()
    assert_equal_up_to_rounding("output", output, torchs(query, key, value, mask), roundings=64)


def test_models_export_with_the_operator(executor):
    exported = torch.export.export(llama(attn_implementation=NAME).eval(), (), tokens())
    assert torch.ops.mcfuser.chain.default in [node.target for node in exported.graph.nodes]


def test_gradient_checkpointing_gives_the_same(executor):
    model, plain = pair(llama)
    model.activation_checkpointing_enable({"use_reentrant": False})
    given = tokens()
    model.train()
    actual, expected = results(model, given), results(plain.train(), given)
    assert_all_close(actual, expected, results(plain.double(), given))
