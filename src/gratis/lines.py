"""Every value as the JSON line that the surfaces print, and back.

The names of the fields are the contract that scripts rely on. A field that does not apply is null.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from gratis.errors import EnrollmentError, LedgerError, RequestError
from gratis.model import (
    Change,
    Correction,
    Counts,
    Decision,
    Durability,
    Enrollment,
    Entry,
    Expiry,
    Held,
    Hold,
    Kind,
    Overage,
    Reason,
    Remedy,
    Request,
    Terms,
    Unit,
    Window,
    check_name,
    correction_id,
    kind_of,
    shown,
    stamp,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

TERMS_CACHED_MAX = 1_000
TERMS_BYTES_MAX = 1 << 14  # larger ones are read each time
NUMBER_MAX = (1 << 63) - 1
LINE_BYTES_MAX = 1 << 20
ENTRY_BYTES_MAX = 4 << 20  # a line of the ledger carries its enrollment, of whatever size that may be
REQUEST_FIELDS = (
    "id",
    "account",
    "project",
    "model",
    "input_tokens",
    "output_tokens",
    "cached_tokens",
    "at",
    "kind",
    "tools",
)
DECISION_FIELDS = (
    "id",
    "account",
    "verdict",
    "reason",
    "group",
    "tokens",
    "free_tokens",
    "billed_tokens",
    "allowance",
    "total",
    "used",
    "remaining",
    "window_start",
    "window_end",
    "seq",
    "offer",
    "revision",
    "at",
    "replayed",
)
ENTRY_FIELDS = ("entry", "shard", "enrollment", "durability", "decided_at", "terms", "link", "hold", "correction")
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(?P<fraction>\.\d+)?(?:[Zz]|[+-]\d\d:\d\d)", flags=re.ASCII)
_LINK = re.compile(r"[0-9a-f]{24}", flags=re.ASCII)
_MICROSECONDS = 7  # a point and six digits
_providers = {"prompttokens": "input_tokens", "completiontokens": "output_tokens"}
_loose = {name.replace("_", ""): name for name in REQUEST_FIELDS}

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder().decode


def instant(field: str, value: object) -> datetime:
    """An RFC 3339 time as an instant in UTC; digits beyond microseconds are cut off."""
    found = _RFC3339.fullmatch(value) if type(value) is str else None
    if found is None:
        raise RequestError(
            field, f"found {shown(value)}; expected RFC 3339 with its offset, such as 2025-04-16T09:15:00Z"
        )
    text, fraction = found[0], found["fraction"]
    if fraction and len(fraction) > _MICROSECONDS:
        text = text.replace(fraction, fraction[:_MICROSECONDS])
    try:
        read = datetime.fromisoformat(text.upper())
        return read if read.tzinfo is UTC else read.astimezone(UTC)
    except (ValueError, OverflowError):
        raise RequestError(field, f"found {shown(value)}; expected a date and time that there is") from None


def request_of(line: object) -> Request:
    """A request from the object of its line. Fields that are not ours are left alone, unless misspelled."""
    if type(line) is not dict:
        raise RequestError("line", f"found {type(line).__name__}; expected a JSON object")
    get = line.get
    if not line.keys() <= _KNOWN:
        _check_spelling(line)
    for field in ("id", "model", "at"):
        if get(field) is None:
            raise RequestError(field, "missing; expected in every request: id, model, at")
    tools = get("tools")
    account, kind, cached = get("account"), get("kind"), get("cached_tokens")
    return Request(
        id=line["id"],
        model=line["model"],
        at=instant("at", line["at"]),
        input_tokens=get("input_tokens"),
        output_tokens=get("output_tokens"),
        account="default" if account is None else account,
        project=get("project"),
        kind=Kind.COMPLETION if kind is None else kind_of(kind),
        tools=() if tools is None else _tool_kinds(tools),
        cached_tokens=0 if cached is None else cached,
    )


def request_line(request: Request) -> dict[str, Any]:
    """A request as its line."""
    return {
        "id": request.id,
        "account": request.account,
        "project": request.project,
        "model": request.model,
        "input_tokens": request.input_tokens,
        "output_tokens": request.output_tokens,
        "cached_tokens": request.cached_tokens,
        "at": stamp(request.at),
        "kind": request.kind,
        "tools": list(request.tools),
    }


def decision_line(decision: Decision) -> dict[str, Any]:
    """A decision as its line."""
    fields = decision_fields(decision)
    for name in ("window_start", "window_end", "at"):
        if fields[name] is not None:
            fields[name] = stamp(fields[name])
    return fields


def decision_fields(decision: Decision) -> dict[str, Any]:
    """The fields of the contract, in their order; `encode` writes times as `stamp` does, and faster.

    Only of a request that was held there is a `hold`, only of a correction a `correction`.
    """
    request, terms, window, used = decision.request, decision.terms, decision.window, decision.used
    is_judged = used is not None
    fields: dict[str, Any] = {
        "id": decision.id,
        "account": request.account,
        "verdict": decision.verdict,
        "reason": decision.reason,
        "group": terms.group if is_judged else None,
        "tokens": request.tokens,
        "free_tokens": decision.free_tokens,
        "billed_tokens": decision.billed_tokens,
        "allowance": terms.allowance if is_judged else None,
        "total": decision.total,
        "used": used,
        "remaining": decision.remaining,
        "window_start": None if window is None else window.start,
        "window_end": None if window is None else window.end,
        "seq": decision.seq,
        "offer": terms.offer,
        "revision": terms.revision,
        "at": request.at,
        "replayed": decision.replayed,
    }
    if decision.hold is not None:
        fields["hold"] = hold_line(decision.hold)
    if decision.correction is not None:
        fields["correction"] = correction_line(decision.correction)
    return fields


def entry_line(entry: Entry) -> dict[str, Any]:
    """A ledger entry as its line: place, request and decision, and the terms on which it rests."""
    decision, terms = entry.decision, entry.decision.terms
    return {
        "entry": entry.entry,
        **({"shard": entry.shard} if entry.shard else {}),
        **decision_line(decision),
        **request_line(decision.request),
        "id": decision.id,
        "enrollment": None if terms.enrollment is None else enrollment_line(terms.enrollment),
        "durability": decision.durability,
        "decided_at": stamp(entry.decided_at),
        "terms": terms_line(terms),
        **({} if entry.link is None else {"link": entry.link}),
    }


def entry_of(line: object) -> Entry:
    """A ledger entry from the object of its line."""
    if type(line) is not dict:
        raise LedgerError(f"found {type(line).__name__}; expected a JSON object")
    try:
        start, end = line["window_start"], line["window_end"]
        hold, correction = line.get("hold"), line.get("correction")
        request, corrects = request_of(line), None
        if correction is not None:
            corrects = correction_of(correction, of=request.id)
            request = replace(request, id=correction_id(corrects.of, corrects.number))
        decision = Decision(
            request=request,
            terms=_entry_terms(line["terms"], line["enrollment"]),
            reason=Reason(line["reason"]),
            free_tokens=_number(line, "free_tokens"),
            used=_number(line, "used"),
            total=_number(line, "total"),
            window=None if start is None else Window(instant("window_start", start), instant("window_end", end)),
            seq=_number(line, "seq"),
            durability=Durability(line["durability"]),
            hold=None if hold is None else hold_of(hold),
            correction=corrects,
        )
        place = _number(line, "entry")
        if place is None:
            raise LedgerError("entry: found null; expected a whole number")
        shard = _number(line, "shard") if "shard" in line else 0
        return Entry(place, instant("decided_at", line["decided_at"]), decision, shard or 0, _link(line.get("link")))
    except KeyError as error:
        raise LedgerError(f"{error.args[0]}: missing; expected a line as `gratis ledger` prints it") from None
    except (RequestError, EnrollmentError, ValueError, TypeError) as error:
        raise LedgerError(str(error)) from None


def hold_line(hold: Held) -> dict[str, Any]:
    """What a decision says of the hold that it ended."""
    return {"tokens_max": hold.tokens_max, "unmeasured": hold.is_unmeasured, **_window_line(hold.window)}


def hold_of(line: object) -> Held:
    """The same from its JSON."""
    if type(line) is not dict:
        raise LedgerError(f"hold: found {shown(line)}; expected a JSON object")
    tokens_max, is_unmeasured = _number(line, "tokens_max"), line["unmeasured"]
    if tokens_max is None or type(is_unmeasured) is not bool:
        raise LedgerError(f"hold: found {shown(line)}; expected what `gratis ledger` prints there")
    return Held(tokens_max, _window_of(line), is_unmeasured)


def holding_line(hold: Hold) -> dict[str, Any]:
    """A hold as its line: what it sets aside, until when, and whether it fits."""
    terms = hold.terms
    return {
        "id": hold.id,
        "account": hold.account,
        "project": hold.request.project,
        "model": hold.request.model,
        "at": stamp(hold.at),
        "kind": hold.request.kind,
        "tools": list(hold.request.tools),
        "tokens_max": hold.tokens_max,
        "amount": hold.amount,
        "fits": hold.fits,
        "short": hold.short,
        "reason": hold.reason,
        "group": hold.group,
        "allowance": terms.allowance if hold.used is not None else None,
        "used": hold.used,
        "held": hold.held,
        **_window_line(hold.window),
        "until": stamp(hold.until),
        "on_expiry": hold.expiry,
        "offer": terms.offer,
        "revision": terms.revision,
    }


def kept_line(hold: Hold) -> dict[str, Any]:
    """A hold as stores keep it: its line, and the terms on which it rests."""
    enrollment = hold.terms.enrollment
    return {
        **holding_line(hold),
        "terms": terms_line(hold.terms),
        "enrollment": None if enrollment is None else enrollment_line(enrollment),
    }


def kept_of(line: Mapping[str, Any]) -> Hold:
    """A hold from what is kept of it."""
    return Hold(
        request=Request(
            id=line["id"],
            model=line["model"],
            at=instant("at", line["at"]),
            input_tokens=line["tokens_max"],
            output_tokens=0,
            account=line["account"],
            project=line["project"],
            kind=kind_of(line["kind"]),
            tools=tuple(line["tools"]),
        ),
        terms=terms_of(line["terms"], enrollment=line["enrollment"]),
        tokens_max=line["tokens_max"],
        amount=line["amount"],
        reason=Reason(line["reason"]),
        used=_number(line, "used"),
        held=_number(line, "held"),
        window=_window_of(line),
        until=instant("until", line["until"]),
        expiry=Expiry(line["on_expiry"]),
    )


def correction_line(correction: Correction) -> dict[str, Any]:
    """What a correction says of itself; what it corrects is its line's id."""
    return {
        "number": correction.number,
        "remedy": correction.remedy,
        "returned": correction.returned,
        **_window_line(correction.window),
        "actor": correction.actor,
        "why": correction.why,
    }


