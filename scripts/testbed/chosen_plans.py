"""What layers chose for themselves while they trained: chunks and strategy for every range of batches."""

from torch import nn

from moe_pipeline import MoELayer
from scripts.testbed.report import Section, Table


def sections(model: nn.Module) -> tuple[Section, ...]:
    """A table of every choice, measured beside predicted; nothing where layers had nothing to choose.

    Args:
        model: What was trained.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    rows = tuple(
        (
            name,
            f"{finding.tokens:,}",
            str(finding.num_chunks),
            finding.restore,
            _ms(finding.measured_us),
            _ms(finding.predicted_us),
        )
        for name, layer in layers.items()
        if layer.adaptive is not None
        for finding in layer.adaptive.findings()
    )
    if not rows:
        return ()
    trials = sum(layer.adaptive.trial_steps for layer in layers.values() if layer.adaptive is not None)
    note = (
        f"Forward and backward of a layer on the slowest rank. {trials} steps tried what was not known to be the best. "
        "Predictions need a device file (moe.pipeline.device)."
    )
    headers = ("Layer", "Tokens up to", "Chunks", "Strategy", "Measured", "Predicted")
    return (Section(title="Chunks and strategy", note=note, table=Table(headers=headers, rows=rows)),)


def _ms(time_us: float | None) -> str:
    return "-" if time_us is None else f"{time_us / 1e3:.2f} ms"
