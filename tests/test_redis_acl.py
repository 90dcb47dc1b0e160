"""The rights that README lists are enough, and none of them is too many."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from gratis import Enrollment, Meter, Request, Sharing, StoreError, Usage
from gratis.model import Durability
from gratis.stores.urls import open_store

from .servers import Cluster, Server

if TYPE_CHECKING:
    from collections.abc import Iterator

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
(LINE,) = re.findall(r"^ACL SETUSER (.*)$", README, flags=re.MULTILINE)
RIGHTS = [word for word in LINE.split() if word.startswith("+")]
OF_CLUSTERS = {"+cluster|slots", "+asking"}
TOLD_BY_DURABILITY = {"+config|get"}
PASSWORD = "known to the test alone"  # noqa: S105 - it is the test's own
NOW = datetime(2025, 4, 20, 12, tzinfo=UTC)
MODEL = "gpt-4.1-2025-04-14"
NUMBERS = count()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A private server that syncs each write."""
    with Server(options={"appendonly": "yes", "appendfsync": "always"}) as started:
        yield started


def grant(server: Server, rights: list[str]) -> None:
    """Give the user of README's line these rights, on a server."""
    words = [word for word in LINE.replace("PASSWORD", PASSWORD.replace(" ", "_")).split() if not word.startswith("+")]
    server.ask("ACL", "SETUSER", words[0], "reset", *words[1:], *rights)


def use_it_all(url: str, scripts: Server) -> Durability:
    """All that a store is used for, from its making to its trimming."""
    namespace = f"gratis:{next(NUMBERS)}"
    user = f"username=gratis&password={PASSWORD.replace(' ', '_')}&wait=0.2"
    mark = "&" if "?" in url else "?"
    where = f"{url}{mark}namespace={namespace}&{user}"
    now = NOW
    with Meter.open(where, clock=lambda: now) as meter:
        meter.enroll("acme", Enrollment(tier=3, sharing=Sharing.ENABLED), actor="ann")
        scripts.ask("SCRIPT", "FLUSH")
        for number in range(3):
            meter.decide(Request(id=f"{number}", model=MODEL, at=NOW, input_tokens=1, output_tokens=1, account="acme"))
        meter.decide(Request(id="0", model=MODEL, at=NOW, input_tokens=1, output_tokens=1, account="acme"))
        assert [standing.used for standing in meter.standing("acme")] == [6, 0]
        holds = [meter.hold(Request(id=f"h{number}", model=MODEL, at=NOW, account="acme"), 5) for number in range(3)]
        meter.settle(holds[0], Usage(input_tokens=1, output_tokens=1))
        assert meter.release(meter.extend(holds[1])) is None
        meter.void("0", actor="ann", why="counted twice", account="acme")
        assert meter._store.claim("openai-data-sharing", "acme", "a threshold", until=NOW, token=uuid4().hex)
        now = NOW + timedelta(hours=1)
        assert [decision.id for decision in meter.expire("acme")] == ["h2"]
        assert [(standing.used, standing.held) for standing in meter.standing("acme")] == [(11, 0), (0, 0)]
        assert len(list(meter.ledger())) == 6
        assert meter.accounts() == ["acme"]
        now = NOW + timedelta(days=9)
    store = open_store(where, clock=lambda: now)
    try:
        store.trim(tuple(6 if store.counters("openai-data-sharing", "acme")[0] == shard else 0
                         for shard in range(store.shards)))  # fmt: skip
        assert list(store.entries()) == []
        return store.durability
    finally:
        store.close()


def test_the_rights_are_enough(server: Server) -> None:
    """With all of them, a store can be made, used, read and trimmed."""
    grant(server, [right for right in RIGHTS if right not in OF_CLUSTERS])
    assert use_it_all(server.url, server) is Durability.SYNCED


@pytest.mark.parametrize("right", [right for right in RIGHTS if right not in OF_CLUSTERS | TOLD_BY_DURABILITY])
def test_each_right_is_needed(server: Server, right: str) -> None:
    """Without one of them, something is refused; the message names no password."""
    grant(server, [other for other in RIGHTS if other not in OF_CLUSTERS | {right}])
    with pytest.raises(StoreError) as refused:
        use_it_all(server.url, server)
    assert "known_to_the_test" not in str(refused.value)
    assert right[1:].upper() in str(refused.value).upper()


def test_without_the_setting_an_answer_claims_less(server: Server) -> None:
    """Who may not read how often the server syncs does not claim that it always does."""
    grant(server, [other for other in RIGHTS if other not in OF_CLUSTERS | TOLD_BY_DURABILITY])
    assert use_it_all(server.url, server) is Durability.JOURNALED


def test_in_a_cluster_two_more_are_enough() -> None:
    """With them the slots are found."""
    with Cluster() as cluster:
        for node in cluster.nodes:
            grant(node, RIGHTS)
        use_it_all(cluster.url, cluster.nodes[0])
        for node in cluster.nodes:
            grant(node, [right for right in RIGHTS if right != "+cluster|slots"])
        with pytest.raises(StoreError, match="slots"):
            use_it_all(cluster.url, cluster.nodes[0])
