"""The command line: JSON lines in, JSON lines out, tables for people.

Exit codes: 0, 1 for findings, 2 for bad use, bad input or a store that cannot be used.
"""

from __future__ import annotations

import contextlib
import os
import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING

from gratis.cli.arguments import parser
from gratis.errors import GratisError

if TYPE_CHECKING:
    from collections.abc import Sequence

BAD_USE = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader left. What it did not read it does not want; nothing decided is undone.
        _drop_output()
        return 0
    except GratisError as error:
        print(f"gratis: {error}", file=sys.stderr)
        return BAD_USE
    except OSError as error:
        print(f"gratis: {error.filename or 'standard output'}: {error.strerror}", file=sys.stderr)
        _drop_output()
        return BAD_USE
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _drop_output() -> None:
    """Let nothing be tried again on the way out."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run() -> None:
    """Run the command of this process; what its output cannot write is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main())
