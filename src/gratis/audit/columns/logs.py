"""Parquet files of requests: one, several or a folder of them, read ahead while the rows before are judged."""

from __future__ import annotations

from pathlib import Path
from queue import Queue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from gratis.audit.columns.reading import Reader, check_columns, is_text
from gratis.errors import GratisError, RequestError
from gratis.lines import REQUEST_FIELDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gratis.model import Request

BATCH_ROWS = 1 << 16  # its columns fit into the caches of a processor
BUFFER_BYTES = 1 << 20
AHEAD = 8
CODED = ("account", "project", "model", "kind")


class Log:
    """The files of a log, in the order of their names where a folder was given."""

    def __init__(self, paths: Sequence[str | Path], *, zone: str | None = None) -> None:
        self.paths = [file for path in paths for file in _files(Path(path))]
        self._zone = zone
        self.rows = 0
        self.has_ids = False
        for number, path in enumerate(self.paths):
            with _opened(path) as file:
                try:
                    check_columns(file.schema_arrow, zone=zone)
                except GratisError as error:
                    raise GratisError(f"{path}: {error}") from None
                has_ids = "id" in file.schema_arrow.names
                if number and has_ids != self.has_ids:
                    raise GratisError(f"{path}: expected an id column in all of the files, or in none")
                self.has_ids = has_ids
                self.rows += file.metadata.num_rows

    def batches(self, *, fields: Sequence[str] = REQUEST_FIELDS) -> Iterator[pa.RecordBatch]:
        """The rows in order, with those of the fields that there are."""
        ahead: Queue[pa.RecordBatch | BaseException | None] = Queue(AHEAD)
        is_over = Event()
        thread = Thread(target=self._read, args=(fields, ahead, is_over), daemon=True)
        thread.start()
        try:
            while (item := ahead.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            is_over.set()
            while thread.is_alive():
                while not ahead.empty():
                    ahead.get_nowait()
                thread.join(0.01)

    def _read(self, fields: Sequence[str], ahead: Queue[Any], is_over: Event) -> None:
        try:
            for path in self.paths:
                for batch in _batches(path, fields):
                    ahead.put(batch)
                    if is_over.is_set():
                        return
            ahead.put(None)
        except BaseException as error:  # noqa: BLE001 - it is raised where the batches are taken
            ahead.put(error)


def _batches(path: Path, fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with _opened(path) as file:
        there = [name for name in fields if name in file.schema_arrow.names]
        coded = [name for name in CODED if name in there and is_text(file.schema_arrow.field(name).type)]
    try:
        # Without `pre_buffer`, as what it has read ahead it keeps until the whole file is read; and with a buffer, as
        # all of a group of rows is read at once without: that may be all of the file.
        with pq.ParquetFile(path, read_dictionary=coded, pre_buffer=False, buffer_size=BUFFER_BYTES) as file:
            yield from file.iter_batches(BATCH_ROWS, columns=there, use_threads=True)
    except (pa.ArrowException, OSError) as error:
        raise GratisError(f"{path}: {error}") from None


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise GratisError(f"{path}: No such file or directory") from None
    except (pa.ArrowException, OSError) as error:
        raise GratisError(f"{path}: {error}; expected a Parquet file") from None


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(path.rglob("*.parquet"))
    if not found:
        raise GratisError(f"{path}: expected .parquet files in this folder")
    return found


def requests(log: Log, *, zone: str | None = None) -> Iterator[list[tuple[int, Request | RequestError]]]:
    """The rows of a log one by one, as requests with their number, from 1 on; what is wrong stands in its place."""
    reader, begin = Reader(zone=zone), 1
    for batch in log.batches():
        found: list[tuple[int, Request | RequestError]] = []
        for row in range(batch.num_rows):
            try:
                found.append((begin + row, reader.request(batch, row, begin + row)))
            except RequestError as error:
                found.append((begin + row, error))
        begin += batch.num_rows
        yield found


IDS = ("id", "account")


def without_ids(log: Log, *, needs_ids: bool) -> list[str]:
    """The fields to judge a log by. Ids are read to be printed; where there are none, rows have numbers."""
    return [field for field in REQUEST_FIELDS if field != "id" or (needs_ids and log.has_ids)]
