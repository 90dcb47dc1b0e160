"""What a URL of Redis or Valkey says: where, how to get in, and what is expected of the store."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from gratis.errors import StoreError
from gratis.model import Durability, check_name
from gratis.stores.redis.core import Settings
from gratis.stores.redis.layout import SHARDS_MAX
from gratis.stores.redis.servers import Cluster, One, Sentinels
from gratis.stores.redis.store import RedisStore
from gratis.stores.redis.wire import Access, Address

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from urllib.parse import SplitResult

    from gratis.stores import Bounds
    from gratis.stores.redis.servers import Servers

PORT, SENTINEL_PORT = 6379, 26379
SECONDS_MAX = 3_600.0
FORMS = (
    "redis://HOST:PORT/DB, rediss://… (TLS), unix:///SOCKET?db=N, redis://HOST,HOST,…/ (a cluster's), "
    "redis+sentinel://HOST,HOST,…/MASTER[/DB]"
)
OPTIONS: Final = (
    "db", "durability", "namespace", "shards", "timeout", "wait", "username", "password", "sentinel_username",
    "sentinel_password", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname",
)  # fmt: skip


def open_redis(
    url: str,
    *,
    clock: Callable[[], datetime] | None,
    bounds: Bounds | None,
    must_exist: bool = False,
    is_checked: bool = True,
) -> RedisStore:
    """Open the store that a URL names."""
    parts, options = _split(url)
    scheme, _, variant = parts.scheme.partition("+")
    tls = _tls(options) if scheme in {"rediss", "valkeys"} else None
    path = [part for part in unquote(parts.path).split("/") if part]
    servers: Servers
    if "db" in options and scheme != "unix" and len(path) > (variant == "sentinel"):
        raise _wrong(parts, f"db={options['db']} beside /{path[-1]}", "the database in one place")
    if scheme == "unix":
        if parts.netloc.rpartition("@")[2]:
            raise _wrong(parts, "a host", "unix:///FOLDER/SOCKET, with three slashes")
        if not path:
            raise _wrong(parts, "no socket", "unix:///FOLDER/SOCKET, with three slashes")
        servers, db = One(Address(unquote(parts.path))), options.get("db", "0")
    elif variant == "sentinel":
        if not path:
            raise _wrong(parts, "it names no master", FORMS)
        servers = Sentinels(_hosts(parts, SENTINEL_PORT), path[0])
        db = path[1] if len(path) > 1 else options.get("db", "0")
    else:
        hosts = _hosts(parts, PORT)
        servers = One(hosts[0]) if len(hosts) == 1 and variant != "cluster" else Cluster(hosts)
        db = path[0] if path else options.get("db", "0")
    timeout = _seconds(parts, options, "timeout", Access().timeout)
    access = Access(
        username=unquote(parts.username) if parts.username else options.get("username"),
        password=unquote(parts.password) if parts.password else options.get("password"),
        db=_whole(parts, "db", db, 1 << 31),
        tls=tls,
        timeout=timeout,
    )
    sentinels = Access(
        username=options.get("sentinel_username"), password=options.get("sentinel_password"), tls=tls, timeout=timeout
    )
    settings = _settings(parts, options, clock, bounds, must_exist=must_exist, is_checked=is_checked)
    return RedisStore(servers, access, settings, sentinels=sentinels)


def _settings(
    parts: SplitResult,
    options: dict[str, str],
    clock: Callable[[], datetime] | None,
    bounds: Bounds | None,
    *,
    must_exist: bool,
    is_checked: bool,
) -> Settings:
    namespace = options.get("namespace", "gratis")
    check_name("namespace", namespace)
    if {"{", "}"} & set(namespace):
        raise _wrong(parts, f"namespace={namespace}", "a name without braces")
    durability = options.get("durability")
    if durability is not None and durability not in set(Durability) - {Durability.REPLICATED}:
        raise _wrong(parts, f"durability={durability}", "volatile, journaled or synced")
    return Settings(
        namespace=namespace,
        shards=_whole(parts, "shards", options["shards"], SHARDS_MAX, least=1) if "shards" in options else None,
        durability=None if durability is None else Durability(durability),
        wait=_seconds(parts, options, "wait", Settings().wait),
        clock=clock,
        bounds=bounds,
        must_exist=must_exist,
        is_checked=is_checked,
    )


def _split(url: str) -> tuple[SplitResult, dict[str, str]]:
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        raise StoreError(f"store: its URL cannot be read; expected {FORMS}") from None
    if unknown := options.keys() - set(OPTIONS):
        raise _wrong(parts, f"unknown option {min(unknown).partition(':')[0]!r}", f"one of {', '.join(OPTIONS)}")
    if parts.fragment:
        raise _wrong(parts, "a fragment", FORMS)
    return parts, options


def _hosts(parts: SplitResult, port: int) -> list[Address]:
    found = []
    for host in parts.netloc.rpartition("@")[2].split(","):
        one = urlsplit(f"//{host}")
        try:
            address = Address(one.hostname or "", one.port or port)
        except ValueError:
            address = Address("")
        if not address.host:
            raise _wrong(parts, f"host {host!r}", FORMS)
        found.append(address)
    return found


def _tls(options: dict[str, str]) -> ssl.SSLContext:
    """Certificates are checked unless that is switched off by name."""
    try:
        context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
        if "ssl_certfile" in options:
            context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"))
    except OSError as error:
        raise StoreError(f"store: its certificates cannot be read: {error}") from None
    if options.get("ssl_check_hostname", "true").lower() in {"0", "no", "false"}:
        context.check_hostname = False
    if options.get("ssl_cert_reqs", "required") == "none":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _seconds(parts: SplitResult, options: dict[str, str], name: str, default: float) -> float:
    try:
        seconds = float(options.get(name, default))
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= SECONDS_MAX:
        raise _wrong(parts, f"{name}={options[name]}", f"seconds, up to {SECONDS_MAX:g}")
    return seconds


def _whole(parts: SplitResult, name: str, text: str, most: int, *, least: int = 0) -> int:
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
        raise _wrong(parts, f"{name}={text}", f"a whole number from {least} to {most}")
    return int(text)


def _wrong(parts: SplitResult, found: str, expected: str) -> StoreError:
    """An error that shows no more of the URL than what is wrong, and of that no secret."""
    if "@" in parts.netloc + parts.path + parts.query + parts.fragment:
        found = found.partition(" ")[0].partition("=")[0] + " (is each special character percent-encoded?)"
    return StoreError(f"store {parts.scheme}://…: {found}; expected {expected}")
