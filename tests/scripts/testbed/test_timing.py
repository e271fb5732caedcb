from scripts.testbed.timing import compare


def test_peers_alternate_and_every_second_round_is_reversed() -> None:
    calls: list[str] = []
    peers = {name: lambda name=name: calls.append(name) for name in ("a", "b", "c")}
    timings = compare(peers, repeats=2, warmup=1)
    assert calls == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]
    assert timings.keys() == peers.keys()
    assert timings["a"].ratio == 1.0
    assert all(timing.low_us <= timing.median_us <= timing.high_us for timing in timings.values())
