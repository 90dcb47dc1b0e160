"""`gratis standing`, `gratis explain`, `gratis enroll`: one account, looked at and enrolled."""

from __future__ import annotations

import getpass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from msgspec.structs import replace

from gratis import clock as system
from gratis.cli.decisions import assumed
from gratis.cli.screen import bar, is_table, number, paint, safe, table, when
from gratis.cli.streams import Output
from gratis.errors import EnrollmentError, GratisError
from gratis.lines import change_line
from gratis.meter import Meter
from gratis.model import Enrollment, Kind, Request, Sharing, stamp
from gratis.offers import load
from gratis.stores.urls import exists, open_store

if TYPE_CHECKING:
    import argparse

    from gratis.book import Explanation, Standing
    from gratis.model import Change


def standing(arguments: argparse.Namespace) -> int:
    """What is left of each allowance, and until when."""
    store = open_store(arguments.store, must_exist=True)
    with Meter(store, load(arguments.offer), assume=assumed(arguments)) as meter:
        names = meter.accounts() if arguments.account is None else [arguments.account]
        for name in names:
            found = meter.standing(name, at=arguments.at)
            if is_table(arguments.format):
                print(_standing_table(name, found))
            else:
                Output().lines([_standing_line(row) for row in found])
    return 0


def _standing_line(row: Standing) -> dict[str, Any]:
    return {
        "account": row.account,
        "offer": row.offer,
        "revision": row.revision,
        "group": row.group,
        "unit": row.unit,
        "allowance": row.allowance,
        "used": row.used,
        "remaining": row.remaining,
        "held": row.held,
        "available": row.available,
        "reason": row.reason,
        "window_start": None if row.window is None else stamp(row.window.start),
        "window_end": None if row.window is None else stamp(row.window.end),
    }


def _standing_table(name: str, found: list[Standing]) -> str:
    if not found:
        return f"{safe(name)}: the offer is not in force at this time"
    rows = [
        [
            row.group,
            number(row.used),
            number(row.allowance),
            bar(row.remaining, row.allowance),
            _left(row),
            when(None if row.window is None else row.window.end),
        ]
        for row in found
    ]
    colors = ["red" if row.remaining == 0 else "yellow" if row.remaining * 5 < row.allowance else None for row in found]
    title = paint(f"{safe(name)} under {found[0].offer}, revision of {found[0].revision}", "bold")
    head = ["group", "used", "allowance", "left", "", "until"]
    return f"{title}\n{table(head, rows, right=['used', 'allowance'], colors=colors)}\n"


def _left(row: Standing) -> str:
    if row.reason is not None:
        return row.reason
    held = f", {number(row.held)} held" if row.held else ""
    return f"{number(row.remaining)} {row.unit} left{held}"


def explain(arguments: argparse.Namespace) -> int:
    """Would this request be free now? Writes nothing."""
    request = Request(
        id=f"explain {uuid4()}",
        model=arguments.model,
        at=system.now() if arguments.at is None else arguments.at,
        input_tokens=arguments.tokens,
        output_tokens=0,
        account=arguments.account,
        project=arguments.project,
        kind=Kind(arguments.kind),
        tools=tuple(arguments.tool),
    )
    # Where nothing was stored yet nothing was decided either; a question makes no store.
    url = arguments.store if exists(arguments.store) else "memory:"
    with Meter.open(url, offer=arguments.offer, assume=assumed(arguments)) as meter:
        found = meter.explain(request)
    if is_table(arguments.format):
        print(_explanation_text(found))
    else:
        Output().lines([_explanation_line(found)])
    return 0


def _explanation_line(found: Explanation) -> dict[str, Any]:
    decision = found.decision
    return {
        "account": decision.account,
        "model": decision.request.model,
        "verdict": decision.verdict,
        "reason": decision.reason,
        "tokens": decision.tokens,
        "fits": found.fits,
        "held": found.held,
        "available": found.available,
        "elsewhere": list(found.elsewhere),
        "unit": found.unit,
        "group": decision.group,
        "allowance": decision.allowance,
        "window_end": None if decision.window_end is None else stamp(decision.window_end),
    }


