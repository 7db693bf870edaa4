"""``usermm hypervisor``: serve domains, or say who shares what with whom.

Exit status: 0 after SIGTERM or SIGINT, and when the status was printed; 2 when it could not be done: another hypervisor
has the socket, the policy says what it must not, none listens, the policy does not let this user read the status.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any, Final

from usermm.errors import UsermmError
from usermm.grants import session
from usermm.hypercalls.addresses import ENVIRONMENT, SYSTEM_SOCKET, user_socket
from usermm.hypervisor import listener, service
from usermm.hypervisor.audit import Audit
from usermm.hypervisor.incarnation import Incarnation
from usermm.hypervisor.listener import Listener
from usermm.hypervisor.policy import Policy, PolicyError
from usermm.hypervisor.server import Server
from usermm.reporters import hypervisor as reporter
from usermm.reporters import sharing

HELP = "Let processes share memory by Xen's grants and event channels, or show what they share"

_PR_SET_DUMPABLE: Final = 4  # linux/prctl.h
_ENDING: Final = (signal.SIGTERM, signal.SIGINT)


def prepare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: those of serving, and the two questions."""
    parser.add_argument("--socket", metavar="PATH", help="where it listens ($USERMM_HYPERVISOR, /run/usermm)")
    parser.add_argument("--policy", metavar="FILE", help="who may connect, as whom, with which quotas (TOML)")
    parser.add_argument("--audit", metavar="FILE", help="write there who was granted what, one JSON object a line")
    parser.add_argument("--mode", type=_mode, metavar="OCTAL", help="the mode of the socket (0666)")
    parser.set_defaults(do=_serve)
    questions = parser.add_subparsers(metavar="[status | graph]")
    status = questions.add_parser("status", help="what the hypervisor knows", description="What the hypervisor knows.")
    status.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    status.set_defaults(do=_status, parser=status)
    graph = questions.add_parser("graph", help="a picture of it", description="Who shares what with whom, as SVG.")
    graph.add_argument("--output", metavar="FILE", help="where the picture goes (the standard output)")
    graph.set_defaults(do=_graph, parser=graph)
    for question in (status, graph):
        question.add_argument("--socket", metavar="PATH", default=argparse.SUPPRESS, help="where it listens")


def run(args: argparse.Namespace) -> int:
    """Serve, or ask."""
    status: int = args.do(args)
    return status


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise argparse.ArgumentTypeError(f"{text!r} is no mode from 0 to 0777")
    return mode


# ---- serving


def _serve(args: argparse.Namespace) -> int:
    policy = Policy.load(args.policy) if args.policy is not None else Policy.default()
    _protect()
    with contextlib.ExitStack() as ends:
        given = service.inherited_socket()
        if given is not None:
            ends.callback(given.close)
            if args.socket is not None or args.mode is not None:
                raise UsermmError("--socket and --mode are systemd's to say here: set them in the .socket unit")
            claim = ends.enter_context(Incarnation(os.fsdecode(given.getsockname())))
            listening = given
        else:
            path = args.socket if args.socket is not None else listener.default_path()
            listener.make_directory(path)
            claim = ends.enter_context(Incarnation(path))
            mode = listener.MODE if args.mode is None else args.mode
            own = Listener(path, mode=mode, locked=claim.locked)
            ends.callback(own.close)
            listening = own.socket
        audit = Audit(args.audit)
        ends.callback(audit.close)
        server = Server(listening, policy=policy, audit=audit, incarnation=claim.tag)
        asyncio.run(_until_signal(server, audit, args.policy))
    return 0


async def _until_signal(server: Server, audit: Audit, policy: str | None) -> None:
    loop = asyncio.get_running_loop()
    for number in _ENDING:
        loop.add_signal_handler(number, server.stop)
    loop.add_signal_handler(signal.SIGHUP, _reload, server, audit, policy)
    audit.record("start", pid=os.getpid(), incarnation=server.incarnation)
    loop.call_soon(_say_ready, server)  # once run() has begun: who is told can connect already, the socket listens
    await server.run()
    service.notify("STOPPING=1")
    audit.record("stop")


def _say_ready(server: Server) -> None:
    service.notify("READY=1")
    path = os.fsdecode(server.listener.getsockname())
    _say(f"listening on {path}")
    if path == user_socket() and os.path.exists(SYSTEM_SOCKET):
        _say(f"who names no socket goes to {SYSTEM_SOCKET} while one listens there: set {ENVIRONMENT}={path}")


def _say(text: str) -> None:
    print(f"usermm hypervisor: {text}", file=sys.stderr, flush=True)


def _reload(server: Server, audit: Audit, path: str | None) -> None:
    """A file that is wrong changes nothing. Domains that are connected stay who they are, with their quotas."""
    audit.reopen()
    if path is None:
        return
    try:
        server.adopt(Policy.load(path, after=server.policy))
    except PolicyError as error:
        audit.record("policy", file=path, loaded=False, reason=str(error))
        _say(f"{error} (the policy stays as it was)")
    else:
        audit.record("policy", file=path, loaded=True)
        _say(f"policy({path}): loaded anew")


def _protect() -> None:
    """Nobody of the same user reads our memory or takes our descriptors, and there are as many of those as can be."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with contextlib.suppress(OSError, ValueError):  # not root: the hard limit is what there is
        with open("/proc/sys/fs/nr_open", encoding="ascii") as file:
            most = max(most, int(file.read()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


# ---- asking


def _status(args: argparse.Namespace) -> int:
    status = _ask(args)
    sys.stdout.write(json.dumps(status, indent=2) + "\n" if args.json else reporter.text(status))
    return 0


def _graph(args: argparse.Namespace) -> int:
    picture = sharing.picture(_ask(args))
    if args.output is None:
        sys.stdout.write(picture)
        return 0
    try:
        with open(args.output, "w", encoding="utf-8") as file:
            file.write(picture)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsermmError(f"--output {args.output}: {reason}: give a file that can be written") from None
    return 0


def _ask(args: argparse.Namespace) -> dict[str, Any]:
    for name in ("policy", "audit", "mode"):
        if getattr(args, name) is not None:
            raise UsermmError(f"--{name} is for serving: leave it out to ask")
    return session.status(args.socket)
