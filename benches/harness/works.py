"""The works: what is measured, with which server, and the checks of each. See README.md for their description."""

import hashlib
import json
import os
import re
import resource
import statistics
import subprocess

from . import servers
from .chromium import Chromium
from .namespaces import within
from .processes import Invalid, Program, run, start
from .servers import ECHO, HTTP, IPERF, VERIFY, VITE
from .vite import MODULES, warm_up


class Figure:
    """One figure of a work: its key in the samples, its heading with the unit, and how the chart shows it."""

    def __init__(self, key, label, better="less", charted=True, relative=False):
        self.key, self.label, self.better = key, label, better
        self.charted, self.relative = charted, relative


class Work:
    """One kind of work: `measure` takes a Trial, and returns the figures or raises Invalid."""

    def __init__(self, name, what, server, port, figures, measure, without_relay=True, discover=False, slow=False, headline=True):
        self.name, self.what, self.server, self.port = name, what, server, port
        self.figures, self.measure = figures, measure
        # Whether a contender without a relay can take part, and whether the relay has to find listeners by itself.
        self.without_relay, self.discover = without_relay, discover
        # Whether the front page shows it.
        self.headline = headline
        # Whether one sample takes so long that a quick run has only three.
        self.slow = slow

    def serve(self, namespaces, contender, options):
        """Starts the server and returns its program when it listens."""
        directory, name = namespaces.directory, self.server.__name__
        command = contender.server_command(self.server(directory, options))
        program = Program(name, command, directory / f"{name}.out")
        try:
            namespaces.await_port(program, contender.server, self.port)
        except Invalid:
            program.stop()
            raise
        return program


class Trial:
    """The surroundings of one sample: the namespaces, the contender, its relay if it has one, and the options."""

    def __init__(self, namespaces, contender, server, relay, options):
        self.namespaces, self.contender, self.server, self.relay = namespaces, contender, server, relay
        self.options, self.programs, self.seconds = options, options.programs, options.seconds
        # iperf3 and wrk take whole seconds.
        self.whole_seconds = max(1, round(options.seconds))
        self.cpu_before = self.cpu()

    def run(self, *command, patience=60):
        """Runs a client to its end and returns its standard output."""
        try:
            return run(*within(self.contender.client, command), timeout=self.seconds + patience)
        except subprocess.TimeoutExpired as late:
            raise Invalid(f"the client had not ended {patience} s after its time") from late

    def cpu(self):
        return self.relay.cpu_seconds() if self.relay else 0.0

    def per(self, key, amount):
        """Returns the relay's processor time since the start of the trial, divided by `amount`, as the figure `key`."""
        if self.relay is None:
            return {}
        spent = self.cpu() - self.cpu_before
        if spent <= 0 and self.contender.relays:
            raise Invalid("the relay used no processor time: it was not in the path")
        return {key: spent / amount}


def verify(trial):
    answer = json.loads(trial.run(trial.programs / "verify", "--to", f"127.0.0.1:{VERIFY}"))
    return {"mbytes": answer["bytes"] / 1e6} | trial.per("cpu_s_per_gb", answer["bytes"] / 1e9)


def bulk(streams, reverse):
    def measure(trial):
        beside = trial.namespaces.bytes_beside_loopback()
        options = ["-P", streams, "-t", trial.whole_seconds, *(["-R"] if reverse else [])]
        answer = json.loads(trial.run("iperf3", "-J", "-c", "127.0.0.1", "-p", IPERF, *options))
        if "error" in answer:
            raise Invalid(f"iperf3: {answer['error']}")
        sent, received = (answer["end"][key] for key in ("sum_sent", "sum_received"))
        if not 0 < received["bytes"] <= sent["bytes"]:
            raise Invalid(f"iperf3 sent {sent['bytes']} bytes and received {received['bytes']}")
        if trial.namespaces.bytes_beside_loopback() - beside > received["bytes"] / 100:
            raise Invalid("the bytes did not go over loopback")
        figures = {"gbit_s": received["bits_per_second"] / 1e9, "bytes": received["bytes"]}
        return figures | trial.per("cpu_s_per_gb", received["bytes"] / 1e9)

    return measure


