"""`python -m tests.mutation [TARGET ...]`: plant faults in rule, windows and classification, and see tests die.

Each mutant is one small change of one expression. It runs in a forked child, against the tests of these modules.
Those that survive must be explained in `mutation_survivors.toml`, which also carries a digest of the sources, so that
`test_mutation.py` notices when it is out of date.
"""

import ast
import hashlib
import importlib.abc
import importlib.util
import os
import signal
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGETS = ("rule", "window", "classify")
TESTS = ("holds", "rule", "classify", "window")
SURVIVORS = ROOT / "tests" / "mutation_survivors.toml"
CHILD_S = 180

COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv}
CALLS = {"max": "min", "min": "max", "any": "all", "all": "any"}


def source(target):
    """The text of a target."""
    return (ROOT / "src" / "gratis" / f"{target}.py").read_text(encoding="utf-8")


def digest():
    """What the survivors were found in: the lines of the targets that are no comments."""
    lines = [line.strip() for target in TARGETS for line in source(target).splitlines()]
    return hashlib.sha256("\n".join(line for line in lines if line and line[0] != "#").encode()).hexdigest()


def changes(node):
    """Each way to change this node, as a function that changes it in place and returns how to undo that."""

    def swap(owner, name, value):
        def apply():
            old = getattr(owner, name)
            setattr(owner, name, value)
            return lambda: setattr(owner, name, old)

        return apply

    if isinstance(node, ast.Compare):
        for place, op in enumerate(node.ops):
            if type(op) in COMPARISONS:
                yield swap(node, "ops", [*node.ops[:place], COMPARISONS[type(op)](), *node.ops[place + 1 :]])
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield swap(node, "op", ARITHMETIC[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield swap(node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And())
        for place in range(len(node.values)):
            if len(node.values) > 2:
                yield swap(node, "values", node.values[:place] + node.values[place + 1 :])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield swap(node, "op", ast.UAdd())
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield swap(node, "value", node.value + 1)
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield swap(node, "value", not node.value)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
        yield swap(node.func, "id", CALLS[node.func.id])
    elif isinstance(node, ast.If | ast.IfExp):
        yield swap(node, "test", ast.Constant(value=True))
        yield swap(node, "test", ast.Constant(value=False))
    elif isinstance(node, ast.Call) and len(node.args) > 1:
        yield swap(node, "args", [node.args[1], node.args[0], *node.args[2:]])


def relevant(tree):
    """The nodes worth changing: no types, no assertions, no docstrings."""
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert | ast.AnnAssign | ast.Import | ast.ImportFrom):
            skipped.update(id(inner) for inner in ast.walk(node))
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped.update(id(inner) for inner in ast.walk(node))
        if isinstance(node, ast.FunctionDef):
            for part in (*node.args.args, *node.args.kwonlyargs):
                if part.annotation is not None:
                    skipped.update(id(inner) for inner in ast.walk(part.annotation))
            if node.returns is not None:
                skipped.update(id(inner) for inner in ast.walk(node.returns))
            for inner in ast.walk(node):
                if id(inner) not in skipped:
                    yield node.name, inner


def mutants():
    """Target, name and changed code of each mutant."""
    for target in TARGETS:
        tree = ast.parse(source(target))
        seen = set()
        for function, node in relevant(tree):
            for apply in changes(node):
                before, line = ast.unparse(node), node.lineno
                undo = apply()
                name = f"{target}.{function}: {before} -> {ast.unparse(node)}".replace("\n", " ")
                code = compile(ast.fix_missing_locations(tree), f"{target}.py", "exec")
                undo()
                while name in seen:
                    name += f" (line {line})" if "(line" not in name else "'"
                seen.add(name)
                yield target, name, code


class _Planted(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives a module its changed code."""

    def __init__(self, target, code):
        self._name = f"gratis.{target}"
        self._code = code

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name == self._name else None

    def exec_module(self, module):
        exec(self._code, module.__dict__)  # noqa: S102 - our own module, changed


def start(target, code):
    """Start a child that runs the tests against a mutant; it ends with 0 if all pass."""
    child = os.fork()
    if child != 0:
        return child
    signal.alarm(CHILD_S)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    sys.meta_path.insert(0, _Planted(target, code))
    import pytest  # noqa: PLC0415 - only the child runs tests

    names = sorted(TESTS, key=lambda name: name != target)  # a target's own tests first: most faults end there
    paths = [str(ROOT / "tests" / f"test_{name}.py") for name in names]
    os._exit(int(pytest.main(["-x", "-q", "-n0", "-p", "no:cacheprovider", *paths])))


def survivors_of(planted):
    """The names of the mutants that no test kills, as they are found."""
    waiting = list(reversed(planted))
    running = {}
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            target, name, code = waiting.pop()
            running[start(target, code)] = name
        child, status = os.wait()
        name = running.pop(child)
        if status == 0:
            yield name
        if (len(planted) - len(waiting)) % 25 == 0:
            print(f"{len(planted) - len(waiting)} of {len(planted)} mutants", flush=True)


def explained():
    """The survivors that are explained, by name."""
    return tomllib.loads(SURVIVORS.read_text(encoding="utf-8")) if SURVIVORS.exists() else {"survivors": []}


def main():
    """Run every mutant and print those that survive; the exit code is 1 if one is not explained."""
    os.environ["GRATIS_TEST_PROFILE"] = "mutation"
    planted = [mutant for mutant in mutants() if mutant[0] in (sys.argv[1:] or TARGETS)]
    known = {row["mutant"] for row in explained()["survivors"]} & {name for _, name, _ in planted}
    survivors = []
    for name in survivors_of(planted):
        survivors.append(name)
        print(f"survived: {name}{'' if name in known else '   (not explained)'}", flush=True)
    print(f"{len(planted)} mutants, {len(planted) - len(survivors)} killed, {len(survivors)} survived")
    print(f'digest = "{digest()}"')
    stale = known - set(survivors)
    for name in stale:
        print(f"explained, but killed: {name}")
    sys.exit(1 if set(survivors) - known or stale else 0)


if __name__ == "__main__":
    main()
