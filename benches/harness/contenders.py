"""Who is compared, and how each is configured: as its own documentation advises for relaying bytes on one thread.

All of them answer at 127.0.0.1:PORT of the host namespace for 127.0.0.1:PORT of the inner one. `direct` is no relay:
the client is inside too, and the path has one connection less.
"""

import re
import shutil
import subprocess
from pathlib import Path

from .haproxy import haproxy
from .space import HOST, INSIDE, Invalid, Program
from .ways import ways


class Contender:
    """A relay that can be started for one port."""

    def __init__(self, name, command, version):
        self.name, self.command, self.version = name, command, version

    def start(self, space, port):
        directory = space.directory
        log = directory / f"{self.name}.log"
        log.write_bytes(b"")
        program = Program(self.name, HOST, self.command(directory, port), log)
        try:
            program.await_port(space, HOST, port)
        except Invalid:
            program.stop()
            raise
        return program


class Direct:
    """The same client without a relay."""

    name = "direct"

    @staticmethod
    def version():
        return "no relay"


def contenders(landfall, programs):
    """All of them, in the order in which they take their turns."""
    relays = [landfall_on(landfall, "landfall", "io_uring"), landfall_on(landfall, "landfall-epoll", "epoll")]
    at_one_port = lambda directory, port: haproxy(directory, port, port)  # noqa: E731
    relays += [Contender("haproxy", at_one_port, said("haproxy", "-v")), Contender("pasta", pasta, package("passt"))]
    for name, crate in (("tokio", "tokio"), ("tokio-uring", "tokio-uring"), ("monoio", "monoio")):
        relays.append(own_relay(programs, name, crate))
    return [Direct(), *relays]


def landfall_ways(landfall):
    """landfall alone, by each of its ways into a container."""
    return [Direct(), *ways(landfall, said(landfall, "--version"))]


def landfall_on(binary, name, ring):
    def command(_directory, _port):
        return [binary, "attach", "--netns", f"/run/netns/{INSIDE}", "--ring", ring]

    return Contender(name, command, said(binary, "--version"))


def own_relay(programs, name, crate):
    def command(_directory, port):
        return [programs / f"relay_{name.replace('-', '_')}", "--netns", f"/run/netns/{INSIDE}", port]

    return Contender(name, command, locked(crate))


def pasta(_directory, port):
    # It may enter the namespace only as its owner, root; by default it becomes nobody first.
    into = ["--netns-only", "--netns", f"/run/netns/{INSIDE}"]
    return ["pasta", "-f", "-q", "--runas", "0", "-t", port, "-u", "none", "-T", "none", "-U", "none", *into]


def said(program, option):
    """The first line of what a program says about its version."""

    def version():
        done = subprocess.run([program, option], capture_output=True, text=True, check=False)
        return ((done.stdout + done.stderr).strip().splitlines() or ["unknown"])[0]

    return version


def package(name):
    """The version of the installed package, for a program that does not know its own."""

    def version():
        if shutil.which("dpkg-query") is None:
            return "unknown"
        done = subprocess.run(
            ["dpkg-query", "-W", "-f", "${Package} ${Version}", name], capture_output=True, text=True, check=False
        )
        return done.stdout or "unknown"

    return version


def locked(crate):
    """The version of a crate in Cargo.lock."""

    def version():
        lock = (Path(__file__).resolve().parents[2] / "Cargo.lock").read_text()
        found = re.search(rf'name = "{crate}"\nversion = "([^"]+)"', lock)
        return f"{crate} {found[1]}" if found else "unknown"

    return version
