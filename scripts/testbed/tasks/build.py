"""From a configuration to its task: data, tokenizer and the class that knows the kind."""

import dataclasses
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from configs.schema import Config
from configs.typed import ConfigError
from scripts.testbed import pretrained
from scripts.testbed.data.load import Data, load
from scripts.testbed.data.tokenizer import train_tokenizer
from scripts.testbed.tasks import edits
from scripts.testbed.tasks.classification import Classification
from scripts.testbed.tasks.task import Task
from scripts.testbed.tasks.translation import Translation


def build(config: Config, folder: Path) -> Task:
    """Load the data, get a tokenizer and make the task.

    Args:
        config: The run's configuration.
        folder: The run's folder; the tokenizer is saved in it.

    Raises:
        ConfigError: Where the data's kind of task and the kind of network or a metric that is asked for do not go
            together, or that metric is not installed.
    """
    stand_in = config.data.stand_in if config.smoke else None
    data = load(config.data if stand_in is None else dataclasses.replace(config.data, name=stand_in, root=None))
    translates = data.task in ("translation", "summarization", "correction")
    if translates == (config.model.kind == "bert") or not (translates or data.task == "classification"):
        raise ConfigError(
            f"model.kind: got {config.model.kind} for {config.data.name}, which is {data.task}; "
            "accepts marian or bart for text generation and bert for classification"
        )
    further = edits.metrics(config.comparison.errant, data.task)
    tokenizer = tokenizer_of(config, data)
    tokenizer.save_pretrained(folder / "tokenizer")
    if translates:
        return Translation(data, tokenizer, config.model, seed=config.seed, further=further)
    return Classification(data, tokenizer, config.model, seed=config.seed)


def tokenizer_of(config: Config, data: Data) -> PreTrainedTokenizerFast:
    """The pretrained network's own tokenizer, or one trained on the training split alone."""
    if config.model.pretrained is not None:
        # RoBERTa's subwords begin with the blank before a word, which a list of words does not hold.
        words = {"add_prefix_space": True} if data.task == "tagging" else {}
        return AutoTokenizer.from_pretrained(pretrained.folder(config.model.pretrained), **words)
    named = ("source", "target", "text", "text_pair", "question", "context")
    texts = [text for name in named if name in data.train.column_names for text in data.train[name]]
    if "tokens" in data.train.column_names:
        texts = [" ".join(words) for words in data.train["tokens"]]
    return train_tokenizer(texts, vocab_size=config.model.vocab_size)
