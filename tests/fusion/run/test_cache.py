import json
import logging
import multiprocessing
from dataclasses import replace

import pytest

from fusion import attention, gemm_chain
from fusion.plan.schedule import schedule
from fusion.run.cache import MAX_FILE_BYTES, Cache, CacheError, default_folder
from fusion.run.winner import Key, Winner, WinnerError


def chain_of(M, N=256, K=64):
    return attention(M=M, N=N, K=K, heads=8, causal=True, dtype="fp16")


def winner_of(chain, tile=64, predicted_us=2.0, measured_us=None):
    tiles = {letter: min(tile, -(-chain.sizes[letter] // 16) * 16) for letter in chain.loops}
    return Winner(schedule(chain, "mn(k,h)", tiles, num_stages=2), predicted_us, measured_us)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "winners")


def stored(cache, M=512, device="a100", **options):
    key = Key.of(chain_of(M), device)
    cache.store(key, winner_of(chain_of(M), **options))
    return key


def files(cache):
    return sorted(cache.folder.glob("*/*.json"))


def test_a_winner_is_found_again_by_its_key_alone(cache):
    key = stored(cache, measured_us=1.5)
    again = Cache(cache.folder)
    assert again.load(key) == winner_of(chain_of(512), measured_us=1.5)
    for other in (
        Key.of(chain_of(511), "a100"),
        Key.of(chain_of(512), "h100"),
        replace(key, code="0" * 16),
        Key.of(attention(M=512, N=256, K=64, heads=8, causal=True, diagonal=1, dtype="fp16"), "a100"),
    ):
        assert again.load(other) is None


def test_a_later_winner_replaces_an_earlier_one(cache):
    key = stored(cache)
    stored(cache, tile=32)
    assert cache.load(key) == winner_of(chain_of(512), tile=32)
    assert len(files(cache)) == 1


def test_only_a_winner_of_the_chain_is_stored(cache):
    with pytest.raises(WinnerError, match="tiles of"):
        cache.store(Key.of(gemm_chain(M=16, N=16, K=16), "a100"), winner_of(chain_of(16)))
    assert not files(cache)


def test_an_empty_folder_has_nothing(cache):
    key = Key.of(chain_of(512), "a100")
    assert cache.load(key) is None
    assert cache.nearest(key) is None
    assert not cache.folder.exists()


def test_the_folder_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == Cache().folder == tmp_path / "quartet" / "fusion" / "winners"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "quartet" / "fusion" / "winners"


CORRUPT = {
    "empty": lambda text: "",
    "truncated": lambda text: text[: len(text) // 2],
    "another schema": lambda text: json.dumps({"version": 7, "best": []}),
    "a list": lambda text: "[1, 2, 3]",
    "not a number": lambda text: text.replace('"predicted_us": 2.0', '"predicted_us": NaN'),
    "endless": lambda text: text.replace('"predicted_us": 2.0', '"predicted_us": 1e999'),
    "many digits": lambda text: text.replace('"num_stages": 2', f'"num_stages": {"9" * 5000}'),
    "a number as text": lambda text: text.replace('"num_stages": 2', '"num_stages": "2"'),
    "nested": lambda text: "[" * 100_000,
    "tiles of another chain": lambda text: text.replace('"H": 64', '"P": 64'),
    "an unknown expression": lambda text: text.replace("mn(k,h)", "xyz"),
    "of another size": lambda text: text.replace('"size": 512', '"size": 513'),
    "of another device": lambda text: text.replace("a100", "h100"),
    "too large": lambda text: text + " " * MAX_FILE_BYTES,
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_file_is_reported_once_and_written_anew(name, cache, caplog):
    key = stored(cache)
    (path,) = files(cache)
    before = path.read_text()
    path.write_text(CORRUPT[name](before))
    assert path.read_text() != before
    with caplog.at_level(logging.WARNING):
        assert cache.load(key) is None
        assert cache.nearest(key) is None
        assert cache.load(key) is None
    (record,) = [record for record in caplog.records if record.name == "fusion.run.cache"]
    assert "is not used and will be written anew" in record.getMessage()
    assert str(path) in record.getMessage()
    stored(cache)
    assert cache.load(key) == winner_of(chain_of(512))


def test_bytes_that_are_no_text_and_folders_in_place_of_files_are_reported(cache, caplog):
    key = stored(cache)
    (path,) = files(cache)
    path.write_bytes(b"\xff\xfe{")
    assert cache.load(key) is None
    path.unlink()
    path.mkdir()
    assert Cache(cache.folder).load(key) is None
    assert len(caplog.records) == 2


def test_a_folder_that_cannot_be_written_is_reported(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file")
    key = stored(cache)
    assert "cannot be written, so the next process searches again" in caplog.text
    assert cache.load(key) is None


def test_nothing_is_left_behind_where_a_file_cannot_be_replaced(cache):
    stored(cache)
    (path,) = files(cache)
    path.unlink()
    path.mkdir()
    stored(cache)
    assert [entry for entry in path.parent.iterdir() if entry != path] == []


def _store_many(folder, first):
    cache = Cache(folder)
    for turn in range(20):
        for M in (64, 128, first):
            cache.store(Key.of(chain_of(M), "a100"), winner_of(chain_of(M), tile=16 * (1 + turn % 4)))
            assert cache.load(Key.of(chain_of(M), "a100")) is not None


def test_processes_that_write_at_once_lose_nothing(cache, caplog):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_store_many, args=(cache.folder, 1000 + 16 * number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    for M in (64, 128, 1000, 1016, 1032):
        assert cache.load(Key.of(chain_of(M), "a100")) == winner_of(chain_of(M))
    assert len(list(cache.folder.glob("*/*"))) == len(list(cache.folder.glob("*/.*"))) + 5 == 5
    assert not caplog.records


def test_the_nearest_is_that_of_the_least_distance_in_logarithms(cache):
    for M, time in ((64, 1.0), (512, 2.0), (4096, 3.0)):
        stored(cache, M, predicted_us=time)
    stored(cache, 1024, device="h100", predicted_us=4.0)
    near = {M: cache.nearest(Key.of(chain_of(M), "a100")).predicted_us for M in (1, 170, 190, 1400, 1500, 9999)}
    assert near == {1: 1.0, 170: 1.0, 190: 2.0, 1400: 2.0, 1500: 3.0, 9999: 3.0}
    assert cache.nearest(Key.of(chain_of(512), "rtx3080")) is None
    assert cache.nearest(Key.of(attention(M=512, N=256, K=64, heads=8, dtype="fp16"), "a100")) is None


def test_the_tiles_of_the_nearest_are_cut_to_size(cache):
    stored(cache, tile=64)
    small = chain_of(20, N=40)
    assert dict(cache.nearest(Key.of(small, "a100")).schedule.tiles) == {"M": 32, "N": 48, "K": 64, "H": 64}


def test_winners_travel_in_one_file(cache, tmp_path):
    keys = [stored(cache, M, device=device) for M in (64, 512) for device in ("a100", "h100")]
    old = replace(keys[0], code="0" * 16)
    cache.store(old, winner_of(chain_of(64)))
    assert cache.export(tmp_path / "winners.json") == 4
    other = Cache(tmp_path / "other")
    assert other.import_(tmp_path / "winners.json") == 4
    assert other.import_(tmp_path / "winners.json") == 0
    assert all(other.load(key) == cache.load(key) for key in keys)
    assert other.load(old) is None


def test_an_import_keeps_what_is_better(cache, tmp_path):
    key = stored(cache, predicted_us=1.0, measured_us=5.0)
    cache.export(tmp_path / "measured.json")
    other = Cache(tmp_path / "other")
    stored(other, predicted_us=0.5)
    assert other.import_(tmp_path / "measured.json") == 1
    stored(other, measured_us=4.0)
    assert other.import_(tmp_path / "measured.json") == 0
    assert other.load(key).measured_us == 4.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"code": "0" * 16}, "is of version '0{16}' of fusion, this is .*: search again"),
        (lambda c: c | {"more": 1}, "accepted is what Cache.export writes"),
        (lambda c: [c], "accepted is what Cache.export writes"),
        (lambda c: c | {"entries": {}}, "entries must be a list"),
        (lambda c: c | {"entries": [*c["entries"], {"key": 1}]}, "entry 1: entry: got"),
        (lambda c: c | {"entries": [{**c["entries"][0], "winner": {}}]}, "entry 0: winner: got"),
        (
            lambda c: c | {"entries": [{**c["entries"][0], "key": {**c["entries"][0]["key"], "code": "1"}}]},
            "entry 0: is of version '1'",
        ),
    ],
)
def test_an_import_takes_all_or_nothing(change, message, cache, tmp_path):
    stored(cache)
    cache.export(tmp_path / "winners.json")
    content = change(json.loads((tmp_path / "winners.json").read_text()))
    (tmp_path / "winners.json").write_text(json.dumps(content))
    other = Cache(tmp_path / "other")
    with pytest.raises(CacheError, match=message):
        other.import_(tmp_path / "winners.json")
    assert not other.folder.exists()


def test_an_import_of_no_json_says_so(cache, tmp_path):
    (tmp_path / "winners.json").write_text("{")
    with pytest.raises(CacheError, match=r"winners.json: is not JSON"):
        cache.import_(tmp_path / "winners.json")
    with pytest.raises(FileNotFoundError):
        cache.import_(tmp_path / "none.json")
