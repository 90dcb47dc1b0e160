"""The shape of the code base: what would rot unless a test read it."""

import ast
import pydoc
import re
from importlib import import_module
from pathlib import Path

import pytest

import gratis

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "gratis"

# From the ground up. A module imports only what stands above it in this list, that is, below it in the house.
FLOORS = {
    "nouns": ["errors", "model", "lines", "chain", "toml_key", "clock"],
    "pure": ["window", "offer", "enrollment", "rule", "classify", "offer_file"],
    "stores": [
        "stores",
        "stores.memory",
        "stores.sqlite.file",
        "stores.sqlite.holds",
        "stores.sqlite.rows",
        "stores.sqlite.turn",
        "stores.sqlite.store",
        "stores.sqlite",
        "stores.gather",
        "stores.redis.wire",
        "stores.redis.layout",
        "stores.redis.holds",
        "stores.redis.servers",
        "stores.redis.calls",
        "stores.redis.asking",
        "stores.redis.holding",
        "stores.redis.reading",
        "stores.redis.mend",
        "stores.redis.trim",
        "stores.redis.core",
        "stores.redis.link",
        "stores.redis.store",
        "stores.redis.url",
        "stores.redis",
        "stores.urls",
    ],
    "meter": ["ledger", "offers", "prices", "thresholds", "book", "flows", "meter", ""],
    "proofs": [
        "audit",
        "audit.seen",
        "audit.replay",
        "audit.columns.compiled",
        "audit.columns.behind",
        "audit.columns.kernel",
        "audit.columns.answers",
        "audit.columns.texts",
        "audit.columns.cases",
        "audit.columns.reading",
        "audit.columns.repeats",
        "audit.columns.spool",
        "audit.columns.tables",
        "audit.columns.writing",
        "audit.columns.logs",
        "audit.columns",
        "audit.readings",
        "audit.findings",
        "audit.force",
        "audit.windows",
        "audit.judging",
        "audit.fold",
        "audit.beside",
        "audit.kept",
        "audit.markup",
        "audit.bars",
        "audit.page",
        "audit.story",
        "audit.properties.histories",
        "audit.properties.expected",
        "audit.properties.choosing",
        "audit.properties.together",
        "audit.properties.driving",
        "audit.properties.namespaces",
        "audit.properties.shrinking",
        "audit.properties.written",
        "audit.properties",
        "usage.fields",
        "usage.tools",
        "usage.shapes",
        "usage.requests",
        "usage.tally",
        "usage.streams",
        "usage.bound",
        "usage",
        "reconcile.rows",
        "reconcile.pages",
        "reconcile.exports",
        "reconcile.overlap",
        "reconcile.files",
        "reconcile.findings",
        "reconcile.own",
        "reconcile.cells",
        "reconcile.totals",
        "reconcile.fit",
        "reconcile.chain",
        "reconcile.rest",
        "reconcile.free",
        "reconcile.money",
        "reconcile.identities",
        "reconcile.compare",
        "reconcile.fetch",
        "reconcile",
    ],
    "edges": [
        "openai.calls",
        "openai.answers",
        "openai.client",
        "openai",
        "cli.screen",
        "cli.streams",
        "cli.report",
        "cli.sheets",
        "cli.decisions",
        "cli.replaying",
        "cli.reading",
        "cli.accounts",
        "cli.holding",
        "cli.demo",
        "cli.properties",
        "cli.ledgers",
        "cli.auditing",
        "cli.offering",
        "cli.reconciled",
        "cli.reconciling",
        "cli.arguments",
        "cli",
        "__main__",
        "testing.scene",
        "testing.compare",
        "testing.deciding",
        "testing.timing",
        "testing.repeating",
        "testing.enrolling",
        "testing.keeping",
        "testing.together",
        "testing.holding",
        "testing.expiring",
        "testing.correcting",
        "testing.racing",
        "testing.contract",
        "testing.choosing",
        "testing.driver",
        "testing",
    ],
}
ORDER = {name: place for place, name in enumerate(name for floor in FLOORS.values() for name in floor)}

# The pure floors touch nothing outside their arguments.
IMPURE = {
    "os",
    "io",
    "sys",
    "time",
    "random",
    "secrets",
    "socket",
    "sqlite3",
    "subprocess",
    "threading",
    "asyncio",
    "pathlib",
}

BANNED = {
    "bucket": "group or window",
    "backend": "store",
    "budget": "allowance",
    "entitlement": "enrollment",
    "lease": "hold",
    "outcome": "decision",
    "pool": "group",
    "promo": "offer",
    "quota": "allowance",
    "subscription": "enrollment",
    "tenant": "account",
    "violation": "finding",
}
ALLOWED = {"OutcomeUnknown", "ThreadPoolExecutor"}
FUNCTION_LINES_MAX = 60
PUBLIC_MAX = 22