def correction_of(line: object, *, of: str) -> Correction:
    """The same from its JSON."""
    if type(line) is not dict:
        raise LedgerError(f"correction: found {shown(line)}; expected a JSON object")
    number, returned = _number(line, "number"), _number(line, "returned")
    if not number or returned is None:
        raise LedgerError(f"correction: found {shown(line)}; expected what `gratis ledger` prints there")
    for field in ("actor", "why"):
        if line[field] is not None:
            check_name(field, line[field])
    return Correction(of, number, Remedy(line["remedy"]), returned, _window_of(line), line["actor"], line["why"])


def _window_line(window: Window | None) -> dict[str, Any]:
    start, end = (None, None) if window is None else (stamp(window.start), stamp(window.end))
    return {"window_start": start, "window_end": end}


def _window_of(line: Mapping[str, Any]) -> Window | None:
    start, end = line["window_start"], line["window_end"]
    return None if start is None else Window(instant("window_start", start), instant("window_end", end))


def enrollment_line(enrollment: Enrollment) -> dict[str, Any]:
    """An enrollment as JSON."""
    return {
        "tier": enrollment.tier,
        "sharing": enrollment.sharing,
        "projects": sorted(enrollment.projects),
        "plan": enrollment.plan,
        "zero_data_retention": enrollment.zero_data_retention,
        "starts": None if enrollment.starts is None else stamp(enrollment.starts),
        "ends": None if enrollment.ends is None else stamp(enrollment.ends),
        "owners": sorted(enrollment.owners),
    }


