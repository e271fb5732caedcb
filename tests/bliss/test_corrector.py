import pytest
import torch
from closeness import assert_all_close
from torch import Tensor

from bliss import BlissConfig, Corrector, reference

SIZES = {"d_model": 8, "num_heads": 2, "d_ff": 12, "vocab_size": 11}


def make(dropout: float = 0.0, **choices: object) -> Corrector:
    return Corrector(BlissConfig(**choices), **SIZES, dropout=dropout)  # type: ignore[arg-type]


def gradients(corrector: Corrector, lengths: list[int], x_BSM: Tensor, *, loops: bool) -> dict[str, Tensor]:
    """Outputs of the real slots and every gradient of a weighted sum of them."""
    corrector.zero_grad()
    x_BSM = x_BSM.clone().to(corrector.token_bias_V.dtype).requires_grad_()
    if loops:
        z_NM = torch.cat(
            [reference.correct(corrector, x_SM[:length]) for x_SM, length in zip(x_BSM, lengths, strict=True)]
        )
    else:
        mask_BS = torch.arange(x_BSM.shape[1]) < torch.tensor(lengths)[:, None]
        z_NM = corrector(x_BSM, mask_BS)[mask_BS]
    (z_NM * torch.linspace(-1, 1, z_NM.numel(), dtype=z_NM.dtype).view_as(z_NM)).sum().backward()
    named = {name: p.grad for name, p in corrector.named_parameters() if p.grad is not None}
    assert x_BSM.grad is not None
    return {"z": z_NM.detach(), "x": x_BSM.grad} | {name: grad.clone() for name, grad in named.items()}


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_equals_the_reference_without_padding(layers: int) -> None:
    x_BSM, lengths = torch.randn(4, 6, 8), [6, 1, 3, 0]
    corrector = make(corrector_layers=layers)
    actual = gradients(corrector, lengths, x_BSM, loops=False)
    expected = gradients(corrector, lengths, x_BSM, loops=True)
    truth = gradients(make(corrector_layers=layers).double(), lengths, x_BSM, loops=True)
    assert len(actual) == 2 + 12 * layers
    assert_all_close(actual, expected, truth)


def test_padding_alone_stays_finite_even_in_bfloat16() -> None:
    corrector = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_BSM = corrector(torch.randn(2, 3, 8), torch.zeros(2, 3))
    z_BSM.float().sum().backward()
    assert torch.isfinite(z_BSM).all()
    assert all(torch.isfinite(p.grad).all() for p in corrector.parameters() if p.grad is not None)


def test_creation_leaves_the_global_random_stream_alone() -> None:
    before = torch.get_rng_state()
    make(corrector_layers=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_depend_on_the_seed_alone() -> None:
    first = make().state_dict()
    torch.manual_seed(99)
    assert all(torch.equal(value, first[name]) for name, value in make().state_dict().items())
    other = Corrector(BlissConfig(), **SIZES, seed=1).state_dict()
    assert not torch.equal(other["layers.0.expand.weight"], first["layers.0.expand.weight"])


def test_has_only_the_parts_it_needs() -> None:
    assert set(make(corrector_layers=0, target="restore_in_place").state_dict()) == {"token_bias_V"}
    assert make(max_displacement=4).position_logits(torch.zeros(3, 8)).shape == (3, 9)
    assert len(make(corrector_layers=2).layers) == 2


def test_token_head_is_tied_with_the_embedding() -> None:
    corrector, embedding_VM, z_RM = make(), torch.randn(11, 8, requires_grad=True), torch.randn(3, 8)
    logits_RV = corrector.token_logits(z_RM, embedding_VM)
    assert torch.equal(logits_RV, torch.nn.functional.linear(z_RM, embedding_VM, corrector.token_bias_V))
    logits_RV.sum().backward()
    assert embedding_VM.grad is not None
    assert "embedding" not in "".join(corrector.state_dict())


def test_dropout_acts_in_training_only() -> None:
    corrector, x_BSM, mask_BS = make(dropout=0.5), torch.randn(2, 3, 8), torch.ones(2, 3)
    assert not torch.equal(corrector(x_BSM, mask_BS), corrector(x_BSM, mask_BS))
    corrector.eval()
    assert torch.equal(corrector(x_BSM, mask_BS), corrector(x_BSM, mask_BS))


def test_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="num_heads is 3"):
        Corrector(BlissConfig(), **(SIZES | {"num_heads": 3}))
    with pytest.raises(ValueError, match="embedding_VM has 10 rows"):
        make().token_logits(torch.zeros(1, 8), torch.zeros(10, 8))
    with pytest.raises(ValueError, match=r"config\.target"):
        make(target="restore_in_place").position_logits(torch.zeros(1, 8))
