"""TCP ports for programs that cannot choose one themselves."""

import itertools
import os
import socket
from pathlib import Path

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST = 15_000
_numbers = itertools.count(os.getpid() * 97)
_held = []  # until this process ends


def free_port():
    """A port that nobody listens on, and that nobody else takes before the program does.

    It is below those that the system gives to connections. A UDP socket of the same number, held
    until this process ends, keeps other tests from choosing it.
    """
    last = int(RANGE.read_text().split()[0]) if RANGE.exists() else 32_768
    last = last if last > FIRST + 1000 else 32_768
    for number in _numbers:
        port = FIRST + number % (last - FIRST)
        mark = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            mark.bind(("127.0.0.1", port))
            socket.create_server(("", port)).close()
        except OSError:
            mark.close()
            continue
        _held.append(mark)
        return port
