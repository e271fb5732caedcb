"""What a gate is and how a layer is pipelined: numbers and names a user chooses, checked when they are given."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

GateKind = Literal["top_k", "switch", "gshard", "expert_choice"]
GateNoise = Literal["none", "gaussian", "jitter", "learned"]
Restore = Literal["none", "S1", "S2", "S3", "S4"]
Split = Literal["tokens", "local", "ranks"]


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """How tokens and experts choose each other.

    Source: MPipeMoE (arXiv:2506.22175) section IV-A for top-k routing; the other kinds and noises name their own
    papers in `moe_pipeline.gate`.
    """

    num_experts: int
    """Number of experts, over all ranks."""
    top_k: int = 2
    """Experts per token; with kind="expert_choice" the mean number of experts per token at capacity_factor 1."""
    kind: GateKind = "top_k"
    """Who chooses: each token its best experts (top_k, switch, gshard) or each expert its best tokens."""
    capacity_factor: float | None = None
    """Rows an expert may take, in units of an equal share (top_k * tokens / num_experts); None drops no token."""
    noise: GateNoise = "none"
    """Exploration in training: added to the logits (gaussian, learned) or multiplied into the gate's input (jitter)."""
    noise_std: float = 0.0
    """Size of the noise: standard deviation in logits (gaussian), half-width of the factor around 1 (jitter)."""
    normalize: bool = True
    """Scale each token's weights to sum to 1 (top_k and gshard; the other kinds use the router's probability)."""
    balance_weight: float = 0.01
    """Weight of the balance loss in the total."""
    z_weight: float = 0.0
    """Weight of the z-loss in the total."""
    importance_weight: float = 0.0
    """Weight of the importance loss in the total."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_kind()
        self._check_noise()

    def capacity_rows(self, num_tokens: int) -> int | None:
        """Most rows one expert takes.

        Args:
            num_tokens: Tokens that are routed; padding does not count.

        Returns:
            The number of rows, rounded up; None where nothing is dropped.

        Source: GShard (arXiv:2006.16668) section 3.2; Switch (arXiv:2101.03961) equation 3; Expert Choice
        (arXiv:2202.09368) section 3.2, whose capacity factor is our top_k * capacity_factor.
        """
        if self.capacity_factor is None:
            return None
        return math.ceil(self.capacity_factor * self.top_k * num_tokens / self.num_experts)

    def _check_numbers(self) -> None:
        _require(self.num_experts >= 1, "num_experts", self.num_experts, "an integer of at least 1")
        _require(self.top_k >= 1, "top_k", self.top_k, "an integer of at least 1")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k: got {self.top_k} with num_experts={self.num_experts}; a token cannot choose more experts "
                f"than there are: lower top_k to {self.num_experts} or raise num_experts"
            )
        if self.capacity_factor is not None:
            accepted = "a finite number above 0, or None to drop no token"
            _require(0 < self.capacity_factor < math.inf, "capacity_factor", self.capacity_factor, accepted)
        for field in ("noise_std", "balance_weight", "z_weight", "importance_weight"):
            value = getattr(self, field)
            _require(0 <= value < math.inf, field, value, "a finite number of at least 0")

    def _check_kind(self) -> None:
        kinds = get_args(GateKind)
        _require(self.kind in kinds, "kind", self.kind, f"one of {kinds}")
        if self.kind == "switch":
            _require(self.top_k == 1, "top_k", self.top_k, "1 with kind='switch', which routes a token to one expert")
        if self.kind == "gshard":
            _require(self.top_k == 2, "top_k", self.top_k, "2 with kind='gshard'; kind='top_k' takes any number")
        if self.kind in ("gshard", "expert_choice"):
            accepted = f"a number above 0 with kind={self.kind!r}, which limits the rows of an expert; try 1.0 to 2.0"
            _require(self.capacity_factor is not None, "capacity_factor", self.capacity_factor, accepted)
        if self.kind == "top_k" and self.top_k == 1 and self.num_experts > 1:
            accepted = (
                "False with top_k=1: a single weight scaled to sum to 1 is always 1, and the router would learn "
                "nothing from the task; pass normalize=False or top_k >= 2"
            )
            _require(not self.normalize, "normalize", self.normalize, accepted)

    def _check_noise(self) -> None:
        noises = get_args(GateNoise)
        _require(self.noise in noises, "noise", self.noise, f"one of {noises}")
        if self.noise in ("gaussian", "jitter"):
            accepted = f"a number above 0 with noise={self.noise!r}; pass noise='none' to switch it off"
            _require(self.noise_std > 0, "noise_std", self.noise_std, accepted)
        else:
            accepted = f"0.0 with noise={self.noise!r}, which has no size to set; pass noise='gaussian' or 'jitter'"
            _require(self.noise_std == 0, "noise_std", self.noise_std, accepted)
        if self.noise == "jitter":
            _require(self.noise_std < 1, "noise_std", self.noise_std, "a number below 1 with noise='jitter'")
        if self.noise == "learned":
            _require(self.kind == "top_k", "noise", self.noise, "'none', 'gaussian' or 'jitter' unless kind='top_k'")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """How a layer's tokens are cut into chunks whose messages hide behind compute, and what is kept for backward.

    Source: MPipeMoE (arXiv:2506.22175) sections III-B and III-D.
    """

    num_chunks: int | Literal["auto"] = 1
    """n; every rank must use the same. auto finds it for every number of tokens."""
    restore: Restore | Literal["auto"] = "none"
    """Kept for backward: all (none), or T_DI and T_M come back by S1 (offload both), S2 (resend, offload), S3 (offload,
    recompute) or S4 (resend, recompute). auto takes the fastest whose memory fits."""
    overlap: bool = True
    """Off waits for each operation before the next begins: the baseline that pipelining is measured against."""
    split: Split = "tokens"
    """What a chunk is: a slice of the tokens for every rank (tokens, the paper's); the same, but rows that stay on
    their rank go first and last, under the first and the last message (local, ours); all tokens for one rank (ranks,
    FasterMoE's)."""
    timeout_s: float = 300.0
    """Longest wait for another rank, in seconds, before an error says who waited for what."""
    choose_by: Literal["trial", "model"] = "trial"
    """How auto chooses: by timing steps while training, or by the model of `device` alone."""
    device: str | None = None
    """Name or path of a device file (`moe_pipeline.plan.device`): where trials begin, or all that model knows."""
    device_budget_bytes: int | None = None
    """Most bytes of device memory a layer's activations and buffers may take with auto; None is no limit."""
    host_budget_bytes: int | None = None
    """The same for copies on the host."""
    cache_folder: str | None = None
    """Where auto keeps what it found for later runs; None keeps nothing."""

    def __post_init__(self) -> None:
        counted = type(self.num_chunks) is int and self.num_chunks >= 1
        _require(counted or self.num_chunks == "auto", "num_chunks", self.num_chunks, "1 or more, or 'auto'")
        restores = (*get_args(Restore), "auto")
        _require(self.restore in restores, "restore", self.restore, f"one of {restores}")
        self._check_choice()
        _require(self.split in get_args(Split), "split", self.split, f"one of {get_args(Split)}")
        _require(0 < self.timeout_s < math.inf, "timeout_s", self.timeout_s, "a finite number of seconds above 0")

    @property
    def chooses(self) -> bool:
        """Whether something is left to choose for every call; not in the paper."""
        return "auto" in (self.num_chunks, self.restore)

    @property
    def fixed_chunks(self) -> int:
        """N of settings that leave nothing open; not in the paper."""
        if self.num_chunks == "auto":
            raise ValueError("num_chunks: got 'auto'; accepted is a number here, of a layer's choice for one call")
        return self.num_chunks

    @property
    def fixed_restore(self) -> Restore:
        """The strategy of settings that leave nothing open; not in the paper."""
        if self.restore == "auto":
            raise ValueError("restore: got 'auto'; accepted is a strategy here, of a layer's choice for one call")
        return self.restore

    def _check_choice(self) -> None:
        _require(self.choose_by in ("trial", "model"), "choose_by", self.choose_by, "'trial' or 'model'")
        for name in ("device_budget_bytes", "host_budget_bytes"):
            value = getattr(self, name)
            accepted = "a number of bytes of at least 0, or None"
            _require(value is None or (type(value) is int and value >= 0), name, value, accepted)
            accepted = "None unless num_chunks or restore is 'auto': a fixed choice takes what it takes"
            _require(value is None or self.chooses, name, value, accepted)
        if self.chooses:
            _require(self.split != "ranks", "split", self.split, "'tokens' or 'local' with 'auto'")
            _require(self.overlap, "overlap", self.overlap, "True with 'auto'")
            accepted = "a device's name or file with choose_by='model'"
            _require(self.choose_by == "trial" or self.device is not None, "device", self.device, accepted)


def _require(holds: bool, field: str, came: object, accepted: str) -> None:
    if not holds:
        raise ValueError(f"{field}: got {came!r}; accepted is {accepted}")
