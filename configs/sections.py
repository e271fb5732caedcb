"""One frozen dataclass per config group that no package owns; the packages' own configs stand beside their code."""

import math
from dataclasses import dataclass, field
from typing import Literal

from bliss import BlissConfig
from configs.cpu import CPUSection
from configs.kernels import KernelsSection
from configs.typed import at_least, closest, share
from moe_pipeline import GateConfig
from moe_pipeline.config import PipelineConfig, Restore
from omoe import OMoEConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The test-bed network: built from these sizes, or a pretrained encoder."""

    kind: Literal["marian", "pegasus", "bart", "bert"]
    """Network class: marian and bart are encoder-decoders with the library's generation, bert is an encoder."""
    pretrained: str | None = None
    """A pretrained encoder: `minilm`, a folder in the library's format, or a BERT or RoBERTa by its name on the hub
    (bert-base-uncased, roberta-base); the sizes below are then its own."""
    vocab_size: int = 6000
    """Subwords in the tokenizer trained on the training split, special tokens included."""
    d_model: int = 256
    """Width of the residual stream."""
    d_ff: int = 1024
    """Hidden width of a feed-forward layer and of an expert."""
    num_heads: int = 4
    """Attention heads."""
    num_encoder_layers: int = 3
    """Encoder layers."""
    num_decoder_layers: int = 3
    """Decoder layers; ignored by an encoder."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Activation inside feed-forward layers."""
    dropout: float = 0.1
    """Dropout of hidden states."""
    max_length: int = 128
    """Longest sequence in subwords; longer ones are truncated."""

    def __post_init__(self) -> None:
        at_least(self, 1, "d_model", "d_ff", "num_heads", "num_encoder_layers", "num_decoder_layers")
        at_least(self, 8, "max_length")
        at_least(self, 300, "vocab_size")
        share(self, "dropout")
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads: got {self.num_heads}, accepts a divisor of d_model={self.d_model}")
        if self.pretrained is not None and self.kind != "bert":
            raise ValueError(
                f"pretrained: got {self.pretrained!r} with kind={self.kind}; only kind=bert can be pretrained"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which corpus, from where, and how much of it."""

    name: str = "libreoffice_help_de_en"
    """A name of the registry in scripts/testbed/data."""
    root: str | None = None
    """Folder that holds the set; null takes the shipped corpus, or else the hub."""
    max_train: int | None = None
    """Most training rows kept, evenly spaced over the split; null keeps all."""
    max_eval: int | None = None
    """Most rows kept of valid and of test each, evenly spaced; null keeps all."""
    stand_in: str | None = None
    """A shipped set that debug=smoke takes instead, where this one cannot be had everywhere."""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_train", "max_eval")
        if not self.name:
            raise ValueError("name: got an empty text, accepts a data set's name, such as libreoffice_help_de_en")
        if self.root == "":
            raise ValueError("root: got an empty text, accepts the folder that holds the set, or null")


@dataclass(frozen=True, kw_only=True)
class MoESection:
    """Which feed-forward layers become Mixtures of Experts, and how their tokens are routed."""

    enabled: bool
    """Off keeps the dense network."""
    layers: tuple[str, ...] = ("*",)
    """Patterns over the names of feed-forward layers, as in a shell: `*encoder*`."""
    expert_noise_std: float = 0.0
    """Symmetry-breaking noise on the copied experts, relative to each weight's standard deviation."""
    expert_ranks: int = 1
    """Ranks over which one copy of the experts is spread; 1 keeps all experts on every rank."""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    """Chunks, and what is kept for backward; see moe_pipeline/config.py."""
    gate: GateConfig = field(default_factory=lambda: GateConfig(num_experts=4, top_k=2))
    """Routing; see moe_pipeline/config.py."""

    def __post_init__(self) -> None:
        at_least(self, 0, "expert_noise_std")
        at_least(self, 1, "expert_ranks")
        if self.gate.num_experts % self.expert_ranks:
            raise ValueError(
                f"expert_ranks: got {self.expert_ranks}, accepts a divisor of gate.num_experts={self.gate.num_experts}"
            )
        if self.pipeline.split == "ranks" and self.pipeline.num_chunks != self.expert_ranks:
            raise ValueError(
                f"pipeline.num_chunks: got {self.pipeline.num_chunks} with pipeline.split=ranks, accepts "
                f"expert_ranks={self.expert_ranks}"
            )
        if not self.layers:
            raise ValueError(
                "layers: got an empty list, accepts at least one pattern; turn the section off with moe=off"
            )


@dataclass(frozen=True, kw_only=True)
class FusionSection:
    """Fused kernels inside the network."""

    enabled: bool
    """Whether chains compute attention and experts; where no kernel runs on the device, torch does."""
    patience_flops: float = 3e11
    """What torch computes first, in all calls with sizes of one interval, before a kernel is looked for, which takes
    seconds; 0 looks at once."""

    def __post_init__(self) -> None:
        at_least(self, 0, "patience_flops")


@dataclass(frozen=True, kw_only=True)
class OMoESection(OMoEConfig):
    """The orthogonal optimizer around the base optimizer, with a warm-up given as a share of the run."""

    enabled: bool
    """Off trains with the base optimizer alone."""


@dataclass(frozen=True, kw_only=True)
class BlissSection(BlissConfig):
    """The two-supervision objective of an encoder-decoder."""

    enabled: bool
    """Off trains on input -> output alone."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Optimisation, evaluation and checkpoints; executed by the library's Trainer."""

    max_steps: int
    """Optimizer steps."""
    batch_tokens: int
    """Padded tokens of a batch on the longer side; the batch size follows from the length."""
    learning_rate: float
    """Peak learning rate of AdamW."""
    schedule: Literal["inverse_sqrt", "linear", "cosine", "constant_with_warmup"] = "linear"
    """Learning-rate schedule after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    adam_beta2: float = 0.98
    """Second-moment decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped at this norm; 0 turns clipping off."""
    accumulation_steps: int = 1
    """Batches per optimizer step."""
    label_smoothing: float = 0.0
    """Label smoothing without BLISS, which has its own."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast precision; auto takes bf16 where the device has instructions for it."""
    threads: int | None = None
    """CPU threads of one rank; null takes the tuned number for this machine, else torch's choice."""
    log_every: int = 50
    """Steps between logged losses."""
    save_every: int = 500
    """Steps between validations and between checkpoints."""
    keep_checkpoints: int = 3
    """Checkpoints kept besides the best."""
    early_stopping: int | None = None
    """Validations without improvement before training stops; null trains to the end."""
    num_beams: int = 4
    """Beams of generated text."""
    deepspeed: Literal["off", "zero1", "zero2"] = "off"
    """DeepSpeed ZeRO stage."""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_steps", "batch_tokens", "accumulation_steps", "threads", "log_every", "save_every")
        at_least(self, 1, "early_stopping", "num_beams")
        at_least(self, 2, "keep_checkpoints")
        at_least(self, 0, "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm")
        share(self, "label_smoothing", "adam_beta2")
        if self.save_every % self.log_every:
            raise ValueError(
                f"save_every: got {self.save_every}, accepts a multiple of log_every={self.log_every}, "
                "so that a resumed run logs the same losses"
            )


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The machines a run is spread over."""

    num_ranks: int = 1
    """Processes; more than one are started by torchrun."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of every rank."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_ranks")


@dataclass(frozen=True, kw_only=True)
class ClustersSection:
    """Clusters that are simulated: how many ranks of which device, and the layer they share."""

    devices: tuple[str, ...] = ("a100_hdr", "h100_nvlink")
    """Names or paths of device files."""
    ranks: tuple[int, ...] = tuple(2**power for power in range(13))
    """Numbers of ranks to simulate."""
    node_gbit: float | None = None
    """Rate of a rank to other nodes, in Gbit/s; null takes the device file's."""
    peer_us: float | None = None
    """What each further rank adds to the latency of an all-to-all; null takes the device file's."""
    model: Literal["MoE-GPT3-S", "MoE-BERT-L", "MoE-GPT3-XL"] | None = "MoE-GPT3-XL"
    """A model of the paper's Table III; null takes d_model and d_hidden below."""
    d_model: int = 2048
    """Width of the tokens, without a model."""
    d_hidden: int = 8192
    """Hidden width of an expert, without a model."""
    gated: bool = False
    """Whether experts are gated, as SwiGLU is."""
    num_tokens: int = 16384
    """Tokens of each rank."""
    top_k: int = 1
    """Experts per token."""
    num_experts: int | None = None
    """Experts over all ranks; null has one for each rank, so that experts grow with ranks."""
    device_budget_bytes: int | None = None
    """Device memory the layer may take for activations and buffers; null takes the device's."""
    host_budget_bytes: int | None = None
    """The same for host memory."""

    def __post_init__(self) -> None:
        at_least(self, 1, "d_model", "d_hidden", "num_tokens", "top_k", "num_experts")
        at_least(self, 0, "device_budget_bytes", "host_budget_bytes", "peer_us")
        if self.node_gbit is not None and not 0 < self.node_gbit < math.inf:
            raise ValueError(f"node_gbit: got {self.node_gbit}, accepts a number above 0, or null")
        if not self.devices:
            raise ValueError("devices: got an empty list, accepts at least one name or path of a device file")
        if not self.ranks or min(self.ranks) < 1:
            raise ValueError(f"ranks: got {list(self.ranks)}, accepts a list of numbers, each 1 or more")
        for ranks in self.ranks:
            experts = ranks if self.num_experts is None else self.num_experts
            if experts % ranks:
                raise ValueError(
                    f"num_experts: got {experts}, which {ranks} of ranks={list(self.ranks)} do not divide; accepts a "
                    "multiple of every number of ranks, or null for one expert on each rank"
                )
            if self.top_k > experts:
                raise ValueError(f"top_k: got {self.top_k}, accepts {experts} or less with {experts} experts")
            if self.num_tokens * self.top_k < experts:
                raise ValueError(
                    f"num_tokens: got {self.num_tokens}, accepts {-(-experts // self.top_k)} or more with {experts} "
                    "experts, so that each gets a row from every rank"
                )


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """A benchmark of one layer beside its peers."""

    subject: Literal[
        "none", "moe_layer", "moe_overlap", "moe_memory", "moe_single", "moe_adaptive", "moe_model_accuracy",
        "moe_fig2", "moe_fig3", "moe_fig8", "moe_fig9", "moe_fig10", "moe_fig11", "moe_fig12", "moe_fig13",
        "moe_journal", "moe_clusters", "fusion_traffic", "fusion_predicted_speedup", "fusion_triton_resources",
        "fusion_chains_cpu", "fusion_attention_cpu", "fusion_model_accuracy_cpu", "fusion_end_to_end_cpu",
        "fusion_experts_cpu", "fusion_search_cost", "omoe_overhead", "bliss_overhead",
    ]  # fmt: skip
    """What is measured; none for experiments of the other verbs."""
    repeats: int = 30
    """Timed rounds; in each round the peers run one after the other."""
    warmup: int = 5
    """Rounds before the timed ones."""
    num_tokens: int = 1536
    """Tokens of the timed batch, on each rank."""
    d_model: int = 512
    """Width of the tokens, where the subject is a layer alone."""
    d_hidden: int = 1024
    """Hidden width of an expert."""
    num_experts: int = 4
    """Experts, over all ranks."""
    top_k: int = 1
    """Experts per token."""
    links_mbit: tuple[float, ...] = (0.0,)
    """Links between ranks, in Mbit/s; 0 is loopback, others are shaped and need root and iproute2."""
    chunks: tuple[int, ...] = (1, 2, 4, 8)
    """Chunk counts to measure."""
    restores: tuple[Restore, ...] = ("none", "S1", "S2", "S3", "S4")
    """Restore strategies to measure."""
    width_divisor: int = 4
    """What the widths of the paper's models are divided by to fit this machine."""
    batch_tokens: tuple[int, ...] = (1024, 4096, 16384)
    """Batch sizes to measure memory at, in tokens of each rank."""
    thread_counts: tuple[int, ...] = (1, 2)
    """Numbers of CPU threads to measure with, where there is one process."""
    clusters: ClustersSection = field(default_factory=ClustersSection)
    """What is simulated of clusters that nobody here has."""
    kernels: KernelsSection = field(default_factory=KernelsSection)
    """Fused kernels that are planned and compiled."""
    cpu: CPUSection = field(default_factory=CPUSection)
    """Fused kernels that are timed on a CPU beside other libraries."""

    def __post_init__(self) -> None:
        at_least(self, 1, "repeats", "num_tokens", "d_model", "d_hidden", "num_experts", "top_k", "width_divisor")
        at_least(self, 0, "warmup")
        for name, low in (("links_mbit", 0), ("chunks", 1), ("batch_tokens", 1), ("thread_counts", 1)):
            values = getattr(self, name)
            if not values or min(values) < low:
                raise ValueError(f"{name}: got {list(values)}, accepts a list of numbers, each {low} or more")


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """Sizes of one MoE layer."""

    num_tokens: int = 4096
    """Tokens of each rank."""
    d_model: int = 512
    """Width of the tokens."""
    d_hidden: int = 1024
    """Hidden width of an expert."""
    gated: bool = False
    """Whether experts are gated, as SwiGLU is."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Between the two products."""
    num_experts: int = 4
    """Experts, over all ranks."""
    num_ranks: int = 2
    """Ranks that share the experts."""
    top_k: int = 1
    """Experts per token."""
    element_bytes: int = 4
    """Bytes of an element."""

    def __post_init__(self) -> None:
        sizes = ("num_tokens", "d_model", "d_hidden", "num_experts", "num_ranks", "top_k", "element_bytes")
        at_least(self, 1, *sizes)
        if self.num_experts % self.num_ranks:
            raise ValueError(f"num_experts: got {self.num_experts}, accepts a multiple of num_ranks={self.num_ranks}")


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """A search whose winner is kept for later runs."""

    subject: Literal[
        "none", "threads", "moe_calibrate", "moe_explain", "moe_fit", "fusion_funnel", "fusion_calibrate_cpu"
    ]
    """What is searched; none for experiments of the other verbs."""
    candidates: tuple[int, ...] = ()
    """Candidates to measure; empty takes the powers of two up to the number of cores."""
    steps: int = 12
    """Training steps per measurement."""
    rounds: int = 3
    """Measurements per candidate, alternated."""
    link_mbit: float = 0.0
    """Link between ranks to calibrate, in Mbit/s; 0 is loopback, others are shaped and need root and iproute2."""
    device: str = "a100_hdr"
    """Name or path of the device file that choices are explained on."""
    device_budget_bytes: int | None = None
    """Device memory a layer may take in an explanation; null takes the device's."""
    host_budget_bytes: int | None = None
    """The same for host memory."""
    layer: LayerSizes = field(default_factory=LayerSizes)
    """The layer that is calibrated with or explained."""
    kernels: KernelsSection = field(default_factory=KernelsSection)
    """The kernel that is searched."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "rounds")
        at_least(self, 0, "link_mbit")


BASELINES = ("copy", "memory", "lead", "tfidf", "dense", "one_process", "one_process_reordered")


def known_baselines(names: tuple[str, ...]) -> None:
    """Refuse a baseline nobody wrote."""
    for name in names:
        if name not in BASELINES:
            raise ValueError(f"baselines: got {name!r}, {closest(name, BASELINES)}")
