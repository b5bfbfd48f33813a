"""The work that is measured. Each returns named figures, or raises Invalid when a check of its own fails."""

import json
import os
import re
import resource
import subprocess

from .space import HOST, INSIDE, Invalid, Program, run, start, within

IPERF, HTTP, ECHO = 5201, 8080, 7007

NGINX = """\
daemon off;
master_process off;
worker_processes 1;
worker_rlimit_nofile 8192;
pid {directory}/nginx.pid;
error_log {directory}/nginx.log;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    sendfile on;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location = / {{ return 200 "landfall\\n"; }}
        location /files/ {{ alias {directory}/; }}
    }}
}}
"""


class Trial:
    """What a work is given: where the client is, the relay if there is one, and how long to go on."""

    def __init__(self, space, programs, server, relay, options):
        self.space, self.programs, self.server, self.relay = space, programs, server, relay
        self.seconds, self.idle = options.seconds, options.idle
        self.client = HOST if relay else INSIDE
        self.cpu_before = self.cpu()

    def run(self, *command, patience=60):
        try:
            return run(*within(self.client, command), timeout=self.seconds + patience)
        except subprocess.TimeoutExpired as late:
            raise Invalid(f"the client had not ended {patience} s after its time") from late

    def cpu(self):
        return self.relay.cpu_seconds() if self.relay else 0.0

    def spent(self):
        """Processor seconds of the relay since the trial began. None at all means that it was not in the path."""
        if self.relay is None:
            return None
        spent = self.cpu() - self.cpu_before
        if spent <= 0:
            raise Invalid("the relay used no processor time: it was not in the path")
        return spent


class Work:
    """A kind of work: its name, the server it takes, the port, the figures it gives, and how it is done."""

    def __init__(self, name, server, port, columns, measure, without_relay=True):
        self.name, self.server, self.port = name, server, port
        self.columns, self.measure, self.without_relay = columns, measure, without_relay

    def serve(self, space, programs):
        directory = space.directory
        log = directory / f"{self.server}.log"
        log.write_bytes(b"")
        server = Program(self.server, INSIDE, SERVERS[self.server](directory, programs), log)
        try:
            server.await_port(space, INSIDE, self.port)
        except Invalid:
            server.stop()
            raise
        return server


def iperf_server(_directory, _programs):
    return ["iperf3", "-s", "-B", "127.0.0.1", "-p", IPERF]


def nginx_server(directory, _programs):
    configuration = directory / "nginx.conf"
    configuration.write_text(NGINX.format(directory=directory, port=HTTP))
    (directory / "1m").write_bytes(bytes(1024 * 1024))
    return ["nginx", "-c", configuration, "-e", directory / "nginx.log"]


def echo_server(_directory, programs):
    return [programs / "echo", ECHO]


SERVERS = {"iperf3": iperf_server, "nginx": nginx_server, "echo": echo_server}


def bulk(streams, reverse):
    def measure(trial):
        beside = trial.space.beside_loopback()
        options = ["-P", streams, "-t", trial.seconds, *(["-R"] if reverse else [])]
        answer = json.loads(trial.run("iperf3", "-J", "-c", "127.0.0.1", "-p", IPERF, *options))
        if "error" in answer:
            raise Invalid(f"iperf3: {answer['error']}")
        received = answer["end"]["sum_received"]
        if received["bytes"] == 0:
            raise Invalid("iperf3 received nothing")
        if trial.space.beside_loopback() - beside > received["bytes"] / 100:
            raise Invalid("the bytes did not go over loopback")
        figures = {"gbit_s": received["bits_per_second"] / 1e9, "bytes": received["bytes"]}
        return figures | per("cpu_s_per_gb", trial.spent(), received["bytes"] / 1e9)

    return measure


def http(connections, path):
    def measure(trial):
        url = f"http://127.0.0.1:{HTTP}{path}"
        text = trial.run("wrk", "-t1", f"-c{connections}", f"-d{trial.seconds}s", "--timeout", "10s", "--latency", url)
        trouble = re.search(r"Socket errors:.*|Non-2xx.*", text)
        if trouble:
            raise Invalid(f"wrk: {trouble[0].strip()}")
        requests = int(re.search(r"(\d+) requests in", text)[1])
        if requests == 0:
            raise Invalid("wrk: no request was answered")
        figures = {
            "per_second": float(re.search(r"Requests/sec:\s*([\d.]+)", text)[1]),
            "p50_us": microseconds(re.search(r"50%\s+([\d.]+)(us|ms|s)", text)),
            "p99_us": microseconds(re.search(r"99%\s+([\d.]+)(us|ms|s)", text)),
        }
        return figures | per("cpu_us_per_request", trial.spent(), requests / 1e6)

    return measure


