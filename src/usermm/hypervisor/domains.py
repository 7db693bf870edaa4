"""A domain as the hypervisor sees it: who it is and what it may use."""

from __future__ import annotations

from dataclasses import dataclass

from usermm.hypervisor.quotas import Quotas


@dataclass(frozen=True, slots=True)
class DomainRecord:
    """One connected domain. Parts of the hypervisor keep what belongs to it in dictionaries of their own, by domid."""

    domid: int
    name: str
    uid: int
    gid: int
    pid: int
    control: bool
    """It may read and change what is others': domain 0, and whom the policy names."""
    quotas: Quotas