def enrollment_of(line: object) -> Enrollment:
    """An enrollment from its JSON."""
    if type(line) is not dict:
        raise EnrollmentError(f"enrollment: found {shown(line)}; expected a JSON object")
    if unknown := line.keys() - set(Enrollment.__struct_fields__):
        raise EnrollmentError(
            f"{_named(min(unknown))}: an unknown field; expected {', '.join(Enrollment.__struct_fields__)}"
        )
    if "tier" not in line:
        raise EnrollmentError("tier: missing; expected the account's usage tier")
    starts, ends = line.get("starts"), line.get("ends")
    return Enrollment(
        tier=line["tier"],
        sharing=line.get("sharing", "disabled"),
        projects=line.get("projects", ()),
        plan=line.get("plan", "standard"),
        zero_data_retention=line.get("zero_data_retention", False),
        starts=None if starts is None else instant("starts", starts),
        ends=None if ends is None else instant("ends", ends),
        owners=line.get("owners", ()),
    )


def change_line(offer: str, account: str, change: Change) -> dict[str, Any]:
    """A change of an enrollment as its line."""
    return {
        "offer": offer,
        "account": account,
        "version": change.version,
        "at": stamp(change.at),
        "actor": change.actor,
        "enrollment": enrollment_line(change.enrollment),
    }