def connect(close):
    def measure(trial):
        dropped = trial.space.protections()
        options = ["--in-flight", "64", "--close", close, "--seconds", trial.seconds]
        answer = json.loads(trial.run(trial.programs / "dial", "--to", f"127.0.0.1:{ECHO}", *options))
        if answer["errors"] or not answer["connections"]:
            raise Invalid(f"{answer['errors']} connects failed: {answer['first_error']}")
        dropped = trial.space.protections() - dropped
        if dropped:
            raise Invalid(f"PAWS dropped {dropped} segments, so the tail is the kernel's")
        figures = {key: answer[key] for key in ("per_second", "p50_us", "p99_us")}
        return figures | per("cpu_us_per_connection", trial.spent(), answer["connections"] / 1e6)

    return measure


def ping(trial):
    """Everything on one processor: unpinned, the figure depends on where the scheduler happens to wake whom."""
    cpu = {max(os.sched_getaffinity(0))}
    for program in (trial.server, trial.relay):
        if program:
            program.pin(cpu)
    pinned = ["taskset", "-c", str(*cpu), trial.programs / "ping"]
    answer = json.loads(trial.run(*pinned, "--to", f"127.0.0.1:{ECHO}", "--seconds", trial.seconds))
    figures = {key: answer[key] for key in ("p50_us", "p99_us")}
    return figures | per("cpu_us_per_round_trip", trial.spent(), answer["round_trips"] / 1e6)


def idle(trial):
    before = trial.relay.resident_bytes()
    command = [trial.programs / "idle", "--to", f"127.0.0.1:{ECHO}", "--connections", trial.idle]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    client = start(trial.client, command, text=True, **pipes)
    try:
        if not client.stdout.readline():
            raise Invalid(f"could not hold {trial.idle} connections: {client.stderr.read().strip()}")
        trial.spent()
        grown = trial.relay.resident_bytes() - before
    finally:
        client.communicate()
    return {"rss_per_connection": grown / trial.idle, "rss_idle_kib": before / 1024, "connections": trial.idle}


def per(name, spent, amount):
    return {} if spent is None else {name: spent / amount}


def microseconds(found):
    return float(found[1]) * {"us": 1, "ms": 1e3, "s": 1e6}[found[2]]


def raise_descriptor_limit():
    """Every program here gets what the machine allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


BULK = {"gbit_s": "Gbit/s", "cpu_s_per_gb": "relay CPU s/GB"}
REQUESTS = {"per_second": "requests/s", "p50_us": "p50 µs", "p99_us": "p99 µs"}
REQUESTS |= {"cpu_us_per_request": "relay CPU µs/request"}
CONNECTS = {"per_second": "connections/s", "p50_us": "p50 µs", "p99_us": "p99 µs"}
CONNECTS |= {"cpu_us_per_connection": "relay CPU µs/connection"}
ROUND_TRIPS = {"p50_us": "p50 µs", "p99_us": "p99 µs", "cpu_us_per_round_trip": "relay CPU µs/round trip"}
MEMORY = {"rss_per_connection": "RSS B/connection", "rss_idle_kib": "RSS without any, KiB"}

WORKS = [
    Work("bulk-1", "iperf3", IPERF, BULK, bulk(1, False)),
    Work("bulk-1-reverse", "iperf3", IPERF, BULK, bulk(1, True)),
    Work("bulk-8", "iperf3", IPERF, BULK, bulk(8, False)),
    Work("bulk-8-reverse", "iperf3", IPERF, BULK, bulk(8, True)),
    Work("http-64", "nginx", HTTP, REQUESTS, http(64, "/")),
    Work("http-256", "nginx", HTTP, REQUESTS, http(256, "/")),
    Work("file-16", "nginx", HTTP, REQUESTS, http(16, "/files/1m")),
    Work("connect-fin", "echo", ECHO, CONNECTS, connect("fin")),
    Work("connect-rst", "echo", ECHO, CONNECTS, connect("rst")),
    Work("ping", "echo", ECHO, ROUND_TRIPS, ping),
    Work("idle", "echo", ECHO, MEMORY, idle, without_relay=False),
]
