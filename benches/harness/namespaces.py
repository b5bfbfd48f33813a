"""The namespaces of a run.

The script starts itself again in its own process and mount namespaces. When the script ends, for whatever reason, the
kernel ends every process that it started, and the two network namespaces end with the private mount that names them. The
run therefore leaves no trace on the machine, and no listener of another program can answer.

"host" is where the relays listen and their clients connect; "inside" is where the servers are, as in a container.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from . import congestion
from .processes import Invalid, run, start

HOST, INSIDE = "host", "inside"
GUARD = "LANDFALL_COMPARE_GUARD"
TRACEFS = Path("/sys/kernel/tracing")

# The same in both namespaces. A default of BBR would pace loopback to a third. Few TIME_WAIT sockets are kept, so that
# those of one contender do not use up the ports of the next one. Timestamps have no random offset, so that the server does
# not take a new SYN for an old one (PAWS).
SETTINGS = {
    "net/ipv4/tcp_timestamps": "2",
    "net/ipv4/tcp_max_tw_buckets": "4096",
    "net/ipv4/ip_local_port_range": "10000 65000",
    "net/core/somaxconn": "4096",
}


def enter(script, congestion_control):
    """Returns in the first process of the new namespaces. The outer process waits for that one and never returns."""
    if GUARD in os.environ and os.getpid() == 1:
        return
    guard = congestion.allow(congestion_control)
    descriptors = () if guard is None else (guard,)
    os.environ[GUARD] = " ".join(map(str, descriptors))
    # Whatever ends the outer process ends unshare, and whatever ends unshare ends the process namespace.
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    command += [sys.executable, script, *sys.argv[1:]]
    inner = subprocess.Popen(command, start_new_session=True, pass_fds=descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    stop = Stop(inner)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop.request)
    signal.signal(signal.SIGALRM, stop.force)
    sys.exit(inner.wait())


class Stop:
    """Ends the inner process: on request in order, and by force when that takes too long."""

    def __init__(self, inner):
        self.inner = inner

    def request(self, _number, _frame):
        # unshare is in this group too, and blocks the signal.
        os.killpg(self.inner.pid, signal.SIGTERM)
        signal.alarm(15)

    def force(self, _number, _frame):
        self.inner.kill()


class Namespaces:
    """Both network namespaces, each kept by an idle process."""

    def __init__(self, congestion_control):
        Path("/run/netns").mkdir(exist_ok=True)
        run("mount", "-t", "tmpfs", "landfall-compare", "/run/netns")
        self.directory = Path("/run/netns/.files")
        self.directory.mkdir()
        self.keepers = {}
        settings = SETTINGS | {"net/ipv4/tcp_congestion_control": congestion_control}
        for name in (HOST, INSIDE):
            run("ip", "netns", "add", name)
            run(*within(name, ["ip", "link", "set", "lo", "up"]))
            for key, value in settings.items():
                script = 'printf %s "$2" > "/proc/sys/$1"'
                run(*within(name, ["sh", "-c", script, "sh", key, value]))
            self.keepers[name] = start(within(name, ["sleep", "infinity"]))
        guard = os.environ.pop(GUARD, "")
        if guard:
            congestion.release(int(guard))
        # pasta does not start without an interface to copy; no sample uses it.
        for words in (
            "link add up0 type veth peer name up1",
            "address add 192.0.2.1/24 dev up0",
            "link set up0 up",
            "link set up1 up",
            "route add default via 192.0.2.2",
        ):
            run(*within(HOST, ["ip", *words.split()]))
        self.has_tracefs = mount_tracefs()

    def file(self, name, path):
        """Returns a file of /proc/net in the namespace `name`."""
        return Path(f"/proc/{self.keepers[name].pid}/net/{path}").read_text()

    def setting(self, key):
        return run(*within(HOST, ["cat", f"/proc/sys/{key}"])).strip()

    def listening(self, name):
        """Returns the ports of all listeners."""
        rows = [row.split() for table in ("tcp", "tcp6") for row in self.file(name, table).splitlines()[1:]]
        return {int(row[1].rsplit(":", 1)[1], 16) for row in rows if row[3] == "0A"}

    def await_port(self, program, name, port):
        program.await_true(f"listen at {port}", lambda: port in self.listening(name))

    def await_silence(self, name, patience=10.0):
        """Waits until no listener is left, and returns the ports of those that are.

        The kernel frees an io_uring after its process has ended, and an accept in it keeps the listener until then.
        """
        until = time.monotonic() + patience
        while (left := self.listening(name)) and time.monotonic() < until:
            time.sleep(0.01)
        return left

    def paws_drops(self):
        """Segments that either namespace dropped as old duplicates, from TcpExt of /proc/net/netstat."""
        total = 0
        for name in (HOST, INSIDE):
            titles, values = [line.split()[1:] for line in self.file(name, "netstat").splitlines()[:2]]
            counts = dict(zip(titles, map(int, values), strict=True))
            total += sum(counts.get(title, 0) for title in ("PAWSActive", "PAWSEstab", "PAWSTimewait"))
        return total

    def bytes_beside_loopback(self):
        """Bytes that entered or left the inner namespace through any interface but its loopback."""
        rows = [row.replace(":", " ").split() for row in self.file(INSIDE, "dev").splitlines()[2:]]
        return sum(int(row[1]) + int(row[9]) for row in rows if row[0] != "lo")


def mount_tracefs():
    """Mounts tracefs in the private mount namespace where the machine does not: most distributions mount it."""
    if TRACEFS.is_dir() and not any(TRACEFS.iterdir()):
        try:
            run("mount", "-t", "tracefs", "tracefs", TRACEFS)
        except Invalid:
            return False
    return (TRACEFS / "events/sock/inet_sock_set_state").is_dir()


def within(namespace, command):
    """Returns the command line of `command` in a namespace. nsenter executes the program, so both have one process id."""
    return ["nsenter", f"--net=/run/netns/{namespace}", "--", *map(str, command)]
