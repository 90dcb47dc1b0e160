"""Many processes and machines over one Redis or Valkey: `store.py` is the store, `apply.lua` its one atomic step."""

from gratis.stores.redis.store import RedisStore

__all__ = ["RedisStore"]
