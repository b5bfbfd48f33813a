"""The results of a run: one JSON object a line, written as soon as it is known. src/report.rs reads them."""

import datetime
import hashlib
import json
import os
import shutil
import subprocess

from . import vite
from .contenders import output_of
from .machine import facts
from .options import ROOT, TARGET

PUBLISHED = ROOT / "benches/results"


class Results:
    """The file of a run. An interrupted run leaves the samples taken until then."""

    def __init__(self, conditions, options):
        size = "smoke" if options.smoke else "quick" if options.quick else "methods" if options.methods else "full"
        name = f"{conditions['started'][:19].replace(':', '')}-{size}"
        self.directory = TARGET / "compare" / name
        self.directory.mkdir(parents=True)
        self.path = self.directory / "run.jsonl"
        self.samples = []
        self._append({"kind": "run", **conditions})
        # Each sample is meaningful without the first line.
        self.shared = {
            "machine": "{kernel}, {processors} x {processor}".format(**conditions["machine"]),
            "commit": conditions["commit"],
            "congestion_control": conditions["congestion_control"],
            "busy_processors_before": conditions["idle"]["busy_processors"],
        }

    def add(self, **sample):
        self.samples.append(sample)
        self._append({"kind": "sample", **sample, **self.shared})

    def _append(self, line):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def report(self, options):
        """Prints the tables, and writes the page and the charts beside the samples. Publishes them on request."""
        program = options.programs / "report"
        subprocess.run([program, self.path, "--into", self.directory], check=True)
        if options.publish:
            published = PUBLISHED / ("methods" if options.methods else "relays")
            shutil.rmtree(published, ignore_errors=True)
            shutil.copytree(self.directory, published)
            give_back(PUBLISHED, published)
        if options.publish and not options.methods:
            subprocess.run([program, self.path, "--publish", ROOT], check=True, stdout=subprocess.DEVNULL)
        give_back(TARGET / "compare", self.directory)


def give_back(parent, directory):
    """Files that root made in a user's checkout belong to that user."""
    owner = parent.parent.stat()
    for path in (parent, directory, *directory.iterdir()):
        os.chown(path, owner.st_uid, owner.st_gid)


def conditions(namespaces, chosen, works, load, options):
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit() if options.built_here else f"{commit()}, but the binaries were given",
        "landfall_sha256": hashlib.sha256(options.landfall.read_bytes()).hexdigest(),
        "machine": facts(),
        "congestion_control": namespaces.setting("net/ipv4/tcp_congestion_control"),
        "tracefs": namespaces.has_tracefs,
        "idle": load,
        "seconds": options.seconds,
        "repetitions": options.repetitions,
        "contenders": [{"name": each.name, "ours": each.ours} for each in chosen],
        "works": [definition(work) for work in works],
        "versions": {each.name: each.version() for each in chosen} | tools(works, options),
    }


def definition(work):
    figures = [vars(figure) for figure in work.figures]
    return {"name": work.name, "what": work.what, "headline": work.headline, "figures": figures}


def commit():
    """Returns the commit of this checkout, with `-dirty` where a tracked file differs from it."""
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def tools(works, options):
    programs = {"iperf3": "--version", "wrk": "-v", "nginx": "-v"}
    versions = {name: output_of(name, option)() for name, option in programs.items()}
    if any(work.name == "vite" for work in works):
        browser = {"chromium": output_of("chromium", "--version")(), "node": output_of("node", "--version")()}
        versions |= browser | {"vite": vite.version(options.vite)}
    return versions
