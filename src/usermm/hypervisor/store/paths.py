"""Paths of the store: which are valid, and how they are taken apart.

Letters, digits and `-/_@`, as docs/misc/xenstore.txt of Xen has them: no empty part, no `/` at the end.
"""

from __future__ import annotations

import errno
import re

from usermm.hypercalls import store as layout
from usermm.hypervisor.calls import Refused

ROOT = "/"
_PART = rb"[A-Za-z0-9_@-]+"
_ABSOLUTE = re.compile(rb"/|(?:/" + _PART + rb")+")
_RELATIVE = re.compile(_PART + rb"(?:/" + _PART + rb")*")
_COMPONENT = re.compile(r"[A-Za-z0-9_@-]+")
_SPECIAL = (layout.INTRODUCE.encode(), layout.RELEASE.encode())
_SHOWN_BYTES = 64


def shown(raw: bytes) -> str:
    """For a message: one line, not too long."""
    text = raw[:_SHOWN_BYTES].decode("ascii", "backslashreplace")
    return "".join(letter if letter.isprintable() else "?" for letter in text) + "..." * (len(raw) > _SHOWN_BYTES)


def resolve(raw: bytes, home: str, longest_bytes: int, call: str) -> str:
    """The absolute path that `raw` names: below `home` unless it begins with `/`, an empty one `home` itself.

    Raises Refused (EINVAL).
    """
    if raw.startswith(b"/"):
        valid, text = _ABSOLUTE.fullmatch(raw), raw.decode("ascii", "replace")
    else:
        if not raw:
            return home
        valid = None if raw.startswith(b"@") or len(raw) > layout.LONGEST_RELATIVE_BYTES else _RELATIVE.fullmatch(raw)
        text = f"{home}/{raw.decode('ascii', 'replace')}"
    if len(text) > min(longest_bytes, layout.LONGEST_ABSOLUTE_BYTES):
        raise Refused(errno.EINVAL, f"{call}({shown(raw)}): the path has {len(text)} bytes: shorten it")
    if not valid:
        rules = "use letters, digits and -_@ between single slashes, and no slash at the end"
        raise Refused(errno.EINVAL, f"{call}({shown(raw)}): this is no path: {rules}")
    return text


def resolve_watched(raw: bytes, home: str, longest_bytes: int, call: str) -> str:
    """As resolve; also the special names."""
    return raw.decode() if raw in _SPECIAL else resolve(raw, home, longest_bytes, call)


def is_component(text: str) -> bool:
    """Whether a node can have this name."""
    return _COMPONENT.fullmatch(text) is not None


def parent(path: str) -> str:
    """The directory of `path`; the root's is the root."""
    return path[: path.rfind("/")] or ROOT


def name(path: str) -> str:
    """The last part of `path`."""
    return path[path.rfind("/") + 1 :]


def below(path: str, child: str) -> str:
    """The path of `child` in the directory `path`."""
    return f"/{child}" if path == ROOT else f"{path}/{child}"


def between(ancestor: str, path: str) -> list[str]:
    """The paths from the child of `ancestor` down to `path`, which is below it."""
    start = 0 if ancestor == ROOT else len(ancestor)
    ends = [match.start() for match in re.finditer("/", path[start + 1 :])]
    return [path[: start + 1 + end] for end in ends] + [path]
