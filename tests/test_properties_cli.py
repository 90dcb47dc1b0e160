"""`gratis audit --properties`: what it prints and writes, and that nothing of the user's is touched."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from gratis import Enrollment, Meter, Request, Sharing
from gratis.audit.properties import check
from gratis.audit.properties.driving import Failure
from gratis.audit.properties.expected import Expected
from gratis.audit.properties.histories import History
from gratis.audit.properties.namespaces import PREFIX, File, Server as ServerSpaces, new_space, spaces_of
from gratis.audit.properties.written import write
from gratis.cli import main, properties
from gratis.model import Change
from gratis.offers import load
from gratis.stores import Bounds
from gratis.stores.urls import open_store
from gratis.testing.scene import HOUR, NOON

from . import broken_stores
from .broken_stores import kinds_of_spaces
from .servers import Cluster, Sentinels, Server, until

if TYPE_CHECKING:
    from collections.abc import Iterator

OFFER = load("openai-data-sharing")
ENROLLED = Enrollment(tier=3, sharing=Sharing.ENABLED)
MODEL = "gpt-4o-2024-08-06"
# Faults that show in a decision which a replay can judge; the others are of clocks, holds, ledgers and counters.
JUDGED = ("OffByOne", "DedupLost", "CounterSurvives", "LocalMidnight", "BilledCounts", "SeenLate")
SEEDS = (3, 8)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A private server."""
    with Server(tcp=True) as server:
        yield server


class Broken:
    """Spaces of a broken store."""

    def __init__(self, name: str) -> None:
        self.open = kinds_of_spaces(getattr(broken_stores, name))

    def drop(self, space: str) -> None:
        """They go with the test."""


def fill(url: str) -> None:
    """A store of the user's, with something in it; its last requests are of today, so they stay."""
    with Meter.open(url, bounds=None, clock=lambda: NOON) as meter:
        meter.enroll("acme", ENROLLED, actor="ann")
        for number in range(40):
            meter.decide(
                Request(id=f"r{number}", account="acme", model=MODEL, at=NOON, input_tokens=9, output_tokens=0)
            )


def dump(server: Server) -> dict[bytes, tuple[bytes, int]]:
    """Every key of every database of a server: its value as the server dumps it, and when it runs out."""
    found = {}
    for db in (0, 1):
        client = server.client(db=db)
        for key in client.scan_iter():
            found[b"%d %b" % (db, key)] = client.dump(key), client.execute_command("PEXPIRETIME", key)
        client.close()
    return found


def others(server: Server) -> None:
    """Keys of nobody's store, some of which run out, some of which look like a run's."""
    client = server.client()
    client.set("other", "value", px=3_600_000)
    client.set(f"{PREFIX}0123456789abcdef", "not ours")
    client.hset("{gratis-properties-}:0:state", mapping={"n": "1"})
    client.rpush("list", "a", "b")
    client.close()


# -- nothing of the user's is touched


@pytest.mark.parametrize("db", ["", "?db=1"])
def test_a_server_is_left_as_it_was(server, db):
    """After a run every key, value and time to live of the server is what it was before."""
    fill(f"{server.url}{db}")
    others(server)
    before = dump(server)
    spaces = spaces_of(f"{server.url}{db}")
    assert check(spaces.open, drop=spaces.drop, seed=1, steps=400).failure is None
    assert dump(server) == before


def test_a_server_is_left_as_it_was_by_a_failure(server):
    """So it is when a history fails and is shrunk, and when a store gives up in the middle."""
    fill(server.url)
    before = dump(server)
    spaces, count = spaces_of(server.url), 0

    class Wrong:
        def __init__(self, store):
            self.store = store

        def __getattr__(self, name):
            return getattr(self.store, name)

        def apply(self, charges, *, dry=False):
            return self.store.apply(charges, dry=dry)[::-1]

    report = check(lambda *a, **n: Wrong(spaces.open(*a, **n)), drop=spaces.drop, seed=1, steps=400, shrinking_s=5)
    assert report.failure is not None
    assert dump(server) == before

    class Interrupted(Wrong):
        def apply(self, charges, *, dry=False):
            nonlocal count
            count += 1
            if count == 100:
                raise KeyboardInterrupt
            return self.store.apply(charges, dry=dry)

    with pytest.raises(KeyboardInterrupt):
        check(lambda *a, **n: Interrupted(spaces.open(*a, **n)), drop=spaces.drop, seed=1, steps=400)
    assert dump(server) == before


def test_a_cluster_is_left_as_it_was():
    """On no master of a cluster anything is added, changed or left."""
    with Cluster() as cluster:
        fill(cluster.url)
        before = [dump_one(master) for master in cluster.masters]
        spaces = spaces_of(f"{cluster.url}?namespace=gratis&shards=4")
        assert check(spaces.open, drop=spaces.drop, seed=2, steps=300).failure is None
        assert [dump_one(master) for master in cluster.masters] == before


