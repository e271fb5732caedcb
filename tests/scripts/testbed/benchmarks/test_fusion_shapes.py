"""The shared shapes are those of mcfuser.md's tables, by hand for some."""

from scripts.testbed.benchmarks.fusion_shapes import ATTENTIONS, GEMM_CHAINS, SELF_ATTENTION, SHAPES


def test_there_are_twelve_of_each_in_fp16() -> None:
    assert len(GEMM_CHAINS) == len(ATTENTIONS) == 12
    assert list(SHAPES) == [*GEMM_CHAINS, *ATTENTIONS]
    assert {chain.dtype for chain in SHAPES.values()} == {"fp16"}
    assert all(len(chain.products) == 2 for chain in SHAPES.values())


def test_some_by_hand() -> None:
    assert GEMM_CHAINS["G6"].sizes == {"M": 512, "N": 512, "K": 1024, "H": 256}
    assert GEMM_CHAINS["G12"].sizes == {"Z": 8, "M": 1024, "N": 1024, "K": 128, "H": 128}
    assert ATTENTIONS["ViT-Huge/16"].sizes == {"G": 16, "M": 208, "N": 208, "K": 80, "H": 80}
    assert ATTENTIONS["Mixer-Base/32-S"].sizes == {"M": 768, "N": 384, "K": 64, "H": 64}


def test_what_grows_in_the_figure_grows_here() -> None:
    """K doubles from G4 to G6, only M grows from G7 to G9, the batch is 1, 4 and 8 from G10 on."""
    assert [GEMM_CHAINS[name].sizes["K"] for name in ("G4", "G5", "G6")] == [256, 512, 1024]
    assert [GEMM_CHAINS[name].sizes["M"] for name in ("G7", "G8", "G9")] == [512, 1024, 2048]
    assert [GEMM_CHAINS[name].sizes.get("Z", 1) for name in ("G10", "G11", "G12")] == [1, 4, 8]


def test_every_attention_has_a_softmax_and_the_papers_names_are_shapes() -> None:
    assert all(chain.softmax_over("C") == "N" for chain in ATTENTIONS.values())
    assert list(SELF_ATTENTION) == [f"S{index}" for index in range(1, 10)]
    assert set(SELF_ATTENTION.values()) <= set(ATTENTIONS)
