from scripts.testbed.memory import translate


def test_returns_the_translation_of_the_nearest_stored_sentence() -> None:
    stored = ["Das Dokument speichern", "Eine Tabelle einfuegen", "Die Datei oeffnen"]
    targets = ["Save the document", "Insert a table", "Open the file"]
    found = translate(["Eine neue Tabelle einfuegen", "Das Dokument speichern!", "oeffnen"], stored, targets)
    assert found == ["Insert a table", "Save the document", "Open the file"]


def test_a_memory_of_one_sentence_answers_everything() -> None:
    assert translate(["a", "xyz", ""], ["Hallo Welt"], ["Hello world"]) == ["Hello world"] * 3
