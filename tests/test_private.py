"""Nothing private is kept."""

import json

from gratis.cli import main
from gratis.lines import REQUEST_FIELDS
from gratis.model import Request

SECRET = "the-secret-text-of-a-prompt"  # noqa: S105 - what must not be found


def test_a_request_has_no_place_for_content():
    """A request is ids, names, counts and a time."""
    assert sorted(Request.__struct_fields__) == sorted(REQUEST_FIELDS)


def test_content_beside_a_request_is_not_kept(tmp_path, capfdbinary):
    """What else a line carries is in no file, line or message."""
    line = {
        "id": "r1",
        "model": "gpt-4.1-2025-04-14",
        "input_tokens": 1,
        "output_tokens": 1,
        "at": "2025-05-01T00:00:00Z",
        "prompt": SECRET,
        "messages": [{"content": SECRET}],
        "api_key": SECRET,
    }
    bad = {**line, "id": "r2", "input_tokens": -1}
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps(line) + "\n" + json.dumps(bad) + "\n")
    store = f"sqlite:///{tmp_path}/store.db"
    assert main(["decide", str(log), "--store", store, "--tier", "3", "--no-bounds"]) == 2
    assert main(["ledger", "--store", store]) == 0
    printed = b"".join(capfdbinary.readouterr())
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path != log)
    assert b"r1" in printed
    assert b"r1" in kept
    assert SECRET.encode() not in printed + kept
