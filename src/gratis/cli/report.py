"""`--html FILE`: where a report for people is written, and at which prices it counts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from gratis import clock
from gratis.audit.story import Story
from gratis.errors import GratisError
from gratis.prices import load_prices, shipped_prices

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gratis.prices import Prices


def begin(
    file: str | None,
    title: str,
    offer: str | None,
    *,
    is_audit: bool = False,
    prices: Prices | None = None,
    reads: str | Iterable[str] | None = None,
) -> Story | None:
    """The story for a file; None without one. That it can be written is asked before the work, not after it.

    `reads` names the file that is told of, or each of them: a page never takes its place.
    """
    if file is None:
        return None
    folder = Path(file).absolute().parent
    if Path(file).is_dir() or not file:
        raise GratisError(f"--html: found the folder {file!r}; expected the name of a file")
    if not os.access(folder, os.W_OK):
        raise GratisError(f"--html: {file}: nothing can be written to {folder}; expected a folder that is there")
    apart(file, [reads] if isinstance(reads, str) else reads or ())
    return Story(title, prices or prices_for(offer), is_audit=is_audit)


def apart(file: str | None, reads: Iterable[str], *, option: str = "--html") -> None:
    """Refuse a file that would take the place of one of these, be it only while it is written."""
    if file is None:
        return
    for page in (Path(file), _part(file)):
        for name in reads:
            if page.exists() and Path(name).exists() and page.samefile(name):
                raise GratisError(f"{option}: {file}: found the file that is read, {name}; expected another")


def store_file(url: str | None) -> str | None:
    """The file of a SQLite store, if its URL is one's."""
    if url is None or not url.startswith("sqlite:"):
        return None
    return unquote(urlsplit(url).path.removeprefix("/"))


def end(file: str | None, story: Story | None) -> None:
    """Write the page: all of it, or what was there before stays."""
    if file is None or story is None:
        return
    part = _part(file)
    try:
        part.write_text(story.html(clock.now()), encoding="utf-8")
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise GratisError(f"--html: {file}: {error.strerror}") from None
    finally:
        story.close()


def _part(file: str) -> Path:
    """Where a page is until all of it is written."""
    return Path(f"{file}.part")


def prices_for(offer: str | None) -> Prices | None:
    """The list prices of the provider whose offer it is, where they are known."""
    provider = (offer or "").partition("-")[0]
    return load_prices(provider) if provider in shipped_prices() else None
