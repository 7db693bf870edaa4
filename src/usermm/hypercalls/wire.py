"""How a domain talks to the hypervisor: one message is one packet of a SOCK_SEQPACKET Unix socket.

Numbers are in the byte order of the machine, which both ends share. A request is `REQUEST` and a payload, a reply
`REPLY` and a payload, with descriptors beside it (SCM_RIGHTS, unix(7)) where the operation hands some out. The
hypervisor takes no descriptors: those that a client sends are discarded by the kernel. `docs/hypercalls.md` has the
payloads.
"""

from __future__ import annotations

import enum
import struct

VERSION = 1

REQUEST = struct.Struct("=HHI")
"""u16 operation, u16 flags, u32 serial; the reply repeats the serial."""

NO_REPLY = 1
"""Flag of a request: it is carried out, and nothing is said about it."""

REPLY = struct.Struct("=iI")
"""i32 status (0, or a negative errno), u32 serial. The payload after a negative status is `REFUSAL` and a text."""

REFUSAL = struct.Struct("=iI")
"""i32 grant status (GNTST_*, 0 where it has no meaning), u32 index of the element that was refused; then the reason in
UTF-8, one line."""

LONGEST_REQUEST_BYTES = 65536
LONGEST_REPLY_BYTES = 32768
MOST_DESCRIPTORS = 250
"""In one reply; the kernel's own limit is 253 (SCM_MAX_FD)."""

DOMID_SELF = 0x7FF0
DOMID_ANY = 0xFFFF
"""In HELLO: whatever the policy gives."""
DOMID_FIRST_RESERVED = 0x7FF0
"""Domain numbers are below (Xen's public/xen.h)."""


class Operation(enum.IntEnum):
    """What a request asks for."""

    HELLO = 1
    STATUS = 2
    PEER = 3
    ALLOCATE = 10
    RELEASE = 11
    OPEN_OWN = 12
    REVOKE = 13
    GRANTOR_NOTIFY = 14
    POOL = 15
    MAP = 20
    UNMAPPED = 21
    GRANTEE_NOTIFY = 22
    POOL_UNMAPPED = 23
    PORT_UNBOUND = 30
    PORT_INTERDOMAIN = 31
    PORT_VIRQ = 32
    PORT_CLOSE = 33
    PORT_REARM = 34
    STORE = 40
    WATCH = 41


HELLO = struct.Struct("=HHI")
"""u16 version, u16 wanted domid or DOMID_ANY, u32 0; then the wanted name in UTF-8, empty for none."""

WELCOME = struct.Struct("=HHIIIQ")
"""u16 domid, u16 version, u32 uid of the hypervisor, u32 uid of this domain, u32 page size in bytes, u64 incarnation of
the hypervisor; then the domain's name."""

STATUS = struct.Struct("=Q")
"""u64 length in bytes of the JSON text in the descriptor that comes with the reply."""

PEER = struct.Struct("=H2x")
"""u16 domid of another domain."""

PEER_IS = struct.Struct("=II")
"""u32 uid, u32 1 when it and this domain are isolated from each other; then its name."""
