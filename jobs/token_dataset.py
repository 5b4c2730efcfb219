"""Token rows as torch sees them: an IterableDataset over pipeline/token_reader.py, and a loader that can be resumed.

Thin: which row comes when, reading and shuffling are the reader's. Here are ranks, DataLoader workers and tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import distributed
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.errors import RunMismatch
from pipeline.token_order import Share
from pipeline.token_reader import SHUFFLE_ROWS, ReaderBatch, ReaderOptions, TokenReader, require_state
from pipeline.token_run import TokenRun

# B rows of a batch, N = H * W tokens of a row


OURS = ("batch_size", "shuffle", "sampler", "batch_sampler", "collate_fn", "drop_last", "in_order")


class TokenRows(NamedTuple):
    """One batch. `tokens`: (B, N), the grid row by row. `columns`: of each a tensor (B,), or a list with None where it
    holds strings or may be null. `state`: where this rank is after this batch; JSON."""

    tokens: torch.Tensor
    columns: dict[str, torch.Tensor | list[Any]]
    state: dict[str, Any]


class TokenDataset(IterableDataset[TokenRows]):
    """A run's token rows for training: this rank's share, in whole batches, so for a DataLoader with `batch_size=None`,
    as TokenLoader is. Without `rank` and `world_size` they are those of torch.distributed, and rank 0 alone opens the
    run, for all must see the same parts even while it grows: every rank makes its dataset then.

    Every row comes once in an epoch, so ranks may differ by a batch; where they must not, as in
    DistributedDataParallel, `drop_last` leaves out up to a batch of each worker of each rank. A plain DataLoader has to
    be told of each epoch by `set_epoch`; TokenLoader goes on by itself."""

    def __init__(
        self,
        run: str | TokenRun,
        *,
        batch_size: int,
        columns: Sequence[str] = (),
        seed: int = 0,
        shuffle_rows: int = SHUFFLE_ROWS,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        dtype: torch.dtype = torch.int64,
        threads: int = 2,
    ) -> None:
        """For `seed`, `shuffle_rows` and `drop_last` see ReaderOptions. Raises NoRun, PipelineError where the run has
        no rows or not these columns, Damaged where parts are missing, StorageError."""
        if isinstance(columns, str):
            raise ValueError(f"columns is a list of names: write [{columns!r}]")
        if (rank is None) != (world_size is None):
            raise ValueError("rank and world_size go together")
        self._rank, self._world_size = _rank() if rank is None or world_size is None else (rank, world_size)
        self.run = _opened_by_all(run) if rank is None else _opened(run)
        options = ReaderOptions(batch_size, tuple(columns), seed, shuffle_rows, drop_last)
        self._reader = TokenReader(self.run, options, threads=threads)
        self._dtype = dtype
        self._place = torch.zeros(2, dtype=torch.int64)
        # Workers look here when they begin, those that stay alive too. Not to be touched while they work.
        self._place.share_memory_()  # type: ignore[no-untyped-call]
        self._num_workers: int | None = None  # of the state that was loaded

    @property
    def epoch(self) -> int:
        return int(self._place[0])

    def set_epoch(self, epoch: int, num_batches: int = 0) -> None:
        """The next `iter` begins here, behind so many batches of this rank."""
        self._num_workers = None
        self._place.numpy()[:] = epoch, num_batches

    def num_batches(self, num_workers: int = 0) -> int:
        """Of an epoch, for this rank."""
        count = max(1, num_workers)
        return sum(len(self._reader_of(worker, count)) for worker in range(count))

    def state_dict(self, num_workers: int = 0) -> dict[str, Any]:
        """Where the next `iter` begins."""
        epoch, taken = self._place.tolist()
        count = max(1, num_workers)
        return _state(epoch, taken, count, self._reader_of(0, count).order())

    def load_state_dict(self, state: Mapping[str, Any], num_workers: int | None = None) -> None:
        """Go on behind the batch that the state came with. In the middle of an epoch it raises RunMismatch where the
        state is of other rows, options or number of ranks or, at once or in `iter`, of workers."""
        require_state(state, self.state_dict())
        then = state["num_workers"] if state["num_batches"] else None
        if num_workers is not None:
            _require_workers(then, max(1, num_workers))
        self._reader_of(0, state["num_workers"]).load_state_dict(state)
        self.set_epoch(state["epoch"], state["num_batches"])
        self._num_workers = then

    def __iter__(self) -> Iterator[TokenRows]:
        """The rest of the epoch. DataLoader asks its workers in turn, the first one first: behind `taken` batches that
        one gives what the worker whose turn it is would have given."""
        info = get_worker_info()
        count, worker = (1, 0) if info is None else (info.num_workers, info.id)
        epoch, taken = self._place.tolist()
        _require_workers(self._num_workers, count)
        own = (worker + taken) % count
        reader, total = self._reader_of(own, count), self.num_batches(count)
        order = reader.order()
        for batch in reader.batches(epoch, -(-(taken - own) // count)):
            done = batch.number * count + own + 1
            where, taken = (epoch + 1, 0) if done == total else (epoch, done)
            if info is None:
                self.set_epoch(where, taken)
            yield self._rows(batch, _state(where, taken, count, order))

    def _reader_of(self, worker: int, num_workers: int) -> TokenReader:
        return self._reader.of_share(Share(self._rank * num_workers + worker, self._world_size * num_workers))

    def _rows(self, batch: ReaderBatch, state: dict[str, Any]) -> TokenRows:
        columns = {
            name: values if isinstance(values, list) else torch.from_numpy(values)
            for name, values in batch.columns.items()
        }
        return TokenRows(torch.from_numpy(batch.tokens_BN).to(self._dtype), columns, state)


class TokenLoader:
    """A DataLoader of a TokenDataset that knows where it is. Iterating gives the rest of the epoch, and then the next
    one; `state_dict()` is that after the batch last given, whatever the workers have made ahead."""

    def __init__(self, dataset: TokenDataset, num_workers: int = 0, **options: Any) -> None:
        """`options`: DataLoader's, such as pin_memory and prefetch_factor. Raises ValueError for those that would
        change which row is in which batch."""
        if ours := [name for name in OURS if name in options]:
            raise ValueError(f"TokenLoader decides {ours[0]} itself; batch_size and drop_last are TokenDataset's")
        self.dataset, self.num_workers = dataset, num_workers
        self._state = dataset.state_dict(num_workers)
        self._loader: DataLoader[TokenRows] = DataLoader(
            dataset, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is, **options
        )

    @property
    def epoch(self) -> int:
        return int(self._state["epoch"])

    def __len__(self) -> int:
        """Batches of an epoch, for this rank."""
        return self.dataset.num_batches(self.num_workers)

    def __iter__(self) -> Iterator[TokenRows]:
        epoch = self.epoch
        self.dataset.set_epoch(epoch, self._state["num_batches"])
        for batch in self._loader:
            self._state = batch.state
            yield batch
        if self.epoch == epoch:  # there was no batch for this rank
            self.set_epoch(epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """The next `iter` begins it."""
        self._state = {**self._state, "epoch": epoch, "num_batches": 0}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises RunMismatch, as the dataset's does."""
        self.dataset.load_state_dict(state, self.num_workers)
        self._state = self.dataset.state_dict(self.num_workers)


def _require_workers(then: int | None, now: int) -> None:
    if then not in (None, now):
        remedy = "take as many, or begin the next epoch with set_epoch"
        raise RunMismatch(f"the state is of {then} DataLoader workers, here are {now}: {remedy}")


def _as_it_is(batch: Any) -> Any:
    return batch


def _state(epoch: int, num_batches: int, num_workers: int, order: dict[str, Any]) -> dict[str, Any]:
    return {"epoch": epoch, "num_batches": num_batches, "num_workers": num_workers, "order": order}


def _rank() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _opened(run: str | TokenRun) -> TokenRun:
    return TokenRun.open(run) if isinstance(run, str) else run


def _opened_by_all(run: str | TokenRun) -> TokenRun:
    """As rank 0 sees it; what it raises, all raise."""
    rank, world_size = _rank()
    if world_size == 1:
        return _opened(run)
    found: list[TokenRun | Exception | None] = [_opened_or_error(run) if rank == 0 else None]
    distributed.broadcast_object_list(found)
    if isinstance(found[0], TokenRun):
        return found[0]
    assert found[0] is not None
    raise found[0]


def _opened_or_error(run: str | TokenRun) -> TokenRun | Exception:
    try:
        return _opened(run)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait to hear of it
        return error
