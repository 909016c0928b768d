"""Minibatches of cells for training, and blocks of cells for inference.

The training stream is infinite and its state is one number: minibatch n is fully determined by the seed, the train
cells, and the sizes below, so a run that resumes at n gets what an uninterrupted run would have got, without reading
anything before n.

Cells are read through scDataset's block shuffling (D'Ascenzo and Cultrera di Montesano, arXiv:2506.01883): blocks of
neighbouring cells in random order, several minibatches per read, shuffled within the read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scdataset import BlockShuffling, scDataset
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from scdiva.errors import ScdivaError, SourceError
from scdiva.types import CellCollection, CellCounts, Inputs

Prepare = Callable[[CellCounts, np.random.Generator], Any]

# Streams of randomness that share one seed must not overlap: each use has its own tag.
_ORDER_STREAM, _PREPARE_STREAM, _FIXED_STREAM, _SUBSET_STREAM = range(4)


@dataclass(frozen=True, slots=True)
class Minibatch:
    """What one training step sees.

    Parameters
    ----------
    inputs
        What the objective's ``prepare`` returned.
    cell_index
        ``(B,)`` int64: the cells, as positions in the collection.
    number
        Number of the minibatch over all processes; process r of R takes step s with minibatch ``s * R + r``.
    """

    inputs: Inputs
    cell_index: NDArray[np.int64]
    number: int

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.cell_index)

    def to(self, device: torch.device) -> Minibatch:
        """Return the same minibatch with its inputs on another device."""
        return Minibatch(self.inputs.to(device), self.cell_index, self.number)


class MinibatchLoader:
    """An infinite, exactly resumable stream of minibatches; iterate over it.

    Within one epoch every cell comes at most once; the cells that would make a last, smaller minibatch are left out of
    that epoch, others in each. A corpus smaller than ``batch_size`` makes one minibatch of all its cells.

    Parameters
    ----------
    collection
        Where cells are read. Worker processes each get a copy (by fork, or pickled).
    indices
        The cells to train on, as positions in the collection, in any order.
    prepare
        ``Objective.prepare``; called with a generator of its own for each minibatch.
    batch_size
        Cells per minibatch and process.
    seed
        Seed of the order and of ``prepare``.
    block_size
        Neighbouring cells that stay together when the order is shuffled.
    fetch_factor
        Minibatches per read; less where the corpus is too small to give every process and worker a read.
    num_workers
        Worker processes that read and prepare; 0: the calling process. The order of minibatches depends on it.
    rank, world_size
        This process and the number of processes; their shares of an epoch are disjoint. A process whose share is one
        read smaller begins its next epoch earlier.
    start
        The first step to give: 0, or the step to resume at.
    start_method
        How workers start ("fork", "spawn", "forkserver"); None: the platform's default.

    Attributes
    ----------
    batch_size, fetch_factor, num_workers
        The sizes in use: what was asked for, or less for a small corpus.

    Raises
    ------
    SourceError
        There are fewer cells than processes.
    """

    def __init__(
        self,
        collection: CellCollection,
        indices: NDArray[np.integer] | Sequence[int],
        prepare: Prepare,
        *,
        batch_size: int,
        seed: int,
        block_size: int = 16,
        fetch_factor: int = 16,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        start_method: str | None = None,
    ) -> None:
        # Sorted, so that blocks are neighbours on disk (and scDataset has nothing to warn about).
        cells = np.sort(np.asarray(indices, dtype=np.int64))
        if len(cells) < world_size:
            raise SourceError(
                f"{len(cells)} cells to train on, for {world_size} processes",
                expected="at least one cell per process",
                fix="train on more cells or on fewer devices",
            )
        self.batch_size = min(batch_size, len(cells) // world_size)
        # Every worker of every process needs at least one read per epoch, or its stream would stand still.
        n_batches = len(cells) // self.batch_size
        self.num_workers = min(num_workers, n_batches // world_size)
        self.fetch_factor = min(fetch_factor, n_batches // (world_size * max(1, self.num_workers)))
        self._start_method = start_method
        self._stream = _Stream(
            collection, cells, prepare, self.batch_size, seed, block_size, self.fetch_factor, rank, world_size, start
        )

    def __iter__(self) -> Iterator[Minibatch]:
        """Yield the minibatches of step ``start``, ``start + 1``, ... of this process."""
        source: Iterable[Minibatch | _Failure | None] = self._stream
        if self.num_workers:
            source = DataLoader(
                self._stream,
                batch_size=None,
                num_workers=self.num_workers,
                collate_fn=_unchanged,
                multiprocessing_context=self._start_method,
                # Without its own generator, DataLoader would draw from torch's global one.
                generator=torch.Generator(),
            )
        for item in source:
            if isinstance(item, _Failure):
                raise item.kind(item.found, expected=item.expected, fix=item.fix)
            if item is not None:
                yield item


def fixed_minibatches(
    collection: CellCollection,
    indices: NDArray[np.integer] | Sequence[int],
    prepare: Prepare,
    *,
    batch_size: int,
    seed: int,
    max_cells: int | None = None,
) -> list[Minibatch]:
    """Prepare the same minibatches every time, for evaluation.

    Parameters
    ----------
    collection, indices, prepare, batch_size, seed
        As for :class:`MinibatchLoader`.
    max_cells
        Where there are more cells, a random choice of this many, fixed by the seed.

    Returns
    -------
    list of Minibatch
        In the order of the collection; the last one may be smaller.
    """
    cells = np.sort(np.asarray(indices, dtype=np.int64))
    if max_cells is not None and len(cells) > max_cells:
        cells = np.sort(np.random.default_rng([seed, _SUBSET_STREAM]).choice(cells, max_cells, replace=False))
    minibatches = []
    for number, begin in enumerate(range(0, len(cells), batch_size)):
        chosen = cells[begin : begin + batch_size]
        rng = np.random.default_rng([seed, _FIXED_STREAM, number])
        minibatches.append(Minibatch(prepare(collection.read(chosen), rng), chosen, number))
    return minibatches


def ordered_blocks(
    collection: CellCollection,
    block_size: int,
    *,
    indices: NDArray[np.integer] | Sequence[int] | None = None,
    prefetch: bool = True,
) -> Iterator[CellCounts]:
    """Read cells in order, block by block, in flat memory.

    Parameters
    ----------
    collection
        Where cells are read.
    block_size
        Cells per block; the last block may be smaller.
    indices
        The cells, in the order to give them; None: all.
    prefetch
        Read the next block in a thread while the caller works on this one. At most two blocks are in memory.

    Yields
    ------
    CellCounts
        The next block.
    """
    cells = np.arange(len(collection)) if indices is None else np.asarray(indices, dtype=np.int64)
    blocks = [cells[begin : begin + block_size] for begin in range(0, len(cells), block_size)]
    if not prefetch or len(blocks) < 2:
        yield from map(collection.read, blocks)
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="scdiva-read") as pool:
        ahead = pool.submit(collection.read, blocks[0])
        for block in blocks[1:]:
            current = ahead.result()
            ahead = pool.submit(collection.read, block)
            yield current
            del current
        yield ahead.result()


@dataclass(frozen=True, slots=True)
class _Failure:
    """A ScdivaError on its way out of a worker: PyTorch would turn it into a RuntimeError with a traceback as text."""

    kind: type[ScdivaError]
    found: str
    expected: str
    fix: str


class _Fetch:
    """Cells of one read; they are read when first used, so that skipping minibatches reads nothing."""

    def __init__(self, collection: CellCollection, indices: NDArray[np.int64]) -> None:
        self.collection = collection
        self.indices = indices
        self._cells: CellCounts | None = None

    def take(self, rows: NDArray[np.integer]) -> CellCounts:
        if self._cells is None:
            self._cells = self.collection.read(self.indices)
        return self._cells.take(rows)


class _WholeMinibatches(BlockShuffling):
    """Block shuffling that leaves the cells of a last, smaller minibatch out of the epoch."""

    def __init__(self, block_size: int, indices: NDArray[np.int64], n_cells: int) -> None:
        super().__init__(block_size=block_size, indices=indices)
        self._n_cells = n_cells

    def get_len(self, data_collection: CellCollection) -> int:
        return self._n_cells

    def get_indices(
        self, data_collection: CellCollection, seed: int | None = None, rng: np.random.Generator | None = None
    ) -> NDArray[np.int64]:
        return super().get_indices(data_collection, seed=seed, rng=rng)[: self._n_cells]


@dataclass(frozen=True, eq=False)
class _Stream(IterableDataset):
    """What runs in one worker. With W workers, step n comes from worker n % W, because DataLoader takes turns."""

    collection: CellCollection
    cells: NDArray[np.int64]
    prepare: Prepare
    batch_size: int
    seed: int
    block_size: int
    fetch_factor: int
    rank: int
    world_size: int
    start: int

    def __iter__(self) -> Iterator[Minibatch | _Failure | None]:
        worker = get_worker_info()
        worker_id, n_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        n_done = self.start // n_workers
        try:
            for position, (fetch, rows) in zip(count(n_done), self._plans(n_done), strict=False):
                step = position * n_workers + worker_id
                if step < self.start:
                    yield None  # keeps the turns in step when the start is not a multiple of W
                    continue
                number = step * self.world_size + self.rank
                rng = np.random.default_rng([self.seed, _PREPARE_STREAM, number])
                yield Minibatch(self.prepare(fetch.take(rows), rng), fetch.indices[rows], number)
        except ScdivaError as error:
            if worker is None:
                raise
            yield _Failure(type(error), error.found, error.expected, error.fix)

    def _plans(self, skip: int) -> Iterator[tuple[_Fetch, NDArray[np.integer]]]:
        """Yield (read, rows) of this worker's minibatches after the first ``skip``."""
        epoch = 0
        if skip:
            # All epochs have as many minibatches; only scDataset knows how many of them are this worker's.
            epoch, skip = divmod(skip, sum(1 for _ in self._epoch(0)))
        while True:
            yield from islice(self._epoch(epoch), skip, None)
            epoch, skip = epoch + 1, 0

    def _epoch(self, epoch: int) -> scDataset:
        # A seed per epoch, rather than scDataset's own counter, so that any epoch can be entered directly.
        seed = int(np.random.SeedSequence([self.seed, _ORDER_STREAM, epoch]).generate_state(1)[0])
        n_cells = len(self.cells) // self.batch_size * self.batch_size
        return scDataset(
            self.collection,
            _WholeMinibatches(self.block_size, self.cells, n_cells),
            batch_size=self.batch_size,
            fetch_factor=self.fetch_factor,
            fetch_callback=_Fetch,
            batch_callback=_pair,
            rank=self.rank,
            world_size=self.world_size,
            seed=seed,
        )


def _pair(fetch: _Fetch, rows: NDArray[np.integer]) -> tuple[_Fetch, NDArray[np.integer]]:
    return fetch, rows


def _unchanged(item: Any) -> Any:
    return item
