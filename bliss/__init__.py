"""BLISS: train a sequence-to-sequence network on input -> output and on perturbed input -> input.

batch -> perturbed batch -> encoder states -> loss terms -> objective

    config.py       BlissConfig, every choice of the method
    vocabulary.py   which ids begin a word, and which are special
    noise.py        random bits that depend on the sentence alone, never on the batch, worker or rank
    generator.py    shuffles and replaces words (the perturbed batch)
    corrector.py    the extra layer and its token and position heads (training only)
    losses.py       the loss terms
    objective.py    the objective around any encoder-decoder network
    reference.py    the meaning, one token at a time
"""

from bliss.config import BlissConfig
from bliss.corrector import Corrector
from bliss.generator import Perturbed, perturb
from bliss.losses import sequence_loss
from bliss.objective import BlissLosses, bliss_losses, encode
from bliss.vocabulary import Vocabulary

__all__ = [
    "BlissConfig",
    "BlissLosses",
    "Corrector",
    "Perturbed",
    "Vocabulary",
    "bliss_losses",
    "encode",
    "perturb",
    "sequence_loss",
]
