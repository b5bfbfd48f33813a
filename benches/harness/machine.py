"""The machine and its other load."""

import os
import platform
import re
import time
from pathlib import Path

from .processes import TICKS, cpu_ticks, every_process

# Other processes that use more than this many processors make a machine unquiet.
QUIET = 0.1


def facts():
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return {
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "processor": found[1] if found else platform.machine(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
    }


def await_quiet(span, patience, note):
    """Reads the load, for `span` seconds at a time, until the machine is quiet or `patience` seconds have passed.

    Returns the last reading.
    """
    start = time.monotonic()
    while True:
        busy, waited = busy_processors(span), time.monotonic() - start - span
        if busy <= QUIET or waited >= patience:
            break
        note(f"other processes use {busy:.2f} processors; waiting for a quiet machine")
    return {"busy_processors": round(busy, 3), "waited_seconds": round(max(0.0, waited), 1), "quiet": busy <= QUIET}


def busy_processors(span):
    before, start = busy_ticks(), time.monotonic()
    time.sleep(span)
    return (busy_ticks() - before) / TICKS / (time.monotonic() - start)


def busy_ticks():
    """Ticks of all processors that were not idle. A processor that waits for a disk is idle."""
    first = Path("/proc/stat").read_text().splitlines()[0]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first.split()[1:9])
    return user + nice + system + irq + softirq + steal


class ForeignLoad:
    """The processor time that processes outside of the run used since this object was made."""

    def __init__(self):
        self.start, self.busy, self.own = time.monotonic(), busy_ticks(), self.own_ticks()

    def processors(self):
        elapsed = time.monotonic() - self.start
        foreign = (busy_ticks() - self.busy) - (self.own_ticks() - self.own)
        return round(max(0.0, foreign / TICKS / elapsed), 2)

    @staticmethod
    def own_ticks():
        # The run is alone in its process namespace.
        return sum(map(cpu_ticks, every_process()))
