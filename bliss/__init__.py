"""BLISS: train a sequence-to-sequence network on input -> output and on perturbed input -> input.

batch -> perturbed batch -> encoder states -> loss terms -> objective

    config.py       BlissConfig and RivalConfig, every choice of the method and of its rivals
    vocabulary.py   which ids begin a word, and which are special
    noise.py        random bits that depend on the sentence alone, never on the batch, worker or rank
    generator.py    shuffles and replaces words (the perturbed batch)
    corrector.py    the extra layer and its token and position heads (training only)
    losses.py       the loss terms
    network.py      what is used of an encoder-decoder network
    corruption.py   what rivals do to tokens: cut or replace them
    rivals.py       the rivals' losses, in the place of the first term
    objective.py    the objective around any encoder-decoder network
    reference.py    the meaning, one token at a time
"""

from bliss.config import BlissConfig, RivalConfig
from bliss.corrector import Corrector
from bliss.corruption import Draw
from bliss.generator import perturb
from bliss.objective import BlissLosses, bliss_losses, encode
from bliss.rivals import Rival
from bliss.vocabulary import Vocabulary

__all__ = [
    "BlissConfig",
    "BlissLosses",
    "Corrector",
    "Draw",
    "Rival",
    "RivalConfig",
    "Vocabulary",
    "bliss_losses",
    "encode",
    "perturb",
]
