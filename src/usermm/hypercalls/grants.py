"""Payloads of the operations on grants. References are u32 and consecutive within one allocation."""

from __future__ import annotations

import struct

ALLOCATE = struct.Struct("=HHI")
"""u16 domid of the grantee, u16 flags (ALLOCATE_*), u32 count of pages, at least 1."""
ALLOCATE_WRITABLE = 1
ALLOCATE_WANT_DESCRIPTOR = 2

ALLOCATED = struct.Struct("=II")
"""u32 first reference, u32 flags (ISOLATED)."""

RANGE = struct.Struct("=III")
"""u32 first reference, u32 count, u32 flags: RELEASE (0), OPEN_OWN (0), REVOKE (0). All of one allocation."""

OPENED = struct.Struct("=I")
"""u32 page of the descriptor's file at which the range begins."""

MAP = struct.Struct("=HHI")
"""u16 flags (MAP_*), u16 0, u32 number of RUN that follow, 1 to MOST_RUNS."""
MAP_WRITABLE = 1
MAP_ATTACH = 2
"""If it is one page, of a pool: attach the pool, to map its pages without the hypervisor (`hypercalls.pools`)."""
MOST_RUNS = 2048

RUN = struct.Struct("=H2xII")
"""u16 domid of the grantor, u32 first reference, u32 count: consecutive references."""

MAPPED = struct.Struct("=II")
"""u32 number of SEGMENT that follow, each with a descriptor; u32 pages that they are: when that is less than was asked
for, the rest needs another request."""

SEGMENT = struct.Struct("=QIII4x")
"""u64 handle, u32 page of the descriptor's file at which it begins, u32 pages, u32 flags (WRITABLE, ISOLATED)."""
WRITABLE = 1
ISOLATED = 2
ATTACHED = 4
"""The descriptor is the whole pool's; the table's (to read) and the marks' (to write) come after it."""

HANDLE = struct.Struct("=Q")
"""UNMAPPED: any number of them, at least one."""

GRANTOR_NOTIFY = struct.Struct("=IHHI")
"""u32 reference, u16 offset in bytes within its page, u16 actions (NOTIFY_*), u32 port."""

GRANTEE_NOTIFY = struct.Struct("=QIHHI")
"""u64 handle (0: only say whether the rest is in order), u32 page of the segment, u16 offset in bytes within that page,
u16 actions, u32 port."""
