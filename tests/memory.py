"""Several views on one memory store, as processes have on one file or server."""

from gratis.stores.memory import MemoryStore


class View(MemoryStore):
    """One more view on what is kept in memory: closing it closes no other."""

    def __init__(self, kept: dict, *, clock, bounds):
        super().__init__(clock=clock, bounds=bounds)
        self.kept = kept
        self._lock = kept.setdefault("lock", self._lock)
        self._accounts = kept.setdefault("accounts", self._accounts)
        self._ledger = kept.setdefault("ledger", self._ledger)
