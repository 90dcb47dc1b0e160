"""Who takes part: which enrollment is in force, what it makes eligible, and who may change it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from gratis.errors import EnrollmentError, RequestError
from gratis.model import Change, Enrollment, Sharing, check_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from gratis.offer import Revision


def in_force(history: Sequence[Change], at: datetime) -> Change | None:
    """The change that was acknowledged last, as of an instant of the past."""
    for made in reversed(history):
        if made.at <= at:
            return made
    return None


def takes_part(enrollment: Enrollment | None, at: datetime) -> bool:
    """Whether the account is enrolled for a request of this time."""
    return (
        enrollment is not None
        and (enrollment.starts is None or enrollment.starts <= at)
        and (enrollment.ends is None or at < enrollment.ends)
    )


def is_eligible(revision: Revision, enrollment: Enrollment) -> bool:
    """Whether the offer is open to an account of this tier, plan and retention."""
    return (
        any(enrollment.tier in group.allowances for group in revision.groups)
        and enrollment.plan not in revision.excluded_plans
        and not (revision.excludes_zero_data_retention and enrollment.zero_data_retention)
    )


def shares(enrollment: Enrollment, project: str | None) -> bool:
    """Whether traffic of this project is shared with the provider."""
    match enrollment.sharing:
        case Sharing.DISABLED:
            return False
        case Sharing.ENABLED:
            return True
        case Sharing.SELECTED:
            return project is not None and project in enrollment.projects


def check_owner(history: Sequence[Change], actor: str, what: str) -> frozenset[str]:
    """The owners of an account, of whom the actor is one."""
    _named(actor)
    if not history:
        raise EnrollmentError(f"actor: this account is not enrolled, so nobody owns it; only an owner {what}")
    owners = history[-1].enrollment.owners
    if actor not in owners:
        raise EnrollmentError(
            f"actor: {actor!r} is no owner of this account; only an owner {what}: {', '.join(sorted(owners))}"
        )
    return owners


def _named(actor: str) -> frozenset[str]:
    try:
        check_name("actor", actor)
    except RequestError as error:
        raise EnrollmentError(str(error)) from None
    return frozenset({actor})


def change(
    history: Sequence[Change], enrollment: Enrollment, *, actor: str, at: datetime, revision: Revision | None
) -> Change:
    """The next change of an account's enrollment, if this actor may make it and the offer allows it."""
    owners = check_owner(history, actor, "changes its enrollment") if history else _named(actor)
    if revision is not None and enrollment.sharing is not Sharing.DISABLED:
        if enrollment.plan in revision.excluded_plans:
            raise EnrollmentError(f"sharing: an account on the {enrollment.plan!r} plan cannot enable it")
        if revision.excludes_zero_data_retention and enrollment.zero_data_retention:
            raise EnrollmentError("sharing: an account with zero data retention cannot enable it")
    version = history[-1].version + 1 if history else 1
    return Change(version, at, actor, enrollment if enrollment.owners else replace(enrollment, owners=owners))
