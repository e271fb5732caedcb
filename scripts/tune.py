"""Search, and keep the winner for later runs: python -m scripts.tune experiment=<package>/<name>."""

from configs.schema import Config
from configs.typed import ConfigError
from scripts.testbed import launch
from scripts.testbed.benchmarks import (
    fusion_calibrate_cpu,
    fusion_funnel,
    moe_calibrate,
    moe_explain,
    moe_fit,
    thread_counts,
)

SUBJECTS: dict[str, launch.Verb] = {
    "fusion_calibrate_cpu": fusion_calibrate_cpu.tune,
    "fusion_funnel": fusion_funnel.tune,
    "moe_calibrate": moe_calibrate.tune,
    "moe_explain": moe_explain.tune,
    "moe_fit": moe_fit.tune,
    "threads": thread_counts.tune,
}


def tune(config: Config, run: launch.Run) -> launch.Outcome:
    """Search what the experiment names.

    Args:
        config: The run's configuration.
        run: Where to write.

    Raises:
        ConfigError: Where the experiment names nothing to search.
    """
    if config.tune.subject not in SUBJECTS:
        raise ConfigError(f"tune.subject: got {config.tune.subject}, accepts {', '.join(SUBJECTS)}")
    return SUBJECTS[config.tune.subject](config, run)


if __name__ == "__main__":
    launch.main("tune", tune)