def dump_one(server: Server) -> dict[bytes, bytes]:
    """Every key of one master."""
    client = server.client()
    found = {key: client.dump(key) for key in client.scan_iter()}
    client.close()
    return found


def test_behind_sentinels_nothing_is_left():
    """A URL that names a master by its sentinels works as well."""
    with Sentinels() as sentinels:
        hosts = ",".join(f"{host}:{port}" for host, port in sentinels.url_hosts)
        spaces = spaces_of(f"redis+sentinel://{hosts}/{sentinels.service}")
        assert check(spaces.open, drop=spaces.drop, seed=1, steps=100).failure is None


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("end", ["fine", "fails", "interrupted"])
def test_a_file_is_left_as_it_was(tmp_path, end):
    """After a run, however it ends, the user's file has the same bytes, and no other file is there."""
    url = f"sqlite:///{tmp_path}/my%20store.db?synchronous=off"
    fill(url)
    before = bytes_of(tmp_path)
    spaces = spaces_of(url)
    seen: list[int] = []

    def tell(_steps: int) -> None:
        seen.append(len(bytes_of(tmp_path)))
        if end == "interrupted" and len(seen) == 3:
            raise KeyboardInterrupt

    def open_store(*names, **options):
        store = spaces.open(*names, **options)
        assert len(bytes_of(tmp_path)) > 1
        if end == "fails":
            store.accounts = lambda: [("openai-data-sharing", "nobody")]
        return store

    if end == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            check(open_store, drop=spaces.drop, seed=1, steps=300, tell=tell)
    else:
        report = check(open_store, drop=spaces.drop, seed=1, steps=300, tell=tell, shrinking_s=1)
        assert (report.failure is not None) == (end == "fails")
    assert bytes_of(tmp_path) == before
    assert set(seen) == {1}


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_removes_the_namespace_first(server, signal_):
    """Interrupted or terminated in the middle of a history, the program removes its namespace, and only that."""
    fill(server.url)
    before = dump(server)
    words = ["audit", "--properties", "--store", server.url, "--minutes", "2", "--seed", "1"]
    program = subprocess.Popen([sys.executable, "-m", "gratis", *words], stderr=subprocess.PIPE)
    client = server.client()
    try:
        until(lambda: any(client.scan_iter(f"{{{PREFIX}[0-9a-f]*")), "a namespace is used")
        program.send_signal(signal_)
        assert program.wait(60) == 130
    finally:
        program.kill()
        program.communicate()
        client.close()
    assert dump(server) == before


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_does_not_keep_a_namespace_and_is_not_lost(signal_):
    """What comes while a namespace is removed is heard once it is gone; afterwards signals are what they were."""
    dropped = []

    def drop(space: str) -> None:
        signal.raise_signal(signal_)
        dropped.append(space)

    usual = signal.getsignal(signal_)
    with pytest.raises(KeyboardInterrupt):
        properties._uninterrupted(drop)("space")
    assert dropped == ["space"]
    assert signal.getsignal(signal_) is usual
    properties._uninterrupted(dropped.append)("another")
    assert dropped == ["space", "another"]


def test_spaces_stand_beside_what_they_belong_to(tmp_path):
    """A space's URL is the user's but for the namespace, or the file's name in the same folder."""
    server = ServerSpaces("rediss://u:p%40@h:1/2?namespace=mine&timeout=3&namespace=x")
    assert server._url("s") == "rediss://u:p%40@h:1/2?timeout=3&namespace=s"
    assert ServerSpaces("unix:///run/socket")._url("s") == "unix:///run/socket?namespace=s"
    assert File("sqlite:////a/b/c.db?wait=1")._url("s") == "sqlite:////a/b/s.db?wait=1"
    assert File("sqlite:///c.db")._url("s") == "sqlite:///s.db"
    assert new_space().startswith(PREFIX)
    assert new_space() != new_space()


# -- what is printed and written


def run(*words: object, code: int = 0, capfdbinary) -> tuple[str, str]:
    """A command's two outputs."""
    assert main([str(word) for word in words]) == code
    out, err = capfdbinary.readouterr()
    return out.decode(), err.decode()


@pytest.fixture
def audit(capfdbinary, tmp_path, monkeypatch):
    """Runs the command in a folder of its own, over a broken store if one is named."""
    monkeypatch.chdir(tmp_path)

    def ask(*words, code=0, broken=None):
        if broken is not None:
            monkeypatch.setattr(properties, "spaces_of", lambda _url: Broken(broken))
        return run("audit", "--properties", "--store", "memory:", *words, code=code, capfdbinary=capfdbinary)

    return ask