def _explanation_text(found: Explanation) -> str:
    decision = found.decision
    if not decision.is_judged:
        elsewhere = "".join(f"; group {name} would take it" for name in found.elsewhere)
        return paint("billed", "red") + f": {decision.reason}; no allowance covers this request{elsewhere}"
    until = "" if found.window_end is None else f" until {when(found.window_end)}"
    if found.fits is None:
        left = f"nothing of group {decision.group} fits{until}"
    else:
        left = f"{number(found.fits)} {found.unit} of group {decision.group} still fit{until}"
    if found.held:
        left += f"; {number(found.held)} are held"
    if decision.is_free:
        return paint("free", "green") + f": {decision.reason}; {left}"
    elsewhere = "".join(f"; group {name} would take it" for name in found.elsewhere)
    return paint("billed", "red") + f": {decision.reason}; {left}{elsewhere}"


def enroll(arguments: argparse.Namespace) -> int:
    """Enroll an account, change its enrollment, or print its history."""
    with Meter(open_store(arguments.store, must_exist=arguments.history), load(arguments.offer)) as meter:
        if arguments.history:
            changes = meter.enrollments(arguments.account)
        else:
            history = meter.enrollments(arguments.account)
            enrollment = _changed(arguments, history[-1].enrollment if history else None)
            actor = user() if arguments.by is None else arguments.by
            changes = [meter.enroll(arguments.account, enrollment, actor=actor)]
        name = meter.offer.name
    if is_table(arguments.format):
        print(_changes_table(changes))
    else:
        Output().lines([change_line(name, arguments.account, change) for change in changes])
    return 0


def user() -> str:
    """Who is at the keyboard, as far as the system knows."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        raise GratisError("enroll: your user has no name here; expected --by NAME") from None


def _changed(arguments: argparse.Namespace, now: Enrollment | None) -> Enrollment:
    """The enrollment as it is, with what the arguments say; what they leave out stays."""
    if now is None and arguments.tier is None:
        raise EnrollmentError("tier: missing; expected --tier N, since this account is not enrolled yet")
    asked = {
        "tier": arguments.tier,
        "plan": arguments.plan,
        "zero_data_retention": arguments.zero_data_retention,
        "starts": arguments.starts,
        "ends": arguments.ends,
        "owners": None if arguments.owner is None else frozenset(arguments.owner),
        "sharing": None if arguments.sharing is None else Sharing(arguments.sharing),
        "projects": None if arguments.shared_project is None else frozenset(arguments.shared_project),
    }
    given = {name: value for name, value in asked.items() if value is not None}
    if given.get("sharing", Sharing.SELECTED) is not Sharing.SELECTED:
        given.setdefault("projects", frozenset())
    if not given:
        raise GratisError("enroll: nothing to change; expected at least one of --tier, --sharing, --plan, …")
    return Enrollment(**given) if now is None else replace(now, **given)


def _changes_table(changes: list[Change]) -> str:
    if not changes:
        return "never enrolled"
    rows = []
    for change in changes:
        enrollment = change.enrollment
        shared = ", ".join(sorted(enrollment.projects))
        rows.append(
            [
                str(change.version),
                stamp(change.at),
                safe(change.actor),
                str(enrollment.tier),
                f"{enrollment.sharing}{f' ({safe(shared)})' if shared else ''}",
                safe(enrollment.plan),
                "yes" if enrollment.zero_data_retention else "no",
                "" if enrollment.starts is None else stamp(enrollment.starts),
                "" if enrollment.ends is None else stamp(enrollment.ends),
                safe(", ".join(sorted(enrollment.owners))),
            ]
        )
    head = ["version", "at", "by", "tier", "sharing", "plan", "zero retention", "starts", "ends", "owners"]
    return table(head, rows, right=["version", "tier"])
