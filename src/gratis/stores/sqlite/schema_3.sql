-- What schema 3 adds to schema 2: the hash that chains each entry to the one before it in its window (chain.py).
-- What was decided before has none.

ALTER TABLE ledger   ADD COLUMN link TEXT;                      -- of this entry
ALTER TABLE windows  ADD COLUMN link TEXT;                      -- of its last entry
ALTER TABLE accounts ADD COLUMN link TEXT;                      -- of the last one outside any window