def http(connections, path):
    def measure(trial):
        url = f"http://127.0.0.1:{HTTP}{path}"
        text = trial.run("wrk", "-t1", f"-c{connections}", f"-d{trial.whole_seconds}s", "--timeout", "10s", "--latency", url)
        errors = re.search(r"Socket errors:.*|Non-2xx.*", text)
        if errors:
            raise Invalid(f"wrk: {errors[0].strip()}")
        requests = int(re.search(r"(\d+) requests in", text)[1])
        if requests == 0:
            raise Invalid("wrk: no request was answered")
        figures = {
            "per_second": float(re.search(r"Requests/sec:\s*([\d.]+)", text)[1]),
            "p50_us": microseconds(re.search(r"50%\s+([\d.]+)(us|ms|s)", text)),
            "p99_us": microseconds(re.search(r"99%\s+([\d.]+)(us|ms|s)", text)),
        }
        figures |= trial.per("cpu_us_per_request", requests / 1e6)
        compare_file(trial)
        return figures

    return measure


def compare_file(trial):
    """wrk does not compare the bodies, so one file is received through the same relay and compared."""
    wanted = hashlib.sha256((trial.namespaces.directory / "1m").read_bytes()).hexdigest()
    received = trial.namespaces.directory / "received"
    trial.run("curl", "-sS", "--noproxy", "*", "-o", received, f"http://127.0.0.1:{HTTP}/files/1m")
    if hashlib.sha256(received.read_bytes()).hexdigest() != wanted:
        raise Invalid("the bytes of a file are wrong")


def connect(close):
    def measure(trial):
        dropped = trial.namespaces.paws_drops()
        options = ["--in-flight", "64", "--close", close, "--seconds", trial.seconds]
        answer = json.loads(trial.run(trial.programs / "dial", "--to", f"127.0.0.1:{ECHO}", *options))
        if answer["errors"] or not answer["connections"]:
            raise Invalid(f"{answer['errors']} connections failed: {answer['first_error']}")
        dropped = trial.namespaces.paws_drops() - dropped
        if dropped:
            raise Invalid(f"PAWS dropped {dropped} segments, so the latencies are those of retransmissions")
        figures = {key: answer[key] for key in ("per_second", "p50_us", "p99_us")}
        return figures | trial.per("cpu_us_per_connection", answer["connections"] / 1e6)

    return measure


def ping(trial):
    """All processes share one processor: without that, the figure depends on where the scheduler wakes each of them."""
    cpu = {max(os.sched_getaffinity(0))}
    for program in (trial.server, trial.relay):
        if program:
            program.pin(cpu)
    pinned = ["taskset", "-c", str(*cpu), trial.programs / "ping"]
    answer = json.loads(trial.run(*pinned, "--to", f"127.0.0.1:{ECHO}", "--seconds", trial.seconds))
    figures = {key: answer[key] for key in ("p50_us", "p99_us")}
    return figures | trial.per("cpu_us_per_round_trip", answer["round_trips"] / 1e6)


def idle(trial):
    before = trial.relay.resident_bytes()
    count = trial.options.idle
    command = [trial.programs / "idle", "--to", f"127.0.0.1:{ECHO}", "--connections", count]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    client = start(within(trial.contender.client, command), text=True, **pipes)
    try:
        if not client.stdout.readline():
            raise Invalid(f"could not hold {count} connections: {client.stderr.read().strip()}")
        grown = trial.relay.resident_bytes() - before
    finally:
        client.communicate()
    figures = {"rss_per_connection": grown / count, "rss_idle_kib": before / 1024, "connections": count}
    return figures | trial.per("cpu_us_per_connection", count / 1e6)


def first_byte(trial):
    inside = f"/run/netns/{trial.contender.server}"
    options = ["--inside", inside, "--seconds", trial.seconds, "--listeners", trial.options.listeners]
    answer = json.loads(trial.run(trial.programs / "first_byte", *options))
    figures = {"p50_ms": answer["p50_us"] / 1e3, "p99_ms": answer["p99_us"] / 1e3, "listeners": answer["listeners"]}
    return figures | trial.per("cpu_us_per_listener", answer["listeners"] / 1e6)


def vite(trial):
    warm_up(trial.contender.server, trial.namespaces.directory, VITE)
    times = []
    trial.cpu_before = trial.cpu()
    with Chromium(trial.contender.client, trial.namespaces.directory) as browser:
        for _ in range(trial.options.loads):
            page = browser.load(f"http://127.0.0.1:{VITE}/")
            times.append(page["milliseconds"])
            if page["modules"] != MODULES:
                raise Invalid(f"{page['modules']:.0f} of {MODULES} modules were loaded")
    return {"load_ms": statistics.median(times)} | trial.per("cpu_ms_per_load", len(times) / 1e3)


