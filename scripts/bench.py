"""Time or measure a layer beside its peers: python -m scripts.bench experiment=<package>/<name>."""

from configs.schema import Config
from configs.typed import ConfigError
from scripts.testbed import launch
from scripts.testbed.benchmarks import (
    bliss_overhead,
    fusion_attention_cpu,
    fusion_chains_cpu,
    fusion_end_to_end_cpu,
    fusion_experts_cpu,
    fusion_model_accuracy_cpu,
    fusion_predicted_speedup,
    fusion_search_cost,
    fusion_traffic,
    fusion_triton_resources,
    moe_adaptive,
    moe_clusters,
    moe_fig2,
    moe_fig3,
    moe_fig8,
    moe_fig9,
    moe_fig10,
    moe_fig11,
    moe_fig12,
    moe_fig13,
    moe_journal,
    moe_layer,
    moe_memory,
    moe_model_accuracy,
    moe_overlap,
    moe_single,
    omoe_overhead,
)

SUBJECTS: dict[str, launch.Verb] = {
    "bliss_overhead": bliss_overhead.bench,
    "fusion_attention_cpu": fusion_attention_cpu.bench,
    "fusion_chains_cpu": fusion_chains_cpu.bench,
    "fusion_end_to_end_cpu": fusion_end_to_end_cpu.bench,
    "fusion_experts_cpu": fusion_experts_cpu.bench,
    "fusion_model_accuracy_cpu": fusion_model_accuracy_cpu.bench,
    "fusion_predicted_speedup": fusion_predicted_speedup.bench,
    "fusion_search_cost": fusion_search_cost.bench,
    "fusion_traffic": fusion_traffic.bench,
    "fusion_triton_resources": fusion_triton_resources.bench,
    "moe_adaptive": moe_adaptive.bench,
    "moe_clusters": moe_clusters.bench,
    "moe_fig10": moe_fig10.bench,
    "moe_fig11": moe_fig11.bench,
    "moe_fig12": moe_fig12.bench,
    "moe_fig13": moe_fig13.bench,
    "moe_fig2": moe_fig2.bench,
    "moe_fig3": moe_fig3.bench,
    "moe_fig8": moe_fig8.bench,
    "moe_fig9": moe_fig9.bench,
    "moe_journal": moe_journal.bench,
    "moe_layer": moe_layer.bench,
    "moe_memory": moe_memory.bench,
    "moe_model_accuracy": moe_model_accuracy.bench,
    "moe_overlap": moe_overlap.bench,
    "moe_single": moe_single.bench,
    "omoe_overhead": omoe_overhead.bench,
}


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Measure the experiment's subject beside its peers.

    Args:
        config: The run's configuration.
        run: Where to write.

    Raises:
        ConfigError: Where the experiment names no subject.
    """
    if config.bench.subject not in SUBJECTS:
        raise ConfigError(f"bench.subject: got {config.bench.subject}, accepts {', '.join(SUBJECTS)}")
    return SUBJECTS[config.bench.subject](config, run)


if __name__ == "__main__":
    launch.main("bench", bench)
