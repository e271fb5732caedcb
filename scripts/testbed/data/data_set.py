"""DataSet: what is known of a data set before any of it is read."""

from collections.abc import Callable
from dataclasses import dataclass

from scripts.testbed.data.hub import HubSource
from scripts.testbed.data.readers import Reader
from scripts.testbed.data.tasks import Row, Task

GIVEN = "splits as given"
HELD_OUT = "the labelled validation split is test, a twentieth of train (by md5 of its first text) is valid"


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One data set: where the hub keeps it, what a local folder of it looks like, and what its rows mean."""

    name: str
    """Its key in the registry, and its folder's name if it is shipped."""
    task: Task
    """What is learnt."""
    licence: str
    """What may be done with it."""
    splits: str = GIVEN
    """How train, valid and test are made."""
    hub: HubSource | None = None
    """Where the hub keeps it; None for the shipped corpora."""
    from_hub: Callable[[Row], Row] | None = None
    """Hub row -> canonical row."""
    read: Reader | None = None
    """Reads a local folder in the set's own layout; None where only the hub's format is known."""
    files: tuple[str, ...] = ()
    """The files of its own layout."""
    line: str = ""
    """What one line of those files holds."""
    origin: str = ""
    """Where a folder of it comes from, if it neither ships nor is on the hub."""
    pair: bool = False
    """Whether classification or regression reads two texts."""
    label_names: tuple[str, ...] = ()
    """Classes or tags in the order of their numbers; empty for other tasks."""


def bio(*kinds: str) -> tuple[str, ...]:
    """The tags of some kinds of entity: O, then B- and I- of each kind."""
    return ("O", *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI"))
