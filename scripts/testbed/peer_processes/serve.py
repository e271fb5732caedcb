"""A worker's side of the talk with the benchmark: one JSON object a line, on standard input and output.

    {"do": "facts"}                                  -> {"facts": {name: text}}
    {"do": "load", "problem": {...}}                 -> {"how": text, "planned_s": s or null} or {"declined": reason}
    {"do": "check", "path": "x.npy"}                 -> {}; what was computed is in the file, flat, as fp32
    {"do": "time", "clock": "cpu", "seconds": 0.01}  -> {"seconds": of a call, "flops": of a call, or null}

Whatever a library prints goes to standard error. An error is answered by {"error": text}.
"""

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scripts.testbed.peer_processes.network import read
from scripts.testbed.peer_processes.problem import Array

LONG_CALL_S = 0.05  # such a call finds nothing in a cache that one before it could have left there
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}  # of all threads: some libraries leave the caller's idle
TRIALS = 3


class DeclinedError(Exception):
    """The library has no way to compute this problem; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A problem that is ready to be computed."""

    run: Callable[[], object]
    """One call; afterwards its outputs are complete."""
    outputs: Callable[[], Sequence[Array]]
    """What a call computes: E, and for a backward the gradients of A, B and D."""
    how: str = ""
    """Which of the library's ways this is."""
    flops: float | None = None
    """Of a call, where it is not the problem's."""
    planned_s: float | None = None
    """Until the first result, with choosing a kernel or finding it in a cache, where that is known."""


def fastest(ways: Mapping[str, Callable[[], Loaded]]) -> Loaded:
    """The best of a library's ways to compute something, each tried a few times.

    Args:
        ways: Name -> what makes it ready; a way that cannot be made ready is passed over if another can.

    Raises:
        DeclinedError: If none can; the message has every reason.
    """
    found_s, reasons = dict[str, float](), []
    for name, make in ways.items():
        try:
            found_s[name] = _tried_s(make)
        except Exception as error:  # a library refuses with exceptions of its own
            reasons.append(f"{name}: {' '.join(str(error).split())[:300]}")
            print("passed over", reasons[-1], file=sys.stderr, flush=True)
        gc.collect()
    if not found_s:
        raise DeclinedError("; ".join(reasons))
    best = min(found_s, key=found_s.__getitem__)
    return replace(ways[best](), how=best)  # anew: a large network is there once, and compiled by its own settings


def _tried_s(make: Callable[[], Loaded]) -> float:
    run = make().run
    return min(_seconds(run, time.perf_counter, 0.0) for _ in range(TRIALS))


def serve(load: Callable[[Any], Loaded], facts: Callable[[], dict[str, str]]) -> None:
    """Answer until standard input ends.

    Args:
        load: Makes a problem or a network ready; raises DeclinedError where the library cannot compute it.
        facts: Versions, and which instructions the library says it uses.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    loaded: Loaded | None = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if question["do"] == "load":
                loaded = None  # frees its memory first
                gc.collect()
                loaded = load(read(question["problem"]))
                answer: dict[str, Any] = {"how": loaded.how, "planned_s": loaded.planned_s}
            elif question["do"] == "facts":
                answer = {"facts": facts()}
            elif loaded is None:
                answer = {"error": f"{question['do']}: nothing is loaded"}
            else:
                answer = _answered(question, loaded)
        except DeclinedError as declined:
            answer = {"declined": str(declined)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def _answered(question: Mapping[str, Any], loaded: Loaded) -> dict[str, Any]:
    if question["do"] == "check":
        flat = [np.ascontiguousarray(each, dtype=np.float32).reshape(-1) for each in loaded.outputs()]
        np.save(question["path"], np.concatenate(flat))
        return {}
    seconds = _seconds(loaded.run, CLOCKS[question["clock"]], question["seconds"])
    return {"seconds": seconds, "flops": loaded.flops}


def _seconds(run: Callable[[], object], clock: Callable[[], float], at_least: float) -> float:
    """Mean of so many calls that they take a while, after one that brings data and code back into the caches."""
    start = clock()
    run()
    first = clock() - start
    if first > LONG_CALL_S:
        return first
    calls, start = 0, clock()
    while calls == 0 or clock() - start < at_least:
        run()
        calls += 1
    return (clock() - start) / calls
