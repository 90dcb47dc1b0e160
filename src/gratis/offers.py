"""Where offers are found: by name among those that are shipped, or by path."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from gratis.errors import OfferError, PricesError
from gratis.offer_file import parse

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from gratis.offer import Offer

DEFAULT_OFFER = "openai-data-sharing"
FILE_BYTES_MAX = 1 << 20


def shipped() -> list[str]:
    """The names of the offers that come with Gratis."""
    return sorted(file.name.removesuffix(".toml") for file in config_folder().iterdir() if file.name.endswith(".toml"))


def load(name: str | Path) -> Offer:
    """The offer of this name, or the one in this file."""
    if isinstance(name, str) and name in shipped():
        return _parse(config_folder() / f"{name}.toml", name)
    path = Path(name)
    if path.suffix != ".toml" or not os.path.isfile(path):  # noqa: PTH113 - unlike Path.is_file, never raises
        raise OfferError(
            file=str(name),
            line=None,
            key="offer",
            found="no such offer",
            expected=f"a path to a .toml file, or one of {', '.join(shipped())}",
        )
    return _parse(path, str(name))


def _parse(file: Traversable, name: str) -> Offer:
    return parse(text_of(file, name, OfferError), file=name)


def text_of(file: Traversable, name: str, wrong: type[OfferError | PricesError]) -> str:
    """The text of a file of config; what is wrong with it as a whole is raised as the error of its kind."""
    try:
        content = file.read_bytes()
        if len(content) > FILE_BYTES_MAX:
            found, expected = f"{len(content)} bytes", f"at most {FILE_BYTES_MAX}"
            raise wrong(file=name, line=None, key="the file", found=found, expected=expected)
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise wrong(file=name, line=None, key="the file", found=str(error), expected="UTF-8 text") from None


def config_folder() -> Traversable:
    """`config/`: inside the package where it is installed, beside `src/` in a checkout."""
    installed = files("gratis") / "config"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "config"
