"""What others do on the same server: check and add tokens to a day's allowance, each set up as its documents advise.

Nothing is imported before it is asked for: who is not installed is named in the table, and the others go on.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import ExitStack

    Hit = Callable[[int], bool]
    AsyncHit = Callable[[int], Awaitable[bool]]

NONE_HAS = "ids (a retry counts twice), a ledger or enrollments"
# The provider's own example day, in thousands: the eighth request does not fit, the ninth, smaller, does.
EXAMPLE_ALLOWANCE = 1_000
EXAMPLE = (120, 140, 150, 150, 150, 150, 115, 30, 20)
EXAMPLE_FREE = (True,) * 7 + (False, True)


class Place(NamedTuple):
    """Where a peer keeps its counts, how many tokens a day it allows, and what closes it."""

    socket: str
    key: str
    allowance: int
    stack: ExitStack


class Peer(NamedTuple):
    """A way of one library: how it is set up, and what it does not do beyond what none of them does."""

    distribution: str
    way: str
    lacks: str
    blocking: Callable[[Place], Hit]
    awaited: Callable[[Place], Awaitable[AsyncHit]]

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"`{self.distribution}` {self.way}"

    @property
    def version(self) -> str | None:
        """Which version is installed; None if it is not."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return None

    def remarks(self, place: Place) -> str:
        """What it does not do; which request of the example day it bills is tried out."""
        hit = self.blocking(place)
        free = tuple(hit(tokens) for tokens in EXAMPLE)
        wrong = [
            str(number) for number, found in enumerate(zip(free, EXAMPLE_FREE, strict=True), 1) if len({*found}) > 1
        ]
        billed = f"bills the wrong request of the example day (number {', '.join(wrong)}); " if wrong else ""
        return f"{billed}{self.lacks}"


def _limits(strategy: str) -> tuple[Callable[[Place], Hit], Callable[[Place], Awaitable[AsyncHit]]]:
    def blocking(place: Place) -> Hit:
        limits: Any = import_module("limits")
        storage = import_module("limits.storage").RedisStorage(f"redis+unix://{place.socket}")
        limiter = getattr(import_module("limits.strategies"), strategy)(storage)
        item = limits.RateLimitItemPerDay(place.allowance)
        place.stack.callback(storage.storage.close)
        return lambda tokens: limiter.hit(item, place.key, cost=tokens) is True

    async def awaited(place: Place) -> AsyncHit:
        limits: Any = import_module("limits")
        storage = import_module("limits.aio.storage").RedisStorage(
            f"async+redis+unix://{place.socket}", implementation="redispy"
        )
        limiter = getattr(import_module("limits.aio.strategies"), strategy)(storage)
        item = limits.RateLimitItemPerDay(place.allowance)

        async def hit(tokens: int) -> bool:
            return await limiter.hit(item, place.key, cost=tokens) is True

        return hit

    return blocking, awaited


def _throttled(using: str) -> tuple[Callable[[Place], Hit], Callable[[Place], Awaitable[AsyncHit]]]:
    def made(place: Place, module: str) -> Any:
        library: Any = import_module(module)
        store: Any = import_module(f"{module}.store").RedisStore(server=f"unix://{place.socket}", options={})
        return library.Throttled(key=place.key, using=using, quota=f"{place.allowance}/d", store=store)

    def blocking(place: Place) -> Hit:
        throttle = made(place, "throttled")
        return lambda tokens: not throttle.limit(place.key, tokens).limited

    async def awaited(place: Place) -> AsyncHit:
        throttle = made(place, "throttled.asyncio")

        async def hit(tokens: int) -> bool:
            return not (await throttle.limit(place.key, tokens)).limited

        return hit

    return blocking, awaited


def _pyrate_state(library: Any, place: Place, client: Any) -> Any:
    """What its documents advise for long windows: a few numbers, however many tokens."""
    store = library.RedisStateStore(client, place.key)
    return library.StateBucket([library.Rate(place.allowance, library.Duration.DAY)], store=store)


def _pyrate_fixed(library: Any, place: Place, client: Any) -> Any:
    """What its documents advise where an allowance returns at midnight UTC."""
    rates = [library.Rate(place.allowance, library.Duration.DAY)]
    return library.RedisBucket.init(rates, client, place.key, library.FixedWindow())


def _pyrate(
    made: Callable[[Any, Place, Any], Any],
) -> tuple[Callable[[Place], Hit], Callable[[Place], Awaitable[AsyncHit]]]:
    def blocking(place: Place) -> Hit:
        library: Any = import_module("pyrate_limiter")
        client = import_module("redis").Redis.from_url(f"unix://{place.socket}")
        limiter = library.Limiter(made(library, place, client))
        place.stack.callback(limiter.close)
        return lambda tokens: limiter.try_acquire(place.key, weight=tokens, blocking=False) is True

    async def awaited(place: Place) -> AsyncHit:
        library: Any = import_module("pyrate_limiter")
        client = import_module("redis.asyncio").Redis.from_url(f"unix://{place.socket}")
        found = made(library, place, client)
        limiter = library.Limiter(await found if hasattr(found, "__await__") else found)
        place.stack.callback(limiter.close)

        async def hit(tokens: int) -> bool:
            return await limiter.try_acquire_async(place.key, weight=tokens, blocking=False) is True

        return hit

    return blocking, awaited


PEERS = (
    Peer("limits", "fixed window", "its day starts with the first request, not at midnight",
         *_limits("FixedWindowRateLimiter")),
    Peer("limits", "sliding window counter", "weighs two days, so it knows no day of its own",
         *_limits("SlidingWindowCounterRateLimiter")),
    Peer("throttled-py", "fixed window", "adds in one command and sets the expiry in another",
         *_throttled("fixed_window")),
    Peer("throttled-py", "token bucket", "fills up during the day, so it knows no day", *_throttled("token_bucket")),
    Peer("pyrate-limiter", "token bucket", "fills up during the day, so it knows no day", *_pyrate(_pyrate_state)),
    Peer("pyrate-limiter", "fixed window", "keeps one member of a sorted set for each token, and never lets it expire",
         *_pyrate(_pyrate_fixed)),
)  # fmt: skip
