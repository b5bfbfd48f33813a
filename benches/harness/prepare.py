"""Preparation on a fresh machine: packages, binaries, the Vite app, and root."""

import os
import shutil
import subprocess
import sys

from . import vite
from .options import ROOT

# The programs of a run, each with the Debian package that contains it.
PACKAGES = {
    "chromium": "chromium",
    "curl": "curl",
    "haproxy": "haproxy",
    "ip": "iproute2",
    "iperf3": "iperf3",
    "nginx": "nginx-light",
    "node": "nodejs",
    "npm": "npm",
    "nsenter": "util-linux",
    "pasta": "passt",
    "setpriv": "util-linux",
    "taskset": "util-linux",
    "unshare": "util-linux",
    "wrk": "wrk",
}
ONLY_FOR_VITE = {"chromium", "node", "npm"}


def prepare(options):
    """Returns when everything that the run needs is present, or ends the program."""
    # Some machines leave these out of root's or a user's path.
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    install_packages([name for name in PACKAGES if "vite" in options.work or name not in ONLY_FOR_VITE])
    if options.built_here:
        build()
    for path in (options.landfall, options.programs / "echo"):
        if not os.access(path, os.X_OK):
            fail(f"there is no program {path}", "leave --landfall and --programs out, or give existing paths")
    if "vite" in options.work:
        reason = vite.install(options.vite)
        if reason:
            fail(reason, "check the connection to the npm registry, or leave the work out with --work")
    become_root(options)


def install_packages(programs):
    missing = [name for name in programs if shutil.which(name) is None]
    if not missing:
        return
    packages = sorted({PACKAGES[name] for name in missing})
    if shutil.which("apt-get") is None:
        fail(f"not installed: {', '.join(missing)}", f"install them; Debian's packages are {' '.join(packages)}")
    note(f"installing {' '.join(packages)}")
    apt_get = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]
    if os.geteuid() != 0:
        apt_get.insert(0, "sudo")
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
        done = subprocess.run([*apt_get, *command], stdout=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            fail(f"apt-get could not install {' '.join(packages)}", f"install them: {', '.join(missing)} must be in PATH")


def build():
    if shutil.which("cargo") is None:
        hint = "install Rust (https://rustup.rs); as another user's root, run this as that user: it uses sudo by itself"
        fail("cargo is not in PATH", hint)
    note("building landfall and the programs of the comparison")
    # One package at a time: built together, features that only the comparison needs would be in landfall too.
    for name in ("landfall", "landfall-benches"):
        done = subprocess.run(["cargo", "build", "--release", "--quiet", "-p", name], cwd=ROOT, check=False)
        if done.returncode != 0:
            fail(f"{name} does not build", "see the errors of cargo above")


def become_root(options):
    """Starts the program again through sudo, with the binaries that were built as the user."""
    if os.geteuid() == 0:
        return
    if shutil.which("sudo") is None:
        fail("the comparison needs root to make network namespaces", "run it as root")
    kept = [f"{name}={os.environ[name]}" for name in ("CARGO_TARGET_DIR",) if name in os.environ]
    os.execvp("sudo", ["sudo", "env", f"{PREPARED}=1", *kept, sys.executable, *sys.argv])


# Set by the process that prepared the run, for the processes that it executes.
PREPARED = "LANDFALL_COMPARE_PREPARED"


def note(text):
    print(text, file=sys.stderr, flush=True)


def fail(text, hint):
    print(f"compare: {text}\nhint: {hint}", file=sys.stderr)
    sys.exit(2)
