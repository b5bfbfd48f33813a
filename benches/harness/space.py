"""The world of a run, and the programs in it.

The script starts itself anew in a process namespace and a mount namespace of its own. Everything that it starts dies
with it, whatever ends it, because the kernel ends a process namespace with its first process; and the two network
namespaces go with the private mount of /run/netns that names them. So nothing of the machine is changed or has to be
restored, and no other program's listener can answer.

"host" is where the relays listen and their clients dial; "inside" is where the servers are, as in a container.
"""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

HOST, INSIDE = "host", "inside"
MARK = "LANDFALL_COMPARE_IN_ITS_OWN_WORLD"
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")

# The same for both namespaces. A default of BBR would pace loopback to a third. Few TIME_WAIT sockets are kept, so that
# those of one contender do not make the next one's ports scarce; and timestamps have no random offset, so that the
# few do not make the server take a new SYN for an old one (PAWS).
SETTINGS = {
    "net/ipv4/tcp_congestion_control": "cubic",
    "net/ipv4/tcp_timestamps": "2",
    "net/ipv4/tcp_max_tw_buckets": "4096",
    "net/ipv4/ip_local_port_range": "10000 65000",
    "net/core/somaxconn": "4096",
}


class Invalid(Exception):
    """A measurement that does not count, and why."""


def enter_own_world(script):
    """Returns in the new namespaces; the outer process only waits."""
    if os.geteuid() != 0:
        sys.exit("compare: it makes namespaces and enters them: run it as root")
    if os.environ.get(MARK) == "1" and os.getpid() == 1:
        return
    os.environ[MARK] = "1"
    flags = ["--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    os.execvp("unshare", ["unshare", *flags, sys.executable, script, *sys.argv[1:]])


class Space:
    """Both network namespaces, each kept by a process that does nothing."""

    def __init__(self):
        Path("/run/netns").mkdir(exist_ok=True)
        run("mount", "-t", "tmpfs", "landfall-compare", "/run/netns")
        self.directory = Path("/run/netns/.files")
        self.directory.mkdir()
        self.keepers = {}
        for name in (HOST, INSIDE):
            run("ip", "netns", "add", name)
            run(*within(name, ["ip", "link", "set", "lo", "up"]))
            for key, value in SETTINGS.items():
                script = 'printf %s "$2" > "/proc/sys/$1"'
                run(*within(name, ["sh", "-c", script, "sh", key, value]))
            self.keepers[name] = start(name, ["sleep", "infinity"])
        # pasta does not start without an interface to copy; nothing of what is measured goes over it.
        for words in (
            "link add up0 type veth peer name up1",
            "address add 192.0.2.1/24 dev up0",
            "link set up0 up",
            "link set up1 up",
            "route add default via 192.0.2.2",
        ):
            run(*within(HOST, ["ip", *words.split()]))

    def file(self, name, path):
        """A file of /proc/net as the namespace `name` has it."""
        return Path(f"/proc/{self.keepers[name].pid}/net/{path}").read_text()

    def setting(self, key):
        return run(*within(HOST, ["cat", f"/proc/sys/{key}"])).strip()

    def listening(self, name):
        """The ports at which something listens."""
        rows = [row.split() for table in ("tcp", "tcp6") for row in self.file(name, table).splitlines()[1:]]
        return {int(row[1].rsplit(":", 1)[1], 16) for row in rows if row[3] == "0A"}

    def await_silence(self, name, patience=10.0):
        """Waits until nothing listens, and gives what still does.

        The kernel takes an io_uring down after its process has ended, and an accept in it keeps the listener until then.
        """
        until = time.monotonic() + patience
        while (left := self.listening(name)) and time.monotonic() < until:
            time.sleep(0.01)
        return left

    def protections(self):
        """Segments that either namespace dropped as old duplicates, from TcpExt of /proc/net/netstat."""
        total = 0
        for name in (HOST, INSIDE):
            titles, values = [line.split()[1:] for line in self.file(name, "netstat").splitlines()[:2]]
            counts = dict(zip(titles, map(int, values), strict=True))
            total += sum(counts.get(title, 0) for title in ("PAWSActive", "PAWSEstab", "PAWSTimewait"))
        return total

    def beside_loopback(self):
        """Bytes that came into or out of the inner namespace over anything but its loopback."""
        rows = [row.replace(":", " ").split() for row in self.file(INSIDE, "dev").splitlines()[2:]]
        return sum(int(row[1]) + int(row[9]) for row in rows if row[0] != "lo")


class Group:
    """Processes whose costs are told together: those of `pids`."""

    def cpu_seconds(self):
        return sum(cpu_ticks(pid) for pid in self.pids()) / TICKS

    def resident_bytes(self):
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE for pid in self.pids())

    def pin(self, cpus):
        """Every thread there is now; threads to come inherit it from their makers."""
        for pid in self.pids():
            for thread in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(thread), cpus)


