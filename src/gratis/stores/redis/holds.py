"""What is kept of a hold on a server: a line of Lua's, the name of its window, its time, and what only Python reads.

The line says when it runs out, what it set aside, d or r (decided by its bound then, or released), w or o (it fits or
not), x or l (no allowance covers it, or its window is no longer kept), what was used and held by others, its bound,
and the window that admitted it, or '-' where none was open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from gratis.lines import decode, encode, kept_line, kept_of
from gratis.model import Expiry, Hold, Reason, Window, from_micros
from gratis.rule import Holding
from gratis.stores.redis.layout import pack

if TYPE_CHECKING:
    from gratis.rule import Charge

_REASONS = {b"w": Reason.WITHIN_ALLOWANCE, b"o": Reason.OVER_ALLOWANCE, b"l": Reason.TOO_LATE}


def kept_of_hold(charge: Charge, step: Holding, at: int) -> bytes:
    """What is kept of a hold but for Lua's line: the request's time, packed as records have it, and its JSON."""
    time = pack(at)
    return b"%c%b%b" % (len(time), time, encode(kept_line(_asked(charge, step))))


def hold_of_line(line: bytes, charge: Charge) -> Hold:
    """The hold that Lua's line tells of a charge."""
    step = charge.step
    assert isinstance(step, Holding), "who asks for a hold says until when"
    return _told(line, _asked(charge, step))


def read_hold(text: bytes) -> Hold:
    """A hold from what is kept of it."""
    line, _, rest = text.partition(b"\n")
    _, _, rest = rest.partition(b"\n")
    return _told(line, kept_of(decode(rest[1 + rest[0] :])))


def _asked(charge: Charge, step: Holding) -> Hold:
    """A hold as it was asked for, before anybody looked at its window."""
    return Hold(
        request=charge.request,
        terms=charge.terms,
        tokens_max=charge.request.tokens or 0,
        amount=charge.amount,
        reason=charge.terms.reason or Reason.OVER_ALLOWANCE,
        used=None,
        held=None,
        window=None,
        until=step.until,
        expiry=step.expiry,
    )


def _told(line: bytes, asked: Hold) -> Hold:
    till, _, expiry, letter, used, held, _, *span = line.split()
    return replace(
        asked,
        reason=_REASONS.get(letter, asked.reason),
        used=None if used == b"-" else int(used),
        held=None if held == b"-" else int(held),
        window=None if span == [b"-"] else Window(from_micros(int(span[0])), from_micros(int(span[1]))),
        until=from_micros(int(till)),
        expiry=Expiry.RELEASED if expiry == b"r" else Expiry.DECIDED,
    )
