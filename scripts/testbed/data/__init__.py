"""Data sets in one shape, and the tokenizer learnt from them.

name -> hub, data.root folder or shipped corpus -> canonical rows -> train / valid / test -> tokenizer

    tasks.py       the task kinds, their canonical columns, and the check every row passes
    files.py       strict reading of text, tables and JSON, plain or under gzip or xz
    grammar_noise.py  artificial errors of learners, for training
    m2.py          the M2 format of corrected sentences
    readers.py     the layouts of local folders
    hub.py         the hub's own format, from the hub or from a folder
    data_set.py    DataSet: what is known of a set before it is read
    local_sets.py  the sets with a local layout
    hub_sets.py    the sets known by their name on the hub
    registry.py    every data set by name
    splits.py      any splits -> train, valid and test; at most so many rows; the hash
    load.py        load(config) -> Data
    tokenizer.py   training texts -> a BPE tokenizer
"""

from configs.sections import DataConfig
from scripts.testbed.data.data_set import DataSet
from scripts.testbed.data.load import Data, load
from scripts.testbed.data.registry import DATA_SETS, DataError
from scripts.testbed.data.tasks import Task
from scripts.testbed.data.tokenizer import train_tokenizer

__all__ = ["DATA_SETS", "Data", "DataConfig", "DataError", "DataSet", "Task", "load", "train_tokenizer"]
