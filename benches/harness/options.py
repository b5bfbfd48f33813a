"""The command line."""

import argparse
import os
from pathlib import Path

from .attach_methods import attach_methods
from .contenders import contenders
from .works import WORKS

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
# The attach methods differ in bulk in both directions, small messages, and new connections.
WORKS_OF_METHODS = ["verify", "bulk-1", "bulk-1-reverse", "http-64", "connect-fin"]
# One work of each kind.
WORKS_QUICK = ["verify", "bulk-1", "bulk-8-reverse", "http-64", "connect-fin", "ping", "idle", "first-byte", "vite"]

# Those of them that take no more than a second or two.
WORKS_SMOKE = ["verify", "bulk-1", "http-64", "connect-fin", "ping", "idle", "first-byte"]


def parse():
    built = TARGET / "release"
    names = [each.name for each in contenders(built, built)]
    methods = [each.name for each in attach_methods(built)]
    works = [work.name for work in WORKS]
    parser = argparse.ArgumentParser(
        prog="compare", description="Compares landfall with other relays on the same work. See benches/README.md."
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one work of each kind, once, one second each: under 3 minutes")
    size.add_argument("--smoke", action="store_true", help="the least that exercises every work and contender; no figures")
    size.add_argument("--publish", action="store_true", help="write the results of a full run to benches/results")
    parser.add_argument("--methods", action="store_true", help="compare landfall's own attach methods instead")
    parser.add_argument("--repetitions", type=positive, default=3, metavar="N", help="default: 3")
    parser.add_argument("--seconds", type=positive, default=5, metavar="S", help="of each sample; default: 5")
    parser.add_argument("--idle", type=positive, default=2000, metavar="N", help="idle connections; default: 2000")
    parser.add_argument("--quiet-wait", type=int, default=600, metavar="S", help="wait for a quiet machine; default: 600")
    listed_names = f"{', '.join(names)}; with --methods: {', '.join(methods)}"
    parser.add_argument("--only", type=listed({*names, *methods}), metavar="NAME,...", help=listed_names)
    parser.add_argument("--work", type=listed(works), metavar="NAME,...", help=", ".join(works))
    parser.add_argument("--congestion-control", default="cubic", metavar="NAME", help="default: cubic")
    parser.add_argument("--landfall", type=Path, metavar="PATH", help="a binary to measure instead of a new build")
    parser.add_argument("--programs", type=Path, metavar="DIRECTORY", help="binaries of landfall-benches instead of a new build")
    options = parser.parse_args()
    check_publish(parser, options)
    known = methods if options.methods else names
    options.only = options.only or known
    if not set(options.only) <= set(known):
        parser.error(f"--only takes {', '.join(known)} {'with' if options.methods else 'without'} --methods")
    choose_sizes(options, works)
    return options


def check_publish(parser, options):
    if not options.publish:
        return
    if options.landfall or options.programs or options.only or options.work or options.repetitions < 3:
        parser.error("--publish takes every contender and work, at least 3 repetitions, and binaries that it builds itself")


def choose_sizes(options, works):
    # At least so many listeners in `first-byte`, and so many page loads in `vite`.
    options.listeners, options.loads = 20, max(1, options.seconds // 2)
    # The span in which the load of the machine is read, in seconds.
    options.load_span = 2.0
    chosen = WORKS_OF_METHODS if options.methods else works
    if options.quick:
        options.repetitions, options.seconds, options.quiet_wait = 1, 1, 0
        options.idle, options.listeners, options.loads = 500, 5, 1
        chosen = [name for name in chosen if name in WORKS_QUICK]
    if options.smoke:
        options.repetitions, options.seconds, options.quiet_wait = 1, 0.2, 0
        options.idle, options.listeners, options.loads, options.load_span = 50, 3, 1, 0.2
        chosen = [name for name in chosen if name in WORKS_SMOKE]
    options.work = options.work or chosen
    options.built_here = not (options.landfall or options.programs)
    options.landfall = (options.landfall or TARGET / "release/landfall").resolve()
    options.programs = (options.programs or TARGET / "release").resolve()
    options.vite = (TARGET / "compare/vite").resolve()


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("a whole number from 1")
    return number


def listed(known):
    def parse_list(text):
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return names

    return parse_list