def test_a_sound_store_is_exit_code_0(audit):
    """The seed is told at the start; what was asked and answered is counted."""
    out, err = audit("--seed", 7, "--steps", 500, "--format", "json")
    told = json.loads(out)
    assert (told["seed"], told["steps"], told["failure"]) == (7, 500, None)
    assert told["counts"]["within_allowance"] > 50
    assert err == "gratis: seed 7, at most 500 steps\n"


def test_without_bounds_a_run_takes_a_minute_at_most(audit):
    """By default it is a few thousand steps, and a minute, of a seed that is told."""
    out, err = audit("--format", "json")
    told = json.loads(out)
    assert err == f"gratis: seed {told['seed']}, at most 4,000 steps or 1 min\n"
    assert told["steps"] == 4_000


def test_people_read_a_table(audit):
    """With --format table the counts are lines for people."""
    out, _ = audit("--seed", 7, "--steps", 500, "--format", "table")
    assert out.startswith("as the rule says: 500 steps in ")
    assert "within_allowance" in out


def test_a_failure_is_exit_code_1_and_told(audit):
    """What was asked, found and expected is printed, with the seed and the command that judges it."""
    out, _ = audit("--seed", 3, "--format", "table", code=1, broken="OffByOne")
    head, *rest = out.splitlines()
    assert head == "not as the rule says: decision, request 'r1' of account 'a'"
    assert "  verdict: found billed; the rule gives free" in rest
    assert any(re.fullmatch("   [0-9]  2.*Z  decide r1 of a: .*, 10?,000,000 tokens", line) for line in rest)
    file = "gratis-properties-3.jsonl"
    judged = f"gratis replay {file} --enrollments {file}.enrollments.jsonl --offer openai-data-sharing"
    assert f"judged by the rule: {judged}" in rest
    assert rest[-1].startswith("again: gratis audit --properties --seed 3 --steps ")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", JUDGED)
def test_the_file_is_judged_by_a_replay(audit, capfdbinary, tmp_path, name, seed):
    """The command that is printed runs, and gives the decision that was expected of the store."""
    out, _ = audit("--seed", seed, "--format", "json", "--out", tmp_path / "it.jsonl", code=1, broken=name)
    failure = json.loads(out)["failure"]
    assert failure["replay_agrees"] is True
    program, *words = shlex.split(failure["replay"])
    assert program == "gratis"
    code = main([*words, "--format", "json"])
    answers, errors = capfdbinary.readouterr()
    last = [json.loads(line) for line in (tmp_path / "it.jsonl").read_text(encoding="utf-8").splitlines()][-1]
    assert last["expected"] == failure["expected"]
    assert last["found"] == failure["found"]
    found = json.loads(answers.splitlines()[-1])
    assert (code, errors) == (0, b"")
    assert found == {key: value for key, value in failure["expected"].items() if key in found}
    assert failure["found"] != failure["expected"]


def test_changes_are_written_with_times_that_part_requests(tmp_path):
    """A late request that was decided under the first enrollment is judged under it by the replay as well."""
    made = [
        Change(number, NOON + number * HOUR, "ann", replace(ENROLLED, tier=tier)) for number, tier in ((1, 3), (2, 1))
    ]
    early, late, last = (
        Request(id=name, account="a", model=MODEL, at=at, input_tokens=tokens, output_tokens=0)
        for name, at, tokens in (("r1", NOON, 5), ("r2", NOON, 999_995), ("r3", NOON + HOUR, 1))
    )
    rule = Expected(OFFER, Bounds())
    rule.enroll("a", ENROLLED, actor="ann", now=NOON + HOUR)
    for request in (early, late, early):
        rule.decide(request, NOON + HOUR)
    rule.enroll("a", replace(ENROLLED, tier=1), actor="ann", now=NOON + 2 * HOUR)
    expected = rule.decide(last, NOON + 2 * HOUR)
    failure = Failure(
        what="decision",
        where="",
        found=None,
        expected=expected,
        step=0,
        request=last,
        asked=(early, late, early, last),
        changes=tuple(("a", one) for one in made),
        versions={("a", "r1"): 1, ("a", "r2"): 1, ("a", "r3"): 2},
    )
    written = write(failure, History(()), OFFER, tmp_path / "it", offer_name=OFFER.name)
    lines = written.enrollments.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["at"] for line in lines] == ["2025-04-20T12:00:00Z", "2025-04-20T13:00:00Z"]
    assert expected.terms.allowance == 250_000
    assert written.count == 3


def test_a_conflict_is_judged_by_a_replay(audit, capfdbinary):
    """Where a conflict was expected, the replay tells it."""
    out, _ = audit("--seed", 3, "--format", "json", code=1, broken="ChangedTokensAccepted")
    failure = json.loads(out)["failure"]
    assert failure["expected"]["conflict"] in {"input_tokens", "output_tokens", "cached_tokens"}
    assert main([*shlex.split(failure["replay"])[1:], "--format", "json"]) == 2
    assert b"was decided before with" in capfdbinary.readouterr().err


