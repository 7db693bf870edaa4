"""A program that ends with everything open says nothing on its standard error, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.hypervisors import wait_until
from support.processes import run_quietly

import usermm
from usermm.grants import session

_PROGRAM = """
    import builtins
    import ctypes
    import threading
    import usermm

    one, other = usermm.Domain(SOCKET), usermm.Domain(SOCKET)
    page = one.gntalloc.allocate(other.domid, 1)
    pages = one.gntalloc.allocate(other.domid, 40)
    seen = other.gntdev.map(one.domid, page.references)
    ends = []
    listener = usermm.Channel.listen(one, "x")
    connector = threading.Thread(target=lambda: ends.append(usermm.Channel.connect(other, one.domid, "x", 20)))
    connector.start()
    ends.append(listener.accept(20))
    connector.join()
    loan = ends[1].loan(100)
    ends[1].send_message(b"kept")
    kept = ends[0].receive_array(timeout=20)
    ctypes.CDLL(None).munmap(ctypes.c_void_p(pages.address), 4096)
    WHERE
"""


KEEP = "builtins.kept = [page, pages, seen, kept, loan, ends]"


@pytest.mark.parametrize("where", ["pass", KEEP, "raise SystemExit(0)"])
def test_nothing_is_said(tmp_path: Path, where: str) -> None:
    with usermm.Hypervisor() as hypervisor:
        run_quietly(_PROGRAM.replace("SOCKET", repr(hypervisor.socket)).replace("WHERE", where), tmp_path)
        wait_until(lambda: not session.status(hypervisor.socket)["domains"], 5)
