"""Turns of a round: a user's share, and that nobody of its connections is left waiting for ever."""

from __future__ import annotations

import asyncio

from usermm.hypervisor.shares import SHARE_NS, Shares

ALICE, BOB = 1, 2


def test_a_user_that_had_its_share_waits_for_the_next_round_and_others_do_not() -> None:
    async def rounds() -> None:
        shares = Shares(asyncio.get_running_loop())
        assert shares.may_go("a", ALICE)
        shares.went(ALICE, SHARE_NS)
        assert not shares.may_go("b", ALICE)
        assert shares.may_go("c", BOB)
        await asyncio.sleep(0)
        assert shares.may_go("b", ALICE)

    asyncio.run(rounds())


def test_who_was_turned_away_goes_before_who_had_a_turn() -> None:
    async def rounds() -> None:
        shares = Shares(asyncio.get_running_loop())
        shares.went(ALICE, SHARE_NS)
        assert not shares.may_go("b", ALICE)
        await asyncio.sleep(0)
        assert not shares.may_go("a", ALICE)
        assert shares.may_go("b", ALICE)
        assert shares.may_go("a", ALICE)

    asyncio.run(rounds())


def test_who_left_while_it_waited_keeps_nobody_waiting() -> None:
    async def rounds() -> None:
        shares = Shares(asyncio.get_running_loop())
        shares.went(ALICE, SHARE_NS)
        assert not shares.may_go("b", ALICE)
        shares.forget("b", ALICE)
        shares.forget("b", BOB)
        await asyncio.sleep(0)
        assert shares.may_go("a", ALICE)

    asyncio.run(rounds())


def test_of_many_that_always_have_something_to_say_each_comes_to_it() -> None:
    """Ten connections, of which a round has room for three."""

    async def rounds() -> dict[int, int]:
        shares, served = Shares(asyncio.get_running_loop()), dict.fromkeys(range(10), 0)
        for _ in range(100):
            for who in served:
                if shares.may_go(who, ALICE):
                    served[who] += 1
                    shares.went(ALICE, SHARE_NS // 3 + 1)
            await asyncio.sleep(0)
        return served

    served = asyncio.run(rounds())
    assert set(served.values()) == {25}  # four rounds for all ten: the last of them has one left
