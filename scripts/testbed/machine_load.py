"""How much of the machine other processes took while something was timed: by Linux's own count."""

import os
from collections.abc import Iterable
from pathlib import Path


class MachineLoad:
    """What others take from now on."""

    def __init__(self, processes: Iterable[int] = ()) -> None:
        """Start to count.

        Args:
            processes: Ids of those that do not count as others, beside this one.
        """
        self._own = (os.getpid(), *processes)
        self._before = _ticks(self._own)

    def share(self) -> float | None:
        """Part of all cores' time that others had since; None where the system does not say."""
        now = _ticks(self._own)
        if now is None or self._before is None:
            return None
        total, busy, own = (after - before for after, before in zip(now, self._before, strict=True))
        return max(0.0, (busy - own) / total) if total else None


def _ticks(own: Iterable[int]) -> tuple[int, int, int] | None:
    """Clock ticks of all cores, those in use, and those used by some processes, since the start."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = (int(x) for x in stat.read_text().split()[1:9])
    busy = user + nice + system + irq + softirq + steal
    used = 0
    for process in own:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        used += int(fields[11]) + int(fields[12])  # in user's and in system's mode
    return busy + idle + iowait, busy, used
