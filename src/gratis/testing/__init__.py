"""Whether a store is one: what ships for those who write a store of their own.

`StoreContract` is a class of clauses. A subclass with a fixture `open_store` has pytest try them all:

    class TestMyStore(StoreContract):
        @pytest.fixture
        def open_store(self, tmp_path):
            return lambda *, clock, bounds: MyStore(tmp_path / "store", clock=clock, bounds=bounds)

    def test_my_store_follows_the_rule(tmp_path):
        for seed in range(20):
            path = tmp_path / f"store {seed}"
            drive(lambda *, clock, bounds: MyStore(path, clock=clock, bounds=bounds), seed=seed, steps=2_000)

`open_store` is called once for each view that a clause needs, always on the same store, which nobody used before.
Views are what other processes would have: what one is told, another knows. `drive` is a random program that compares
every answer with the pure rule's. Neither needs pytest: `StoreContract.clauses()` tells them all.
"""

from gratis.testing.contract import StoreContract
from gratis.testing.driver import drive
from gratis.testing.scene import Opener

__all__ = ["Opener", "StoreContract", "drive"]
