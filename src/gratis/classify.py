"""Whether an allowance covers a request at all; else, why not.

Each exclusion is one row of the table `EXCLUDES`; which of them apply, and in which order they win, is the
revision's data. Two are not in the table because they have only one possible place: `offer_not_in_force` comes
before all (there is no revision to ask), and `too_late` after all (only a store knows what it still keeps).
Model ids are compared as they are: no prefix, suffix or case is guessed, and no name is cleaned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec import Struct

from gratis.enrollment import is_eligible, shares, takes_part
from gratis.model import AT_MAX, Kind, Reason, Sharing, Terms, Unit, Window
from gratis.offer import Group, Revision  # noqa: TC001 - fields of a struct
from gratis.rule import Charge
from gratis.window import Rolling, calendar_window, clip, rolling_window

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from gratis.model import Enrollment, Request
    from gratis.offer import Offer
    from gratis.rule import Step

_TOKENS = Unit.TOKENS


class Case(Struct, frozen=True, gc=False):
    """How requests alike in all but size and time are judged, as long as their time lies within `span`.

    `window` is the calendar window of that span; None where windows roll, or no group covers the request.
    """

    terms: Terms
    group: Group | None
    span: Window
    window: Window | None
    revision: Revision | None


def charge_for(offer: Offer, request: Request, enrollment: Enrollment | None, *, version: int = 0) -> Charge:
    """The charge of a request: under which terms, for how much, in which window."""
    return charge_in(case_of(offer, request, enrollment), request, version)


def charge_in(case: Case, request: Request, version: int, step: Step | None = None) -> Charge:
    """The charge of a request that is such a case."""
    group = case.group
    if group is None:
        return Charge(request, case.terms, version, 0, None, False, step)  # noqa: FBT003 - by place: the hot path
    taken = amount(group, request)
    if case.window is not None:
        return Charge(request, case.terms, version, taken, case.window, False, step)  # noqa: FBT003 - as above
    assert case.revision is not None, "a group is a revision's"
    return Charge(request, case.terms, version, taken, window_at(case.revision, request.at), True, step)  # noqa: FBT003 - as above


def case_of(offer: Offer, request: Request, enrollment: Enrollment | None) -> Case:
    """How a request is judged, and for how long one like it is judged alike."""
    at = request.at
    revision = offer.at(at)
    if revision is None:
        terms = Terms(offer.name, None, Reason.OFFER_NOT_IN_FORCE, enrollment)
        return Case(terms, None, Window(at, at), None, None)
    terms, group = terms_for(offer, revision, request, enrollment)
    span = Window(revision.starts, revision.ends or AT_MAX)
    if enrollment is not None:
        for edge in (enrollment.starts, enrollment.ends):
            if edge is not None:
                span = clip(span, after=edge, before=None) if edge <= at else clip(span, after=None, before=edge)
    if group is None or isinstance(revision.window, Rolling):
        return Case(terms, group, span, None, revision)
    window = window_at(revision, at)
    return Case(terms, group, clip(span, after=window.start, before=window.end), window, revision)


def terms_for(
    offer: Offer, revision: Revision, request: Request, enrollment: Enrollment | None
) -> tuple[Terms, Group | None]:
    """What the decision rests on, and the group that covers the request, if any does."""
    reason = exclusion(revision, request, enrollment)
    if reason is not None:
        return Terms(offer.name, revision.name, reason, enrollment), None
    group = revision.group_of(request.model, request.kind)
    assert group is not None, "every revision excludes unlisted models"
    assert enrollment is not None, "every revision excludes accounts that take no part"
    terms = Terms(
        offer.name,
        revision.name,
        None,
        enrollment,
        group.name,
        group.unit,
        group.allowances[enrollment.tier],
        revision.counts,
        revision.overage,
        str(revision.window),
    )
    return terms, group


def exclusion(revision: Revision, request: Request, enrollment: Enrollment | None) -> Reason | None:
    """The first reason, in the revision's order, for which no allowance covers the request."""
    for reason in revision.reasons:
        if EXCLUDES[reason](revision, request, enrollment):
            return reason
    return None


def amount(group: Group, request: Request) -> int:
    """What the request would take of its group's allowance."""
    if group.unit is not _TOKENS:
        return 1
    tokens = request.tokens
    assert tokens is not None, "a group that counts tokens excludes the unmeasured"
    return tokens if group.counts_cached_input else tokens - request.cached_tokens


def window_at(revision: Revision, at: datetime) -> Window:
    """The window in which an instant falls, or the one that it would open."""
    if isinstance(revision.window, Rolling):
        window = rolling_window(revision.window, at)
    else:
        window = calendar_window(revision.window, at)
    return clip(window, after=revision.after, before=revision.before)


def _not_enrolled(_revision: Revision, request: Request, enrollment: Enrollment | None) -> bool:
    return not takes_part(enrollment, request.at)


def _account_not_eligible(revision: Revision, _request: Request, enrollment: Enrollment | None) -> bool:
    return enrollment is not None and not is_eligible(revision, enrollment)


def _sharing_disabled(_revision: Revision, _request: Request, enrollment: Enrollment | None) -> bool:
    return enrollment is not None and enrollment.sharing is Sharing.DISABLED


def _project_not_shared(_revision: Revision, request: Request, enrollment: Enrollment | None) -> bool:
    return enrollment is not None and not shares(enrollment, request.project)


def _fine_tuning_training(_revision: Revision, request: Request, _enrollment: Enrollment | None) -> bool:
    return request.kind is Kind.FINE_TUNING_TRAINING


def _evals(_revision: Revision, request: Request, _enrollment: Enrollment | None) -> bool:
    return request.kind is Kind.EVAL


def _fine_tuned_model(revision: Revision, request: Request, _enrollment: Enrollment | None) -> bool:
    return revision.fine_tuned_prefix is not None and request.model.startswith(revision.fine_tuned_prefix)


def _model_not_listed(revision: Revision, request: Request, _enrollment: Enrollment | None) -> bool:
    return revision.group_of(request.model, request.kind) is None


def _assistants_o_series(revision: Revision, request: Request, _enrollment: Enrollment | None) -> bool:
    return request.kind is Kind.ASSISTANTS and revision.listed_id(request.model) in revision.o_series


def _tool_use(revision: Revision, request: Request, _enrollment: Enrollment | None) -> bool:
    return any(tool not in revision.client_side_tools for tool in request.tools)


def _unmeasured(revision: Revision, request: Request, _enrollment: Enrollment | None) -> bool:
    group = revision.group_of(request.model, request.kind)
    return request.tokens is None and (group is None or group.unit is Unit.TOKENS)


EXCLUDES: Final[Mapping[Reason, Callable[[Revision, Request, Enrollment | None], bool]]] = {
    Reason.NOT_ENROLLED: _not_enrolled,
    Reason.ACCOUNT_NOT_ELIGIBLE: _account_not_eligible,
    Reason.SHARING_DISABLED: _sharing_disabled,
    Reason.PROJECT_NOT_SHARED: _project_not_shared,
    Reason.FINE_TUNING_TRAINING: _fine_tuning_training,
    Reason.EVALS: _evals,
    Reason.FINE_TUNED_MODEL: _fine_tuned_model,
    Reason.MODEL_NOT_LISTED: _model_not_listed,
    Reason.ASSISTANTS_O_SERIES: _assistants_o_series,
    Reason.TOOL_USE: _tool_use,
    Reason.UNMEASURED: _unmeasured,
}
