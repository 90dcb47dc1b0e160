"""Gratis decides for every LLM request whether it is free or billed under a complimentary-token offer."""

from gratis.book import Explanation, Standing
from gratis.errors import (
    Conflict,
    EnrollmentError,
    GratisError,
    NotExecuted,
    OfferError,
    OutcomeUnknown,
    RequestError,
    StoreError,
)
from gratis.meter import AsyncMeter, Meter
from gratis.model import Decision, Enrollment, Entry, Hold, Reason, Request, Sharing, Usage, Verdict
from gratis.offer import Offer

__all__ = [
    "AsyncMeter",
    "Conflict",
    "Decision",
    "Enrollment",
    "EnrollmentError",
    "Entry",
    "Explanation",
    "GratisError",
    "Hold",
    "Meter",
    "NotExecuted",
    "Offer",
    "OfferError",
    "OutcomeUnknown",
    "Reason",
    "Request",
    "RequestError",
    "Sharing",
    "Standing",
    "StoreError",
    "Usage",
    "Verdict",
]
