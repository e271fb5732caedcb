"""Classification of a text or a pair of texts: accuracy beside TF-IDF with logistic regression."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from configs.sections import ModelConfig
from scripts.testbed import networks
from scripts.testbed.data import Data
from scripts.testbed.rows import Row
from scripts.testbed.tasks.task import Evaluation, Example, Predictor, Splits, by_length, pad


class Classification:
    """Text, or a pair of texts, to a label.

    Args:
        data: Splits with `text`, perhaps `text_pair`, and `label` columns.
        tokenizer: The pretrained encoder's, or one trained on the training split alone.
        model: Sizes of the network, or the name of the pretrained encoder.
        seed: Seed of the network's fresh weights.
    """

    generates = False

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerFast, model: ModelConfig, *, seed: int) -> None:
        self._data = data
        self._model = model
        self._seed = seed
        self.tokenizer = tokenizer
        self.data_sha256 = data.sha256
        self.splits = Splits(
            train=self._tokenize(data.train),
            valid=by_length(self._tokenize(data.valid)),
            test=self._tokenize(data.test),
        )

    def network(self) -> PreTrainedModel:
        """A fresh encoder with a head, equal at every call."""
        return networks.classifier(self._model, self.tokenizer, self._data.label_names, seed=self._seed)

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Pad examples into a batch."""
        input_ids_BS = pad([example["input_ids"] for example in examples], self.tokenizer.pad_token_id)
        return {
            "input_ids": input_ids_BS,
            "attention_mask": (input_ids_BS != self.tokenizer.pad_token_id).long(),
            "labels": torch.tensor([example["labels"] for example in examples]),
        }

    def evaluate(self, trainer: Predictor, provider: str) -> Evaluation:
        """Accuracy on the test split, in percent."""
        examples = by_length(self.splits.test)
        logits = trainer.predict(examples).predictions[: len(examples)]  # ranks are filled up with repeats
        predicted = np.argmax(logits, axis=-1)
        return self._accuracy(provider, predicted, np.array([example["labels"] for example in examples]))

    def baseline(self, name: str) -> Evaluation | None:
        """`tfidf` is logistic regression on weighted words and word pairs."""
        if name != "tfidf":
            return None
        model = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10.0, max_iter=1000)
        )
        model.fit(self._texts(self._data.train), list(self._data.train["label"]))
        return self._accuracy("tfidf", model.predict(self._texts(self._data.test)), np.array(self._data.test["label"]))

    @staticmethod
    def _accuracy(provider: str, predicted: Any, labels: Any) -> Evaluation:
        accuracy = 100.0 * float((predicted == labels).mean())
        row = Row(provider=provider, metric="accuracy", unit="percent", value=accuracy)
        return Evaluation(rows=(row,), summary={"accuracy" if provider == "moe" else f"accuracy_{provider}": accuracy})

    def _tokenize(self, rows: Any) -> list[Example]:
        pairs = [list(rows["text_pair"])] if "text_pair" in rows.column_names else []
        ids = self.tokenizer(list(rows["text"]), *pairs, truncation=True, max_length=self._model.max_length)[
            "input_ids"
        ]
        return [
            {"input_ids": tokens, "labels": label, "sentence_id": sentence_id}
            for tokens, label, sentence_id in zip(ids, rows["label"], rows["sentence_id"], strict=True)
        ]

    @staticmethod
    def _texts(rows: Any) -> list[str]:
        if "text_pair" in rows.column_names:
            return [f"{text} {pair}" for text, pair in zip(rows["text"], rows["text_pair"], strict=True)]
        return list(rows["text"])
