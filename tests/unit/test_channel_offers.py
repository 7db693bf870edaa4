"""What a stranger may write where two domains meet: an offer that is none is an error, and nothing is mapped."""

from __future__ import annotations

import pytest

from usermm.channels.offers import Offer
from usermm.channels.rings import Geometry
from usermm.errors import ProtocolError

HONEST = Offer(9, 12, 3, Geometry(4, 16, 16))
MOST = (1 << 32) - 1
LARGEST = Offer(MOST - 2, MOST - 65535, MOST, Geometry(1, 65535, 1))


@pytest.mark.parametrize("offer", [HONEST, Offer(0, 0, 0, Geometry(1, 1, 1)), LARGEST])
def test_an_honest_offer_comes_as_it_went(offer: Offer) -> None:
    assert Offer.unpack(offer.pack()) == offer


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"1",
        b"1 9 12 3 4 16",  # too few
        b"1 9 12 3 4 16 16 1",  # too many
        b"1 9 12 3 4 16 x",
        b"1 -9 12 3 4 16 16",
        b"1 9 12 3 4 16 \xb2",  # a digit elsewhere
        b"1 " + b"9" * 5000 + b" 12 3 4 16 16",  # takes long to be read as a number
        b"2 9 12 3 4 16 16",  # another version
        b"1 4294967296 12 3 4 16 16",
        b"1 9 4294967296 3 4 16 16",
        b"1 9 12 4294967296 4 16 16",
        b"1 9 12 3 0 16 16",
        b"1 9 12 3 65 16 16",
        b"1 9 12 3 4 0 16",
        b"1 9 12 3 4 1048576 16",
        b"1 9 12 3 64 1048575 16",  # a range of references that takes a list of 64 million
        b"1 9 12 3 4 16384 4",  # more pages than can be mapped at once
        b"1 4294967294 12 3 4 16 16",  # references beyond u32
        b"1 9 4294967280 3 4 16 16",
        b"1 9 12 3 4 16 0",
        b"1 9 12 3 4 16 3",
        b"1 9 12 3 4 16 65536",
    ],
)
def test_an_offer_that_is_none(text: bytes) -> None:
    with pytest.raises(ProtocolError):
        Offer.unpack(text)
