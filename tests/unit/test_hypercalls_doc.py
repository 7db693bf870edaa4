"""docs/hypercalls.md has every operation, every type of the store, every layout and every limit, with its number."""

from __future__ import annotations

import importlib
import pkgutil
import re
import struct

import pytest
from support.processes import TESTS

from usermm import hypercalls
from usermm.hypercalls import grants, pools, store, wire

TEXT = (TESTS.parent / "docs" / "hypercalls.md").read_text(encoding="utf-8")
MODULES = [each.name for each in pkgutil.iter_modules(hypercalls.__path__)]
LAYOUTS = {
    f"{module}.{name}": (layout.size, layout.format)
    for module in MODULES
    for name, layout in vars(importlib.import_module(f"usermm.hypercalls.{module}")).items()
    if isinstance(layout, struct.Struct)
}
FIELDS = {"u16": 2, "u32": 4, "i32": 4, "u64": 8}


def rows(heading: str) -> dict[str, str]:
    """The first cell of each row of the section's tables, and the rest of the row."""
    section = TEXT.split(heading, 1)[1].split("\n## ", 1)[0]
    return dict(re.findall(r"^\| (\S[^|]*?) \| (.*) \|$", section, re.MULTILINE))


def test_every_operation_is_there_with_its_number() -> None:
    named = {name for name in rows("# Hypercalls\n") if re.fullmatch(r"[A-Z_]+ \d+", name)}
    assert named == {f"{operation.name} {operation.value}" for operation in wire.Operation}


def test_every_type_of_the_store_is_there_with_its_number() -> None:
    named = {name for name in rows("\n## The store\n") if re.fullmatch(r"[A-Z_]+ \d+", name)}
    assert named == {f"{kind.name} {kind.value}" for kind in store.Type}


def test_every_layout_is_there_with_its_size_and_format() -> None:
    found = re.findall(r"^\| `(\w+\.\w+)` \| (\d+) \| `(\S+)` \|$", TEXT, re.MULTILINE)
    assert {name: (int(size), form) for name, size, form in found} == LAYOUTS
    assert len(found) == len(LAYOUTS) > 20


@pytest.mark.parametrize(
    ("operation", "layout"),
    [
        (wire.Operation.HELLO, wire.HELLO),
        (wire.Operation.PEER, wire.PEER),
        (wire.Operation.ALLOCATE, grants.ALLOCATE),
        (wire.Operation.RELEASE, grants.RANGE),
        (wire.Operation.OPEN_OWN, grants.RANGE),
        (wire.Operation.REVOKE, grants.RANGE),
        (wire.Operation.GRANTOR_NOTIFY, grants.GRANTOR_NOTIFY),
        (wire.Operation.POOL, pools.POOL),
        (wire.Operation.UNMAPPED, grants.HANDLE),
        (wire.Operation.GRANTEE_NOTIFY, grants.GRANTEE_NOTIFY),
        (wire.Operation.POOL_UNMAPPED, pools.POOL_UNMAPPED),
        (wire.Operation.STORE, store.HEADER),
    ],
    ids=lambda value: value.name if isinstance(value, wire.Operation) else "",
)
def test_the_fields_of_a_payload_add_up_to_its_layout(operation: wire.Operation, layout: struct.Struct) -> None:
    payload = rows("# Hypercalls\n")[f"{operation.name} {operation.value}"].split("|")[0]
    assert sum(FIELDS[field] for field in re.findall(r"\b([ui]\d\d)\b", payload)) == layout.size


@pytest.mark.parametrize(
    "number",
    [
        wire.LONGEST_REQUEST_BYTES,
        wire.LONGEST_REPLY_BYTES,
        wire.MOST_DESCRIPTORS,
        grants.MOST_RUNS,
        pools.PAGES,
        pools.BLOCK,
        pools.CLOSED_WORD,
        pools.HELD_WORDS,
        store.LONGEST_TOKEN_BYTES,
        store.MOST_PERMISSIONS,
    ],
)
def test_every_limit_is_there(number: int) -> None:
    assert re.search(rf"\b{number}\b", TEXT.split("\n## Layouts\n")[0])
