"""One machine, durable: the embedded default. `store.py` is the store, `file.py` its file, `turn.py` a transaction."""

from gratis.stores.sqlite.file import Synchronous
from gratis.stores.sqlite.store import WAIT_S, SQLiteStore

__all__ = ["WAIT_S", "SQLiteStore", "Synchronous"]
