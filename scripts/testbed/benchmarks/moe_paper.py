"""What the papers print of MPipeMoE: the numbers of its figures, read off the drawings where no table gives them.

Bars are known to about 0.005. MPipeMoE is IPDPS 2023 (arXiv:2506.22175), MPMoE is IEEE TPDS 2024.
"""

from dataclasses import dataclass

from moe_pipeline.config import Restore

NUM_RANKS = 64
NUM_EXPERTS = 64
K = 1024
MODELS = ("MoE-GPT3-S", "MoE-BERT-L", "MoE-GPT3-XL")
POINTS = tuple((model, kilo * K) for model in MODELS for kilo in (4, 8, 16))
"""The nine cases of figures 8 and 9, in their order."""

SPEED_OVER_FASTMOE: dict[str, tuple[float, ...]] = {
    "FasterMoE": (1.42, 1.03, 1.14, 1.18, 1.17, 1.20, 1.31, 1.14, 1.08),
    "PipeMoE n=1": (1.91, 1.29, 1.29, 1.64, 1.69, 1.71, 2.87, 2.98, 3.25),
    "PipeMoE": (1.85, 1.41, 1.38, 1.93, 1.80, 1.83, 3.06, 3.40, 3.72),
    "MPipeMoE": (1.48, 1.18, 1.08, 1.33, 1.09, 1.52, 2.46, 2.75, 3.10),
}
"""Figure 8."""
MEMORY_OVER_FASTMOE: dict[str, tuple[float, ...]] = {
    "FasterMoE": (1.08, 1.12, 1.13, 1.08, 1.14, 1.16, 1.02, 1.09, 1.13),
    "PipeMoE": (1.10, 1.14, 1.17, 1.20, 1.27, 1.32, 1.11, 1.20, 1.27),
    "MPipeMoE": (0.776, 0.774, 0.775, 0.748, 0.736, 0.661, 0.673, 0.740, 0.600),
}
"""Figure 9."""

SAVING_TOKENS = {
    "MoE-GPT3-S": (8 * K, 16 * K, 32 * K, 64 * K),
    "MoE-BERT-L": (4 * K, 8 * K, 16 * K, 32 * K),
    "MoE-GPT3-XL": (16 * K, 32 * K, 64 * K, 128 * K),
}
"""Figure 10: the batches that its 36 bars fit, whatever its caption says."""
ACHIEVED_OVER_THEORY = {2: (0.93, 0.96), 4: (0.93, 0.96), 8: (0.89, 0.91)}
"""Figure 10: chunks -> lowest and highest ratio of the saving that was measured to the theoretical one."""

MEMORY_TIME_TOKENS = (1 * K, 2 * K, 4 * K, 8 * K, 16 * K)
"""Figure 11: the batches whose memory fits its points."""
MEMORY_TIME: dict[str, tuple[tuple[float, float], ...]] = {
    "PipeMoE n=4": ((393, 7.35), (530, 3.12), (803, 1.93), (1349, 1.10), (2442, 0.88)),
    "PipeMoE": ((393, 3.59), (530, 2.09), (803, 1.44), (1349, 0.98), (2442, 0.81)),
    "MPipeMoE": ((345, 4.14), (435, 2.36), (612, 1.48), (966, 1.20), (1674, 0.92)),
}
"""Figure 11: (MB, ms), the time falling with the batch: it is per token."""

SPEED_OVER_ONE_CHUNK = {
    4 * K: {2: 1.091, 4: 0.952, 8: 0.893},
    8 * K: {2: 1.061, 4: 1.073, 8: 0.996},
    16 * K: {2: 1.075, 4: 1.111, 8: 1.049},
    22 * K: {2: 1.087, 4: 1.088, 8: 1.089},
    31 * K: {2: 1.106, 4: 1.169, 8: 1.175},
}
"""Figure 12: tokens -> chunks -> speed over one chunk, MoE-GPT3-XL."""
SAME_BARS = 0.002
"""Figure 12: bars closer than this are one height."""

OVERHEAD_PERCENT: dict[tuple[int, int], dict[Restore, float]] = {
    (8, 4 * K): {"S1": 4.1, "S2": 3.6, "S3": 12.3, "S4": 11.6},
    (8, 8 * K): {"S1": 6.3, "S2": 4.9, "S3": 12.2, "S4": 12.5},
    (8, 16 * K): {"S1": 6.7, "S2": 5.1, "S3": 12.5, "S4": 13.3},
    (16, 4 * K): {"S1": 10.9, "S2": 14.8, "S3": 8.3, "S4": 13.4},
    (16, 8 * K): {"S1": 8.6, "S2": 11.0, "S3": 11.3, "S4": 15.7},
    (16, 16 * K): {"S1": 14.5, "S2": 8.4, "S3": 13.9, "S4": 14.5},
    (32, 4 * K): {"S1": 17.3, "S2": 5.5, "S3": 2.7, "S4": 3.0},
    (32, 8 * K): {"S1": 12.4, "S2": 5.9, "S3": 5.0, "S4": 6.0},
    (32, 16 * K): {"S1": 16.1, "S2": 11.8, "S3": 11.0, "S4": 10.8},
    (64, 4 * K): {"S1": 18.0, "S2": 14.0, "S3": 5.0, "S4": 8.8},
    (64, 8 * K): {"S1": 21.1, "S2": 20.9, "S3": 8.2, "S4": 9.7},
    (64, 16 * K): {"S1": 24.9, "S2": 19.0, "S3": 10.1, "S4": 7.2},
}
"""Figure 13: (ranks, tokens) -> strategy -> time over PipeMoE's, MoE-GPT3-XL."""
CHOSEN: dict[tuple[int, int], Restore] = dict(
    zip(OVERHEAD_PERCENT, ("S2", "S2", "S2", "S3", "S1", "S2", "S2", "S3", "S4", "S3", "S3", "S4"), strict=True)
)
"""Figure 13: what the paper's selector took."""


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """The journal's breakdown on its second cluster, of one model: shares of a time that are saved.

    Source: MPMoE (IEEE TPDS 2024) section 5.6.
    """

    compute_by_tensor_cores: float
    step_by_tensor_cores: float
    step_by_splitting: float
    """Of six chunks without overlap: negative, for it costs."""
    compute_and_messages_by_overlap: float


BREAKDOWN = {
    "MoE-BERT-L": Breakdown(
        compute_by_tensor_cores=0.58,
        step_by_tensor_cores=0.26,
        step_by_splitting=-0.12,
        compute_and_messages_by_overlap=0.30,
    ),
    "MoE-GPT3-XL": Breakdown(
        compute_by_tensor_cores=0.44,
        step_by_tensor_cores=0.23,
        step_by_splitting=-0.04,
        compute_and_messages_by_overlap=0.23,
    ),
}
BREAKDOWN_CHUNKS = 6
OVERLAP_EFFICIENCY = 0.70
"""Of what perfect overlap would reach."""
SCALING_NODES = (1, 2, 4, 8)
SCALING_AT_8_NODES = 5.76


def paper_chunks(num_tokens: int) -> int:
    """The chunk count that the papers report for a batch of MoE-GPT3-XL: 2 below 8k tokens, 4 up to 22k, 8 above.

    Args:
        num_tokens: B.
    """
    return 2 if num_tokens < 8 * K else 4 if num_tokens <= 22 * K else 8
