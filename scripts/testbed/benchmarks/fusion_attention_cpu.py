"""Attention on a CPU, full and causal, forward and with gradients, beside what a user would run instead."""

from configs.schema import Config
from configs.typed import ConfigError
from scripts.testbed import launch
from scripts.testbed.benchmarks.cpu_contests import (
    Case,
    Cases,
    geomean,
    least,
    over,
    rows,
    run_contests,
    sections,
    share_of,
)
from scripts.testbed.benchmarks.cpu_shapes import ATTENTIONS, LONG_ATTENTIONS, attention_problem
from scripts.testbed.rows import headlines


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Time every attention in every precision, with every number of threads.

    Args:
        config: The run's configuration: `bench.cpu`.
        run: Where to write.

    Raises:
        ConfigError: Where a shape or a peer is unknown.
    """
    cpu = config.bench.cpu
    names = (cpu.shapes or tuple(ATTENTIONS))[: cpu.num_shapes]
    try:
        problems = [
            (name, attention_problem(name, dtype, causal=causal, backward=backward))
            for dtype in cpu.dtypes
            for backward in (False, True)
            for causal in (False, True)
            for name in names
        ]
    except ValueError as error:
        raise ConfigError(f"bench.cpu.{error}") from error
    found = run_contests(problems[:1] if config.smoke else problems, config, run.folder)  # gradients search for long
    summary = _summary(found)
    note = (
        "softmax(A B' / sqrt(K)) D, shapes as heads x M x K with N = M, H = K; causal counts the unmasked half alone."
    )
    return launch.Outcome(
        rows=(*rows(found), *headlines("fusion", summary)),
        summary=summary,
        sections=sections(found, "Attention", note),
        versions=found.versions,
    )


def _summary(found: Cases) -> dict[str, float | int | str | None]:
    """Headlines; those without a number of threads in their name are one thread's, or the worst of all."""
    full = found.of(1, backward=False, causal=False)
    causal = found.of(1, backward=False, causal=True)
    bf16 = found.of(1, "bf16", backward=False)
    forward = found.of(backward=False)
    train = found.of(1, backward=True)
    return {
        "speedup_sdpa_full_min": least(full, over("torch_sdpa")),
        "speedup_sdpa_causal_short_min": least([case for case in causal if not _is_long(case)], over("torch_sdpa")),
        "speedup_sdpa_causal_long_min": least([case for case in causal if _is_long(case)], over("torch_sdpa")),
        "bf16_speedup_sdpa_min": least(bf16, over("torch_sdpa")),
        "peak_fraction_full_min": least(full, share_of("peak_fp32")),
        "best_peer_ratio_min": least(forward, over()),
        "best_peer_ratio_geomean": geomean(forward, over()),
        "best_peer_ratio_min_1t": least([*full, *causal], over()),
        "best_peer_ratio_min_2t": least(found.of(2, backward=False), over()),
        "bf16_best_peer_ratio_min": least(found.of(dtype="bf16", backward=False), over()),
        "bf16_peak_fraction_min": least(bf16, share_of("peak_bf16", "peak_amx")),
        "bf16_avx512_peak_fraction_min": least(bf16, share_of("peak_bf16")),
        "speedup_sdpa_train": least(train, over("torch_sdpa")),
        "speedup_sdpa_train_geomean": geomean(train, over("torch_sdpa")),
        "train_best_peer_ratio_min": least(train, over()),
        "others_share": found.others_share,
    }


def _is_long(case: Case) -> bool:
    return case.shape in LONG_ATTENTIONS
