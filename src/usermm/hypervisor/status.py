"""What the hypervisor says of itself: plain data, as JSON. `docs/hypervisor.md` has the fields."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

from usermm.hypervisor.domains import DomainRecord
from usermm.hypervisor.extents import Extent, Hold
from usermm.hypervisor.memfds import PAGE_BYTES
from usermm.hypervisor.quotas import GRANTS_PER_FRAME
from usermm.version import __version__

if TYPE_CHECKING:
    from usermm.hypervisor.server import Server

_RECENT = 100


def as_json(server: Server) -> bytes:
    """The whole of it."""
    return json.dumps(as_data(server)).encode()


def as_data(server: Server) -> dict[str, Any]:
    """Domains, grants and ports in the order of their numbers."""
    store = server.store.status()["domains"]
    domains = [server.domains[domid] for domid in sorted(server.domains)]
    ports = {domain.domid: server.ports.status(domain.domid) for domain in domains}
    return {
        "hypervisor": _hypervisor(server),
        "domains": [
            _domain(server, domain, store.get(domain.domid, {}), len(ports[domain.domid])) for domain in domains
        ],
        "grants": [_grant(server, extent) for extent in server.grants.holding.extents()],
        "ports": [{"domid": domid, **port} for domid, own in ports.items() for port in own],
        "audit": server.audit.last(_RECENT),
    }


def _hypervisor(server: Server) -> dict[str, Any]:
    return {
        "version": __version__,
        "pid": os.getpid(),
        "uid": os.geteuid(),
        "socket": server.listener.getsockname(),
        "incarnation": server.incarnation,
        "started": server.started,
        "requests": server.requests,
        "domains": len(server.domains),
        "extents": sum(1 for _ in server.grants.holding.extents()),
        "descriptors": len(os.listdir("/proc/self/fd")) - 1,
    }


def _domain(server: Server, domain: DomainRecord, store: dict[str, int], ports: int) -> dict[str, Any]:
    table = server.grants.holding.tables[domain.domid]
    return {
        "domid": domain.domid,
        "name": domain.name,
        "uid": domain.uid,
        "pid": domain.pid,
        "control": domain.control,
        "quotas": dataclasses.asdict(domain.quotas),
        "usage": {
            "grants": table.granted_pages,
            "grant_frames": -(-table.granted_pages // GRANTS_PER_FRAME),
            "mapped": table.mapped_pages,
            "event_channels": ports,
            "memkb": table.granted_pages * PAGE_BYTES // 1024,
            "store_entries": store.get("nodes", 0),
            "watches": store.get("watches", 0),
            "transactions": store.get("transactions", 0),
        },
    }


def _grant(server: Server, extent: Extent) -> dict[str, Any]:
    holds = (hold for hold in extent.holds.values() if not hold.of_grantor)
    return {
        "grantor": extent.grantor,
        "grantee": extent.grantee,
        "first_reference": extent.first_reference,
        "count": extent.count,
        "writable": extent.writable,
        "isolated": server.grants.are_isolated(extent.grantor, extent.grantee),
        "released": not extent.live,
        "revoked": extent.revoked,
        "pooled": None if extent.pool is None else len(extent.pool.live()),
        "mapped_by": [_held(extent, hold) for hold in holds],
    }


def _held(extent: Extent, hold: Hold) -> dict[str, Any]:
    """Of a pool the grantee's own count."""
    pages = extent.pool.mapped() if extent.pool is not None and hold.is_attached else hold.pages
    return {"domid": hold.domid, "handle": hold.handle, "pages": pages}
