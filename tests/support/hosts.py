"""Two hosts on one machine: network namespaces with a cable (a veth pair) between them and nothing else.

Each has its own host name, its own loopback, and an address out of 198.18.0.0/15, which RFC 2544 sets aside for tests;
no packet can leave the pair. It needs root (CAP_SYS_ADMIN, CAP_NET_ADMIN), Debian's iproute2 and util-linux.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PREFIX_BITS = 30
_PATIENCE_S = 10  # the kernel says up to a second later that a link runs, and libraries pass over one that does not

# Sets the name inside its own UTS namespace, since MPI libraries take equal host names for shared memory.
_NAMED = "import os, socket, sys; socket.sethostname(sys.argv[1]); os.execvp(sys.argv[2], sys.argv[2:])"


class NoHostsError(Exception):
    """Why none can be made here, and what would help."""


@dataclass(frozen=True)
class Host:
    """A namespace; `name` is its host name, too, and the name of its end of the cable."""

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        """What runs `words` on this host."""
        named = [sys.executable, "-c", _NAMED, self.name]
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", *named, *words]

    def bytes_on_the_cable(self) -> int:
        """What this host sent and received, with all headers."""
        counts = self.link()["stats64"]
        return int(counts["rx"]["bytes"] + counts["tx"]["bytes"])

    def link(self) -> dict[str, Any]:
        """What ip knows of this end of the cable."""
        links: list[dict[str, Any]] = json.loads(
            _ip("-n", self.name, "-json", "-statistics", "link", "show", self.name)
        )
        return links[0]


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """They are there while the block runs; whatever runs on them then is killed. Raises NoHostsError."""
    if os.geteuid():
        raise NoHostsError("network namespaces need root: run the tests as root")
    for tool, package in (("ip", "iproute2"), ("unshare", "util-linux")):
        if shutil.which(tool) is None:
            raise NoHostsError(f"{tool} is missing: apt install {package}")
    hosts = Host(f"um{os.getpid()}a", "198.18.0.1"), Host(f"um{os.getpid()}b", "198.18.0.2")
    try:
        try:
            _plug(*hosts)
        except subprocess.CalledProcessError as error:
            what = f"{' '.join(error.cmd)}: {error.stderr.strip()}"
            raise NoHostsError(f"{what}: run the tests outside a container") from None
        yield hosts
    finally:
        for host in hosts:
            _remove(host)


def write_launcher(hosts: Sequence[Host], path: Path) -> Path:
    """A program that is called as rsh is, ``ADDRESS COMMAND...``, and reaches these hosts."""
    cases = [f'{host.address}) exec {shlex.join(host.command())} sh -c "$*" ;;' for host in hosts]
    refusal = '*) echo "no host $address" >&2; exit 1 ;;'
    launcher = path / "launcher"
    launcher.write_text("\n".join(["#!/bin/sh", "address=$1; shift", 'case "$address" in', *cases, refusal, "esac\n"]))
    launcher.chmod(0o755)
    return launcher


def _plug(left: Host, right: Host) -> None:
    for host in (left, right):
        _ip("netns", "add", host.name)
    end, other_end = (("name", host.name, "netns", host.name) for host in (left, right))
    _ip("link", "add", *end, "type", "veth", "peer", *other_end)
    for host in (left, right):
        _ip("-n", host.name, "address", "add", f"{host.address}/{_PREFIX_BITS}", "dev", host.name)
        for device in ("lo", host.name):
            _ip("-n", host.name, "link", "set", device, "up")
    until = time.monotonic() + _PATIENCE_S
    while any(host.link()["operstate"] != "UP" for host in (left, right)):
        if time.monotonic() > until:
            raise NoHostsError(f"the cable between {left.name} and {right.name} did not come up in {_PATIENCE_S} s")
        time.sleep(0.02)


def _remove(host: Host) -> None:
    """The namespace and the cable go with the last process in it."""
    with contextlib.suppress(subprocess.CalledProcessError):  # it was never made
        while pids := _ip("netns", "pids", host.name).split():  # again, for those that were being started
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.01)
        _ip("netns", "delete", host.name)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True, timeout=20).stdout