def test_a_difference_that_no_replay_shows_is_said_to_be_one(audit):
    """Holds, counters and clocks are none of a replay's: that is said, and the steps are in the report."""
    out, _ = audit("--seed", 3, "--format", "table", code=1, broken="HoldsIgnored")
    why = "(a replay goes by the requests' own times and has no holds or counters: it does not show this difference)"
    assert why in out
    out, _ = audit("--seed", 3, "--format", "json", code=1)
    failure = json.loads(out)["failure"]
    assert failure["replay_agrees"] is False
    assert [step["do"] for step in failure["history"]][-2:] == ["hold", "hold"]


def test_callers_at_once_are_told(audit, capfdbinary):
    """A race is printed with who asked what, and written in the order of the ledger; a replay judges each request."""
    out, _ = audit("--seed", 3, "--format", "json", code=1, broken="CheckThenAct")
    failure = json.loads(out)["failure"]
    assert main([*shlex.split(failure["replay"])[1:], "--format", "json"]) == 0
    answers = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert len(answers) == len(Path(failure["file"]).read_text(encoding="utf-8").splitlines())
    out, _ = audit("--seed", 3, "--format", "table", code=1)
    assert len(set(re.findall("at once, caller [0-9]", out))) > 1


def test_an_offer_may_be_given(audit):
    """Histories are those of the offer that is named."""
    out, _ = audit("--seed", 1, "--steps", 300, "--offer", "gemini-free", "--format", "json")
    assert json.loads(out)["failure"] is None
    out, _ = audit("--seed", 1, "--offer", "gemini-free", "--format", "json", code=1, broken="DedupLost")
    assert shlex.split(json.loads(out)["failure"]["replay"])[-2:] == ["--offer", "gemini-free"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["audit", "--properties", "ledger.jsonl"], "found FILE and --properties"),
        (["audit", "--properties", "--store", "memory:", "--out", "no/such/folder"], "--out: no/such/folder"),
        (["audit", "--properties", "--html", "page"], "found --html and --properties"),
        (["audit", "--seed", "1"], "found --seed; expected it with --properties"),
        (["audit", "--properties", "--store", "memory:", "--steps", "0"], "--steps: found 0"),
        (["audit", "--properties", "--store", "memory:", "--minutes", "-1"], "--minutes: found -1.0"),
        (["audit", "--properties", "--store", "memory:", "--minutes", "nan"], "--minutes: found nan"),
        (["audit", "--properties", "--store", "nothing://x"], "unknown kind"),
        (["audit", "--properties", "--store", "sqlite://x"], "expected sqlite:///FILE"),
        (["audit", "--properties", "--store", "sqlite:////nowhere/at/all/x.db"], "/nowhere/at/all"),
        (["audit", "--properties", "--store", "unix:///nowhere/socket?wait=0.2", "--steps", "5"], "/nowhere/socket"),
        (["audit", "--properties", "--store", "memory:", "--offer", "no-such-offer"], "no-such-offer"),
    ],
)
def test_bad_use_is_exit_code_2(words, why, capfdbinary, tmp_path, monkeypatch):
    """What cannot be done is told in one line, with what was expected, and nothing is left."""
    monkeypatch.chdir(tmp_path)
    _, err = run(*words, code=2, capfdbinary=capfdbinary)
    assert why in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_secret_is_never_shown(capfdbinary, tmp_path, monkeypatch):
    """Neither the seed's line nor an error repeats a URL's password."""
    monkeypatch.chdir(tmp_path)
    url = "redis://user:not-to-be-shown@127.0.0.1:1?wait=0.2"
    out, err = run("audit", "--properties", "--store", url, code=2, capfdbinary=capfdbinary)
    assert "not-to-be-shown" not in out + err


def test_a_namespace_that_cannot_be_removed_is_named(server):
    """Should the server go away, what is left is named, so that it can be removed by hand."""
    spaces = spaces_of(f"unix:///nowhere/socket?wait=0.2&namespace={server.port}")
    with pytest.raises(Exception, match="namespace 'gratis-properties-x' was not removed"):
        spaces.drop("gratis-properties-x")


def test_the_store_of_a_space_is_the_users_kind(server):
    """A space of a server has the server's own durability, as the user's store has."""
    spaces, space = spaces_of(server.url), new_space()
    store = spaces.open(space, clock=lambda: NOON, bounds=None)
    mine = open_store(server.url)
    assert (store.durability, store.shards) == (mine.durability, mine.shards)
    store.close()
    mine.close()
    spaces.drop(space)
    assert load("openai-data-sharing") is not None
