"""The policy: who becomes which domain, who may grant to whom, and what its file may say."""

from __future__ import annotations

import errno
import os
import pwd
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from usermm.errors import ArgumentError
from usermm.hypercalls.wire import DOMID_FIRST_RESERVED
from usermm.hypervisor import policy_file, quotas
from usermm.hypervisor.policy import Admission, Policy, PolicyError, PolicyRefused
from usermm.hypervisor.policy_file import Rules, read
from usermm.hypervisor.quotas import Quotas

DOCUMENT = Path(__file__).parents[2] / "docs" / "hypervisor.md"
HYPERVISOR, ALICE, BOB = 900, 1001, 1002
GROUP = 7000


class Someone(NamedTuple):
    domid: int
    uid: int = ALICE
    gid: int = GROUP


class House:
    """The part of the hypervisor that a policy asks: which domains there are."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.domains: dict[int, tuple[int, str]] = {}

    def connect(self, uid: int, domid: int | None = None, name: str | None = None, gid: int = GROUP) -> Admission:
        admission = self.policy.admit(
            uid,
            gid,
            domid,
            name,
            self.domains.__contains__,
            sum(of == uid for of, _ in self.domains.values()),
            name_in_use=lambda wanted: any(wanted == name for _, name in self.domains.values()),
        )
        self.domains[admission.domid] = (uid, admission.name)
        return admission


def refused(number: int, call: Callable[[], object], reason: str) -> None:
    with pytest.raises(PolicyRefused, match=reason) as caught:
        call()
    assert caught.value.errno == number, caught.value.reason
    assert "\n" not in caught.value.reason
    assert caught.value.reason.startswith("connect(")


@pytest.fixture
def house() -> House:
    return House(Policy(Rules(), own_uid=HYPERVISOR))


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Policy]:
    """A policy from the text of its file; the hypervisor's user is HYPERVISOR."""

    def policy(text: str, after: Policy | None = None) -> Policy:
        path = tmp_path / "policy.toml"
        path.write_text(text)
        path.chmod(0o644)
        loaded = Policy.load(path, after=after)
        return Policy(read(path), own_uid=HYPERVISOR) if after is None else loaded

    return policy


# ---- without a file


def test_by_default_everybody_gets_a_domain_with_xens_quotas(house: House) -> None:
    assert house.connect(ALICE) == Admission(1, "domain-1", False, Quotas())
    assert house.connect(BOB, name="web") == Admission(2, "web", False, Quotas())
    assert house.connect(BOB, name="").name == "domain-3"


def test_a_domid_is_not_given_again_before_all_were(house: House) -> None:
    for expected in range(1, 5):
        assert house.connect(ALICE).domid == expected
        house.domains.clear()


def test_after_the_last_domid_comes_the_first_that_is_free(house: House) -> None:
    house.policy._last_automatic = DOMID_FIRST_RESERVED - 2
    house.domains = {1: (BOB, "one"), 2: (BOB, "two")}
    assert house.connect(ALICE).domid == DOMID_FIRST_RESERVED - 1 == 0x7FEF
    assert house.connect(ALICE).domid == 3


def test_when_every_domid_is_in_use_there_is_no_room(house: House) -> None:
    refused(
        errno.ENOSPC,
        lambda: house.policy.admit(ALICE, GROUP, None, None, lambda _: True, 0),
        "every domid is in use",
    )


def test_a_user_has_64_domains_at_most(house: House) -> None:
    for _ in range(64):
        house.connect(ALICE)
    refused(errno.ENOSPC, lambda: house.connect(ALICE), "user 1001 has 64 domains of domains_per_user 64: close some")
    assert house.connect(BOB)


def test_asking_for_a_domid_is_for_root_and_the_hypervisors_user(house: House) -> None:
    refused(errno.EACCES, lambda: house.connect(ALICE, 5), "user 1001 may not ask for it")
    assert house.connect(0, 5).domid == 5
    assert house.connect(HYPERVISOR, 6).domid == 6
    refused(errno.EBUSY, lambda: house.connect(0, 5), "domid 5 is connected already")


def test_domain_0_is_for_who_is_trusted_and_has_control(house: House) -> None:
    refused(errno.EACCES, lambda: house.connect(ALICE, 0), "domid 0")
    assert house.connect(0, 0) == Admission(0, "domain-0", True, Quotas())
    assert not house.connect(0).control


