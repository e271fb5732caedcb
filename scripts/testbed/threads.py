"""How many CPU threads a network trains with: what the configuration says, what was tuned, or torch's choice."""

import json
import logging
from pathlib import Path

import torch

from configs.schema import Config
from scripts.testbed import rows
from scripts.testbed.files import cache_folder, write_text

logger = logging.getLogger(__name__)

FORMAT = 1


def chosen(config: Config) -> int:
    """Threads for this run.

    Args:
        config: `trainer.threads` wins; where it is null, what tune found for this network here; else torch's own.
    """
    if config.trainer.threads is not None:
        return config.trainer.threads
    return read().get(key(config), torch.get_num_threads())


def key(config: Config) -> str:
    """What a tuned number of threads is valid for: sizes, batch, methods, machine and versions."""
    model, trainer = config.model, config.trainer
    parts = (
        f"{model.kind} d{model.d_model} f{model.d_ff} e{model.num_encoder_layers} d{model.num_decoder_layers}",
        f"v{model.vocab_size} tokens{trainer.batch_tokens} {trainer.precision} ranks{config.cluster.num_ranks}",
        f"experts{config.moe.gate.num_experts if config.moe.enabled else 0} bliss{config.bliss.enabled}",
        rows.device("cpu"),
        f"torch {torch.__version__}",
    )
    return ", ".join(parts)


def cache_file() -> Path:
    """Where tuned numbers are kept between runs."""
    return cache_folder() / "threads.json"


def read() -> dict[str, int]:
    """All tuned numbers; a file that cannot be read is reported and counts as empty."""
    path = cache_file()
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        found = dict(content["threads"])
        if not all(isinstance(name, str) and type(value) is int and value > 0 for name, value in found.items()):
            raise ValueError("an entry is not a positive number of threads")
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is ignored and will be rewritten by tune: %s", path, error)
        return {}
    return found


def keep(name: str, value: int) -> Path:
    """Keep a tuned number; two processes may do so at once, and the file is whole at any moment."""
    write_text(cache_file(), json.dumps({"format": FORMAT, "threads": {**read(), name: value}}, indent=1))
    return cache_file()
