"""Where a hypervisor and its domains meet when nobody says otherwise."""

from __future__ import annotations

import os

ENVIRONMENT = "USERMM_HYPERVISOR"
"""The environment variable with the socket's path."""
SYSTEM_SOCKET = "/run/usermm/hypervisor.sock"


def user_socket() -> str | None:
    """Of this user's own hypervisor; None without $XDG_RUNTIME_DIR."""
    directory = os.environ.get("XDG_RUNTIME_DIR")
    return os.path.join(directory, "usermm", "hypervisor.sock") if directory else None


def default_addresses() -> list[str]:
    """Where a domain looks for a hypervisor: $USERMM_HYPERVISOR, else the system's, else the user's own."""
    named, own = os.environ.get(ENVIRONMENT), user_socket()
    if named:
        return [named]
    return [SYSTEM_SOCKET] if own is None else [SYSTEM_SOCKET, own]
