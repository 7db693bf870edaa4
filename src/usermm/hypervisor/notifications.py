"""Unmap notifications: which ones a domain may ask for."""

from __future__ import annotations

import errno

from usermm.hypervisor.calls import Refused
from usermm.hypervisor.domains import DomainRecord
from usermm.hypervisor.extents import UnmapNotification
from usermm.hypervisor.holding import Events
from usermm.hypervisor.memfds import PAGE_BYTES
from usermm.hypervisor.tables import Table
from usermm.uapi.xen_gntdev import NOTIFY_CLEAR_BYTE, NOTIFY_SEND_EVENT

MOST_NOTIFICATIONS = 2048
"""Of one domain: all are carried out at once when it goes."""


class Notifications:
    """One for each page at most; asking again replaces it."""

    def __init__(self, events: Events) -> None:
        self._events = events

    def check(self, domain: DomainRecord, offset: int, actions: int, port: int) -> None:
        """Raises Refused (EINVAL) for what could not be carried out."""
        if actions & ~(NOTIFY_CLEAR_BYTE | NOTIFY_SEND_EVENT) or offset >= PAGE_BYTES:
            raise Refused(errno.EINVAL, f"notify: actions {actions:#x} at byte {offset} are unknown: 1, 2 or 3")
        if actions & NOTIFY_SEND_EVENT and not self._events.is_bound(domain.domid, port):
            raise Refused(errno.EINVAL, f"notify: domain {domain.domid} has no port {port}: bind it first")

    def keep(
        self,
        domain: DomainRecord,
        table: Table,
        wanted: UnmapNotification,
        notifications: dict[int, UnmapNotification],
    ) -> None:
        """Keeps it for its page of the extent; no actions: takes it back. Raises Refused (EINVAL, ENOSPC)."""
        self.check(domain, wanted.offset_bytes, wanted.actions, wanted.port)
        if wanted.actions and wanted.page not in notifications and table.notifications >= MOST_NOTIFICATIONS:
            text = f"notify: domain {domain.domid} has {MOST_NOTIFICATIONS} notifications: unmap something first"
            raise Refused(errno.ENOSPC, text)
        if notifications.pop(wanted.page, None) is not None:
            table.notifications -= 1
        if wanted.actions:
            notifications[wanted.page] = wanted
            table.notifications += 1
