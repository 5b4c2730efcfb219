"""Batches of token rows for training, as numpy: a share of the run's rows, shuffled, resumable at any batch.

Which row comes when is token_order.py's; torch and its workers are jobs/token_dataset.py's.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import storage
from pipeline.errors import Damaged, PipelineError, RunMismatch
from pipeline.token_order import ORDER_VERSION, Share, ShareOrder, Span
from pipeline.token_run import Part, TokenRun, tokens_of
from pipeline.token_table import token_schema

# B rows of a batch, S of a span, W of a window, N = H * W tokens of a row, P parts

Column = NDArray[Any] | list[Any]
SHUFFLE_ROWS = 65_536
READ_THREADS = 4
WHOLE = Share(0, 1)
_NEXT_EPOCH = "go on with the next epoch there, or go back to that"


@dataclass(frozen=True)
class ReaderOptions:
    """`columns`: to come with the tokens. `shuffle_rows`: of a window; two windows are held in memory, and the rows of
    a part of 2,048 are scattered over one; 0 for the stored order. `drop_last`: every share gives the same number of
    whole batches, for workers in lockstep; what is left, less than a batch and a row of each share, is another rest in
    each epoch."""

    batch_size: int
    columns: tuple[str, ...] = ()
    seed: int = 0
    shuffle_rows: int = SHUFFLE_ROWS
    drop_last: bool = False

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("seed", 0), ("shuffle_rows", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")


@dataclass(frozen=True)
class ReaderBatch:
    """`tokens_BN` in the table's dtype. `columns`: an array of each, or a list with None of strings and of what may be
    null. `number`: of this share in this epoch, from 0."""

    tokens_BN: NDArray[np.signedinteger[Any]]
    columns: dict[str, Column]
    number: int

    def __len__(self) -> int:
        return len(self.tokens_BN)


class TokenReader:
    """Iterating gives the rest of the epoch; iterating again gives the next one. `state_dict` after a batch, loaded
    into a reader of the same rows and options anywhere, makes it go on with the batch behind it."""

    def __init__(
        self, run: TokenRun, options: ReaderOptions, share: Share = WHOLE, *, threads: int = READ_THREADS
    ) -> None:
        """Raises Damaged where parts of the run are missing, PipelineError where it has no rows or not the columns."""
        self.run, self.options, self.share, self._threads = run, options, share, threads
        self.epoch = self.num_batches = 0  # where the next batch is
        self._names = run.column_names([name for name in dict.fromkeys(options.columns) if name != "tokens"])
        self._schema = _with_long_texts(token_schema(run.table), self._names)
        self._rows_P = np.array([part.num_rows for part in run.parts], np.int64)
        self._num_rows = int(self._rows_P.sum())
        _require_rows(run, self._num_rows)
        self._parts_hash = _parts_hash(run.parts)

    def of_share(self, share: Share) -> TokenReader:
        """Another reader, of that share."""
        other = copy(self)
        other.share = share
        return other

    def __len__(self) -> int:
        """Batches of an epoch."""
        first, end = self.share.stretch(self._num_rows)
        size = self.options.batch_size
        return self._num_rows // self.share.count // size if self.options.drop_last else -(-(end - first) // size)

    def __iter__(self) -> Iterator[ReaderBatch]:
        epoch, end = self.epoch, len(self)
        for batch in self.batches(epoch, self.num_batches):
            is_last = batch.number + 1 == end
            self.epoch, self.num_batches = (epoch + 1, 0) if is_last else (epoch, batch.number + 1)
            yield batch
        self.epoch, self.num_batches = epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """JSON, the same for every share that is as far."""
        return {"epoch": self.epoch, "num_batches": self.num_batches, "order": self.order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises RunMismatch where the state is of other rows or options, but for that of an epoch's end: behind it any
        will do."""
        require_state(state, self.state_dict())
        if state["num_batches"]:
            _require_same_order(state["order"], self.order())
        self.epoch, self.num_batches = state["epoch"], state["num_batches"]

    def order(self) -> dict[str, Any]:
        """All that decides which row is in which batch."""
        options = {name: value for name, value in asdict(self.options).items() if name != "columns"}
        return {
            "version": ORDER_VERSION,
            "rows": self._num_rows,
            "parts": self._parts_hash,
            "shares": self.share.count,
            **options,
        }

    def batches(self, epoch: int, first: int = 0) -> Iterator[ReaderBatch]:
        """The batches of one epoch from the first-th on. Raises what `TokenRun.read_rows` does, and PipelineError where
        there are too few rows for one batch in every share."""
        self._require_batches()
        pieces = self._pieces(epoch, first * self.options.batch_size)
        for number, (tokens_BN, rows) in zip(range(first, len(self)), pieces, strict=False):
            yield ReaderBatch(
                tokens_BN, {field.name: _column(rows[field.name], field) for field in rows.schema}, number
            )

    def _require_batches(self) -> None:
        if self.options.drop_last and not len(self):
            where, size = storage.public_url(self.run.output.url), self.options.batch_size
            raise PipelineError(
                f"{where} has {self._num_rows:,} rows: no batch of {size} for each of {self.share.count} shares; take "
                "a smaller batch, fewer ranks or workers, or drop_last=False"
            )

    def _pieces(self, epoch: int, first_row: int) -> Iterator[_Piece]:
        rows = _Rows(self.options.batch_size)
        for window in self._windows(epoch, first_row):
            yield from rows.cut(window)
            del window  # the next but one is loaded while the next is used
        yield rows.rest()

    def _windows(self, epoch: int, first_row: int) -> Iterator[_Window]:
        """From the one that holds the first-row-th row of the share on, one loaded ahead."""
        options = self.options
        order = ShareOrder(
            self._rows_P, seed=options.seed, epoch=epoch, shuffle_rows=options.shuffle_rows, share=self.share
        )
        loading: deque[_Window] = deque()
        first = order.window_of(first_row)
        pool = ThreadPoolExecutor(self._threads, "read-tokens")
        try:
            for number in range(first, order.num_windows):
                num_given = max(0, first_row - order.first_row(number))
                loading.append(self._begin(pool, order.spans(number), order.row_order(number), num_given))
                if len(loading) > 1:
                    yield loading.popleft().loaded()
            while loading:
                yield loading.popleft().loaded()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _begin(
        self, pool: ThreadPoolExecutor, spans: Sequence[Span], order_W: NDArray[np.int64], num_given: int
    ) -> _Window:
        tokens_WN = np.empty((len(order_W), self.run.table.num_tokens), self.run.table.token_dtype)
        place_W = np.empty_like(order_W)  # where each row comes
        place_W[order_W] = np.arange(len(order_W))
        ends = np.cumsum([len(span) for span in spans])
        reads = [
            pool.submit(self._read, span, tokens_WN, place_W[end - len(span) : end])
            for span, end in zip(spans, ends.tolist(), strict=True)
        ]
        return _Window(tokens_WN, order_W, num_given, reads)

    def _read(self, span: Span, tokens_WN: NDArray[np.signedinteger[Any]], place_S: NDArray[np.int64]) -> pa.Table:
        """The tokens go where they come, the other columns come back."""
        part = self.run.parts[span.part]
        rows = self.run.read_rows(part, span.start, span.stop, ["tokens", *self._names])
        tokens_WN[place_S] = tokens_of(rows, self.run.table)
        return rows.drop_columns(["tokens"]).cast(self._schema)


