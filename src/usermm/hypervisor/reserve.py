"""Descriptors for everybody: once they get scarce, no user may have more of the hypervisor's than are left."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable

from usermm.hypervisor.calls import Refused


class Reserve:
    """Quotas are a domain's and may add up to more than there is. Of n greedy users the last one still gets 1/2^n."""

    def __init__(self) -> None:
        self._limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)

    def refuse_hog(self, uid: int, own: Callable[[], int]) -> None:
        """Raises Refused (ENFILE) when the user's `own` are more than are free. Before Linux 6.2 nothing tells."""
        used = os.stat("/proc/self/fd").st_size
        if used * 2 >= self._limit and own() > self._limit - used:
            text = f"user {uid} has {own()} of the hypervisor's {self._limit} descriptors, and {used} are in use: "
            raise Refused(errno.ENFILE, text + "release something, or raise its limit (ulimit -n)")
