"""The run: in each repetition, and for each work, one sample of each contender (A B C, then C B A, ...)."""

import os
import signal
import sys

from . import namespaces as world
from .attach_methods import attach_methods
from .congestion import CongestionError
from .contenders import contenders
from .machine import ForeignLoad, await_quiet
from .namespaces import HOST, INSIDE, Namespaces
from .options import parse
from .prepare import PREPARED, fail, note, prepare
from .processes import Invalid
from .results import Results, commit, conditions
from .works import WORKS, Trial, raise_descriptor_limit


def main():
    options = parse()
    if PREPARED not in os.environ or os.geteuid() != 0:
        if options.publish and commit().endswith("-dirty"):
            fail("this checkout differs from its commit", "commit the changes first: published figures name a commit")
        prepare(options)
        os.environ[PREPARED] = "1"
    try:
        world.enter(sys.argv[0], options.congestion_control)
    except CongestionError as error:
        fail(str(error), "--congestion-control reno is allowed on every machine")
    signal.signal(signal.SIGTERM, interrupt)
    raise_descriptor_limit()
    try:
        return compare(options)
    except KeyboardInterrupt:
        note("\ncompare: interrupted; the samples taken until then are in target/compare")
        return 130


def interrupt(_number, _frame):
    raise KeyboardInterrupt


def compare(options):
    spaces = Namespaces(options.congestion_control)
    offered = attach_methods(options.landfall) if options.methods else contenders(options.landfall, options.programs)
    chosen = [each for each in offered if each.name in options.only]
    works = [work for work in WORKS if work.name in options.work]
    load = await_quiet(options.load_span, options.quiet_wait, note)
    results = Results(conditions(spaces, chosen, works, load, options), options)
    if not load["quiet"]:
        note(f"other processes use {load['busy_processors']} processors: the figures are not reliable")
    for repetition in range(1, options.repetitions + 1):
        for number, work in enumerate(works):
            taking_part = [each for each in chosen if each.takes_part(work)]
            if options.smoke and work.name != "verify":
                # Every contender takes part in the first work, and a different one in each of the others.
                taking_part = [taking_part[number % len(taking_part)]]
            elif options.quick and work.slow:
                taking_part = taking_part[:3]
            # The order alternates, so that a contender does not always follow the same other one.
            for contender in taking_part if repetition % 2 else reversed(taking_part):
                sample(options, spaces, results, repetition, work, contender)
    results.report(options)
    foreign = max(each["foreign_processors"] for each in results.samples)
    note(f"Other processes used up to {foreign} processors during a sample.")
    note(f"Samples, page and charts: {results.directory}")
    return 1 if any("invalid" in each for each in results.samples) else 0


def sample(options, spaces, results, repetition, work, contender):
    """Takes one sample with a server and a relay of its own, which have ended when it returns."""
    load = ForeignLoad()
    try:
        figures = measure(options, spaces, work, contender)
        outcome = {"figures": figures}
        keys = [figure.key for figure in work.figures if figure.key in figures]
        shown = ", ".join(f"{key} {figures[key]:.4g}" for key in keys)
    except Invalid as reason:
        outcome = {"invalid": str(reason)}
        shown = f"invalid: {reason}"
    names = {"repetition": repetition, "work": work.name, "contender": contender.name}
    results.add(**names, **outcome, foreign_processors=load.processors())
    note(f"{repetition} {work.name:14} {contender.name:17} {shown}")
    for name in (HOST, INSIDE):
        left = spaces.await_silence(name)
        if left:
            fail(f"a listener is left at {sorted(left)} ({name}) and would answer in the next sample", "run it again")


def measure(options, spaces, work, contender):
    running = [work.serve(spaces, contender, options)]
    try:
        relay = contender.start(spaces, work.port, work.discover)
        if relay:
            running.append(relay)
        figures = work.measure(Trial(spaces, contender, running[0], relay, options))
        for program in running:
            ended = program.has_ended()
            if ended:
                raise Invalid(ended)
        return figures
    finally:
        for program in reversed(running):
            program.stop()
