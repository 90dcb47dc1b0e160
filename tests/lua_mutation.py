"""`python -m tests.lua_mutation [rule | holding | SCRIPT ...]`: plant faults in scripts of a Redis store; checks fail.

Each mutant is one small change of one script. A store with that script goes through the checks of `lua_checks.py`, on a
private server, until one of them fails. Mutants that survive must be explained in `lua_survivors.toml`, which also
carries a digest of the scripts, so that `test_lua_mutation.py` notices when it is out of date.
"""

import hashlib
import re
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.bench import NAMES, text_of
from tests.lua_checks import CHECKS, OF_HOLDS, Stage

SURVIVORS = Path(__file__).parent / "lua_survivors.toml"

TOKEN = re.compile(
    r"""(?P<space>\s+|--[^\n]*)
    |(?P<text>'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*")
    |(?P<number>\d+(?:\.\d+)?)
    |(?P<name>[A-Za-z_]\w*)
    |(?P<sign>\.\.\.|\.\.|==|~=|<=|>=|[-+*/%^\#<>=(){}\[\];:,.])""",
    re.VERBOSE,
)
KEYWORDS = set(
    "and break do else elseif end false for function if in local nil not or repeat return then true until while".split()  # noqa: SIM905 - words are read as words
)
OPENING, CLOSING = set("({["), set(")}]")
VALUES = {"name", "number", "text"}
# A statement starts with a name or one of the former, behind what ends an expression or one of the latter.
STARTING = set("break else elseif end for function if local repeat return until while".split())  # noqa: SIM905 - as above
ENDING = {")", "}", "]", "nil", "true", "false", "...", "end", "then", "do", "else", "repeat", "break"}
SWAPS = {
    "==": ("~=",), "~=": ("==",), "<": ("<=",), "<=": ("<",), ">": (">=",), ">=": (">",),
    "+": ("-",), "-": ("+",), "*": ("+",), "/": ("*",), "%": ("*",),
    "and": ("or",), "or": ("and",), "true": ("false",), "false": ("true",), "min": ("max",), "max": ("min",),
}  # fmt: skip
BOUND_MIN = 10  # what is smaller counts or names a place, and is made larger only
COMMAND = re.compile(r"[A-Z]{3,}")
ABOUT_HOLDS = re.compile(
    r"\b(holding|ends|first_end|verb|correction|pin|extra|returned|members|is_in|is_held|gone|unmeasured|waiting)\b"
)
SENTENCE = re.compile(r"[a-z']+ [a-z']+ [a-z']+")


class Token(NamedTuple):
    """A piece of a script: what it is, what it says, and where."""

    kind: str
    said: str
    start: int
    end: int


class Mutant(NamedTuple):
    """A change of a script; by the line's text and what is changed it is known again where lines moved."""

    script: str
    line: str
    change: str
    text: str

    @property
    def name(self):
        """By what it is known."""
        return f"{self.script}: {self.line} | {self.change}"


def tokens_of(text):
    """The tokens of a script, without what is between them."""
    found, at = [], 0
    while at < len(text):
        match = TOKEN.match(text, at)
        assert match is not None, f"what is this? {text[at : at + 20]!r}"
        if match.lastgroup == "name" and match[0] in KEYWORDS:
            found.append(Token("keyword", match[0], at, match.end()))
        elif match.lastgroup != "space":
            found.append(Token(match.lastgroup, match[0], at, match.end()))
        at = match.end()
    return found


def closing(tokens, place):
    """The place of the bracket that closes the one at a place."""
    depth = 0
    for at in range(place, len(tokens)):
        depth += (tokens[at].said in OPENING) - (tokens[at].said in CLOSING)
        if depth == 0:
            return at
    raise AssertionError("a bracket that nobody closes")


def statements(tokens):
    """The first and the last place of each statement that is an assignment, a call or a break."""
    depth, start, before = 0, None, None
    for at, token in enumerate(tokens):
        may_start = depth == 0 and (token.kind == "name" or token.said in STARTING)
        if may_start and (before is None or before.kind in VALUES or before.said in ENDING):
            if start is not None:
                yield start, at - 1
            start = at if token.kind == "name" or token.said == "break" else None
        depth += (token.said in OPENING) - (token.said in CLOSING)
        before = token
    if start is not None:
        yield start, len(tokens) - 1


def arguments(tokens, place):
    """The first and the last place of each argument of the call whose bracket opens at a place."""
    end, start, depth = closing(tokens, place), place + 1, 0
    for at in range(place + 1, end):
        if depth == 0 and tokens[at].said == ",":
            yield start, at - 1
            start = at + 1
        depth += (tokens[at].said in OPENING) - (tokens[at].said in CLOSING)
    if end > place + 1:
        yield start, end - 1


def other_texts(said):
    """What else a text may say: letters and words are others, patterns lose their anchors, commands stay."""
    inner = said[1:-1]
    if COMMAND.fullmatch(inner) or SENTENCE.search(inner):
        return
    if inner.startswith("^"):
        yield f"'{inner[1:]}'"
    if inner.endswith("$"):
        yield f"'{inner[:-1]}'"
    if not inner.startswith("^"):
        yield "'?'" if len(inner) <= 1 else f"'{inner}?'"


