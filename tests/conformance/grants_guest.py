"""In another guest of a real Xen: agents at its console, one after the other, as many as crash."""

from __future__ import annotations

import os
import sys

from conformance.grants_agent import serve
from support.console import ConsoleStream
from support.messages import send

READY = "ready"
_A_DAY_S = 86400.0


def run(path: str) -> None:
    """Each agent is a process of its own, so that the kernel cleans up after one that ends at once."""
    console = ConsoleStream(path, _A_DAY_S)
    while True:
        child = os.fork()
        if not child:
            try:
                send(console, READY)
                serve(console)
            finally:
                os._exit(1)
        os.waitpid(child, 0)


if __name__ == "__main__":
    run(sys.argv[1])
