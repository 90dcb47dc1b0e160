"""`python -m gratis`."""

from gratis.cli import run

run()
