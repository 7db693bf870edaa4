"""Pools of single pages: granting, mapping and returning a page without a word to the hypervisor.

A pool is `PAGES` pages of one extent, for one grantee in one mode, with `BLOCK` references of which each names a page
in one of its uses. As in Xen, where a domain writes its grant table itself, two small pages tell what is granted and
what is mapped: the table is the grantor's to write, the marks are the grantee's, each reads the other's. What a grantee
can gain by lying is to see again what was granted to it and will be; what a grantor can, to take away what is its own.
`docs/hypercalls.md` has the protocol, `docs/models/grant_pool.pml` its model.
"""

from __future__ import annotations

import struct

PAGES = 32
USES = 32
"""How often a page is granted, each time under a number of its own; then the pool is used up."""
BLOCK_BITS = 10
BLOCK = PAGES * USES

MOST_POOLS = 256
"""Of one grantor: they use up numbers."""

POOL = struct.Struct("=HH")
"""u16 domid of the grantee, u16 flags (ALLOCATE_WRITABLE)."""

POOL_MADE = struct.Struct("=II")
"""u32 first reference of the block, a multiple of BLOCK; u32 flags (ISOLATED). Three descriptors: the pages, the table
(both to write), the marks (to read)."""

POOL_UNMAPPED = struct.Struct("=QI")
"""u64 handle, u32 page of the pool: its mapping is gone, and the notification about it is due."""

WORD = struct.Struct("=I")

CLOSED_WORD = 1023
"""The hypervisor's in both: not 0 once nothing more is granted from this pool, since its grantor gave it up, one of the
two went, or the policy changed. Each end believes the page that the other cannot write."""

HELD_WORDS = 512
"""Of the marks: from here on the hypervisor counts mappings that it has handed out itself, a word a page. Below are
the grantee's own counts."""


def page_of(reference: int) -> int:
    """The page of its pool that a reference names."""
    return reference % PAGES


def block_of(reference: int) -> int:
    """What the references of one pool have in common."""
    return reference >> BLOCK_BITS
