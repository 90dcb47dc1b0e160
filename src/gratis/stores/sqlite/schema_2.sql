-- What schema 2 adds to schema 1: holds, corrections, and claims. A new file is made by both, one after the other.

ALTER TABLE ledger ADD COLUMN hold       TEXT;                  -- JSON: the hold that the decision ended
ALTER TABLE ledger ADD COLUMN correction TEXT;                  -- JSON: what the decision corrects, and how
ALTER TABLE ledger ADD COLUMN corrects   TEXT;                  -- the id of the request that it corrects

CREATE INDEX ledger_corrections ON ledger (account, corrects) WHERE corrects IS NOT NULL;

-- Tokens set aside before a request is sent. Holds move no tokens: they are forgotten when they end.
CREATE TABLE holds (
  account    INTEGER NOT NULL REFERENCES accounts,
  id         TEXT    NOT NULL,
  "group"    TEXT    NOT NULL,
  kind       TEXT    NOT NULL,
  start      INTEGER NOT NULL,                                  -- of the window; -1 where none was open
  aside      INTEGER NOT NULL CHECK (typeof(aside) = 'integer' AND aside BETWEEN 0 AND 1000000000000),
  until      INTEGER NOT NULL,
  hold       TEXT    NOT NULL,                                  -- JSON
  PRIMARY KEY (account, id)
) WITHOUT ROWID;

CREATE INDEX holds_by_end ON holds (account, until, id);

-- What all holds set aside of a window; it follows from them.
CREATE TABLE held (
  account    INTEGER NOT NULL REFERENCES accounts,
  "group"    TEXT    NOT NULL,
  kind       TEXT    NOT NULL,
  start      INTEGER NOT NULL,
  held       INTEGER NOT NULL CHECK (typeof(held) = 'integer' AND held >= 0),
  PRIMARY KEY (account, "group", kind, start)
) WITHOUT ROWID;

CREATE TRIGGER holds_set_aside AFTER INSERT ON holds WHEN NEW.aside > 0
BEGIN
  INSERT INTO held VALUES (NEW.account, NEW."group", NEW.kind, NEW.start, NEW.aside)
  ON CONFLICT DO UPDATE SET held = held + NEW.aside;
END;

CREATE TRIGGER holds_give_back AFTER DELETE ON holds WHEN OLD.aside > 0
BEGIN
  UPDATE held SET held = held - OLD.aside
  WHERE account = OLD.account AND "group" = OLD."group" AND kind = OLD.kind AND start = OLD.start;
  DELETE FROM held
  WHERE account = OLD.account AND "group" = OLD."group" AND kind = OLD.kind AND start = OLD.start AND held = 0;
END;

CREATE TRIGGER holds_keep_what_they_set_aside BEFORE UPDATE ON holds
WHEN (NEW.account, NEW.id, NEW."group", NEW.kind, NEW.start, NEW.aside)
  <> (OLD.account, OLD.id, OLD."group", OLD.kind, OLD.start, OLD.aside)
BEGIN SELECT RAISE(ABORT, 'of a hold only its end may change'); END;

-- What one process of all may do, once.
CREATE TABLE claims (
  account    INTEGER NOT NULL REFERENCES accounts,
  name       TEXT    NOT NULL,
  token      TEXT    NOT NULL,                                  -- by what whoever claimed it knows it again
  PRIMARY KEY (account, name)
) WITHOUT ROWID;
