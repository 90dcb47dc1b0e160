"""Why the free tokens differ: a chain of suppositions, each kept only if it brings the decisions nearer to the report.

A supposition says how some requests would have to be taken (not counted twice, on another day, of a model that is
listed, of a project that does not share), and all of them are judged anew by the rule. What that changes, cell by cell,
is what it explains. So the parts add up along the chain, and what is left at its end is unexplained.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import combinations
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from gratis.model import Enrollment, Kind, Reason, Sharing
from gratis.reconcile.cells import group_of
from gratis.reconcile.chain import Chain
from gratis.reconcile.findings import Cause
from gratis.reconcile.own import Others
from gratis.reconcile.rest import allowance, is_crowded, left_over
from gratis.reconcile.rows import day_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gratis.audit.readings import Reading
    from gratis.offer import Offer
    from gratis.reconcile.cells import Key, Table
    from gratis.reconcile.fit import Slot
    from gratis.reconcile.own import Amended, Own
    from gratis.reconcile.totals import Totals

SHORT_MAX: Final = 3
SHORT_OF_MAX: Final = 60
OF_ACCOUNT: Final = frozenset(
    {Reason.NOT_ENROLLED, Reason.SHARING_DISABLED, Reason.ACCOUNT_NOT_ELIGIBLE, Reason.OFFER_NOT_IN_FORCE}
)


def explain_free(table: Table, own: Own, offer: Offer, totals: Totals) -> Chain:
    """The chain of suppositions that brings the decisions nearest to the report."""
    chain = Chain(table, own, offer, totals)
    _by_the_rule(chain)
    chain.suppose(
        Cause.DUPLICATE,
        "a request that is there twice is counted once",
        totals.amended.get(Cause.DUPLICATE, {}),
        always=True,
    )
    chain.suppose(
        Cause.OTHER_NAME,
        "what was logged under another name of its model is judged by that of the report",
        totals.amended.get(Cause.OTHER_NAME, {}),
        always=True,
    )
    chain.suppose(
        Cause.LATE_ARRIVAL,
        "requests near midnight count on the day that the report says",
        totals.amended.get(Cause.LATE_ARRIVAL, {}),
        always=True,
    )
    _known(chain, _not_there(chain))
    if not chain.is_even:
        _nothing_there(chain)
    if not chain.is_even:
        _beside_others(chain)
        _with_tools(chain)
        _free_there(chain)
    chain.try_readings()
    if chain.is_even:
        return chain
    exact = next((reading for reading in chain.free if not any(chain.off(reading))), None)
    if exact is None:
        _billed_there(chain)
        chain.try_readings()
        exact = _better(chain)
    if exact is not None and exact != chain.used:
        chain.read_as(exact)
    if not chain.is_even:
        _for_a_part_of_the_day(chain)
        _single_requests(chain)
        chain.try_readings()
    if not chain.is_even:
        left_over(chain)
    return chain


def _by_the_rule(chain: Chain) -> None:
    """What the rule gives where something else was decided: a request came too late, or the ledger does not follow."""
    late: Counter[Key] = Counter()
    other: Counter[Key] = Counter()
    for place, (item, key) in enumerate(zip(chain.own.items, chain.keys, strict=True)):
        if key is not None and chain.current[place] != item.free:
            (late if item.reason is Reason.TOO_LATE else other)[key] += chain.current[place] - item.free
    if chain.gain(late) > 0:
        chain.account(Cause.LATE_ARRIVAL, "came too late to be decided by its size here, and free in the report", late)
    if chain.gain(other) > 0:
        chain.account(
            Cause.RULE_DIFFERS, "the rule itself gives what the report says: `gratis audit` tells more", other
        )


def _not_there(chain: Chain) -> frozenset[Key]:
    """Requests of ours that the provider does not have took none of its allowance, where it is told which they are.

    What comes back are the cells of which that accounts for all that is missing.
    """
    amended: Amended = {}
    told: set[Key] = set()
    for key, parts in chain.totals.parts.items():
        missing = -sum(part.tokens for part in parts if part.cause is Cause.MISSING_IN_REPORT)
        if missing > 0:
            places = sorted(chain.within(key), key=lambda place: chain.own.items[place].request.at, reverse=True)
            count = len(places) - chain.table.cells[key].requests
            found = _adding_up(places, [chain.own.items[place].tokens for place in places], count, missing)
            amended.update(dict.fromkeys(found))
            told.update([key] if found else [])
    why = "requests that are not in the report took none of the allowance there"
    is_kept = not chain.is_even and chain.suppose(Cause.MISSING_IN_REPORT, why, amended)
    return frozenset(told if is_kept else ())


def _adding_up(places: Sequence[int], sizes: Sequence[int], count: int, amount: int) -> Sequence[int]:
    """So many of these requests that have just so many tokens: the first ones, or else the first such few."""
    if count < 1 or count > len(places):
        return ()
    if sum(sizes[:count]) == amount:
        return places[:count]
    if count == 1:
        return next(([place] for place, size in zip(places, sizes, strict=True) if size == amount), ())
    if count > SHORT_MAX or len(places) > SHORT_OF_MAX:
        return ()
    numbers = combinations(range(len(places)), count)
    found = next((each for each in numbers if sum(sizes[number] for number in each) == amount), ())
    return [places[number] for number in found]


def _known(chain: Chain, told: frozenset[Key]) -> None:
    """What the sums told already: traffic that only one side has, and tokens of a tier that nobody knows."""
    for key, cell in chain.table.cells.items():
        is_listed = not chain.table.by_model or group_of(chain.offer, key) is not None
        for part in chain.totals.parts.get(key, ()):
            if chain.left[key] > 0 and is_listed and part.cause in {Cause.MISSING_IN_LEDGER, Cause.UNMEASURED}:
                chain.know(key, part.cause, min(chain.left[key], part.tokens), part.why)
            elif chain.left[key] < 0 and key not in told and part.cause is Cause.MISSING_IN_REPORT:
                chain.know(key, part.cause, max(chain.left[key], part.tokens), part.why)
        if chain.left[key] < 0 and cell.unknown:
            why = f"{cell.unknown:,} tokens of the report are in no tier that is known"
            chain.know(key, Cause.TIER_UNKNOWN, -min(-chain.left[key], cell.unknown), why)


def _nothing_there(chain: Chain) -> None:
    """A report in which nothing at all is free: the plain cause, before a reading or a tier fits by chance."""
    if not any(cell.free for cell in chain.table.cells.values()):
        why = "nothing at all is free in the report: sharing is off, not enrolled, or no balance"
        chain.suppose(Cause.ENROLLMENT_OR_BALANCE, why, {place: None for place, key in enumerate(chain.keys) if key})


def _beside_others(chain: Chain) -> None:
    """Traffic that was not decided here took its part of the allowance first."""
    others: dict[Slot, Others] = {}
    for key, slot in chain.places.items():
        tokens = sum(part.tokens for part in chain.totals.parts.get(key, ()) if part.cause is Cause.MISSING_IN_LEDGER)
        free = sum(part.tokens for part in chain.parts[key] if part.cause is Cause.MISSING_IN_LEDGER)
        if tokens > 0:
            before = others.get(slot, Others())
            others[slot] = Others(before.tokens + tokens, before.free + free)
    why = "traffic that was not decided here took part of the allowance"
    chain.suppose(Cause.MISSING_IN_LEDGER, why, {}, others=others)


def _with_tools(chain: Chain) -> None:
    """On days with calls of hosted tools, the requests that would explain a cell if they had made them."""
    for key in sorted(chain.left, key=str):
        calls = chain.calls(key)
        if calls:
            why = f"{calls:,} calls of hosted tools on this day, which exclude their requests"
            chain.suppose(Cause.HOSTED_TOOLS, why, dict.fromkeys(_exactly_short(chain, key)))


def _single_requests(chain: Chain) -> None:
    """Requests that were billed each by itself, though they would fit under the reading in use."""
    why = "billed though they would fit: enrollment, balance, tools or sharing"
    for key in sorted(chain.left, key=str):
        if not is_crowded(chain, key):
            chain.suppose(Cause.ENROLLMENT_OR_BALANCE, why, dict.fromkeys(_exactly_short(chain, key)))


def _exactly_short(chain: Chain, key: Key) -> Sequence[int]:
    """A few requests of a cell that have just the free tokens that the report has fewer, and are as many."""
    if chain.left[key] >= 0:
        return ()
    free = [place for place in chain.within(key) if chain.current[place]]
    count = len(free) - chain.table.cells[key].free_requests
    if count > SHORT_MAX or len(free) > SHORT_OF_MAX:
        return ()
    return _adding_up(free, [chain.current[place] for place in free], count, -chain.left[key])


def _better(chain: Chain) -> Reading | None:
    """A reading that is right on more days and groups than the one in use, and wrong on none where that is right."""
    base = chain.off(chain.used)
    found, most = None, base.count(0)
    for reading in chain.free:
        off = chain.off(reading)
        keeps = all(mine == 0 for mine, theirs in zip(off, base, strict=True) if theirs == 0)
        if keeps and off.count(0) > most:
            found, most = reading, off.count(0)
    return found


def _free_there(chain: Chain) -> None:
    """What is free in the report though it was excluded here."""
    excess = {key for key, left in chain.left.items() if left > 0 and chain.seen[key] > 0}
    for model in sorted({key[2] for key in excess if key[2] is not None and group_of(chain.offer, key) is None}):
        _listed_there(chain, model)
    by_reason: defaultdict[Reason, list[int]] = defaultdict(list)
    for key in sorted(excess, key=str):
        for place in chain.table.cells[key].places:
            by_reason[chain.own.items[place].reason].append(place)
    for place_reason, places in by_reason.items():
        _as_if_covered(chain, place_reason, places)


def _listed_there(chain: Chain, model: str) -> None:
    """A model that no list here has, and that is free in the report: it may be in any of the groups."""
    keys = [key for key in chain.left if key[2] == model and chain.seen[key] > 0]
    first = min(key[0] for key in keys)
    why = f"{model} is free in the report from {day_text(first)} on and on no list here: the offer's file is stale"
    places = [place for place, key in enumerate(chain.keys) if key is not None and key[2] == model and key[0] >= first]
    revision = chain.offer.at(first)
    best: tuple[int, Amended] = (0, {})
    for group in revision.groups if revision is not None and places else ():
        if not group.models:
            continue
        amended: Amended = {}
        for place in places:
            taken = chain.taken(place)
            amended[place] = None if taken is None else (replace(taken[0], model=min(group.models)), taken[1])
        best = max(best, (chain.would_gain(amended), amended), key=_first)
    chain.suppose(Cause.MODEL_NOT_LISTED, why, best[1])


def _as_if_covered(chain: Chain, reason: Reason, places: Iterable[int]) -> None:
    """Requests that were excluded for a reason, as if that had not been."""
    amended: Amended = {}
    cause, why = Cause.RULE_DIFFERS, f"decided as {reason}, and free in the report"
    for place in places:
        taken = chain.taken(place)
        if taken is None:
            continue
        request, enrollment = taken
        if reason is Reason.TOOL_USE:
            cause, why = (
                Cause.HOSTED_TOOLS,
                "decided as tool use, and free in the report: those tools do not exclude it",
            )
            amended[place] = replace(request, tools=()), enrollment
        elif reason is Reason.PROJECT_NOT_SHARED and enrollment is not None:
            cause, why = Cause.PROJECT_NOT_SHARING, "decided as not shared, and free in the report: the project shares"
            amended[place] = request, replace(enrollment, sharing=Sharing.ENABLED, projects=frozenset())
        elif reason in OF_ACCOUNT:
            cause, why = (
                Cause.ENROLLMENT_OR_BALANCE,
                f"decided as {reason}, and free in the report: it is enrolled there",
            )
            tier = 3 if enrollment is None or enrollment.tier == 0 else enrollment.tier
            amended[place] = request, Enrollment(tier=tier, sharing=Sharing.ENABLED)
        elif reason in {Reason.EVALS, Reason.ASSISTANTS_O_SERIES}:
            amended[place] = replace(request, kind=Kind.COMPLETION), enrollment
    chain.suppose(cause, why, amended)


def _of_day(key: Key) -> str | None:
    return day_text(key[0])


def _of_project(key: Key) -> str | None:
    return key[1]


def _of_project_and_day(key: Key) -> str | None:
    return None if key[1] is None else f"{day_text(key[0])} {key[1]}"


def _of_model(key: Key) -> str | None:
    return key[2]


SCOPES: Final = (
    (_of_day, Cause.ENROLLMENT_OR_BALANCE, "nothing was free on this day: enrollment, balance or sharing"),
    (_of_project, Cause.PROJECT_NOT_SHARING, "nothing of this project was free: it does not share"),
    (_of_project_and_day, Cause.PROJECT_NOT_SHARING, "nothing of this project was free on this day: it did not share"),
    (_of_model, Cause.MODEL_NOT_LISTED, "nothing of this model was free: the provider does not list it"),
)


def _billed_there(chain: Chain) -> None:
    """What is billed as a whole in the report, though it would have fit: days, projects, models."""
    for scope, cause, why in SCOPES:
        given = chain.given()
        keys: defaultdict[str, set[Key]] = defaultdict(set)
        for key in chain.places:
            name = scope(key)
            if name is not None:
                keys[name].add(key)
        for found in keys.values():
            lost = [key for key in found if given[key]]
            is_reported = any(chain.table.cells[key].tokens for key in lost)
            is_billed = is_reported and not any(chain.seen[key] for key in found)
            is_by_tools = scope is _of_project_and_day and any(chain.calls(key) for key in lost)
            if is_billed and not is_by_tools and _would_fit(chain, lost, given):
                chain.suppose(cause, why, {place: None for place, key in enumerate(chain.keys) if key in found})


def _would_fit(chain: Chain, keys: Iterable[Key], given: Mapping[Key, int]) -> bool:
    """Whether on some day and group what was lost would have fit beside all that was free there."""
    lost: Counter[Slot] = Counter()
    for key in keys:
        lost[chain.places[key]] += given[key]
    seen = chain.observed()
    return any(seen[slot] + tokens <= allowance(chain.offer, chain.own, slot) for slot, tokens in lost.items())


def _for_a_part_of_the_day(chain: Chain) -> None:
    """Days on which everything is free up to an instant, or from one on, and nothing else is."""
    for day in sorted({key[0] for key, left in chain.left.items() if left}):
        places = [place for place, key in enumerate(chain.keys) if key is not None and key[0] == day]
        places.sort(key=lambda place: chain.own.items[place].request.at)
        wanted = Counter({key: seen for key, seen in chain.seen.items() if key[0] == day and seen})
        for order, text in ((places, "nothing was free from here on"), (places[::-1], "nothing was free before")):
            cut = _cut(chain, order, wanted)
            if cut and cut < len(order):
                at = chain.own.items[order[cut if order is places else cut - 1]].request.at
                why = f"{text}: {at:%H:%M:%S} UTC; enrollment, balance or sharing"
                if chain.suppose(Cause.ENROLLMENT_OR_BALANCE, why, dict.fromkeys(order[cut:])):
                    break


def _cut(chain: Chain, order: Sequence[int], wanted: Counter[Key]) -> int | None:
    """After how many requests exactly what the report gives free has been given."""
    given: Counter[Key] = Counter()
    for number, place in enumerate(order):
        key, tokens = chain.keys[place], chain.current[place]
        if tokens and given == wanted:
            return number
        if tokens and key is not None:
            given[key] += tokens
    return None


def _first(pair: tuple[int, Amended]) -> int:
    return pair[0]
