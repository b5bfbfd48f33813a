"""HAProxy as a relay of bytes into the inner namespace, with splice(2) forced: `splice-auto` does not use it."""

from .namespaces import INSIDE

CONFIGURATION = """\
global
    nbthread 1
    maxconn 6000
defaults
    mode tcp
    option splice-request
    option splice-response
    timeout connect 10s
    timeout client 1h
    timeout server 1h
listen relay
    bind 127.0.0.1:{at}
    server server 127.0.0.1:{to} namespace {inside}
"""


def haproxy(directory, at, to):
    """Returns the command line that relays from port `at` to port `to` of the inner namespace's loopback."""
    configuration = directory / "haproxy.cfg"
    configuration.write_text(CONFIGURATION.format(at=at, to=to, inside=INSIDE))
    return ["haproxy", "-db", "-q", "-f", configuration]