def modules():
    """Each module's name below gratis, its path and its tree."""
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, path, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree):
    """Each module that a tree imports, and whether only for types."""
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in typing_only
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".removeprefix("gratis.")
                is_module = node.module.split(".")[0] == "gratis" and inner in ORDER
                yield (f"gratis.{inner}" if is_module else node.module), id(node) in typing_only


def test_every_module_has_a_floor():
    """The list of floors names the modules that there are, each once."""
    assert sorted(name for name, _, _ in modules()) == sorted(ORDER)


def test_imports_only_go_down():
    """No module imports one that stands above it, not even for its types, errors excepted."""
    upward = []
    for name, _, tree in modules():
        for imported, is_typing in imports(tree):
            if imported == "gratis" or imported.startswith("gratis."):
                below = imported.removeprefix("gratis").removeprefix(".")
                is_down = ORDER[below] < ORDER[name]
                # errors.py carries a Decision in its types; nothing of it runs.
                if not is_down and not (name == "errors" and is_typing):
                    upward.append(f"{name or 'gratis'} imports {below}")
    assert upward == []


def test_the_pure_floors_are_pure():
    """Nouns and pure modules import nothing that does I/O, reads a clock or is random."""
    found = {
        (name, imported)
        for name, _, tree in modules()
        if name in (*FLOORS["nouns"], *FLOORS["pure"]) and name != "clock"
        for imported, _ in imports(tree)
        if imported.split(".")[0] in IMPURE
    }
    assert found == set()


def test_only_the_clock_reads_the_time_of_day():
    """Time is an argument everywhere but in clock.py."""
    found = []
    for name, path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in {"now", "utcnow", "today", "time_ns"}:
                owner = node.value.id if isinstance(node.value, ast.Name) else ""
                if owner in {"datetime", "date", "time"} and name != "clock":
                    found.append(f"{path.name}:{node.lineno}")
    assert found == []


def test_one_vocabulary():
    """No word of the contract goes by another name, in Python, SQL, TOML or prose."""
    texts = [*SOURCE.rglob("*.py"), *SOURCE.rglob("*.sql"), *(ROOT / "config").glob("*.toml"), ROOT / "README.md"]
    found = []
    for path in texts:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            for allowed in ALLOWED:
                line = line.replace(allowed, "")  # noqa: PLW2901 - the line without them
            for word, instead in BANNED.items():
                if re.search(rf"(?<![a-z]){word}s?(?![a-z])", line, flags=re.IGNORECASE):
                    found.append(f"{path.name}:{number}: {word}; say {instead}")
    assert found == []


def test_every_module_says_what_it_decides():
    """Each module and each public class and function has a docstring."""
    found = [path.name for _, path, tree in modules() if not ast.get_docstring(tree)]
    assert found == []


def test_functions_fit_on_a_screen():
    """No function is longer than a screen."""
    found = [
        f"{path.name}:{node.lineno} {node.name}"
        for _, path, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > FUNCTION_LINES_MAX
    ]
    assert found == []


def test_lint_exceptions_have_reasons():
    """Each exception to a lint rule says why, on its line."""
    found = []
    for path in sorted([*SOURCE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]):
        reasons = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            comment = re.search(r"#\s*(?:noqa|type: ignore)[:\[]?\s*([A-Z0-9, ]*)\]?(.*)", line)
            if comment is None or path.name == "test_tidy.py":
                continue
            codes, reason = comment[1].strip(), comment[2].strip(" -]")
            if not codes:
                found.append(f"{path.name}:{number}: names no rule")
            elif not reason and codes not in reasons:
                found.append(f"{path.name}:{number}: {codes} without a reason")
            reasons[codes] = reason
    assert found == []


def test_public_names_are_pinned():
    """The public surface is this, sorted, and at most twenty-two names."""
    expected = [
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
    assert gratis.__all__ == expected
    assert len(expected) <= PUBLIC_MAX


@pytest.mark.parametrize("name", ["", *gratis.__all__, "usage", "thresholds", "openai", "testing"])
def test_help_is_there(name):
    """`help` tells of the package and of each public name, with its parameters."""
    thing = import_module("gratis") if not name else getattr(gratis, name, None) or import_module(f"gratis.{name}")
    assert pydoc.render_doc(thing)


def test_nothing_is_left_to_do():
    """No note of something unfinished is committed."""
    words = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    found = [path.name for path in SOURCE.rglob("*.py") if words.search(path.read_text(encoding="utf-8"))]
    assert found == []


def test_no_place_of_one_machine_is_named():
    """No file names a package registry's host or a home folder, and no lock file carries addresses."""
    pattern = re.compile(r"index-url|extra-index|/root/|/home/[a-z]", flags=re.IGNORECASE)
    found = [
        str(path.relative_to(ROOT))
        for folder in ("src", "tests", "benchmarks", "config", ".github", ".ci")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and path.suffix in {".py", ".toml", ".md", ".sql", ".txt", ""}
        and path.name != "test_tidy.py"
        and pattern.search(path.read_text(encoding="utf-8", errors="ignore"))
    ]
    assert found == []
