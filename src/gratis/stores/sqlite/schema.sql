-- A Gratis store, schema 1. Times are microseconds since 1970-01-01T00:00Z.
-- What guards money stands here a second time, as far as one row can tell: as CHECKs and triggers.

CREATE TABLE accounts (
  account    INTEGER PRIMARY KEY,
  offer      TEXT    NOT NULL,
  name       TEXT    NOT NULL,
  version    INTEGER NOT NULL DEFAULT 0 CHECK (version >= 0),   -- of the enrollment in force
  UNIQUE (offer, name)
);

CREATE TABLE enrollments (
  account    INTEGER NOT NULL REFERENCES accounts,
  version    INTEGER NOT NULL CHECK (version >= 1),
  at         INTEGER NOT NULL,
  actor      TEXT    NOT NULL,
  enrollment TEXT    NOT NULL,                                  -- JSON
  PRIMARY KEY (account, version)
) WITHOUT ROWID;

-- What decisions rest on, each distinct set of facts once.
CREATE TABLE terms (
  terms      INTEGER PRIMARY KEY,
  facts      TEXT    NOT NULL UNIQUE                            -- JSON
);

CREATE TABLE windows (
  window     INTEGER PRIMARY KEY,
  account    INTEGER NOT NULL REFERENCES accounts,
  "group"    TEXT    NOT NULL,
  kind       TEXT    NOT NULL,                                  -- 'day UTC', 'rolling 24h', …
  start      INTEGER NOT NULL,
  end        INTEGER NOT NULL CHECK (end > start),
  used       INTEGER NOT NULL CHECK (typeof(used) = 'integer' AND used >= 0),
  seq        INTEGER NOT NULL CHECK (typeof(seq) = 'integer' AND seq >= 1),
  UNIQUE (account, "group", kind, start)
);

CREATE TABLE ledger (
  entry         INTEGER PRIMARY KEY,
  account       INTEGER NOT NULL REFERENCES accounts,
  id            TEXT    NOT NULL,
  terms         INTEGER NOT NULL REFERENCES terms,
  model         TEXT    NOT NULL,
  project       TEXT,
  input_tokens  INTEGER CHECK (typeof(input_tokens)  IN ('integer', 'null') AND input_tokens  BETWEEN 0 AND 1000000000000),
  output_tokens INTEGER CHECK (typeof(output_tokens) IN ('integer', 'null') AND output_tokens BETWEEN 0 AND 1000000000000),
  cached_tokens INTEGER NOT NULL CHECK (typeof(cached_tokens) = 'integer' AND cached_tokens BETWEEN 0 AND 1000000000000),
  kind          TEXT    NOT NULL,
  tools         TEXT,                                           -- JSON
  at            INTEGER NOT NULL,
  reason        TEXT    NOT NULL,
  free_tokens   INTEGER CHECK (typeof(free_tokens) IN ('integer', 'null') AND free_tokens BETWEEN 0 AND 1000000000000),
  used          INTEGER CHECK (typeof(used)  IN ('integer', 'null') AND used >= 0),
  total         INTEGER CHECK (typeof(total) IN ('integer', 'null') AND total >= 0),
  window        INTEGER REFERENCES windows,
  seq           INTEGER CHECK (typeof(seq) IN ('integer', 'null') AND seq >= 1),
  decided_at    INTEGER NOT NULL,
  durability    TEXT    NOT NULL DEFAULT 'volatile',            -- what the answer rested on
  CHECK ((window IS NULL) = (seq IS NULL)),
  CHECK (free_tokens <= input_tokens + coalesce(output_tokens, 0)),
  CHECK (used IS NOT NULL OR (free_tokens = 0 AND reason <> 'within_allowance')),
  UNIQUE (account, id)
);

-- REPLACE would delete without asking the other triggers; entries are numbered by the ledger alone.
CREATE TRIGGER ledger_adds_what_is_new BEFORE INSERT ON ledger
WHEN NEW.entry > 0 OR EXISTS (SELECT 1 FROM ledger WHERE account = NEW.account AND id = NEW.id)
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;

CREATE TRIGGER ledger_keeps_what_it_says BEFORE UPDATE ON ledger
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;

CREATE TRIGGER ledger_keeps_what_it_holds BEFORE DELETE ON ledger
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;

CREATE TRIGGER enrollments_add_what_is_new BEFORE INSERT ON enrollments
WHEN EXISTS (SELECT 1 FROM enrollments WHERE account = NEW.account AND version = NEW.version)
BEGIN SELECT RAISE(ABORT, 'the history of enrollments is append-only'); END;

CREATE TRIGGER enrollments_keep_what_they_say BEFORE UPDATE ON enrollments
BEGIN SELECT RAISE(ABORT, 'the history of enrollments is append-only'); END;

CREATE TRIGGER enrollments_keep_what_they_hold BEFORE DELETE ON enrollments
BEGIN SELECT RAISE(ABORT, 'the history of enrollments is append-only'); END;
