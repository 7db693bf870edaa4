"""/dev/xen/evtchn: event channels of Xen (Linux: xen/evtchn.h); numbers and layouts.

read(2) gives ports, write(2) takes them back, both as u32 in the byte order of the machine.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from usermm.uapi._ioctl import _IOC, NONE

DEVICE_PATH: Final = "/dev/xen/evtchn"

PORT: Final = Struct("=I")
"""u32 port: what is read and written, and the argument of UNBIND and NOTIFY."""
MOST_PORTS_READ: Final = 1024
"""In one read or write: a page of them."""

VIRQ: Final = Struct("=I")
"""u32 number of a virtual interrupt."""
INTERDOMAIN: Final = Struct("=II")
"""u32 remote domid, u32 remote port."""
UNBOUND: Final = Struct("=I")
"""u32 domid of who may bind it."""
RESTRICTION: Final = Struct("=H")
"""u16 domid, the only one that the file may talk to from then on."""

_LETTER: Final = "E"

BIND_VIRQ: Final = _IOC(NONE, _LETTER, 0, VIRQ.size)
BIND_INTERDOMAIN: Final = _IOC(NONE, _LETTER, 1, INTERDOMAIN.size)
BIND_UNBOUND_PORT: Final = _IOC(NONE, _LETTER, 2, UNBOUND.size)
"""These three return the new port."""
UNBIND: Final = _IOC(NONE, _LETTER, 3, PORT.size)
NOTIFY: Final = _IOC(NONE, _LETTER, 4, PORT.size)
RESET: Final = _IOC(NONE, _LETTER, 5, 0)
"""Forgets what was not read yet, and an overflow; ports that it forgot stay masked until they are written back."""
RESTRICT_DOMID: Final = _IOC(NONE, _LETTER, 6, RESTRICTION.size)

VIRQ_DOM_EXC: Final = 3
"""A domain has ended (Xen's public/xen.h)."""
