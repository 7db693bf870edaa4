"""The reference model, for your own tests: an address space that can be changed at will, and the device on top.

    from usermm.testing import AddressSpace, ModelDevice

    space = AddressSpace()
    device = ModelDevice(space)
    address = space.mmap(8192)
    device.register_range(address, address + 8192, cookie=7)
    space.munmap(address, 4096)
    device.read(timeout=0)  # [Invalidation(7, address, address + 4096, hint=True), Last(generation=1)]

A `ModelDevice` has the methods of `usermm.Ummunotify` that make sense without memory, so code that takes a device can
be given a model and made to meet every order of events, without a kernel's permission and without luck.

`GrantMachine` is a machine with domains; `ModelGntalloc`, `ModelGntdev`, `ModelGntdev2007` and `ModelEvtchn` are the
devices of `usermm.Domain` on it.

A `ScriptedRegistrar` takes a device's place under `usermm.RegistrationCache`; `ModelCache` is that cache over a model.
"""

from usermm.testing.address_space import (
    MADV_DONTNEED,
    MADV_DONTNEED_LOCKED,
    MADV_FREE,
    MADV_REMOVE,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    AddressSpace,
)
from usermm.testing.cache import ModelCache
from usermm.testing.device import ModelDevice
from usermm.testing.entries import ModelRegistration, Outcome, Range
from usermm.testing.grant_evtchn import ModelEvtchn
from usermm.testing.grant_gntalloc import ModelGntalloc
from usermm.testing.grant_gntdev import ModelGntdev
from usermm.testing.grant_gntdev2007 import ModelGntdev2007
from usermm.testing.grant_machine import GrantMachine, ModelDomain
from usermm.testing.mappings import PAGE_BYTES, Mapping
from usermm.testing.notifications import Cause, Flavour, Listener, Notification
from usermm.testing.registrar import Call, ContractError, Pin, ScriptedRegistrar

__all__ = [
    "MADV_DONTNEED",
    "MADV_DONTNEED_LOCKED",
    "MADV_FREE",
    "MADV_REMOVE",
    "MREMAP_DONTUNMAP",
    "MREMAP_FIXED",
    "MREMAP_MAYMOVE",
    "PAGE_BYTES",
    "AddressSpace",
    "Call",
    "Cause",
    "ContractError",
    "Flavour",
    "GrantMachine",
    "Listener",
    "Mapping",
    "ModelCache",
    "ModelDevice",
    "ModelDomain",
    "ModelEvtchn",
    "ModelGntalloc",
    "ModelGntdev",
    "ModelGntdev2007",
    "ModelRegistration",
    "Notification",
    "Outcome",
    "Pin",
    "Range",
    "ScriptedRegistrar",
]