@pytest.mark.parametrize("domid", [DOMID_FIRST_RESERVED, 0xFFFE, 2**31, -1])
def test_reserved_numbers_are_nobodys(house: House, domid: int) -> None:
    refused(errno.EINVAL, lambda: house.connect(0, domid), "domids are 0 to 32751")


@pytest.mark.parametrize("name", ["a/b", "a b", "x" * 64, "é", "..", "a\n", "domain-77", "\0"])
def test_a_name_must_fit_the_store_and_be_ones_own(house: House, name: str) -> None:
    refused(errno.EINVAL, lambda: house.connect(ALICE, name=name), "a name is 1 to 63 letters, digits, - and _")


def test_a_name_is_had_once(house: House) -> None:
    house.connect(ALICE, name="web")
    refused(errno.EBUSY, lambda: house.connect(BOB, name="web"), "another domain has that name")


def test_everybody_grants_to_everybody_by_default(house: House) -> None:
    assert house.policy.may_grant(Someone(3), 4)


def test_status_is_for_root_and_the_hypervisors_user(house: House) -> None:
    assert house.policy.may_read_status(0, 0)
    assert house.policy.may_read_status(HYPERVISOR, GROUP)
    assert not house.policy.may_read_status(ALICE, GROUP)


def test_the_own_user_is_this_process() -> None:
    assert Policy.default().may_read_status(os.geteuid(), os.getegid())


# ---- fixed domains

FIXED = f"""
[defaults]
max_memkb = 4096
[[domain]]
domid = 5
user = {ALICE}
name = "database"
control = true
max_event_channels = 7
may_grant_to = [9, "web", "20-22"]
[[domain]]
domid = 6
user = {BOB}
name = "web"
status = true
"""


@pytest.mark.parametrize("wanted", [(None, None), (5, None), (None, "database"), (5, "database")])
def test_a_fixed_domain_is_its_users_however_he_asks(
    load: Callable[..., Policy], wanted: tuple[int | None, str | None]
) -> None:
    expected = Quotas(max_memkb=4096, max_event_channels=7)
    assert House(load(FIXED)).connect(ALICE, *wanted) == Admission(5, "database", True, expected)


def test_a_fixed_domain_is_nobody_elses(load: Callable[..., Policy]) -> None:
    house = House(load(FIXED))
    refused(errno.EACCES, lambda: house.connect(BOB, 5), "the policy has it for user 1001, this is user 1002")
    refused(errno.EACCES, lambda: house.connect(BOB, name="database"), "the policy has it for user 1001")
    refused(errno.EACCES, lambda: house.connect(0, 9, "database"), "the policy has that name for domid 5")
    refused(errno.EACCES, lambda: house.connect(ALICE, 5, "other"), "the policy names it database")
    assert house.connect(0, 5).name == "database", "root is trusted"


def test_fixed_domids_are_not_handed_out(load: Callable[..., Policy]) -> None:
    house = House(load(FIXED))
    carol = [house.connect(1003).domid for _ in range(7)]
    assert carol == [1, 2, 3, 4, 7, 8, 9]
    assert house.connect(1003).quotas == Quotas(max_memkb=4096)


def test_whoever_has_his_fixed_domain_gets_another_one_beside_it(load: Callable[..., Policy]) -> None:
    house = House(load(FIXED))
    assert [house.connect(ALICE).domid for _ in range(3)] == [5, 1, 2]
    refused(errno.EBUSY, lambda: house.connect(ALICE, 5), "domid 5 is connected already")


def test_a_fixed_domain_is_not_refused_for_number_or_by_allow(load: Callable[..., Policy]) -> None:
    house = House(load("allow = false\ndomains_per_user = 0\n" + FIXED))
    assert house.connect(ALICE).domid == 5
    refused(errno.EBUSY, lambda: house.connect(ALICE), "every domid that the policy has for user 1001 is connected")
    refused(errno.EACCES, lambda: house.connect(1003), "the policy does not admit user 1003")
    refused(errno.ENOSPC, lambda: house.connect(0), "user 0 has 0 domains of domains_per_user 0")


def test_whom_a_fixed_domain_may_grant_to(load: Callable[..., Policy]) -> None:
    policy = load(FIXED)
    allowed = [domid for domid in range(30) if policy.may_grant(Someone(5), domid)]
    assert allowed == [5, 6, 9, 20, 21, 22]
    assert policy.may_grant(Someone(6, BOB), 29)


def test_a_fixed_domains_user_may_read_status_where_it_says_so(load: Callable[..., Policy]) -> None:
    policy = load(FIXED)
    assert policy.may_read_status(BOB, GROUP)
    assert not policy.may_read_status(ALICE, GROUP)