def change_of(line: object) -> tuple[str, str, Change]:
    """Offer, account and change from the object of a line."""
    if type(line) is not dict:
        raise EnrollmentError(f"found {type(line).__name__}; expected a JSON object")
    try:
        version, offer, account, actor = line["version"], line["offer"], line["account"], line["actor"]
        if type(version) is not int or version < 1:
            raise EnrollmentError(f"version: found {shown(version)}; expected a whole number from 1 on")
        for field in ("offer", "account", "actor"):
            check_name(field, line[field])
        return offer, account, Change(version, instant("at", line["at"]), actor, enrollment_of(line["enrollment"]))
    except KeyError as error:
        raise EnrollmentError(f"{error.args[0]}: missing; expected a line as `gratis enroll` prints it") from None
    except RequestError as error:
        raise EnrollmentError(str(error)) from None


def terms_line(terms: Terms) -> dict[str, Any]:
    """Terms as JSON, without the enrollment, which has a place of its own."""
    return {
        "offer": terms.offer,
        "revision": terms.revision,
        "reason": terms.reason,
        "group": terms.group,
        "unit": terms.unit,
        "allowance": terms.allowance,
        "counts": terms.counts,
        "overage": terms.overage,
        "window": terms.window,
    }


def terms_of(line: object, *, enrollment: Mapping[str, Any] | None) -> Terms:
    """Terms from their JSON."""
    if type(line) is not dict:
        raise LedgerError(f"terms: found {shown(line)}; expected a JSON object")
    for field, kinds in _TERMS_TYPES.items():
        if not isinstance(line[field], kinds) or line[field] is True or line[field] is False:
            raise LedgerError(f"terms.{field}: found {shown(line[field])}; expected what `gratis ledger` prints there")
    reason = line["reason"]
    return Terms(
        line["offer"],
        line["revision"],
        None if reason is None else Reason(reason),
        None if enrollment is None else enrollment_of(enrollment),
        line["group"],
        Unit(line["unit"]),
        line["allowance"],
        Counts(line["counts"]),
        Overage(line["overage"]),
        line["window"],
    )


def _entry_terms(terms: object, enrollment: Mapping[str, Any] | None) -> Terms:
    text = encode((terms, enrollment))
    return _terms_of_text(text) if len(text) <= TERMS_BYTES_MAX else terms_of(terms, enrollment=enrollment)


@lru_cache(maxsize=TERMS_CACHED_MAX)
def _terms_of_text(text: bytes) -> Terms:
    """Terms and enrollment from their JSON: thousands of entries say the same."""
    terms, enrollment = decode(text)
    return terms_of(terms, enrollment=enrollment)


def _tool_kinds(tools: object) -> tuple[str, ...]:
    """Tools as kinds, or as the objects that requests carry: their type is the kind."""
    if type(tools) is not list:
        raise RequestError("tools", f"found {shown(tools)}; expected a list of kinds of tool")
    kinds: list[Any] = [tool.get("type") if type(tool) is dict else tool for tool in tools]
    return tuple(kinds)


def _named(name: str) -> str:
    """A field's name, safe on a terminal."""
    return name if name.isidentifier() else shown(name)


def _number(line: Mapping[str, Any], field: str) -> int | None:
    value = line[field]
    if value is not None and (type(value) is not int or not 0 <= value <= NUMBER_MAX):
        raise LedgerError(f"{field}: found {shown(value)}; expected a whole number below 2^63, or null")
    return value


def _link(value: object) -> str | None:
    if value is not None and (type(value) is not str or _LINK.fullmatch(value) is None):
        raise LedgerError(f"link: found {shown(value)}; expected 24 hexadecimal digits")
    return value


def _check_spelling(line: Mapping[str, object]) -> None:
    """Refuse a field that is one of ours but for case, hyphens, underscores or a plural: it would be missed."""
    for name in line:
        if name in _KNOWN:
            continue
        bare = name.casefold().replace("_", "").replace("-", "")
        meant = _loose.get(bare) or _loose.get(bare + "s") or _loose.get(bare.removesuffix("s"))
        if meant is not None:
            raise RequestError(name, f"an unknown field; expected {meant!r}, spelled so")
        meant = _providers.get(bare)
        if meant is not None and meant not in line:
            raise RequestError(name, f"the provider's word, which is not read; expected {meant!r}")


_NULL = type(None)
_TERMS_TYPES: dict[str, tuple[type, ...]] = {
    "offer": (str,),
    "revision": (str, _NULL),
    "reason": (str, _NULL),
    "group": (str, _NULL),
    "unit": (str,),
    "allowance": (int,),
    "counts": (str,),
    "overage": (str,),
    "window": (str,),
}
_KNOWN = frozenset(REQUEST_FIELDS) | frozenset(DECISION_FIELDS) | frozenset(ENTRY_FIELDS)
