"""Chains of two products on a CPU: fused, beside what a user would run instead, and beside the processor's peak."""

from configs.schema import Config
from configs.typed import ConfigError
from scripts.testbed import launch
from scripts.testbed.benchmarks.cpu_contests import (
    UNFUSED,
    Cases,
    geomean,
    least,
    over,
    rows,
    run_contests,
    sections,
    share_of,
)
from scripts.testbed.benchmarks.cpu_shapes import CHAINS, LONG_CHAINS, chain_problem
from scripts.testbed.rows import headlines

OPENBLAS = ("openblas", "openblas_skylakex")


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Time every chain in every precision, with every number of threads.

    Args:
        config: The run's configuration: `bench.cpu`.
        run: Where to write.

    Raises:
        ConfigError: Where a shape or a peer is unknown.
    """
    cpu = config.bench.cpu
    names = (cpu.shapes or tuple(CHAINS))[: cpu.num_shapes]
    try:
        problems = [(name, chain_problem(name, dtype)) for dtype in cpu.dtypes for name in names]
    except ValueError as error:
        raise ConfigError(f"bench.cpu.{error}") from error
    found = run_contests(problems, config, run.folder)
    summary = _summary(found)
    return launch.Outcome(
        rows=(*rows(found), *headlines("fusion", summary)),
        summary=summary,
        sections=sections(found, "Chains", "E = (A B) D, shapes as batch x M x N x K x H."),
        versions=found.versions,
    )


def _summary(found: Cases) -> dict[str, float | int | str | None]:
    """Headlines; those without a number of threads in their name are one thread's, or the worst of all."""
    one, two, bf16 = found.of(1), found.of(2), found.of(1, "bf16")
    long = [case for case in found.cases if case.problem.dtype == "fp32" and case.shape in LONG_CHAINS]
    return {
        "peak_fraction_geomean": geomean(one, share_of("peak_fp32")),
        "peak_fraction_min": least(one, share_of("peak_fp32")),
        "peak_fraction_geomean_2t": geomean(two, share_of("peak_fp32")),
        "peak_fraction_min_2t": least(two, share_of("peak_fp32")),
        "speedup_eager_out_min": least(one, over("torch_out")),
        "speedup_compile_min": least(one, over("torch_compile")),
        "speedup_openblas_geomean": geomean(one, over(*OPENBLAS)),
        "speedup_long_eager": least([case for case in long if case.threads == 1], over("torch_eager")),
        "speedup_own_unfused_long_2t": least([case for case in long if case.threads == 2], over(UNFUSED)),
        "best_peer_ratio_min": least(found.of(), over()),
        "best_peer_ratio_geomean": least_of(geomean(one, over()), geomean(two, over())),
        "best_peer_ratio_min_1t": least(one, over()),
        "best_peer_ratio_geomean_1t": geomean(one, over()),
        "best_peer_ratio_min_2t": least(two, over()),
        "best_peer_ratio_geomean_2t": geomean(two, over()),
        "bf16_peak_fraction_min": least(bf16, share_of("peak_bf16", "peak_amx")),
        "bf16_avx512_peak_fraction_min": least(bf16, share_of("peak_bf16")),
        "bf16_speedup_eager_geomean": geomean(bf16, over("torch_out")),
        "bf16_best_peer_ratio_min": least(found.of(dtype="bf16"), over()),
        "others_share": found.others_share,
    }


def least_of(*values: float | None) -> float | None:
    """The smallest of the figures that there are.

    Args:
        values: Any.
    """
    return min((value for value in values if value is not None), default=None)
