"""landfall's own attach methods side by side: its daemon and engine, and its agent inside where the method needs one.

Every sample starts the real programs in a home directory of their own. The WebSocket method needs the agent's port published
on the host's loopback. Docker does that with docker-proxy, a splicing relay in user space; HAProxy takes its place here. Its
processor time is not in the figures, but it uses its part of the machine.
"""

import json
import os
import secrets
import socket
import tempfile
from pathlib import Path

from .contenders import Contender, Direct, output_of
from .haproxy import haproxy
from .namespaces import HOST, INSIDE, within
from .processes import Group, Invalid, Program, end, processes_of

AGENT_PORT, PUBLISHED = 8973, 18973
CONTAINER = "container"


class AttachMethod(Contender):
    ours = True

    def __init__(self, name, binary, method, extensions=True):
        super().__init__(name, output_of(binary, "--version"))
        self.binary, self.method, self.extensions = binary, method, extensions

    def start(self, namespaces, port, discover):
        home = Path(tempfile.mkdtemp(dir=namespaces.directory))
        deployment = Deployment(self.name, self.binary, home)
        try:
            token = secrets.token_urlsafe(32)
            if self.method != "netns":
                self._start_inside(namespaces, deployment, home, token)
            command = [self.binary, "_hostd", "--http-port", "0"]
            daemon = deployment.run("daemon", HOST, command, self._variables(home))
            self._register(daemon, home, token)
            namespaces.await_port(daemon, HOST, port)
        except Invalid:
            deployment.stop()
            raise
        return deployment

    def _start_inside(self, namespaces, deployment, home, token):
        shared = home / "shared"
        shared.mkdir()
        variables = self._variables(home) | {"LANDFALL_HOSTD_BROKER_TOKEN": token, "LANDFALL_CONTAINER_NAME": CONTAINER}
        command = [self.binary, "agent"]
        if self.method == "agent":
            command += ["--directory", shared]
        agent = deployment.run("agent", INSIDE, command, variables)
        namespaces.await_port(agent, INSIDE, AGENT_PORT)
        publisher = deployment.run("publisher", HOST, haproxy(home, PUBLISHED, AGENT_PORT), None)
        namespaces.await_port(publisher, HOST, PUBLISHED)

    def _variables(self, home):
        """Returns the environment without the caller's own settings of landfall and Docker."""
        removed = ("LANDFALL_", "TYPECLAW_", "DOCKER_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(removed)}
        kept |= {"LANDFALL_HOME": str(home / "home"), "DOCKER_HOST": f"unix://{home}/no-docker.sock"}
        return kept if self.extensions else kept | {"LANDFALL_BROKER_EXTENSIONS": "none"}

    def _register(self, daemon, home, token):
        methods = {
            "netns": {"kind": "netns", "path": f"/run/netns/{INSIDE}"},
            "agent": {"kind": "agent", "directory": str(home / "shared")},
            "websocket": {"kind": "websocket"},
        }
        request = {"kind": "register", "containerName": CONTAINER, "cwd": str(home), "way": methods[self.method]}
        if self.method != "netns":
            request |= {"wsHostPort": PUBLISHED, "brokerToken": token, "portForward": {"allow": "*"}}
        path = home / "home/run/hostd.sock"
        daemon.await_true("answer", path.exists)
        answer = request_daemon(path, request)
        if not answer.get("ok"):
            raise Invalid(f"the daemon refused the registration: {answer}")


class Deployment(Group):
    """All programs of one attach method. The costs are those of landfall's own processes."""

    def __init__(self, name, binary, home):
        self.name, self.binary, self.home, self.programs = name, binary, home, []

    def run(self, name, namespace, command, env):
        log = self.home / f"{name}.log"
        program = Program(f"{self.name}'s {name}", within(namespace, command), log, env=env)
        self.programs.append(program)
        return program

    def has_ended(self):
        return next((how for how in (program.has_ended() for program in self.programs) if how), None)

    def pids(self):
        # An engine outlives its daemon by design, so the processes are found by their binary instead of their parent. Only
        # this deployment runs that binary in this process namespace.
        return processes_of(self.binary)

    def stop(self):
        own = {program.process.pid: program.process for program in self.programs}
        others = [pid for program in self.programs for pid in program.pids()]
        end(sorted({*others, *self.pids()}), own)


def request_daemon(path, request):
    """Sends one request over the daemon's socket, one line in each direction."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        connection.sendall(json.dumps(request).encode() + b"\n")
        return json.loads(connection.makefile().readline() or "{}")


def attach_methods(binary):
    """Returns root's method first, then those without a privilege on the host."""
    return [
        Direct(),
        AttachMethod("root", binary, "netns"),
        AttachMethod("agent", binary, "agent"),
        AttachMethod("websocket", binary, "websocket"),
        AttachMethod("websocket-plain", binary, "websocket", extensions=False),
    ]
