import dataclasses

import pytest

from configs.sections import DataConfig


def test_the_default_is_the_shipped_translation_corpus() -> None:
    assert DataConfig() == DataConfig(name="libreoffice_help_de_en", root=None, max_train=None, max_eval=None)


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataConfig().name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "name: got an empty text"),
        ({"root": ""}, "root: got an empty text"),
        ({"max_train": 0}, "max_train: got 0"),
        ({"max_eval": -3}, "max_eval: got -3"),
    ],
)
def test_what_it_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)  # type: ignore[arg-type]
