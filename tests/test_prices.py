"""The table of prices is data, read strictly, and what it adds up is exact."""

from datetime import UTC, date, datetime
from decimal import Decimal

import pytest
from hypothesis import given, strategies as st

from gratis.errors import PricesError
from gratis.offers import load, shipped
from gratis.prices import Price, cost, load_prices, parse_prices, shipped_prices, total

AT = datetime(2026, 8, 1, tzinfo=UTC)
GOOD = """
name = "mine"
currency = "usd"
as_of = 2026-01-01
source = "a page"

[[prices]]
models = ["a", "b"]
from = 2025-01-01
until = 2025-06-01
seen_on = 2025-02-01
source = "a page"
input = 2.50
cached_input = 0.25
cache_write = 3.125
output = 10

[[prices]]
models = ["a"]
from = 2025-06-01
seen_on = 2025-07-01
source = "a page"
input = 1e-3
output = 0
"""


def test_every_listed_model_has_a_price():
    """Each model of the shipped offer has a price at some time; the table is no offer."""
    prices = load_prices()
    listed = {
        model for each in load("openai-data-sharing").revisions for group in each.groups for model in group.models
    }
    assert listed - {row.model for row in prices.rows} == set()
    assert (prices.name, prices.currency) == ("openai", "usd")
    assert shipped_prices() == ["openai"]
    assert "openai" not in shipped()


def test_every_row_has_its_source_and_date():
    """No price is without the place and the day where it was seen."""
    for row in load_prices().rows:
        assert len(row.source) > 10
        assert date(2025, 1, 1) <= row.seen_on <= load_prices().as_of
        assert row.price.cached_input <= row.price.input <= row.price.output
        assert row.price.cache_write is None or row.price.cache_write == row.price.input * Decimal("1.25")


@pytest.mark.parametrize(
    ("model", "at", "price"),
    [
        ("gpt-5.6-luna", "2026-07-29", ("1.00", "0.10", "6.00")),
        ("gpt-5.6-luna", "2026-07-30", ("0.20", "0.02", "1.20")),
        ("gpt-5.6-sol", "2026-08-20", ("5.00", "0.50", "30.00")),
        ("gpt-5.6-sol", "2026-08-21", ("4.00", "0.40", "20.00")),
        ("gpt-5.6-sol", "2026-11-22", None),
        ("gpt-4o-2024-05-13", "2025-01-01", ("5.00", "5.00", "15.00")),
        ("gpt-4.1-2025-04-14", "2026-08-01", ("2.00", "0.50", "8.00")),
        ("gpt-4.1", "2026-08-01", None),
        ("gpt-4.1-2025-04-14 ", "2026-08-01", None),
        ("GPT-4.1-2025-04-14", "2026-08-01", None),
    ],
)
def test_a_price_is_of_an_exact_model_and_a_date(model, at, price):
    """No prefix and no case is guessed; a model that is not there has no price, which is not 0."""
    found = load_prices().price(model, datetime.fromisoformat(at).replace(tzinfo=UTC))
    assert (found and (found.input, found.cached_input, found.output)) == (price and tuple(map(Decimal, price)))


