"""What a run leaves behind: one JSON object a line, and a table of medians."""

import datetime
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path


class Results:
    """The file of a run. Each line is written as soon as it is known, so a run that was stopped is worth something."""

    def __init__(self, facts, options):
        stem = f"{facts['began'][:19].replace(':', '')}-linux-{facts['kernel']}-{facts['processors']}cpu"
        prefix, suffix = "quick-" if options.quick else "", "-ways" if options.ways else ""
        self.path = Path(__file__).resolve().parents[1] / "results" / f"{prefix}{stem}{suffix}.jsonl"
        self.path.parent.mkdir(exist_ok=True)
        self.lines = []
        self.path.touch(exist_ok=False)
        self._append({"kind": "run", **facts})

    def add(self, **measurement):
        self.lines.append(measurement)
        self._append({"kind": "measurement", **measurement})

    def _append(self, line):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def tables(self, works, names):
        """One table for each work: medians, and the least and the most in brackets."""
        for work in works:
            rows = [self._row(work, name) for name in names]
            rows = [row for row in rows if row]
            if rows:
                yield f"### {work.name}\n"
                yield "| | " + " | ".join(work.columns.values()) + " |"
                yield "| --- |" + " ---: |" * len(work.columns)
                yield from rows
                yield ""

    def _row(self, work, name):
        mine = [line for line in self.lines if (line["work"], line["contender"]) == (work.name, name)]
        if not mine:
            return None
        bad = [line["invalid"] for line in mine if "invalid" in line]
        if bad:
            why = bad[0].replace("|", "/")
            return f"| {name} | invalid ({len(bad)} of {len(mine)}): {why} |" + " |" * (len(work.columns) - 1)
        cells = [summary([line["figures"].get(key) for line in mine]) for key in work.columns]
        return f"| {name} | " + " | ".join(cells) + " |"


def summary(values):
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    low, middle, high = (short(value) for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}–{high})" if len(values) > 1 else middle


def short(value):
    """Three significant digits, and thousands in groups."""
    if abs(value) >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def facts(space, contenders, options):
    return {
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "processor": processor(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "congestion_control": space.setting("net/ipv4/tcp_congestion_control"),
        "load_average": os.getloadavg()[0],
        "commit": commit(),
        "landfall_sha256": hashlib.sha256(options.landfall.read_bytes()).hexdigest(),
        "seconds": options.seconds,
        "repetitions": options.repetitions,
        "versions": {contender.name: contender.version() for contender in contenders} | tools(),
    }


def processor():
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def commit():
    """The commit of this checkout, which need not be the one that the measured binary was built from."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def tools():
    versions = {}
    for name, option in (("iperf3", "--version"), ("wrk", "-v"), ("nginx", "-v")):
        done = subprocess.run([name, option], capture_output=True, text=True, check=False)
        versions[name] = ((done.stdout + done.stderr).strip().splitlines() or ["unknown"])[0][:60]
    return versions
