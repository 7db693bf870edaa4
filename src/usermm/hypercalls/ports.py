"""Payloads of the operations on event channels. Each reply but PORT_CLOSE's has one descriptor: the port's end."""

from __future__ import annotations

import struct

UNBOUND = struct.Struct("=H2x")
"""PORT_UNBOUND: u16 domid of who may bind it, or DOMID_SELF."""

INTERDOMAIN = struct.Struct("=H2xI")
"""PORT_INTERDOMAIN: u16 domid of who made the port, or DOMID_SELF; u32 that port."""

VIRQ = struct.Struct("=I")
"""PORT_VIRQ: u32 number of the virtual interrupt."""

PORT = struct.Struct("=I")
"""u32 port: the argument of PORT_CLOSE and PORT_REARM, the answer of the other three."""
