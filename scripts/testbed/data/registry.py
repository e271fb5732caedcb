"""Every data set by its name."""

from collections.abc import Mapping
from types import MappingProxyType

from configs.typed import closest
from scripts.testbed.data.data_set import DataSet
from scripts.testbed.data.hub_sets import HUB_SETS
from scripts.testbed.data.local_sets import LOCAL_SETS

DATA_SETS: Mapping[str, DataSet] = MappingProxyType({data_set.name: data_set for data_set in (*LOCAL_SETS, *HUB_SETS)})


class DataError(ValueError):
    """A data set is unknown, missing or malformed; the message says which, and how to mend it."""


def find(name: str) -> DataSet:
    """The data set of a name.

    Raises:
        DataError: No set has this name.
    """
    if name not in DATA_SETS:
        raise DataError(f"data.name: got {name!r}, {closest(name, tuple(DATA_SETS))}")
    return DATA_SETS[name]
