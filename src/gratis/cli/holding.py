"""`gratis hold`, `settle`, `release`, `holds` and `correct`: before a request is sent, and after it was decided."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from msgspec.structs import replace

from gratis import clock as system
from gratis.cli.accounts import user
from gratis.cli.decisions import COLUMNS, assumed
from gratis.cli.screen import Listing, is_table, number, safe, table, when
from gratis.cli.streams import Output
from gratis.errors import GratisError, RequestError
from gratis.lines import holding_line
from gratis.meter import Meter
from gratis.model import Hold, Kind, Request, Usage
from gratis.offers import load
from gratis.stores.urls import open_store

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from gratis.model import Decision


def hold(arguments: argparse.Namespace) -> int:
    """Set aside an upper bound on a request's tokens, and say whether it fits."""
    request = Request(
        id=arguments.id,
        model=arguments.model,
        at=system.now() if arguments.at is None else arguments.at,
        account=arguments.account,
        project=arguments.project,
        kind=Kind(arguments.kind),
        tools=tuple(arguments.tool),
    )
    with Meter.open(arguments.store, offer=arguments.offer, assume=assumed(arguments)) as meter:
        known = _known(meter, arguments.account, arguments.id)
        if known is not None and arguments.at is None:
            request = replace(request, at=known.at)  # the same request, asked for again
        made = meter.hold(
            request, arguments.tokens_max, for_=timedelta(seconds=arguments.last), on_expiry=arguments.on_expiry
        )
    if made.decision is not None:
        _show_decisions(arguments, [made.decision])
    else:
        _show_holds(arguments, [made])
    return 0


def settle(arguments: argparse.Namespace) -> int:
    """Decide a held request by what it used."""
    used = Usage(
        input_tokens=arguments.input_tokens,
        output_tokens=arguments.output_tokens,
        cached_tokens=arguments.cached_tokens,
        model=arguments.model,
        tools=tuple(arguments.tool),
    )
    with _opened(arguments) as meter:
        hold = _found(meter, arguments)
        made = 0 if hold.request.kind is Kind.EMBEDDING and used.input_tokens is not None else used.output_tokens
        if (used.input_tokens is None) is not (made is None):
            expected = "--input-tokens N and --output-tokens N, or neither: then its bound counts"
            raise GratisError(f"settle: expected {expected}")
        decision = meter.settle(hold, used)
    _show_decisions(arguments, [decision])
    return 0


def release(arguments: argparse.Namespace) -> int:
    """Give a hold back."""
    with _opened(arguments) as meter:
        known = _known(meter, arguments.account, arguments.id)
        decision = None if known is None else meter.release(_held(meter, known))
    if decision is not None:
        _show_decisions(arguments, [decision])
    elif is_table(arguments.format):
        print("given back" if isinstance(known, Hold) else "nothing is held: it was settled or released before")
    else:
        Output().lines([{"id": arguments.id, "account": arguments.account, "released": isinstance(known, Hold)}])
    return 0


def holds(arguments: argparse.Namespace) -> int:
    """The holds of accounts, or the decisions on those that ran out of time."""
    with _opened(arguments) as meter:
        names = meter.accounts() if arguments.account is None else [arguments.account]
        if arguments.expire:
            _show_decisions(arguments, [decision for name in names for decision in meter.expire(name)])
        else:
            _show_holds(arguments, [one for name in names for one in meter.holds(name)])
    return 0


def correct(arguments: argparse.Namespace) -> int:
    """Correct what was decided: a new entry of the ledger, which says who corrected what, and why."""
    actor = user() if arguments.by is None else arguments.by
    place = {"account": arguments.account, "actor": actor, "why": arguments.why}
    with _opened(arguments) as meter:
        if arguments.void:
            if arguments.input_tokens is not None or arguments.output_tokens is not None:
                raise GratisError("correct: expected --void, or what it really used; not both")
            decision = meter.void(arguments.id, **place)
        else:
            if arguments.input_tokens is None:
                raise GratisError("correct: expected --void, or --input-tokens N and --output-tokens N")
            used = Usage(
                input_tokens=arguments.input_tokens,
                output_tokens=arguments.output_tokens,
                cached_tokens=arguments.cached_tokens,
            )
            decision = meter.adjust(arguments.id, used, **place)
    _show_decisions(arguments, [decision])
    return 0


def _opened(arguments: argparse.Namespace) -> Meter:
    return Meter(open_store(arguments.store, must_exist=True), load(arguments.offer), assume=assumed(arguments))


def _known(meter: Meter, account: str, request_id: str) -> Hold | Decision | None:
    """What is known of a request: its hold, or its first decision."""
    for one in meter.holds(account):
        if one.id == request_id:
            return one
    return next(iter(meter.decisions(request_id, account=account)), None)


def _found(meter: Meter, arguments: argparse.Namespace) -> Hold:
    """The hold of a request, or what it would say of one that was decided."""
    known = _known(meter, arguments.account, arguments.id)
    if known is None:
        gone = "it was released, or ran out of time; `gratis decide` decides it all the same"
        raise RequestError("id", f"no hold of request {arguments.id!r} in account {arguments.account!r}: {gone}")
    return _held(meter, known)


def _held(meter: Meter, known: Hold | Decision) -> Hold:
    return known if isinstance(known, Hold) else meter.hold(known.request, known.tokens or 0)


def _show_holds(arguments: argparse.Namespace, found: Sequence[Hold]) -> None:
    if not is_table(arguments.format):
        Output().lines([holding_line(one) for one in found])
        return
    rows = [
        [
            safe(one.id),
            safe(one.account),
            one.group or "",
            number(one.tokens_max),
            "yes" if one.fits else f"no: {one.reason}" + (f", by {number(one.short)}" if one.short else ""),
            when(one.until),
            one.expiry,
        ]
        for one in found
    ]
    head = ["id", "account", "group", "tokens at most", "fits", "until", "and then"]
    print(table(head, rows, right=["tokens at most"]) if rows else "nothing is held")


def _show_decisions(arguments: argparse.Namespace, found: Sequence[Decision]) -> None:
    if is_table(arguments.format):
        Listing(COLUMNS).decisions(found)
    else:
        Output().decisions(found)
