"""The run: for each repetition and each work, every contender takes its turn (A B C, A B C, ...)."""

import argparse
import os
import shutil
import signal
import sys
from pathlib import Path

from .contenders import Direct, contenders, landfall_ways
from .report import Results, facts
from .space import HOST, INSIDE, Foreigners, Invalid, Space, enter_own_world
from .works import WORKS, Trial, raise_descriptor_limit

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ["haproxy", "ip", "iperf3", "nginx", "nsenter", "pasta", "taskset", "unshare", "wrk"]
# What the ways differ in: bytes in both directions, small messages, and new connections.
WORKS_OF_WAYS = ["bulk-1", "bulk-1-reverse", "http-64", "connect-fin"]
PROGRAMS = ["dial", "echo", "idle", "ping", "relay_monoio", "relay_tokio", "relay_tokio_uring"]


def main():
    options = parse()
    check_tools(options)
    enter_own_world(sys.argv[0])
    signal.signal(signal.SIGTERM, interrupted)
    raise_descriptor_limit()
    try:
        return compare(options)
    except KeyboardInterrupt:
        print("\ninterrupted; what was measured until then is in the results file", file=sys.stderr)
        return 130


def interrupted(_number, _frame):
    raise KeyboardInterrupt


def compare(options):
    space = Space()
    chosen = [each for each in offered(options) if each.name in options.only]
    works = [work for work in WORKS if work.name in options.work]
    conditions = facts(space, chosen, options)
    results = Results(conditions, options)
    if conditions["load_average"] > 0.5:
        note(f"the load of this machine is {conditions['load_average']:.1f}: others are at work, and figures suffer")
    for repetition in range(1, options.repetitions + 1):
        for work in works:
            for contender in chosen:
                if work.without_relay or not isinstance(contender, Direct):
                    one(options, space, results, repetition, work, contender)
    names = [contender.name for contender in chosen]
    print("\n".join(results.tables(works, names)))
    foreign = max((line["foreign_processors"] for line in results.lines), default=0)
    print(f"Others kept up to {foreign} of {os.cpu_count()} processors busy during a measurement.")
    print(f"Every measurement: {results.path}")
    return 1 if any("invalid" in line for line in results.lines) else 0


def one(options, space, results, repetition, work, contender):
    """One measurement, with servers and relay of its own, all gone when it returns."""
    began = Foreigners()
    try:
        outcome = {"figures": measured(options, space, work, contender)}
        told = ", ".join(f"{key} {outcome['figures'][key]:.4g}" for key in work.columns if key in outcome["figures"])
    except Invalid as why:
        outcome = {"invalid": str(why)}
        told = f"invalid: {why}"
    line = {"repetition": repetition, "work": work.name, "contender": contender.name}
    results.add(**line, **outcome, foreign_processors=began.processors())
    note(f"{repetition} {work.name:14} {contender.name:14} {told}")
    for name in (HOST, INSIDE):
        left = space.await_silence(name)
        if left:
            sys.exit(f"compare: something still listens at {sorted(left)} ({name}) and would answer for the next one")


def measured(options, space, work, contender):
    running = []
    try:
        running.append(work.serve(space, options.programs))
        if not isinstance(contender, Direct):
            running.append(contender.start(space, work.port))
        server, relay = running[0], running[1] if len(running) > 1 else None
        figures = work.measure(Trial(space, options.programs, server, relay, options))
        for program in running:
            ended = program.has_ended()
            if ended:
                raise Invalid(ended)
        return figures
    finally:
        for program in reversed(running):
            program.stop()


def offered(options):
    if options.ways:
        return landfall_ways(options.landfall)
    return contenders(options.landfall, options.programs)


def note(text):
    print(text, file=sys.stderr, flush=True)


def check_tools(options):
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        sys.exit(f"compare: not installed: {', '.join(missing)} (apt-get install haproxy iperf3 nginx-light passt wrk)")
    if not os.access(options.landfall, os.X_OK):
        sys.exit(f"compare: no landfall at {options.landfall}: run `cargo build --release`, or give --landfall PATH")
    missing = [name for name in PROGRAMS if not os.access(options.programs / name, os.X_OK)]
    if missing:
        sys.exit(f"compare: not built: {', '.join(missing)}: run `cargo build --release -p landfall-benches`")


def parse():
    built = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
    names = [each.name for each in contenders(built / "landfall", built)]
    own = [each.name for each in landfall_ways(built / "landfall")]
    works = [work.name for work in WORKS]
    parser = argparse.ArgumentParser(prog="compare", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="once, one second each: shows that it works, no more")
    parser.add_argument("--ways", action="store_true", help="landfall's own ways into a container instead, side by side")
    parser.add_argument("--repetitions", type=positive, default=3, metavar="N")
    parser.add_argument("--seconds", type=positive, default=5, metavar="S", help="of each measurement")
    parser.add_argument("--idle", type=positive, default=2000, metavar="N", help="idle connections to hold")
    told = f"{', '.join(names)}; with --ways {', '.join(own)}"
    parser.add_argument("--only", type=listed(names + own), metavar="NAME,...", help=told)
    parser.add_argument("--work", type=listed(works), metavar="NAME,...", help=", ".join(works))
    parser.add_argument("--landfall", type=Path, default=built / "landfall", metavar="PATH")
    parser.add_argument("--programs", type=Path, default=built, metavar="DIRECTORY", help="of this package's binaries")
    options = parser.parse_args()
    options.only = options.only or (own if options.ways else names)
    options.work = options.work or (WORKS_OF_WAYS if options.ways else works)
    if not set(options.only) <= set(own if options.ways else names):
        parser.error(f"--only takes {', '.join(own)} with --ways, and {', '.join(names)} without")
    if options.quick:
        options.repetitions, options.seconds, options.idle = 1, 1, 500
    options.landfall, options.programs = options.landfall.resolve(), options.programs.resolve()
    return options


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("a whole number from 1")
    return number


def listed(known):
    def parse_list(text):
        names = text.split(",")
        strange = [name for name in names if name not in known]
        if strange:
            raise argparse.ArgumentTypeError(f"no {', '.join(strange)}; there are {', '.join(known)}")
        return names

    return parse_list
