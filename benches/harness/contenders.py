"""The contenders of a comparison, each configured as its documentation advises for relaying bytes on one thread.

Every relay answers at 127.0.0.1:PORT of the host namespace for 127.0.0.1:PORT of the inner one.
"""

import re
import shutil
import subprocess
from pathlib import Path

from .haproxy import haproxy
from .namespaces import HOST, INSIDE, TRACEFS, within
from .processes import Invalid, Program

NETNS = f"/run/netns/{INSIDE}"


class Contender:
    """One way for a client to reach a server. The defaults are those of a relay that gets its port from the command line.

    A contender without a relay, in which the host's client reaches the server's own socket, sets `relays = False` and
    replaces `server_command`, because the server has to start in a special way.
    """

    # Where the clients are.
    client = HOST
    # Where the servers are.
    server = INSIDE
    # Whether it spends processor time of its own on every byte. A relay without processor time was not in the path.
    relays = True
    # Whether it finds listeners by itself.
    discovers = False
    # The names of the only works that it takes part in, if not all.
    only = None
    # Whether it is this project's.
    ours = False

    def __init__(self, name, version):
        self.name, self.version = name, version

    def server_command(self, command):
        """Returns the command line that starts a server in the right namespace."""
        return within(self.server, command)

    def start(self, namespaces, port, discover):
        """Starts the relay and returns its program when `port` answers; None for a contender without a relay.

        With `discover`, it has to find later listeners too.
        """
        command = self.command(namespaces.directory, port, discover)
        program = Program(self.name, within(HOST, command), namespaces.directory / f"{self.name}.log")
        try:
            namespaces.await_port(program, HOST, port)
        except Invalid:
            program.stop()
            raise
        return program

    def command(self, directory, port, discover):
        """Returns the command line of the relay."""
        raise NotImplementedError

    def takes_part(self, work):
        if self.only is not None and work.name not in self.only:
            return False
        return (self.discovers or not self.relays or not work.discover) and (self.relays or work.without_relay)


class Direct(Contender):
    """No relay: the client is inside too, and the path has one connection instead of two."""

    client = INSIDE
    relays = False

    def __init__(self):
        super().__init__("direct", lambda: "no relay")

    def start(self, namespaces, port, discover):
        return None


class Landfall(Contender):
    ours = True
    discovers = True

    def __init__(self, name, binary, ring):
        super().__init__(name, output_of(binary, "--version"))
        self.binary, self.ring = binary, ring

    def command(self, directory, port, discover):
        return [self.binary, "attach", "--netns", NETNS, "--ring", self.ring]


class LandfallWithoutHints(Landfall):
    """landfall as it runs without root or tracefs: it finds listeners by scanning alone."""

    only = ("first-byte",)

    def command(self, directory, port, discover):
        hidden = f'mount -t tmpfs none {TRACEFS} && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", hidden, "sh", *super().command(directory, port, discover)]


class HAProxy(Contender):
    def __init__(self):
        super().__init__("haproxy", output_of("haproxy", "-v"))

    def command(self, directory, port, discover):
        return haproxy(directory, port, port)


class Pasta(Contender):
    discovers = True

    def __init__(self):
        super().__init__("pasta", package("passt"))

    def command(self, directory, port, discover):
        # Only the owner of the namespace, root, may enter it, and pasta drops root by default.
        into = ["--netns-only", "--netns", NETNS, "--runas", "0"]
        # Versions of 2023 find no port inside unless they look for the host's ports too.
        ports = ["-t", "auto", "-T", "auto"] if discover else ["-t", port, "-T", "none"]
        return ["pasta", "-f", "-q", *into, *ports, "-u", "none", "-U", "none"]


class OwnRelay(Contender):
    """The relay that a programmer writes first on one of the runtimes; see src/bin/relay_*.rs."""

    def __init__(self, name, programs):
        super().__init__(name, locked(name))
        self.binary = programs / f"relay_{name.replace('-', '_')}"

    def command(self, directory, port, discover):
        return [self.binary, "--netns", NETNS, port]


def contenders(landfall, programs):
    """Returns all contenders in the order of their samples. A new contender, such as one without a relay, goes here."""
    return [
        Direct(),
        Landfall("landfall", landfall, "io_uring"),
        Landfall("landfall-epoll", landfall, "epoll"),
        LandfallWithoutHints("landfall-no-hints", landfall, "io_uring"),
        HAProxy(),
        Pasta(),
        OwnRelay("tokio", programs),
        OwnRelay("tokio-uring", programs),
        OwnRelay("monoio", programs),
    ]


def output_of(program, option):
    """Returns a function that reads the version of a program: the first line that it prints."""

    def version():
        done = subprocess.run([program, option], capture_output=True, text=True, check=False)
        return ((done.stdout + done.stderr).strip().splitlines() or ["unknown"])[0][:60]

    return version


def package(name):
    """The same for a program that does not print its version: the version of its package."""

    def version():
        if shutil.which("dpkg-query") is None:
            return "unknown"
        done = subprocess.run(
            ["dpkg-query", "-W", "-f", "${Package} ${Version}", name], capture_output=True, text=True, check=False
        )
        return done.stdout or "unknown"

    return version


def locked(crate):
    """The same for a crate: its version in Cargo.lock."""

    def version():
        lock = (Path(__file__).resolve().parents[2] / "Cargo.lock").read_text()
        found = re.search(rf'name = "{crate}"\nversion = "([^"]+)"', lock)
        return f"{crate} {found[1]}" if found else "unknown"

    return version
