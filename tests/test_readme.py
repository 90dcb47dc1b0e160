"""README is run: every command, every block of Python, every table that must agree with the program."""

import contextlib
import io
import itertools
import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
from openai import OpenAI

from gratis import Meter, Reason
from gratis.cli.arguments import parser
from gratis.offer_file import _GroupTable, _RevisionTable

from .provider import KEY, Provider
from .servers import Server

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
SCREEN_LINES = 24


def sessions():
    """Each command of README's console blocks with what it prints."""
    for language, block in BLOCKS:
        if language == "console":
            for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                lines = part.splitlines()
                size = lines.index("END") + 1 if "<<'END'" in lines[0] else 1
                yield "\n".join(lines[:size]), "\n".join(lines[size:])


def matches(printed, expected):
    """Whether text is as README prints it; … stands for anything."""
    pattern = ".*".join(re.escape(part) for part in expected.split("…"))
    return re.fullmatch(pattern, printed, flags=re.DOTALL) is not None


@pytest.fixture
def server():
    """The server that README finds on its own port is a private one here."""
    with Server() as started:
        yield started


def test_console_sessions_print_what_readme_prints(tmp_path, server):
    """Each command, run in order in one folder, prints what stands below it."""
    path = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
    ran = 0
    for command, expected in sessions():
        if command.startswith("python3 -m venv"):
            continue  # test_packaging runs the one, CI is the other
        done = subprocess.run(
            ["bash", "-c", command.replace("redis://localhost:6379", server.url)],
            cwd=tmp_path,
            env={"PATH": path, "LANG": "C.UTF-8"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            check=False,
        )
        printed = "\n".join(line.rstrip() for line in done.stdout.splitlines())
        assert matches(printed, expected), f"$ {command}\n{printed}\n--- README says:\n{expected}"
        ran += 1
    assert ran >= 10


@pytest.fixture
def provider(monkeypatch):
    """The provider that README's clients call is one of our own, on loopback."""
    with Provider(model="gpt-5-2025-08-07") as started:
        monkeypatch.setenv("OPENAI_BASE_URL", started.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield started


@pytest.mark.usefixtures("provider")
def test_python_blocks_print_what_readme_prints(tmp_path, monkeypatch):
    """The blocks of Python, run in order, print what the blocks after them say."""
    monkeypatch.chdir(tmp_path)
    made, init = [], OpenAI.__init__

    def noted(client, *args, **named):
        made.append(client)
        init(client, *args, **named)

    monkeypatch.setattr(OpenAI, "__init__", noted)
    namespace = {}
    ran = 0
    for (language, block), (after, expected) in itertools.pairwise(BLOCKS):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, "README.md", "exec"), namespace)  # noqa: S102 - README is ours
        assert after == "text"
        assert matches(printed.getvalue(), expected), f"{block}\n--- prints:\n{printed.getvalue()}"
        ran += 1
    assert ran == 7
    for client in made:  # README's program ends here, the tests go on
        client.close()
    assert len(made) >= README.count("OpenAI()")


@pytest.mark.parametrize("command", [command for command, _ in sessions() if command.startswith("python3 -m venv")])
def test_the_two_commands_are_one_line_each(command):
    """Each begins with a virtual environment of its own and ends in the demo or the tests."""
    assert "\n" not in command
    assert command.endswith(("gratis demo", "pytest"))


def test_ci_runs_exactly_the_test_line():
    """The line that CI runs is README's, to the letter."""
    line = next(command for command, _ in sessions() if command.endswith("pytest"))
    assert line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_code_comes_within_a_screen():
    """At most one screen of text stands before the first code."""
    assert README[: README.index("```")].count("\n") <= SCREEN_LINES


def test_the_table_of_reasons_is_complete():
    """Each reason stands in the table, once."""
    table = README[README.index("| reason | when |") :].split("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == sorted(Reason)


def test_the_table_of_commands_is_complete():
    """Each command stands in the table, once."""
    rows = re.findall(r"^\| `gratis (\w+)", README, flags=re.MULTILINE)
    (commands,) = parser()._subparsers._group_actions
    assert sorted(rows) == sorted(commands.choices)


def test_the_table_of_verbs_is_complete():
    """Each verb of a meter is mentioned."""
    verbs = {name for name in vars(Meter) if not name.startswith("_")} - {
        "open",
        "close",
        "offer",
        "durability",
        "shards",
    }
    assert {verb for verb in verbs if f"`{verb}`" not in README} == set()


def test_keys_of_offer_files_are_documented():
    """Each key that an offer file may have is named."""
    keys = {
        field.alias or name for table in (_RevisionTable, _GroupTable) for name, field in table.model_fields.items()
    }
    assert {key for key in keys if f"`{key}`" not in README and f"`{key} = " not in README} == set()


def test_links_lead_somewhere():
    """Each relative link names a file or folder."""
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if not link.startswith("https:") and not (ROOT / link).exists()] == []