@dataclass
class _Window:
    """Rows in the order in which they come, once they are loaded; `num_given` of them were given before."""

    tokens_WN: NDArray[np.signedinteger[Any]]
    order_W: NDArray[np.int64]
    num_given: int
    reads: list[Future[pa.Table]]
    columns: pa.Table = field(default_factory=lambda: pa.table({}))

    def loaded(self) -> _Window:
        rows = pa.concat_tables(read.result() for read in self.reads)
        self.columns = rows.combine_chunks().take(self.order_W) if rows.num_columns else rows
        self.reads = []
        return self


_Piece = tuple[NDArray[np.signedinteger[Any]], pa.Table]


class _Rows:
    """Cuts windows into batches; what is left of one begins the first batch of the next."""

    def __init__(self, size: int) -> None:
        self._size = self._missing = size
        self._pieces: list[_Piece] = []

    def cut(self, window: _Window) -> Iterator[_Piece]:
        start, end = window.num_given, len(window.tokens_WN)
        while start < end:
            tokens_BN = window.tokens_WN[start : start + self._missing].copy()  # a view would keep the window alive
            self._pieces.append((tokens_BN, window.columns.slice(start, len(tokens_BN))))
            start += len(tokens_BN)
            self._missing -= len(tokens_BN)
            if not self._missing:
                yield self.rest()

    def rest(self) -> _Piece:
        pieces, self._pieces, self._missing = self._pieces, [], self._size
        if len(pieces) == 1:
            return pieces[0]
        tokens, tables = zip(*pieces, strict=True)
        return np.concatenate(tokens), pa.concat_tables(tables)


def _column(values: pa.ChunkedArray, field: pa.Field) -> Column:
    """By its type alone, not by what happens to be in a batch."""
    if field.nullable or pa.types.is_large_string(field.type):
        found: list[Any] = values.to_pylist()
        return found
    return np.array(values.to_numpy())


def _with_long_texts(schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    """Of these columns; a plain string array ends at 2 GiB, which the captions of one window may be."""
    fields = [schema.field(name) for name in names]
    return pa.schema(
        [field.with_type(pa.large_string()) if pa.types.is_string(field.type) else field for field in fields]
    )


def require_state(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises RunMismatch where it has not the names of `wanted`."""
    if lacking := [name for name in wanted if name not in state]:
        raise RunMismatch(f"this is no state of a reader of tokens: it lacks {lacking[0]!r}")


def _require_same_order(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises RunMismatch naming what is different."""
    for name in now:
        if then.get(name) != now[name]:
            told = f"{name} was {then.get(name)!r} and is {now[name]!r}"
            raise RunMismatch(f"the state is of another order of the rows: {told}; {_NEXT_EPOCH}")


def _require_rows(run: TokenRun, num_rows: int) -> None:
    where = storage.public_url(run.output.url)
    if run.missing:
        more = f" and {len(run.missing) - 1:,} more" if len(run.missing) > 1 else ""
        what = f"tokens/{run.missing[0]}{more} is missing or damaged"
        raise Damaged(f"{where}: {what}; `dvae verify {where}` says what else")
    if not num_rows:
        raise PipelineError(f"{where} has no token rows yet; `dvae status {where}` says how far it is")


def _parts_hash(parts: Sequence[Part]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.name}\0{part.num_rows}\0{part.size_bytes}\n".encode())
    return digest.hexdigest()[:16]
