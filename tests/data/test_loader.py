from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from scdiva.data.loader import Minibatch, MinibatchLoader, fixed_minibatches, ordered_blocks
from scdiva.errors import SourceError
from scdiva.types import CellCounts


class Cells:
    def __init__(self, n_cells: int, fails: bool = False) -> None:
        self.n_cells, self.fails, self.reads = n_cells, fails, []

    def __len__(self) -> int:
        return self.n_cells

    def read(self, indices: np.ndarray) -> CellCounts:
        if self.fails:
            raise SourceError("the file is gone", expected="a file", fix="bring it back")
        self.reads.append(np.asarray(indices))
        n = len(indices)
        counts = sp.csr_matrix(np.asarray(indices, dtype=np.int32)[:, None] + 1)
        return CellCounts(counts, np.ones(n), np.asarray(indices), np.zeros(n, np.int32), np.ones((1, 1), bool))

    def describe(self, indices: list[int]) -> str:
        return str(indices)


@dataclass(frozen=True)
class Prepared:
    count: torch.Tensor
    noise: torch.Tensor

    def to(self, device: torch.device) -> Prepared:
        return Prepared(self.count.to(device), self.noise.to(device))


def prepare(cells: CellCounts, rng: np.random.Generator) -> Prepared:
    return Prepared(torch.from_numpy(cells.counts.toarray()[:, 0]), torch.from_numpy(rng.normal(size=cells.n_cells)))


def loader(n_cells: int = 128, indices: np.ndarray | None = None, **options) -> MinibatchLoader:
    settings = {"batch_size": 8, "seed": 1, "block_size": 4, "fetch_factor": 2} | options
    cells = settings.pop("cells", None) or Cells(n_cells)
    return MinibatchLoader(cells, np.arange(n_cells) if indices is None else indices, prepare, **settings)


def take(stream: MinibatchLoader, n: int) -> list[Minibatch]:
    return list(islice(stream, n))


