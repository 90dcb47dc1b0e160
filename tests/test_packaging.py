"""The built wheel is all there is: installed away from the checkout, it works."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gratis.offers import shipped

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", ".hypothesis", "__pycache__", ".*_cache", "*.db*", "dist", "build")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(copy)], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_what_runs(wheel):
    """Offers, SQL and the type marker ship; tests and benchmarks do not."""
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"gratis/config/{name}.toml" for name in shipped()} <= names
    assert {"gratis/stores/sqlite/schema.sql", "gratis/py.typed"} <= names
    assert {name for name in names if not name.startswith(("gratis/", "gratis-"))} == set()


def test_the_wheel_works_in_a_clean_environment(wheel, tmp_path):
    """Installed alone, away from the checkout, it shows the demo and finds its offers."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    program = tmp_path / "venv" / "bin"
    subprocess.run([program / "pip", "install", "--quiet", wheel], check=True)
    demo = subprocess.run([program / "gratis", "demo"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "23:10      | 30 k              | 1 005 k       | Billed (entire 30k)" in demo.stdout
    listed = subprocess.run(
        [program / "gratis", "offers", "list", "--format", "json"], cwd=tmp_path, check=True, capture_output=True
    )
    assert listed.stdout.count(b"\n") == len(shipped())
    where = "import gratis, pathlib; print(pathlib.Path(gratis.__file__).is_relative_to(pathlib.Path.cwd() / 'venv'))"
    ours = subprocess.run([program / "python", "-c", where], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert ours.stdout == "True\n"


def test_readmes_first_line_works_in_a_fresh_copy(tmp_path):
    """The line that README shows first makes its own environment and prints the demo."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    line = next(line[2:] for line in readme.splitlines() if line.startswith("$ python3 -m venv"))
    done = subprocess.run(["bash", "-c", line], cwd=copy, check=True, capture_output=True, text=True)
    assert "Billed (entire 30k)" in done.stdout
