"""What a report tells, and in which words: what was kept of decisions and findings, as the parts of a page."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from gratis.audit.bars import Bar, Chart
from gratis.audit.kept import ACCOUNTS_MAX, REST, WORDS_MAX, Kept, step_of
from gratis.audit.markup import ROWS_MAX, Column, Table, day_name, percent, shown
from gratis.audit.page import Facts, Figure, Page, Part, Share, render
from gratis.prices import cost, total

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from gratis.audit.findings import Finding
    from gratis.audit.kept import Crossing, Place, Spent
    from gratis.audit.markup import Cell
    from gratis.model import Decision
    from gratis.prices import Price, Prices

WIDE = 40
CENT, FINE = Decimal("0.01"), Decimal("0.0001")


class Story:
    """Told request by request, in constant memory for each.

    `is_audit` says that findings were looked for, so that there being none is worth saying.
    """

    def __init__(self, title: str, prices: Prices | None = None, *, is_audit: bool = False) -> None:
        self._title = title
        self._is_audit = is_audit
        self._kept = Kept(prices)
        self._sections: list[Part] = []
        self._beside: list[Figure] = []

    def add(self, decision: Decision) -> None:
        """Tell of one decision."""
        self._kept.add(decision)

    def found(self, finding: Finding) -> None:
        """Tell of one finding."""
        self._is_audit = True
        self._kept.found(finding)

    def section(self, title: str, head: Sequence[str], rows: Sequence[Sequence[object]], note: str = "") -> None:
        """Tell of something else, as a table: numbers are int or Decimal, all else is text."""
        kept = [[_cell(value) for value in row] for row in rows[:ROWS_MAX]]
        columns = [
            Column(name[:1].upper() + name[1:], _kind([row[place] for row in kept])) for place, name in enumerate(head)
        ]
        omitted = len(rows) - len(kept)
        said = f"{omitted:,} more rows are left out here." if omitted else ""
        if not rows and not note:
            said = "Nothing to show."
        self._sections.append(Part(title, note, [Table("", columns, kept, omitted=said)]))

    def beside(self, *figures: Figure) -> None:
        """Numbers of somebody else, to be seen first: those of these decisions are then called decided."""
        self._beside.extend(figures)

    def money(self, amount: Decimal) -> str:
        """An amount in the currency of the prices, as this page writes it."""
        return self._money_text(amount)

    def html(self, made: datetime) -> str:
        """All of it as one page, made at this time."""
        return render(self.page(made))

    def page(self, made: datetime) -> Page:
        """All of it, as the values that the page shows."""
        parts = [self._days_part(), self._crossings_part(), self._findings_part(), self._money_part()]
        if self._beside:
            parts = [part and replace(part, title=f"{part.title}, as decided by Gratis") for part in parts]
        parts += [*self._sections, self._assumptions()]
        return Page(
            title=self._title,
            lede=self._lede(),
            figures=self._figures(),
            shares=self._shares(),
            parts=[part for part in parts if part is not None],
            made=f"Made {made:%Y-%m-%d %H:%M} UTC with Gratis {version('gratis')}."
            " This page loads nothing and sends nothing.",
        )

    def close(self) -> None:
        """Give back what the ids took."""
        self._kept.close()

    def _requests(self) -> int:
        return sum(spent.requests for spent in self._kept.models.values())

    def _sums(self) -> tuple[int, int, int]:
        """Tokens: free, billed though a group covers them, and not covered."""
        spent = self._kept.models.values()
        return sum(one.free for one in spent), sum(one.billed for one in spent), sum(one.uncovered for one in spent)

    def _lede(self) -> str:
        if self._kept.first is None or self._kept.last is None:
            return "There is no request to tell of."
        first, last = self._kept.first.date(), self._kept.last.date()
        span = day_name(first) if first == last else f"{day_name(first)} to {day_name(last)}"
        accounts = _many(len(self._kept.accounts), "account")
        if len(self._kept.accounts) > ACCOUNTS_MAX:
            accounts = f"more than {ACCOUNTS_MAX:,} accounts"
        return f"{span} (UTC) · {_many(self._requests(), 'request')} of {accounts} · {self._said('offer')}"

    def _said(self, what: str) -> str:
        """The words of one kind, in the order in which they came."""
        words = list(self._kept.words.get(what, ()))
        return ", ".join([*words[:WORDS_MAX], *(["and more"] if len(words) > WORDS_MAX else [])])

    def _figures(self) -> list[Figure]:
        free, billed, uncovered = self._sums()
        whole = free + billed + uncovered
        figures = [
            Figure("Free tokens", shown(free), f"{percent(free, whole)} of all" if whole else ""),
            Figure("Billed beyond the allowance", shown(billed), f"{_many(self._kept.crossed, 'request')} did not fit"),
            Figure("Not covered", shown(uncovered), f"{_many(self._uncovered(), 'request')}"),
        ]
        if self._kept.prices is not None:
            said = f"prices of {self._kept.prices.as_of}"
            figures.append(Figure("Saved, at list price", self._sum_text("free"), said))
        if self._is_audit:
            count = self._kept.kinds.total()
            said = "none" if count == 0 else shown(count)
            note = "every decision follows from the rule" if count == 0 else _many(len(self._kept.kinds), "kind")
            figures.insert(0, Figure("Findings", said, note, "bad" if count else "good"))
        if self._beside:
            ours = [replace(one, name=f"Decided: {one.name[:1].lower()}{one.name[1:]}") for one in figures]
            figures = [*self._beside, *ours]
        return figures

    def _uncovered(self) -> int:
        return sum(requests for requests, _ in self._kept.reasons.values())

    def _shares(self) -> list[Share]:
        names = [("free", "Free"), ("billed", "Billed beyond the allowance"), ("none", "Not covered")]
        if self._beside:
            names = [(kind, f"Decided: {name[:1].lower()}{name[1:]}") for kind, name in names]
        return [Share(kind, name, amount) for (kind, name), amount in zip(names, self._sums(), strict=True)]

    def _days_part(self) -> Part | None:
        found = [(place, self._bars(place)) for place in sorted(self._kept.days, key=_by_place)]
        charts = [self._chart(place, bars) for place, bars in found if bars]
        days = [bar.day for chart in charts if chart.step == "day" for bar in (chart.bars[0], chart.bars[-1])]
        items: list[Chart | Table | Facts] = [replace(chart, span=(min(days), max(days))) for chart in charts if days]
        items = items or [*charts]
        reasons = [(reason, sums[0], sums[1]) for reason, sums in sorted(self._kept.reasons.items()) if sums[0]]
        if reasons:
            columns = [Column("Reason"), Column("Requests", "n"), Column("Tokens", "n")]
            rows: list[list[Cell]] = [[_words(reason), requests, tokens] for reason, requests, tokens in reasons]
            items.append(Table("Why they are not covered", columns, rows))
        legend = [
            ("free", "free"),
            ("billed", "billed: did not fit"),
            ("none", "not covered by any allowance"),
            ("line", "allowance"),
        ]
        return Part("Day by day", "", items, legend) if items else None

    def _bars(self, place: Place | None) -> list[Bar]:
        bars = []
        for when, day in sorted(self._kept.days[place].items()):
            if day.requests:
                allowance = sum(day.allowances.values()) if 0 < len(day.allowances) < ACCOUNTS_MAX else None
                bars.append(Bar(when, day.free, day.billed, allowance, day.requests, day.free_requests))
        return bars

    def _chart(self, place: Place | None, bars: Sequence[Bar]) -> Chart:
        if place is None:
            said = "Requests that no group of the offer covers, or of accounts and projects that take no part."
            return Chart("Not covered by any allowance", said, "tokens", bars, is_covered=False)
        window, unit = self._kept.steps[place]
        step, zone = step_of(window)
        whole = sum(1 for bar in bars if bar.billed == 0)
        lines = {bar.allowance for bar in bars}
        allowance = next(iter(lines)) if len(lines) == 1 else None
        said = "All of it was free."
        if whole < len(bars):
            said = f"All of it was free on {whole:,} of {_many(len(bars), step)} with requests."
        if allowance is not None:
            said = f"Allowance: {allowance:,} {unit} a {step}. {said}"
        if len(self._kept.accounts) > 1:
            said += " The line is the allowance of all accounts that were seen that day."
        if zone not in {"UTC", ""}:
            said += f" A {step} is one of {zone}."
        if window.startswith("rolling"):
            said += " Its windows roll, so a day may see parts of two."
        name = f"Group {place[1]}"
        if len({offer for offer, _ in self._kept.steps}) > 1:
            name += f" of {place[0]}"
        return Chart(name, said, unit, bars, step)

    def _crossings_part(self) -> Part:
        title = "Requests that did not fit"
        if not self._kept.crossed:
            return Part(title, "None: every request that an allowance covers was free.", [])
        kept = sorted(self._kept.crossings, key=_by_time)
        omitted = self._kept.crossed - len(kept)
        many = _many(self._kept.crossed, "request")
        about = f"{many}, by time: what was left when each came, and what would have fitted."
        has_accounts = len(self._kept.accounts) > 1
        is_whole = all(each.billed == _size(each) for each in kept)
        columns = [
            *(Column("Request", "code"), *([Column("Account", "code")] if has_accounts else [])),
            *(Column("At (UTC)"), Column("Model", "code")),
            *(Column("Group"), Column("Size", "n"), Column("Used before", "n"), Column("Allowance", "n")),
            *(Column("Over by", "n"), Column("Would have fitted", "n")),
            *([] if is_whole else [Column("Billed tokens", "n")]),
        ]
        rows: list[list[Cell]] = []
        for each in kept:
            one = each.decision
            size = _size(each)
            when = f"{one.at:%Y-%m-%d %H:%M:%S}"
            who = [one.account] if has_accounts else []
            cells: list[Cell] = [one.id, *who, when, one.request.model, one.group or "", size]
            over = each.used + size - one.terms.allowance
            billed = [] if is_whole else [one.billed_tokens]
            rows.append([*cells, each.used, one.terms.allowance, over, each.fits, *billed])
        said = f"{_many(omitted, 'more request')} left out: of those shown most tokens were billed." if omitted else ""
        return Part(title, about, [Table("", columns, rows, omitted=said)])

    def _findings_part(self) -> Part | None:
        if not self._is_audit:
            return None
        count = self._kept.kinds.total()
        if not count:
            return Part("Findings", "None: every decision follows from the rule.", [])
        kinds: list[list[Cell]] = [[_words(kind), many] for kind, many in self._kept.kinds.most_common()]
        columns = [
            *(Column("Kind"), Column("Entry", "n"), Column("Account", "code"), Column("Request", "code")),
            *(Column("Field"), Column("Found", "w"), Column("Expected", "w")),
        ]
        rows: list[list[Cell]] = [
            [
                *(_words(one.kind), one.entry, one.account, one.id, one.field),
                *(_plain(one.found), _plain(one.expected)),
            ]
            for one in self._kept.findings
        ]
        omitted = count - len(rows)
        said = f"{_many(omitted, 'more finding')} left out: the first {len(rows):,} are shown." if omitted else ""
        listing = Table("One by one", columns, rows, omitted=said)
        about = f"{_many(count, 'finding')}: what the records say, and what the rule gives."
        return Part("Findings", about, [Table("By kind", [Column("Kind"), Column("Findings", "n")], kinds), listing])

    def _money_part(self) -> Part | None:
        """List prices by model: of what was free, saved; of the rest, spent."""
        prices = self._kept.prices
        if prices is None:
            return None
        columns = [
            *(Column("Model", "code"), Column("Requests", "n"), Column("Free tokens", "n"), Column("Saved", "n")),
            *(Column("Billed tokens", "n"), Column("At list price", "n"), Column("Not covered", "n")),
            Column("At list price", "n"),
        ]
        rows: list[list[Cell]] = []
        for model, spent in sorted(self._kept.models.items(), key=_by_free):
            if spent.requests:
                money = [self._priced(model, what) for what in ("free", "billed", "uncovered")]
                cells: list[Cell] = [model, spent.requests, spent.free, money[0], spent.billed, money[1]]
                rows.append([*cells, spent.uncovered, money[2]])
        said = [self._sum_text(what) for what in ("free", "billed", "uncovered")]
        free, billed, uncovered = self._sums()
        foot: list[Cell] = ["All", self._requests(), free, said[0], billed, said[1], uncovered, said[2]]
        about = (
            f"At the list prices of {prices.as_of} in {prices.currency.upper()} ({prices.source})."
            " Free tokens cost nothing: what they save is what they would have cost."
        )
        missing = sorted({model for model, price, _ in self._paid() if price is None})
        note = ""
        if missing:
            names = ", ".join(model or "(no name)" for model in missing[:WORDS_MAX])
            note = f"No price is known of {_many(len(missing), 'model')}, which no sum of money holds: {names}"
            note += "." if len(missing) <= WORDS_MAX else ", and more."
        return Part("Saved and spent", about, [Table("", columns, rows, foot, omitted=note)]) if rows else None

    def _paid(self) -> list[tuple[str, Price | None, str]]:
        """Of what there are tokens to be paid: not of what corrections took back."""
        return [key for key, parts in self._kept.money.items() if parts.input or parts.output]

    def _cost(self, model: str, what: str) -> Decimal:
        """What tokens of a model cost, as far as prices are known."""
        partly = self._kept.partly.get(model, Decimal(0))
        found = [{"free": partly, "billed": -partly}.get(what, Decimal(0))]
        for (name, price, kind), parts in self._kept.money.items():
            if name == model and kind == what and price is not None:
                tokens = (parts.input, parts.cached, parts.output)
                found.append(cost(price, **dict(zip(_PARTS, tokens, strict=True))))
        return total(found)

    def _priced(self, model: str, what: str) -> str:
        """The cost as a cell: no price is not a price of 0."""
        prices = [price for name, price, kind in self._paid() if (name, kind) == (model, what)]
        amount = self._cost(model, what)
        if prices and all(price is None for price in prices):
            return "no price"
        return self._money_text(amount) if prices or amount else ""

    def _sum_text(self, what: str) -> str:
        """The cost of all models together: at least so much, where the price of one is not known."""
        prices = [price for _, price, kind in self._paid() if kind == what]
        if prices and all(price is None for price in prices):
            return "no price"
        amount = self._money_text(total(self._cost(model, what) for model in self._kept.models))
        return f"\u2265 {amount}" if None in prices else amount

    def _money_text(self, amount: Decimal) -> str:
        assert self._kept.prices is not None, "there is money only with prices"
        currency = self._kept.prices.currency.upper()
        sign = "$" if currency == "USD" else f"{currency} "
        return _money(amount, sign)

    def _assumptions(self) -> Part:
        facts = [
            ("Reading", self._said("reading")),
            ("Windows", self._said("window")),
            ("Revisions", self._said("revision")),
            ("Enrollment", self._said("enrollment")),
            ("Days", "Times are in UTC. A request belongs to the day of its own time, not to that of its arrival."),
        ]
        counted = [
            (self._kept.unmeasured, "request", "without measured tokens: counted as requests, with no tokens"),
            (self._kept.repeats, "line", "asked for a request again: it is counted once"),
            (self._kept.corrected, "correction", "took the place of what was said before"),
            (
                self._kept.unknown,
                "correction",
                "is of a request that is not among these: what was said of it is not taken back",
            ),
        ]
        facts += [("Counted", f"{_many(count, what)}: {said}.") for count, what, said in counted if count]
        return Part("What this rests on", "", [Facts([(name, said) for name, said in facts if said])])


_PARTS = ("input_tokens", "cached_tokens", "output_tokens")


def _by_place(place: Place | None) -> tuple[bool, Place]:
    return place is None, place or REST


def _by_time(crossing: Crossing) -> tuple[datetime, int]:
    return crossing.decision.at, -crossing.number


def _size(crossing: Crossing) -> int:
    """What it would have taken, in the unit of its group."""
    return (crossing.decision.total or 0) - crossing.used


def _by_free(item: tuple[str, Spent]) -> tuple[int, int, str]:
    model, spent = item
    return -spent.free, -spent.billed - spent.uncovered, model


def _words(name: str) -> str:
    return str(name).replace("_", " ")


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _money(amount: Decimal, sign: str) -> str:
    """An amount as people write it; a small one is never said to be nothing."""
    size = abs(amount)
    minus = "\u2212" if amount < 0 else ""
    if 0 < size < FINE:
        return f"under {sign}{FINE}"
    step = CENT if size >= 1 or size == 0 else FINE
    return f"{minus}{sign}{size.quantize(step, ROUND_HALF_EVEN):,}"


def _cell(value: object) -> Cell:
    if value is None or (isinstance(value, str | int | Decimal) and not isinstance(value, bool)):
        return str(value) if isinstance(value, str) else value
    return _plain(value)


def _plain(value: Any) -> str:
    """What was found or expected, as text: a mapping field by field."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "nothing" if value is None else str(value)


def _kind(cells: Sequence[Cell]) -> str:
    """Numbers stand to the right; long text may break."""
    given = [cell for cell in cells if cell is not None]
    if given and all(isinstance(cell, int | Decimal) for cell in given):
        return "n"
    return "w" if any(len(str(cell)) > WIDE for cell in given) else ""