def assert_equal(left: list[Minibatch], right: list[Minibatch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.number == b.number
        np.testing.assert_array_equal(a.cell_index, b.cell_index)
        assert torch.equal(a.inputs.count, b.inputs.count)
        assert torch.equal(a.inputs.noise, b.inputs.noise)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_resumed_stream_equals_the_uninterrupted_one(workers):
    # 128 cells are 16 minibatches per epoch: the starts lie inside a read, between workers and two epochs on.
    whole = take(loader(num_workers=workers), 44)
    assert [minibatch.number for minibatch in whole] == list(range(44))
    for start in (1, 5, 16, 37):
        assert_equal(take(loader(num_workers=workers, start=start), 44 - start), whole[start:])


def test_same_stream_when_iterated_twice():
    stream = loader()
    assert_equal(take(stream, 20), take(stream, 20))


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_workers_can_be_spawned(start_method):
    whole = take(loader(num_workers=2), 5)
    assert_equal(take(loader(num_workers=2, start_method=start_method), 5), whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_inputs_belong_to_the_named_cells(workers):
    for minibatch in take(loader(num_workers=workers), 20):
        np.testing.assert_array_equal(minibatch.inputs.count.numpy(), minibatch.cell_index + 1)


def test_skipping_reads_nothing():
    cells = Cells(128)
    take(loader(cells=cells, start=1000), 1)
    assert len(cells.reads) == 1


def test_every_cell_once_per_epoch_and_epochs_differ():
    chosen = np.arange(0, 256, 2)
    minibatches = take(loader(256, indices=chosen), 32)
    epochs = [np.concatenate([m.cell_index for m in part]) for part in (minibatches[:16], minibatches[16:])]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), chosen)
    assert not np.array_equal(*epochs)


def test_left_out_cells_differ_between_epochs():
    minibatches = take(loader(100), 12 * 30)
    epochs = [np.concatenate([m.cell_index for m in minibatches[i : i + 12]]) for i in range(0, 360, 12)]
    assert all(len(np.unique(epoch)) == 96 for epoch in epochs)
    assert len(np.unique(np.concatenate(epochs))) == 100


def test_seeds_give_other_orders_and_other_noise():
    first, second = take(loader(seed=1), 3), take(loader(seed=2), 3)
    assert not np.array_equal(first[0].cell_index, second[0].cell_index)
    assert not torch.equal(first[0].inputs.noise, first[1].inputs.noise)


def test_global_random_state_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    take(loader(num_workers=2), 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("error")
def test_reads_are_sorted_whole_blocks_whatever_the_order_of_the_indices():
    cells = Cells(128)
    shuffled = np.random.default_rng(0).permutation(128)
    take(loader(cells=cells, indices=shuffled), 16)
    for read in cells.reads:
        assert np.all(np.diff(read) > 0)
        blocks = read.reshape(-1, 4)
        assert np.all(np.diff(blocks, axis=1) == 1)
        assert np.all(blocks[:, 0] % 4 == 0)


@pytest.mark.parametrize("n_cells", [1, 3, 8, 9, 17])
@pytest.mark.parametrize("workers", [0, 2])
def test_tiny_corpora(n_cells, workers):
    minibatches = take(loader(n_cells, num_workers=workers), 6)
    assert [m.number for m in minibatches] == list(range(6))
    assert all(m.n_cells == min(8, n_cells) for m in minibatches)
    assert all(len(np.unique(m.cell_index)) == m.n_cells for m in minibatches)


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_an_epoch(workers):
    ranks = [take(loader(num_workers=workers, rank=rank, world_size=2), 8) for rank in (0, 1)]
    seen = np.concatenate([m.cell_index for rank in ranks for m in rank])
    np.testing.assert_array_equal(np.sort(seen), np.arange(128))
    assert [m.number for m in ranks[1]] == list(range(1, 16, 2))


def test_fewer_cells_than_processes_is_refused():
    with pytest.raises(SourceError, match="1 cells"):
        loader(1, world_size=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_the_collection_arrive_unchanged(workers):
    with pytest.raises(SourceError) as caught:
        take(loader(cells=Cells(128, fails=True), num_workers=workers), 1)
    assert (caught.value.found, caught.value.fix) == ("the file is gone", "bring it back")


def test_minibatch_moves_its_inputs():
    moved = take(loader(), 1)[0].to(torch.device("meta"))
    assert moved.inputs.count.device.type == "meta"
    assert moved.n_cells == 8


def test_fixed_minibatches_are_fixed_capped_and_spread():
    cells = Cells(1000)
    first, second = (
        fixed_minibatches(cells, np.arange(1000), prepare, batch_size=16, seed=3, max_cells=40) for _ in "ab"
    )
    assert_equal(first, second)
    assert [m.n_cells for m in first] == [16, 16, 8]
    chosen = np.concatenate([m.cell_index for m in first])
    assert chosen.max() > 500
    assert np.all(np.diff(chosen) > 0)
    assert sum(m.n_cells for m in fixed_minibatches(cells, np.arange(30), prepare, batch_size=16, seed=3)) == 30


@pytest.mark.parametrize("prefetch", [True, False])
def test_ordered_blocks(prefetch):
    cells = Cells(10)
    blocks = list(ordered_blocks(cells, 4, prefetch=prefetch))
    assert [block.n_cells for block in blocks] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([block.cell_index for block in blocks]), np.arange(10))
    some = ordered_blocks(cells, 2, indices=np.array([7, 2, 5]), prefetch=prefetch)
    np.testing.assert_array_equal(np.concatenate([block.cell_index for block in some]), [7, 2, 5])
    assert list(ordered_blocks(Cells(0), 4, prefetch=prefetch)) == []


def test_ordered_blocks_read_one_ahead_and_no_more():
    cells = Cells(100)
    blocks = ordered_blocks(cells, 10)
    next(blocks)
    deadline = time.monotonic() + 5
    while len(cells.reads) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(cells.reads) == 2
    blocks.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("scdiva-read")]
