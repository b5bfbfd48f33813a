"""Tests of the comparison itself: `python3 -m unittest harness.tests`, as root and in benches/.

LANDFALL_BENCHES is the directory of the binaries, target/debug by default.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest
from pathlib import Path
from types import SimpleNamespace

from . import congestion
from .options import ROOT, TARGET
from .processes import Invalid
from .works import Trial

PROGRAMS = Path(os.environ.get("LANDFALL_BENCHES", TARGET / "debug"))
HOLDER = """
import sys, time
from harness import congestion
congestion.allow(sys.argv[1])
print("allowed", flush=True)
time.sleep(60)
"""


def await_true(what, condition, patience=20.0):
    until = time.monotonic() + patience
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"not within {patience} s: {what}")
        time.sleep(0.01)


class CongestionControl(unittest.TestCase):
    def test_the_list_is_restored_after_sigkill(self):
        allowed = congestion.words(congestion.ALLOWED)
        available = congestion.words(congestion.SETTINGS / "tcp_available_congestion_control")
        others = [name for name in available if name not in allowed]
        if os.geteuid() != 0 or not others:
            self.skipTest("needs root, and a congestion control that is available and not allowed")
        command = [sys.executable, "-c", HOLDER, others[0]]
        holder = subprocess.Popen(command, cwd=ROOT / "benches", stdout=subprocess.PIPE, text=True)
        with holder:
            self.assertEqual(holder.stdout.readline(), "allowed\n")
            self.assertIn(others[0], congestion.words(congestion.ALLOWED))
            holder.send_signal(signal.SIGKILL)
        await_true("the list as before", lambda: congestion.words(congestion.ALLOWED) == allowed)


class Checks(unittest.TestCase):
    def test_a_relay_without_processor_time_was_not_in_the_path(self):
        relay = SimpleNamespace(cpu_seconds=lambda: 1.5)
        options = SimpleNamespace(programs=PROGRAMS, seconds=1)
        trial = Trial(None, SimpleNamespace(relays=True), None, relay, options)
        with self.assertRaisesRegex(Invalid, "no processor time"):
            trial.per("cpu_s_per_gb", 1)
        trial = Trial(None, SimpleNamespace(relays=False), None, relay, options)
        self.assertEqual(trial.per("cpu_s_per_gb", 1), {"cpu_s_per_gb": 0.0})

    def test_verify_finds_one_wrong_byte(self):
        for flipped, succeeds in ((None, True), (3_000_000, False)):
            with self.subTest(flipped=flipped), Flipper(flipped) as address:
                command = [PROGRAMS / "verify", "--to", address, "--streams", "1"]
                done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
                self.assertEqual(done.returncode == 0, succeeds, done)


class Flipper:
    """A relay of one connection between `verify` and its server that inverts the byte at one position."""

    def __init__(self, position):
        self.position = position

    def __enter__(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.server = subprocess.Popen([PROGRAMS / "verify", "--serve", str(port)])
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.relay, args=(port,))
        self.thread.start()
        return f"127.0.0.1:{self.listener.getsockname()[1]}"

    def __exit__(self, *_):
        self.thread.join()
        self.listener.close()
        self.server.kill()
        self.server.wait()

    def relay(self, port):
        client, _ = self.listener.accept()
        with client, connect(port) as server:
            back = threading.Thread(target=self.copy, args=(server, client, None))
            back.start()
            self.copy(client, server, self.position)
            back.join()

    @staticmethod
    def copy(source, sink, flipped):
        position = 0
        try:
            while piece := bytearray(source.recv(1 << 16)):
                if flipped is not None and position <= flipped < position + len(piece):
                    piece[flipped - position] ^= 0xFF
                position += len(piece)
                sink.sendall(piece)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


def connect(port):
    """Connects to a server that may not listen yet."""
    until = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


if __name__ == "__main__":
    unittest.main()