def test_domain_0_can_be_a_users(load: Callable[..., Policy]) -> None:
    house = House(load(f'[[domain]]\ndomid = 0\nuser = {ALICE}\nname = "Domain-0"\n'))
    assert house.connect(ALICE, 0) == Admission(0, "Domain-0", True, Quotas())


# ---- rules


def test_the_first_rule_about_a_user_decides(load: Callable[..., Policy]) -> None:
    house = House(
        load(f"""
            allow = false
            [[rule]]
            user = {BOB}
            allow = false
            [[rule]]
            group = {GROUP}
            domids = ["100-109", 200]
            domains_per_user = 2
            may_grant_to = [200]
            status = true
            quota_entries = 10
        """)
    )
    refused(errno.EACCES, lambda: house.connect(BOB), "does not admit user 1002")
    refused(errno.EACCES, lambda: house.connect(ALICE, gid=1), "does not admit user 1001")
    assert house.connect(ALICE, 105) == Admission(105, "domain-105", False, Quotas(quota_entries=10))
    refused(errno.EACCES, lambda: house.connect(ALICE, 110), "may not ask for it")
    assert house.connect(ALICE, 200).domid == 200
    refused(errno.ENOSPC, lambda: house.connect(ALICE), "domains_per_user 2")
    assert not house.policy.may_grant(Someone(105), 3)
    assert house.policy.may_grant(Someone(105), 200)
    assert house.policy.may_read_status(ALICE, GROUP)


def test_a_rule_does_not_give_domain_0(load: Callable[..., Policy]) -> None:
    house = House(load(f"[[rule]]\nuser = {ALICE}\ndomids = ['0-9']\n"))
    refused(errno.EACCES, lambda: house.connect(ALICE, 0), "may not ask for it")
    assert house.connect(ALICE, 9).domid == 9


def test_domids_that_somebody_may_ask_for_are_not_handed_out(load: Callable[..., Policy]) -> None:
    house = House(load(f"[[rule]]\nuser = {ALICE}\ndomids = ['1-99']\n"))
    assert house.connect(BOB).domid == 100


def test_users_and_groups_have_names(load: Callable[..., Policy]) -> None:
    nobody = pwd.getpwnam("nobody")
    policy = load('allow = false\n[[rule]]\nuser = "nobody"\nstatus = true\n[[rule]]\ngroup = "root"\nstatus = true\n')
    assert policy.may_read_status(nobody.pw_uid, nobody.pw_gid)
    assert policy.may_read_status(ALICE, 0)
    assert not policy.may_read_status(ALICE, GROUP)


# ---- the file


def test_an_empty_file_is_the_default(load: Callable[..., Policy]) -> None:
    assert House(load("")).connect(ALICE) == Admission(1, "domain-1", False, Quotas())


