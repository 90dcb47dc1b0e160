"""The hash that chains each entry of the ledger to the one before it in its window.

Who edits an entry afterwards, takes one out or puts two in another order breaks the chain there, and an audit says
where. What belongs to no window is chained by account. A store computes a link in the same atomic step that writes the
entry; inside Redis that is possible with SHA-1 alone, of which the first 96 bits are kept: enough that no other entry
can be found to fit a link. Who may rewrite a whole store can also chain it anew, but not without changing its last
links: they are kept elsewhere by whoever keeps its ledger elsewhere.
"""

from __future__ import annotations

from hashlib import sha1
from typing import TYPE_CHECKING

import msgspec

from gratis.lines import correction_line, encode, enrollment_line, terms_line
from gratis.model import Reason, micros

if TYPE_CHECKING:
    from datetime import datetime

    from gratis.model import Correction, Decision, Durability, Held, Request, Terms, Window

LINK_HEX = 24
UNCHAINED = "0" * LINK_HEX  # what the first entry of a window is chained to
HEX_MIN = 16

pack = msgspec.msgpack.Encoder().encode

_LETTERS = {Reason.WITHIN_ALLOWANCE: "w", Reason.OVER_ALLOWANCE: "o", Reason.TOO_LATE: "l"}


def facts_of(request: Request, terms: Terms, durability: Durability) -> bytes:
    """What an entry has in common with many, as JSON."""
    return encode(
        {
            "model": request.model,
            "project": request.project,
            "kind": request.kind,
            "tools": request.tools,
            "durability": durability,
            "terms": terms_line(terms),
            "enrollment": None if terms.enrollment is None else enrollment_line(terms.enrollment),
        }
    )


def stem_of(offer: str, account: str, facts: bytes) -> bytes:
    """The same as a digest, with the account: by this each link begins."""
    return sha1(f"{offer}\0{account}\0".encode() + facts, usedforsecurity=False).hexdigest().encode()


def id_bytes(request_id: str) -> bytes:
    """An id as it is kept and chained: long hexadecimal ones take half the room."""
    if len(request_id) >= HEX_MIN and len(request_id) % 2 == 0:
        try:
            packed = bytes.fromhex(request_id)
        except ValueError:
            return pack(request_id)
        if packed.hex() == request_id:
            return pack(packed)
    return pack(request_id)


def rest_of(request: Request, at: int, decided_at: int, correction: Correction | None = None) -> bytes:
    """What else an entry says of its request; a correction comes last."""
    rest = (at, request.input_tokens, request.output_tokens, request.cached_tokens, decided_at - at)
    if correction is None:
        return pack(rest)
    return pack((*rest, {"of": correction.of, **correction_line(correction)}))


def verdict_of(decision: Decision) -> bytes:
    """What a store found: a letter; of what belongs to a window used, seq and the window; of a hold that it ended."""
    letter = "x" if decision.terms.reason is not None else _LETTERS.get(decision.reason, decision.reason.value)
    if decision.seq is None or decision.window is None:
        text = "n" if letter == "o" else letter
    else:
        text = f"{letter} {decision.used} {decision.seq} {_span(decision.window)}"
    return (text if decision.hold is None else text + ended(decision.hold)).encode()


def ended(hold: Held) -> str:
    """What a verdict says of the hold that the decision ended."""
    span = "-" if hold.window is None else _span(hold.window)
    return f"\t{'u' if hold.is_unmeasured else 's'}{hold.tokens_max} {span}"


def link(before: str, stem: bytes, decision: Decision, decided_at: datetime) -> str:
    """The link of an entry, given that of the one before it."""
    request = decision.request
    rest = rest_of(request, micros(request.at), micros(decided_at), decision.correction)
    text = b"%b%b%b\n%b%b" % (before.encode(), stem, verdict_of(decision), id_bytes(request.id), rest)
    return sha1(text, usedforsecurity=False).hexdigest()[:LINK_HEX]


class Stems:
    """The stems of entries; those of many are the same."""

    def __init__(self, most: int = 20_000) -> None:
        self._most = most
        self._known: dict[tuple[object, ...], bytes] = {}

    def of(self, decision: Decision) -> bytes:
        """The stem of a decision."""
        request, terms = decision.request, decision.terms
        key = (terms, decision.durability, request.account, request.model, request.project, request.kind, request.tools)
        stem = self._known.get(key)
        if stem is None:
            if len(self._known) >= self._most:
                self._known.clear()
            facts = facts_of(request, terms, decision.durability)
            stem = self._known[key] = stem_of(terms.offer, request.account, facts)
        return stem


def _span(window: Window) -> str:
    return f"{max(0, micros(window.start)):018d} {max(0, micros(window.end)):018d}"
