"""Prints N ports that are free on every address and in every state. They are below the range of ephemeral ports, so that no
connection of these tests uses the port of a server."""

import random
import socket
import sys


def free(port):
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        with socket.socket(family) as probe:
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind((address, port))
            except OSError:
                return False
    return True


with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
    low = int(file.read().split()[0])
candidates = list(range(2000, low)) if low > 4000 else list(range(2000, 32000))
random.shuffle(candidates)
found = []
for port in candidates:
    if len(found) == int(sys.argv[1]):
        break
    if free(port):
        found.append(port)
print(*found)