def changes(tokens):
    """Each change: first and last place of what is replaced, and by what: a text, or places in another order."""
    for at, token in enumerate(tokens):
        before = tokens[at - 1] if at else None
        if token.kind == "text":
            yield from ((at, at, other) for other in other_texts(token.said))
        elif token.kind == "number" and before.said == "[" and tokens[at - 2].said == "KEYS":
            yield at, at, {"1": "2", "2": "1", "3": "1"}[token.said]
        elif token.kind == "number":
            yield at, at, str(int(token.said) + 1)
            if int(token.said) >= BOUND_MIN:
                yield at, at, str(int(token.said) - 1)
        elif token.said == "-" and not (before.kind in VALUES or before.said in ENDING):
            yield at, at, ""
        elif token.said in SWAPS:
            yield from ((at, at, other) for other in SWAPS[token.said])
        elif token.said == "not":
            yield at, at, ""
        elif token.said in {"if", "elseif", "while"}:
            end = next(place for place in range(at, len(tokens)) if tokens[place].said in {"then", "do"})
            yield from ((at + 1, end - 1, other) for other in ("true", "false")[token.said == "while" :])
        elif token.said == "(" and before.kind == "name" and tokens[at - 2].said != "function":
            found = list(arguments(tokens, at))
            first = int(len(found) > 2 and COMMAND.fullmatch(tokens[at + 1].said[1:-1]) is not None)
            if len(found) > first + 1:
                yield found[first][0], found[first + 1][1], found[first : first + 2]
    yield from ((first, last, "") for first, last in statements(tokens))


def rule():
    """The mutants of the rule: of the function in `apply.lua` that judges."""
    text = text_of("apply.lua")
    judge = text[text.index("local function judge(") : text.index("-- What an id's first decision says")]
    lines = {line.strip() for line in judge.splitlines()} - {"end", "else"}
    return [mutant for mutant in mutants(["apply.lua"]) if mutant.line in lines]


def holding():
    """The mutants of what is about holds and corrections: of `hold.lua`, and of such lines of `apply.lua`."""
    text = text_of("apply.lua")
    parts = [
        text[text.index("local unmeasured, waiting") : text.index("\nlocal holding\n")],
        text[text.index("  local step, verb, extra") : text.index("  local version = values")],
    ]
    lines = {line.strip() for part in parts for line in part.splitlines()} - {"end", "else"}
    found = mutants(["apply.lua"])
    return [*mutants(["hold.lua"]), *(one for one in found if one.line in lines or ABOUT_HOLDS.search(one.line))]


def mutants(scripts=NAMES):
    """Each mutant of these scripts, under a name of its own."""
    for script in scripts:
        text = text_of(script)
        tokens = tokens_of(text)
        seen = set()
        for first, last, other in changes(tokens):
            start, end = tokens[first].start, tokens[last].end
            before = text[start:end]
            if not isinstance(other, str):  # two arguments trade places
                (one, one_end), (two, two_end) = ((tokens[a].start, tokens[b].end) for a, b in other)
                other = text[two:two_end] + text[one_end:two] + text[one:one_end]  # noqa: PLW2901 - the text of it
            if other == before:
                continue
            line = text[text.rfind("\n", 0, start) + 1 : text.find("\n", start)].strip()
            change = " ".join(f"{before} -> {other}".split())
            number = 1
            while (line, change, number) in seen:
                number += 1
            seen.add((line, change, number))
            change += f" ({number})" if number > 1 else ""
            yield Mutant(script, line, change, text[:start] + other + text[end:])


def digest():
    """What the survivors were found in: the lines of the scripts that are no comments."""
    text = text_of("apply.lua")
    judge = text[text.index("local function judge(") : text.index("-- What an id's first decision says")]
    lines = [line.strip() for line in judge.splitlines()]
    return hashlib.sha256("\n".join(line for line in lines if line and line[:2] != "--").encode()).hexdigest()


def explained():
    """The survivors that are explained."""
    return tomllib.loads(SURVIVORS.read_text(encoding="utf-8")) if SURVIVORS.exists() else {"survivors": []}


def names_of(rows):
    """The names of survivors that are explained."""
    return [Mutant(row["script"], row["line"], row["change"], "").name for row in rows]


def main():
    """Run every mutant and print those that survive; the exit code is 1 if one is not explained."""
    asked = sys.argv[1:]
    planted = PARTS[asked[0]]() if asked and asked[0] in PARTS else list(mutants(asked or NAMES))
    checks = OF_HOLDS if asked == ["holding"] else CHECKS
    known = set(names_of(explained()["survivors"])) & {mutant.name for mutant in planted}
    survivors, killers = [], Counter()
    started = time.monotonic()
    with Stage() as stage:
        if (killer := stage.killer({})) is not None:
            sys.exit(f"without a fault, {killer} fails already")
        for place, mutant in enumerate(planted, start=1):
            killer = stage.killer({mutant.script: mutant.text}, checks)
            killers[killer] += 1
            if killer is None:
                survivors.append(mutant.name)
                print(f"survived: {mutant.name}{'' if mutant.name in known else '   (not explained)'}", flush=True)
            if place % 50 == 0:
                print(f"{place} of {len(planted)} mutants, {time.monotonic() - started:.0f} s", flush=True)
    for killer, count in killers.most_common():
        print(f"{count:6}  {killer or 'survived'}")
    print(f"{len(planted)} mutants, {len(planted) - len(survivors)} killed, {len(survivors)} survived")
    print(f'digest = "{digest()}"')
    stale = known - set(survivors)
    for name in stale:
        print(f"explained, but killed: {name}")
    sys.exit(1 if set(survivors) - known or stale else 0)


PARTS = {"rule": rule, "holding": holding}


if __name__ == "__main__":
    main()
