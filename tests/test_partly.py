"""A call of which a part was written before the rest could not be says so."""

import pytest

from gratis import Meter, NotExecuted, OutcomeUnknown, Request
from gratis.lines import instant

REQUESTS = [
    Request(id=f"r{number}", model="m", at=instant("at", "2025-04-20T12:00:00Z"), input_tokens=1, output_tokens=1)
    for number in range(4)
]


@pytest.mark.parametrize(("good", "error"), [(0, NotExecuted), (1, OutcomeUnknown)])
def test_what_was_written_in_part_is_never_called_not_executed(monkeypatch, good, error):
    """Where the first call of several fails nothing was written; where a later one does, something was."""
    monkeypatch.setattr("gratis.flows.BATCH_MAX", 2)
    meter = Meter.open("memory:", bounds=None)
    apply, calls = meter._store.apply, []

    def failing(charges):
        calls.append(charges)
        if len(calls) > good:
            raise NotExecuted("no write lock")
        return apply(charges)

    monkeypatch.setattr(meter._store, "apply", failing)
    with pytest.raises(error):
        meter.decide_many(REQUESTS)
    assert len(list(meter.ledger())) == 2 * good
