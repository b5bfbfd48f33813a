"""The programs of a run: start, costs and end."""

import contextlib
import os
import select
import signal
import subprocess
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


class Invalid(Exception):
    """A sample that does not count; the text says why."""


class Group:
    """Processes whose costs are added up: those of `pids()`."""

    def cpu_seconds(self):
        return sum(map(cpu_seconds, self.pids()))

    def resident_bytes(self):
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE for pid in self.pids())

    def pin(self, cpus):
        """Pins every existing thread; later threads inherit it."""
        for pid in self.pids():
            for thread in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(thread), cpus)


class Program(Group):
    """A program that runs until `stop()`, with its descendants."""

    def __init__(self, name, command, log, **options):
        self.name, self.log = name, log
        with open(log, "wb") as out:
            self.process = start(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, **options)

    def await_true(self, what, condition, patience=15.0):
        until = time.monotonic() + patience
        while not condition():
            ended = self.has_ended()
            if ended:
                raise Invalid(ended)
            if time.monotonic() > until:
                raise Invalid(f"{self.name} does not {what}: {self.last_line()}")
            time.sleep(0.01)

    def has_ended(self):
        """Returns how the program ended, or None while it runs."""
        if self.process.poll() is None:
            return None
        return f"{self.name} ended with {self.process.returncode}: {self.last_line()}"

    def last_line(self):
        lines = Path(self.log).read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "no output"

    def pids(self):
        return descendants(self.process.pid)

    def stop(self):
        end(self.pids(), {self.process.pid: self.process})


def end(pids, own):
    """Ends processes and returns when they are gone, because a leftover listener would answer in the next sample.

    `own` maps the process ids that this process started to their Popen objects.
    """
    handles = {}
    for pid in pids:
        try:
            handles[pid] = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
    for number in (signal.SIGTERM, signal.SIGKILL):
        for handle in handles.values():
            try:
                signal.pidfd_send_signal(handle, number)
            except ProcessLookupError:
                continue
        if join(handles, own, patience=3.0):
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


def reap(pid):
    """Collects an orphan, which becomes a child of this process, the first one of its namespace."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def start(command, **streams):
    """Starts a program in its own session: Ctrl-C reaches this process only, which then stops the programs in order."""
    return subprocess.Popen(list(map(str, command)), start_new_session=True, **streams)


def run(*command, timeout=60):
    """Runs a program to its end and returns its standard output."""
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        check=False,
    )
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise Invalid(f"{program_of(command)} ended with {done.returncode}: {lines[-1] if lines else 'no output'}")
    return done.stdout


def program_of(command):
    return Path(command[command.index("--") + 1 if "--" in command else 0]).name


def stat(pid):
    """Returns the fields of /proc/PID/stat from the third on, or None for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def every_process():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def processes_of(binary):
    """Returns every process that runs this file."""
    file = os.stat(binary)

    def runs(pid):
        try:
            return os.path.samestat(os.stat(f"/proc/{pid}/exe"), file)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return False

    return [pid for pid in every_process() if runs(pid)]


def descendants(root):
    """Returns `root` and the processes below it that have not ended."""
    children, alive = {}, set()
    for pid in every_process():
        fields = stat(pid)
        if fields and fields[0] != "Z":
            alive.add(pid)
            children.setdefault(int(fields[1]), []).append(pid)
    found, queue = [], [root]
    while queue:
        pid = queue.pop()
        if pid in alive:
            found.append(pid)
        queue.extend(children.get(pid, []))
    return found


def cpu_ticks(pid):
    """User and system time of a process and of the children that it has waited for."""
    fields = stat(pid)
    return sum(map(int, fields[11:15])) if fields else 0


def cpu_seconds(pid):
    """The same in seconds. The time of the process itself comes from its clock, in nanoseconds instead of ticks."""
    fields = stat(pid)
    try:
        # The kernel's encoding of a process' CPU clock; see clock_getcpuclockid(3).
        return time.clock_gettime((~pid << 3) | 2) + (sum(map(int, fields[13:15])) / TICKS if fields else 0.0)
    except OSError:
        return 0.0