class Program(Group):
    """A program that runs until it is stopped, with its descendants."""

    def __init__(self, name, namespace, command, log, env=None):
        self.name, self.log = name, log
        with open(log, "ab") as out:
            self.process = start(namespace, command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env)

    def await_port(self, space, namespace, port):
        self.await_true(f"listen at {port}", lambda: port in space.listening(namespace))

    def await_true(self, what, condition, patience=10.0):
        until = time.monotonic() + patience
        while not condition():
            ended = self.has_ended()
            if ended:
                raise Invalid(ended)
            if time.monotonic() > until:
                raise Invalid(f"{self.name} does not {what}: {self.last_words()}")
            time.sleep(0.01)

    def has_ended(self):
        """How it ended, if it has."""
        if self.process.poll() is None:
            return None
        return f"{self.name} ended with {self.process.returncode}: {self.last_words()}"

    def last_words(self):
        lines = Path(self.log).read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "it said nothing"

    def pids(self):
        return descendants(self.process.pid)

    def stop(self):
        end(self.pids(), {self.process.pid: self.process})


def end(pids, own):
    """Ends processes, and returns when they are gone: a leftover would answer for the next one. `own` are those among them
    that were started here, by their ids."""
    handles = {}
    for pid in pids:
        try:
            handles[pid] = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
    for patience, number in ((3.0, signal.SIGTERM), (3.0, signal.SIGKILL)):
        for handle in handles.values():
            try:
                signal.pidfd_send_signal(handle, number)
            except ProcessLookupError:
                continue
        if join(handles, own, patience):
            break
    for handle in handles.values():
        os.close(handle)


def join(handles, own, patience):
    until = time.monotonic() + patience
    for pid, handle in handles.items():
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        if not poller.poll(max(0, until - time.monotonic()) * 1000):
            return False
        if pid in own:
            own[pid].wait()
        else:
            reap(pid)
    return True


def within(namespace, command):
    """The command line of `command` in a namespace; nsenter becomes the program, so the process id is its own."""
    return ["nsenter", f"--net=/run/netns/{namespace}", "--", *map(str, command)]


def start(namespace, command, **streams):
    """Starts a program in a session of its own, since Ctrl-C is for this script, which then stops the others in order."""
    return subprocess.Popen(within(namespace, command), start_new_session=True, **streams)


def run(*command, timeout=60):
    """Runs a program to its end and gives its standard output."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, start_new_session=True
    )
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise Invalid(f"{program_of(command)} ended with {done.returncode}: {words[-1] if words else ''}")
    return done.stdout


def program_of(command):
    words = list(command)
    return Path(words[words.index("--") + 1 if "--" in words else 0]).name


def reap(pid):
    """Descendants that outlive their parent become ours, since ours is the first process."""
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass


def stat(pid):
    """The fields of /proc/PID/stat from the third on; none when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def everyone():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def processes_of(binary):
    """Every process that runs this file."""
    file = os.stat(binary)

    def runs(pid):
        try:
            return os.path.samestat(os.stat(f"/proc/{pid}/exe"), file)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return False

    return [pid for pid in everyone() if runs(pid)]


def descendants(root):
    children = {}
    for pid in everyone():
        fields = stat(pid)
        if fields and fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(pid)
    found, queue = [], [root]
    while queue:
        pid = queue.pop()
        if stat(pid) is not None:
            found.append(pid)
        queue.extend(children.get(pid, []))
    return found


def cpu_ticks(pid):
    """User and system time of a process and of the children that it has waited for."""
    fields = stat(pid)
    return sum(map(int, fields[11:15])) if fields else 0


class Foreigners:
    """How busy others kept the machine meanwhile, in processors."""

    def __init__(self):
        self.began, self.busy, self.ours = time.monotonic(), self._busy(), self._ours()

    def processors(self):
        elapsed = time.monotonic() - self.began
        others = (self._busy() - self.busy) - (self._ours() - self.ours)
        return round(max(0.0, others / TICKS / elapsed), 2)

    @staticmethod
    def _busy():
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(
            int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        )
        return user + nice + system + irq + softirq + steal

    @staticmethod
    def _ours():
        return sum(map(cpu_ticks, everyone()))
