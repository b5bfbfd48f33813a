"""Allows a congestion control on this machine for as long as the namespaces of the run are being configured.

A network namespace may use only the congestion controls of the machine's list `tcp_allowed_congestion_control`, and cubic is
not in it where the default is BBR. A namespace that is configured keeps its congestion control when the list changes again.

A guard process, which ignores signals and is in no group with the run, restores the list. It waits on a pipe: one byte says
that the namespaces are configured, and the kernel's end-of-file says that the run has ended in any other way, SIGKILL
included. A lock serialises concurrent runs, because each of them restores the list that it found.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

SETTINGS = Path("/proc/sys/net/ipv4")
ALLOWED = SETTINGS / "tcp_allowed_congestion_control"
LOCK = Path("/run/landfall-compare.lock")


class CongestionError(Exception):
    """The congestion control cannot be used here; the text says why."""


def allow(name):
    """Adds `name` to the list. Returns the descriptor that releases the guard, or None where `name` is allowed already."""
    # A module that is built in, or that is absent, makes modprobe fail; the list decides.
    if name not in words(SETTINGS / "tcp_available_congestion_control"):
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["modprobe", f"tcp_{name}"], check=False, capture_output=True)
    lock = os.open(LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    if name in words(ALLOWED):
        os.close(lock)
        return None
    # Only the run holds the writing end, so that its end is an end-of-file for the guard.
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(writing)
        guard(name, reading)
    os.close(reading)
    try:
        ALLOWED.write_text(" ".join([*words(ALLOWED), name]))
    except OSError as error:
        os.close(writing)
        raise CongestionError(f"cannot add {name} to {ALLOWED}: {error.strerror}") from error
    finally:
        # The guard holds the lock until the list is restored.
        os.close(lock)
    return writing


def release(guard_descriptor):
    """Makes the guard restore the list."""
    os.write(guard_descriptor, b".")
    os.close(guard_descriptor)


def guard(name, reading):
    """Waits for the run, removes `name` from the list, and ends the process."""
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        os.read(reading, 1)
        if name in words(ALLOWED):
            ALLOWED.write_text(" ".join(word for word in words(ALLOWED) if word != name))
        code = 0
    except OSError as error:
        print(f"compare: cannot remove {name} from {ALLOWED}: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def words(path):
    return path.read_text().split()
