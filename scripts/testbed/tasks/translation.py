"""Translation: a tokenizer trained on the training split, an encoder-decoder, and BLEU beside two simple baselines."""

import re
from collections.abc import Sequence

import sacrebleu
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from configs.sections import ModelConfig
from scripts.testbed import memory, networks
from scripts.testbed.data import Data
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row
from scripts.testbed.tasks.scores import OF_TASK, Metric
from scripts.testbed.tasks.task import IGNORED, Evaluation, Example, Predictor, Splits, by_length, pad

NUM_SHOWN = 10
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Translation:
    """Sentence to sentence.

    Args:
        data: Splits with `source` and `target` columns.
        tokenizer: Trained on the training split alone.
        model: Sizes of the network.
        seed: Seed of the network's weights.
        further: Metrics beside the task's own.
    """

    generates = True

    def __init__(
        self,
        data: Data,
        tokenizer: PreTrainedTokenizerFast,
        model: ModelConfig,
        *,
        seed: int,
        further: Sequence[Metric] = (),
    ) -> None:
        self.data = data
        self.metric = OF_TASK[data.task]
        self.further = further
        self._model = model
        self._seed = seed
        self.tokenizer = tokenizer
        self.data_sha256 = data.sha256
        self.splits = Splits(
            train=self._tokenize(data.train),
            valid=by_length(self._tokenize(data.valid)),
            test=self._tokenize(data.test),
        )

    @staticmethod
    def references(rows: Dataset) -> list[list[str]]:
        """All accepted targets of every row."""
        if "references" in rows.column_names:
            return [list(texts) for texts in rows["references"]]
        return [[text] for text in rows["target"]]

    def network(self) -> PreTrainedModel:
        """A fresh encoder-decoder, equal at every call."""
        return networks.translator(self._model, self.tokenizer, seed=self._seed)

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Pad examples into a batch; the sentence's number and epoch go along for the perturbation."""
        input_ids_BS = pad([example["input_ids"] for example in examples], self.tokenizer.pad_token_id)
        return {
            "input_ids": input_ids_BS,
            "attention_mask": (input_ids_BS != self.tokenizer.pad_token_id).long(),
            "labels": pad([example["labels"] for example in examples], IGNORED),
            "sentence_id": torch.tensor([example["sentence_id"] for example in examples]),
            "epoch": torch.tensor(examples[0].get("epoch", 0)),
        }

    def evaluate(self, trainer: Predictor, provider: str) -> Evaluation:
        """BLEU of the test split, and ten translations, evenly spaced, beside their references."""
        examples = by_length(self.splits.test)
        predicted = trainer.predict(examples).predictions[: len(examples)]  # ranks are filled up with repeats
        predicted[predicted < 0] = self.tokenizer.pad_token_id
        texts = self.tokenizer.batch_decode(predicted, skip_special_tokens=True)
        by_id = {example["sentence_id"]: text.strip() for example, text in zip(examples, texts, strict=True)}
        hypotheses = [by_id[sentence_id] for sentence_id in self.data.test["sentence_id"]]
        score = self._score(hypotheses)
        triples = list(zip(self.data.test["source"], self.data.test["target"], hypotheses, strict=True))
        shown = triples[:: max(1, len(triples) // NUM_SHOWN)][:NUM_SHOWN]
        table = Table(headers=("Source", "Reference", provider), rows=tuple(shown))
        return Evaluation(
            rows=(Row(provider=provider, metric=self.metric.name, unit=self.metric.unit, value=score),),
            summary={self.metric.name: score},
            sections=(Section(title=f"Translations by {provider}", note=str(self._signature()), table=table),),
        )

    def baseline(self, name: str) -> Evaluation | None:
        """`copy` returns the source, `lead` its first sentence, `memory` the target of the nearest training source."""
        sources: list[str] = list(self.data.test["source"])
        if name == "copy":
            hypotheses = sources
        elif name == "lead":
            hypotheses = [SENTENCE_END.split(source, maxsplit=1)[0] for source in sources]
        elif name == "memory":
            hypotheses = memory.translate(sources, self.data.train["source"], self.data.train["target"])
        else:
            return None
        references = self.references(self.data.test)
        rows = tuple(
            Row(provider=name, metric=part, unit=metric.unit, value=value)
            for metric in (self.metric, *self.further)
            for part, value in metric.by_name(metric.figures(hypotheses, references, sources).sum(0)).items()
        )
        return Evaluation(rows=rows, summary={f"{self.metric.name}_{name}": rows[0].value})

    def _tokenize(self, rows: Sequence[Example]) -> list[Example]:
        limit = {"truncation": True, "max_length": self._model.max_length}
        sources = self.tokenizer(list(rows["source"]), **limit)["input_ids"]  # type: ignore[call-overload]
        targets = self.tokenizer(list(rows["target"]), **limit)["input_ids"]  # type: ignore[call-overload]
        ids = rows["sentence_id"]  # type: ignore[call-overload]
        return [
            {"input_ids": source, "labels": target, "sentence_id": sentence_id}
            for source, target, sentence_id in zip(sources, targets, ids, strict=True)
        ]

    def _score(self, hypotheses: Sequence[str]) -> float:
        return self.metric(hypotheses, self.references(self.data.test), list(self.data.test["source"]))

    @staticmethod
    def _signature() -> str:
        metric = sacrebleu.BLEU()
        metric.corpus_score(["a"], [["a"]])
        return str(metric.get_signature())
