"""Which data set a run uses, from where, and how much of it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One data set.

    Raises:
        ValueError: A field is empty or not positive.
    """

    name: str = "libreoffice_help_de_en"
    """A key of `registry.DATA_SETS`."""
    root: str | None = None
    """Folder that holds the set; None takes the shipped corpus, or else the hub."""
    max_train: int | None = None
    """Most training rows kept, evenly spaced over the split; None keeps all."""
    max_eval: int | None = None
    """Most rows kept of valid and of test each, evenly spaced; None keeps all."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name: empty; give a data set's name, such as libreoffice_help_de_en")
        if self.root is not None and not self.root:
            raise ValueError(
                "root: empty; give the folder that holds the set, or null for the shipped corpus or the hub"
            )
        for field in ("max_train", "max_eval"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}: {value}; give a positive number of rows, or null for all of them")