def test_the_digits_are_those_of_the_file():
    """Prices are read from the text, not through a float."""
    prices = parse_prices(GOOD, file="f.toml")
    assert str(prices.rows[0].price.input) == "2.50"
    assert prices.price("a", datetime(2025, 6, 1, tzinfo=UTC)) == Price(Decimal("0.001"), Decimal("0.001"), Decimal(0))
    assert prices.price("b", datetime(2025, 6, 1, tzinfo=UTC)) is None
    assert prices.price("b", datetime(2025, 5, 31, 23, 59, tzinfo=UTC)).cache_write == Decimal("3.125")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("input = 2.50", "input = -1", "f.toml:13: prices[1].input: '-1'; expected a number from 0"),
        ("input = 2.50", "input = nan", "prices[1].input"),
        ("input = 2.50", "input = inf", "prices[1].input"),
        ("input = 2.50", 'input = "2.50"', "prices[1].input"),
        ("input = 2.50", "input = true", "prices[1].input"),
        ("input = 2.50", "input = 0.0000000000001", "digits after the point"),
        ("input = 2.50", "input = 1e30", "prices[1].input"),
        ("input = 2.50", "input = 1e9999999999999999999", "a number beyond any size"),
        ("output = 10", "", "output is missing"),
        ("output = 10", "output = 10\noutputs = 3", "prices[1].outputs: an unknown key"),
        ('name = "mine"', 'name = "mine"\nnames = "x"', "names: an unknown key"),
        ('currency = "usd"', "", "currency is missing"),
        ("as_of = 2026-01-01", 'as_of = "2026-01-01"', "as_of"),
        ("as_of = 2026-01-01", "as_of = 2026-01-01T00:00:00Z", "as_of"),
        ("until = 2025-06-01", "until = 2025-01-01", "until: 2025-01-01 is not after from 2025-01-01"),
        ("until = 2025-06-01", "until = 2025-06-02", "'a' has a price then already"),
        ('models = ["a", "b"]', 'models = ["b", "b"]', "'b' has a price then already"),
        ('models = ["a", "b"]', "models = []", "at least one model id"),
        ('models = ["a", "b"]', "models = [1]", "prices[1].models[1]"),
        ('source = "a page"', 'source = ""', "source"),
        ("[[prices]]", "[prices]", "expected"),
        ("currency", "currency currency", "TOML"),
    ],
)
def test_a_wrong_table_is_refused(old, new, message):
    """What is unknown, missing, doubled or no number is an error with its file and key."""
    with pytest.raises(PricesError) as error:
        parse_prices(GOOD.replace(old, new, 1), file="f.toml")
    assert message in str(error.value)
    assert str(error.value).startswith("f.toml")


def test_a_table_that_is_not_there(tmp_path):
    """A name that is none, and a file that is no text, are errors that say so."""
    with pytest.raises(PricesError, match="no such table"):
        load_prices("nobody")
    path = tmp_path / "own.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(PricesError, match="UTF-8"):
        load_prices(path)
    path.write_text(GOOD)
    assert load_prices(str(path)).name == "mine"


MONEY = st.decimals(0, 1_000, places=6)


@given(MONEY, MONEY, MONEY, st.integers(0, 10**12), st.integers(0, 10**12), st.integers(0, 10**12))
def test_a_cost_is_exact(  # noqa: PLR0917 - Hypothesis gives them by place
    given_price, cached_price, made_price, plain, cached, made
):
    """What tokens cost is the sum of the products, to the last digit."""
    price = Price(given_price, cached_price, made_price)
    found = cost(price, input_tokens=plain + cached, cached_tokens=cached, output_tokens=made)
    millionths = [int(one * 1_000_000) for one in (given_price, cached_price, made_price)]
    wanted = plain * millionths[0] + cached * millionths[1] + made * millionths[2]
    assert found.as_integer_ratio()[0] * 10**12 == wanted * found.as_integer_ratio()[1]


def test_input_that_is_written_to_the_cache_has_its_own_price():
    """It is a part of the input, and costs what other input does where there is no such price."""
    tokens = {"input_tokens": 100, "cached_tokens": 20, "cache_write_tokens": 30, "output_tokens": 1}
    price = Price(Decimal(2), Decimal(1), Decimal(3))
    assert cost(price, **tokens) * 1_000_000 == 80 * 2 + 20 * 1 + 3
    price = Price(Decimal(2), Decimal(1), Decimal(3), Decimal("2.5"))
    assert cost(price, **tokens) * 1_000_000 == 50 * 2 + 30 * Decimal("2.5") + 20 * 1 + 3


def test_sums_have_all_their_digits():
    """Amounts with 17 decimals beside large ones add up without rounding."""
    assert total([Decimal("999999999999.1"), Decimal("0.00000000000000001")]) == Decimal(
        "999999999999.10000000000000001"
    )