def test_a_new_policy_goes_on_where_the_old_one_was(load: Callable[..., Policy]) -> None:
    house = House(load(""))
    assert [house.connect(ALICE).domid for _ in range(3)] == [1, 2, 3]
    house.domains.clear()
    house.policy = load("domains_per_user = 1\n", after=house.policy)
    assert house.connect(ALICE).domid == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("allow = 1", "allow = 1: give true or false"),
        ("alow = true", "alow: no such key: give allow, domains_per_user, defaults, domain, rule"),
        ("domains_per_user = -1", "domains_per_user = -1: give a whole number from 0 to 32751"),
        ("defaults = 3", r"defaults = 3: give a table, \[defaults\]"),
        ("[defaults]\nmax_grants = 3", r"\[defaults\] max_grants: no such key: give max_grant_frames"),
        ("[defaults]\nmax_memkb = -3", r"\[defaults\] max_memkb = -3: give a whole number from 0 to"),
        ("domain = 3", r"domain = 3: give tables, each headed \[\[domain\]\]"),
        ("rule = [1]", r"rule = \[1\]: give tables"),
        ("[[domain]]\nuser = 1", r"\[\[domain\]\] 1 has no domid"),
        ("[[domain]]\ndomid = 1", r"\[\[domain\]\] 1 has no user"),
        ("[[domain]]\ndomid = 32752\nuser = 1", r"\[\[domain\]\] 1 domid = 32752: give a whole number from 0 to 32751"),
        ("[[domain]]\ndomid = true\nuser = 1", "domid = True"),
        ("[[domain]]\ndomid = 1\nuser = 1\nname = 'a/b'", "name = 'a/b': give 1 to 63 letters"),
        ("[[domain]]\ndomid = 1\nuser = 1\nname = 'domain-2'", "name = 'domain-2': give one that is not given"),
        ("[[domain]]\ndomid = 1\nuser = 1\n[[domain]]\ndomid = 1\nuser = 2", r"\[\[domain\]\] 2 domid = 1: give"),
        (
            "[[domain]]\ndomid = 1\nuser = 1\nname = 'a'\n[[domain]]\ndomid = 2\nuser = 2\nname = 'a'",
            r"\[\[domain\]\] 2 name = 'a': give a name that no other",
        ),
        ("[[domain]]\ndomid = 1\nuser = 'no such user'", "user = 'no such user': give a user of this system"),
        ("[[domain]]\ndomid = 1\nuser = 'a\\u0000b'", "give a user of this system"),
        ("[[domain]]\ndomid = 1\nuser = 1.5", "user = 1.5: give the name or the number of a user"),
        ("[[domain]]\ndomid = 1\nuser = -1", "user = -1: give"),
        ("[[domain]]\ndomid = 1\nuser = 1\nmay_grant_to = 3", "may_grant_to = 3: give a list of domids"),
        ("[[domain]]\ndomid = 1\nuser = 1\nmay_grant_to = ['x']", "may_grant_to has 'x': no ..domain.. has this name"),
        ("[[domain]]\ndomid = 1\nuser = 1\nmay_grant_to = ['9-3']", "may_grant_to = '9-3': give"),
        ("[[domain]]\ndomid = 1\nuser = 1\nmay_grant_to = [40000]", "may_grant_to = 40000: give"),
        ("[[domain]]\ndomid = 1\nuser = 1\nallow = true", r"\[\[domain\]\] 1 allow: no such key"),
        ("[[rule]]\nallow = true", r"\[\[rule\]\] 1 has to have either user or group"),
        ("[[rule]]\nuser = 1\ngroup = 1", r"\[\[rule\]\] 1 has to have either user or group"),
        ("[[rule]]\ngroup = 'no such group'", "group = 'no such group': give a group of this system"),
        ("[[rule]]\nuser = 1\ndomids = ['1-32751']", "its domids leave none to hand out"),
        ("allow = tru", r"line 1"),
        ("allow = true\nallow = false", r"overwrite|line 2"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line_with_file_and_key(
    load: Callable[..., Policy], text: str, message: str
) -> None:
    with pytest.raises(PolicyError, match=message) as caught:
        load(text)
    assert isinstance(caught.value, ArgumentError)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("policy(/")
    assert "policy.toml" in str(caught.value)


def test_what_is_no_policy_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(PolicyError, match=r"file\): No such file"):
        Policy.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(PolicyError, match="utf-8"):
        Policy.load(path)
    path.write_bytes(b"#" * (1 << 21))
    with pytest.raises(PolicyError, match="longer than 1048576 bytes"):
        Policy.load(path)
    with pytest.raises(PolicyError, match="Is a directory"):
        Policy.load(tmp_path)
    with pytest.raises(PolicyError, match="null"):
        Policy.load("a\0b")


def test_the_documented_example_is_a_policy(load: Callable[..., Policy]) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    house = House(load(example.replace('group = "users"', f"group = {GROUP}")))  # not every system has that group
    refused(errno.EACCES, lambda: house.connect(BOB, gid=1), "does not admit")
    assert house.connect(ALICE, 150).quotas == Quotas(max_memkb=262144)
    assert house.connect(0).name == "database"
    assert house.policy.may_grant(Someone(5, 0, 0), 6)
    assert not house.policy.may_grant(Someone(150), 6)


def test_every_key_and_every_range_is_documented() -> None:
    text = DOCUMENT.read_text()
    for key in (*policy_file._TOP_KEYS, *policy_file._DOMAIN_KEYS, *policy_file._RULE_KEYS):
        assert re.search(rf"`{key}`|\[{key}\]", text), key
    for name, (least, most) in quotas._RANGES.items():
        (row,) = re.findall(rf"^\| `{name}` \| (\d+) \| ([^|]+) \| (.*) \|$", text, re.MULTILINE)
        assert int(row[0]) == getattr(Quotas(), name)
        assert int(row[1].replace("2^40", str(2**40))) == most
        assert least == 0 or f"at least {least}" in row[2]


def test_a_file_that_everybody_may_write_is_no_policy(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("")
    path.chmod(0o666)
    with pytest.raises(PolicyError, match=r"everybody may write it: chmod o-w /"):
        Policy.load(path)
