"""landfall's own ways into a container, side by side: its daemon and engine, and inside the agent where the way needs one.

All of them are the programs that people run, each start in a home of its own. The way by WebSocket needs the agent's port
published on the host's loopback. Docker does that with a relay in user space, docker-proxy; here HAProxy plays it, which
splices as that one does. Its processor time is not landfall's and not in the figures, but it takes its part of the machine.
"""

import json
import os
import secrets
import socket
import tempfile
from pathlib import Path

from .haproxy import haproxy
from .space import HOST, INSIDE, Group, Invalid, Program, end, processes_of

AGENT_PORT, PUBLISHED = 8973, 18973
CONTAINER = "container"


class Way:
    """A daemon that reaches the container in one way."""

    def __init__(self, name, binary, version, kind, extensions=True):
        self.name, self.binary, self.version = name, binary, version
        self.kind, self.extensions = kind, extensions

    def start(self, space, port):
        place = Path(tempfile.mkdtemp(dir=space.directory))
        deployment = Deployment(self.name, self.binary)
        try:
            token = secrets.token_urlsafe(32)
            if self.kind != "netns":
                self._start_inside(space, deployment, place, token)
            command = [self.binary, "_hostd", "--http-port", "0"]
            daemon = deployment.run("daemon", HOST, command, place, self._variables(place))
            self._register(daemon, place, token)
            daemon.await_port(space, HOST, port)
        except Invalid:
            deployment.stop()
            raise
        return deployment

    def _start_inside(self, space, deployment, place, token):
        shared = place / "shared"
        shared.mkdir()
        variables = self._variables(place) | {"LANDFALL_HOSTD_BROKER_TOKEN": token, "LANDFALL_CONTAINER_NAME": CONTAINER}
        command = [self.binary, "agent"]
        if self.kind == "agent":
            command += ["--directory", shared]
        deployment.run("agent", INSIDE, command, place, variables).await_port(space, INSIDE, AGENT_PORT)
        command = haproxy(place, PUBLISHED, AGENT_PORT)
        publisher = deployment.run("publisher", HOST, command, place, None)
        publisher.await_port(space, HOST, PUBLISHED)

    def _variables(self, place):
        """Nothing of the caller's own landfall or Docker leads elsewhere."""
        ours = ("LANDFALL_", "TYPECLAW_", "DOCKER_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        kept |= {"LANDFALL_HOME": str(place / "home"), "DOCKER_HOST": f"unix://{place}/no-docker.sock"}
        return kept if self.extensions else kept | {"LANDFALL_BROKER_EXTENSIONS": "none"}

    def _register(self, daemon, place, token):
        ways = {
            "netns": {"kind": "netns", "path": f"/run/netns/{INSIDE}"},
            "agent": {"kind": "agent", "directory": str(place / "shared")},
            "websocket": {"kind": "websocket"},
        }
        request = {"kind": "register", "containerName": CONTAINER, "cwd": str(place), "way": ways[self.kind]}
        if self.kind != "netns":
            request |= {"wsHostPort": PUBLISHED, "brokerToken": token, "portForward": {"allow": "*"}}
        path = place / "home/run/hostd.sock"
        daemon.await_true("answer", path.exists)
        answer = ask(path, request)
        if not answer.get("ok"):
            raise Invalid(f"the daemon refused the registration: {answer}")


class Deployment(Group):
    """All programs of a way. Only landfall's own count."""

    def __init__(self, name, binary):
        self.name, self.binary, self.programs = name, binary, []

    def run(self, name, namespace, command, place, variables):
        log = place / f"{name}.log"
        program = Program(f"{self.name}'s {name}", namespace, command, log, env=variables)
        self.programs.append(program)
        return program

    def has_ended(self):
        return next((how for how in (program.has_ended() for program in self.programs) if how), None)

    def pids(self):
        # An engine outlives its daemon on purpose, so they are told by what they run and not by who started them. Nobody
        # else runs it in this process namespace.
        return processes_of(self.binary)

    def stop(self):
        own = {program.process.pid: program.process for program in self.programs}
        others = [pid for program in self.programs for pid in program.pids()]
        end(sorted({*others, *self.pids()}), own)


def ask(path, request):
    """One request over the daemon's socket: a line there, a line back."""
    with socket.socket(socket.AF_UNIX) as wire:
        wire.settimeout(10)
        wire.connect(str(path))
        wire.sendall(json.dumps(request).encode() + b"\n")
        return json.loads(wire.makefile().readline() or "{}")


def ways(binary, version):
    """Root's way first, then those that need no privilege on the host."""
    return [
        Way("root", binary, version, "netns"),
        Way("agent", binary, version, "agent"),
        Way("websocket", binary, version, "websocket"),
        Way("websocket-plain", binary, version, "websocket", extensions=False),
    ]