def microseconds(found):
    return float(found[1]) * {"us": 1, "ms": 1e3, "s": 1e6}[found[2]]


def raise_descriptor_limit():
    """Raises the descriptor limit to its hard limit; every program of the run inherits it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


CPU_PER_GB = Figure("cpu_s_per_gb", "relay CPU s/GB")
P50, P99 = Figure("p50_us", "p50 µs", charted=False), Figure("p99_us", "p99 µs", relative=True)
VERIFIED = [Figure("mbytes", "MB, all bytes right", "more", charted=False), Figure(**vars(CPU_PER_GB) | {"charted": False})]
BULK = [Figure("gbit_s", "Gbit/s", "more", relative=True), CPU_PER_GB]
REQUESTS = [
    Figure("per_second", "requests/s", "more", relative=True),
    P50,
    P99,
    Figure("cpu_us_per_request", "relay CPU µs/request"),
]
CONNECTIONS = [
    Figure("per_second", "connections/s", "more", relative=True),
    P50,
    P99,
    Figure("cpu_us_per_connection", "relay CPU µs/connection"),
]
ROUND_TRIPS = [
    Figure("p50_us", "p50 µs", relative=True),
    P99,
    Figure("cpu_us_per_round_trip", "relay CPU µs/round trip"),
]
MEMORY = [
    Figure("rss_per_connection", "RSS B/connection"),
    Figure("rss_idle_kib", "RSS without connections, KiB"),
    Figure("cpu_us_per_connection", "relay CPU µs/connection", charted=False),
]
DISCOVERY = [
    Figure("p50_ms", "p50 ms"),
    Figure("p99_ms", "p99 ms"),
    Figure("cpu_us_per_listener", "relay CPU µs/listener", charted=False),
]
LOADS = [Figure("load_ms", "page load ms", relative=True), Figure("cpu_ms_per_load", "relay CPU ms/load")]


def bulk_work(streams, reverse):
    what = f"iperf3, {streams} stream{'s' if streams > 1 else ''} {'from' if reverse else 'to'} the server"
    name = f"bulk-{streams}{'-reverse' if reverse else ''}"
    return Work(name, what, servers.iperf3, IPERF, BULK, bulk(streams, reverse), headline=not reverse)


def http_work(connections):
    what = f"wrk, {connections:,} connection{'s' if connections > 1 else ''}, keep-alive, a body of 9 bytes"
    measure = http(connections, "/")
    return Work(f"http-{connections}", what, servers.nginx, HTTP, REQUESTS, measure, headline=connections in (64, 256))


def connect_work(close, how):
    what = f"connect, one byte in each direction, close with a {how}; 64 in flight"
    measure = connect(close)
    return Work(f"connect-{close}", what, servers.echo, ECHO, CONNECTIONS, measure, headline=close == "fin")


VERIFY_WHAT = "8 connections, 4 MiB of known bytes in both directions of each"
FILE_WHAT = "wrk, 16 connections, a file of 1 MiB"
PING_WHAT = "64 bytes in each direction on one connection, all on one processor"
IDLE_WHAT = "resident memory of the relay, with and without idle connections"
FIRST_BYTE_WHAT = "from listen() inside to the first byte at a client outside"
VITE_WHAT = f"Chromium loads a Vite app of {MODULES:,} modules with an empty cache"

WORKS = [
    Work("verify", VERIFY_WHAT, servers.verify, VERIFY, VERIFIED, verify, headline=False),
    *(bulk_work(streams, reverse) for streams in (1, 8) for reverse in (False, True)),
    *(http_work(connections) for connections in (1, 64, 256, 1000)),
    Work("file-16", FILE_WHAT, servers.nginx, HTTP, REQUESTS, http(16, "/files/1m"), headline=False),
    connect_work("fin", "FIN"),
    connect_work("rst", "reset"),
    Work("ping", PING_WHAT, servers.echo, ECHO, ROUND_TRIPS, ping),
    Work("idle", IDLE_WHAT, servers.echo, ECHO, MEMORY, idle, without_relay=False),
    Work("first-byte", FIRST_BYTE_WHAT, servers.echo, ECHO, DISCOVERY, first_byte, discover=True),
    Work("vite", VITE_WHAT, servers.vite, VITE, LOADS, vite, slow=True),
]
