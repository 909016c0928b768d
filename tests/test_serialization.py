from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import twins
from scdiva.data.statistics import GeneStatistics
from scdiva.serialization import TokenOrder, collate, log1p_cp10k, serialize, to_counts, token_ranks
from scdiva.types import CellCounts

COUNTS = arrays(np.int32, st.tuples(st.integers(1, 6), st.just(9)), elements=st.integers(0, 40) | st.just(0))
ORDERS = st.sampled_from(["entropy", "expression"])


@pytest.fixture(scope="module")
def corpus() -> np.ndarray:
    return np.random.default_rng(0).negative_binomial(1, 0.3, (40, 9)) * (np.arange(9) != 4)


@pytest.fixture(scope="module")
def statistics(corpus) -> GeneStatistics:
    return GeneStatistics.from_cells(twins.cell_counts(corpus))


@settings(max_examples=25, deadline=None)
@given(dense=COUNTS, outside=st.integers(0, 30), max_tokens=st.integers(1, 11), order=ORDERS)
def test_tokens_equal_a_sort_per_cell(dense, outside, max_tokens, order, corpus, statistics):
    library = dense.sum(axis=1) + outside
    tokens = serialize(twins.cell_counts(dense, library), statistics, max_tokens=max_tokens, order=order)
    entropy = twins.normalised_entropy(corpus)
    expected = [twins.tokens_of_cell(row, n, entropy, max_tokens, order) for row, n in zip(dense, library, strict=True)]
    assert tokens.gene_id_BL.shape == (len(dense), max(map(len, expected)))
    for i, cell in enumerate(expected):
        n = len(cell)
        assert list(tokens.gene_id_BL[i, :n]) == [row for row, _, _ in cell]
        np.testing.assert_allclose(tokens.value_BL[i, :n], [value for _, value, _ in cell], rtol=1e-6)
        assert list(tokens.count_BL[i, :n]) == [count for _, _, count in cell]
        assert not tokens.is_pad_BL[i, :n].any()
        assert tokens.is_pad_BL[i, n:].all()
        for padded in (tokens.gene_id_BL, tokens.value_BL, tokens.count_BL):
            assert (padded[i, n:] == 0).all()
    np.testing.assert_array_equal(tokens.n_detected_B, (dense > 0).sum(axis=1))
    np.testing.assert_array_equal(tokens.is_truncated_B, (dense > 0).sum(axis=1) > max_tokens)


@settings(max_examples=25, deadline=None)
@given(dense=COUNTS, order=ORDERS, max_tokens=st.integers(1, 9), seed=st.integers(0, 50))
def test_a_cell_gets_the_same_tokens_whatever_its_company(dense, order, max_tokens, seed, statistics):
    cells = twins.cell_counts(dense)
    together = serialize(cells, statistics, max_tokens=max_tokens, order=order)
    shuffled = np.random.default_rng(seed).permutation(len(dense))
    apart = collate(
        [serialize(cells.take(np.array([i])), statistics, max_tokens=max_tokens, order=order) for i in shuffled]
    )
    for name in ("gene_id_BL", "value_BL", "count_BL", "is_pad_BL", "n_detected_B"):
        np.testing.assert_array_equal(getattr(apart, name), getattr(together, name)[shuffled])


@settings(max_examples=25, deadline=None)
@given(dense=COUNTS, seed=st.integers(0, 50))
def test_renumbering_the_genes_changes_numbers_only(dense, seed, statistics, corpus):
    # distinct scores: with ties the order of the vocabulary decides, by design
    genes = np.random.default_rng(seed).permutation(9)
    tokens = serialize(twins.cell_counts(dense), statistics, max_tokens=9)
    moved = serialize(twins.cell_counts(dense[:, genes]), statistics.take(genes), max_tokens=9)
    for i, row in enumerate(dense):
        n = (row > 0).sum()
        original = genes[moved.gene_id_BL[i, :n] - 2] + 2
        assert set(original) == set(tokens.gene_id_BL[i, :n])
        weight = 1 / (statistics.normalised_entropy + 0.05)
        scores = [v * weight[g - 2] for g, v in zip(original, moved.value_BL[i, :n], strict=True)]
        assert (np.diff(scores) <= 1e-5 * np.abs(scores[:-1])).all()


@settings(max_examples=25, deadline=None)
@given(dense=COUNTS, order=st.sampled_from(list(TokenOrder)))
def test_tokens_go_back_to_the_counts(dense, order, statistics):
    tokens = serialize(twins.cell_counts(dense), statistics, order=order, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(to_counts(tokens, 9).toarray(), dense)


def test_truncated_genes_are_absent_not_changed(statistics):
    dense = np.arange(1, 10)[None]
    tokens = serialize(twins.cell_counts(dense), statistics, max_tokens=3, order="expression")
    np.testing.assert_array_equal(to_counts(tokens, 9).toarray(), np.where(dense >= 7, dense, 0))


def test_equal_scores_keep_the_order_of_the_vocabulary(statistics):
    tokens = serialize(twins.cell_counts(np.full((3, 9), 4)), statistics, max_tokens=5, order="expression")
    np.testing.assert_array_equal(tokens.gene_id_BL, np.tile(np.arange(2, 7), (3, 1)))


def test_genes_of_few_cells_come_before_housekeeping_genes():
    corpus = np.zeros((100, 3), dtype=int)
    corpus[:, 0] = 10  # everywhere
    corpus[:5, 1] = 10  # in five cells
    corpus[:, 2] = 90
    statistics = GeneStatistics.from_cells(twins.cell_counts(corpus, np.full(100, 200)))
    cell = twins.cell_counts(np.array([[12, 9, 0]]))
    assert list(serialize(cell, statistics).gene_id_BL[0]) == [3, 2]
    assert list(serialize(cell, statistics, order="expression").gene_id_BL[0]) == [2, 3]


def test_random_order_is_seeded_and_keeps_a_random_subset(statistics):
    cells = twins.cell_counts(np.ones((200, 9)))

    def kept(seed):
        return serialize(cells, statistics, max_tokens=3, order="random", rng=np.random.default_rng(seed)).gene_id_BL

    np.testing.assert_array_equal(kept(1), kept(1))
    assert (kept(1) != kept(2)).any()
    frequency = np.bincount(kept(1).ravel() - 2, minlength=9) / 200
    np.testing.assert_allclose(frequency, 1 / 3, atol=0.14)  # four standard errors
    with pytest.raises(ValueError, match="rng"):
        serialize(cells, statistics, order="random")


def test_blocks_beyond_one_integer_key_are_ranked_alike():
    import scdiva.serialization as module

    # one long row takes 17 bits of the key, which leaves 15 bits for the rows of one sort
    n_stored = np.concatenate([np.full(40_000, 2), [70_000]])
    score = np.random.default_rng(0).random(n_stored.sum(), dtype=np.float32)
    ranked = module._rank_within_rows(score, n_stored)
    pairs = np.argsort(-score[:80_000].reshape(-1, 2), axis=1, kind="stable") + np.arange(0, 80_000, 2)[:, None]
    np.testing.assert_array_equal(ranked[:80_000].reshape(-1, 2), pairs)
    np.testing.assert_array_equal(ranked[80_000:], 80_000 + np.argsort(-score[80_000:], kind="stable"))


def test_no_cells_and_empty_cells_have_no_tokens(statistics):
    cells = twins.cell_counts(np.array([[0] * 9, [0, 3] + [0] * 7]))
    tokens = serialize(cells, statistics)
    assert tokens.gene_id_BL.tolist() == [[0], [3]]
    assert serialize(cells.take(np.array([0])), statistics).gene_id_BL.shape == (1, 0)
    assert serialize(cells.take(np.array([], dtype=int)), statistics).n_cells == 0


def test_wrong_sizes_are_refused(statistics):
    with pytest.raises(ValueError, match="8 genes"):
        serialize(twins.cell_counts(np.ones((2, 8))), statistics)
    with pytest.raises(ValueError, match="max_tokens"):
        serialize(twins.cell_counts(np.ones((2, 9))), statistics, max_tokens=0)
    with pytest.raises(ValueError, match="by_name"):
        serialize(twins.cell_counts(np.ones((2, 9))), statistics, order="by_name")


def test_query_cells_never_change_the_statistics(statistics):
    before = statistics.normalised_entropy.copy()
    cells = twins.cell_counts(np.random.default_rng(5).poisson(50, (30, 9)))
    assert isinstance(cells, CellCounts)
    serialize(cells, statistics)
    np.testing.assert_array_equal(statistics.normalised_entropy, before)


@settings(max_examples=25, deadline=None)
@given(dense=COUNTS, outside=st.integers(0, 30), order=ORDERS)
def test_ranks_are_the_places_of_the_tokens(dense, outside, order, statistics):
    cells = twins.cell_counts(dense, dense.sum(axis=1) + outside)
    ranks = token_ranks(cells, statistics, order=order)
    tokens = serialize(cells, statistics, order=order)
    assert ranks.shape == (cells.counts.nnz,)
    cell = np.repeat(np.arange(len(dense)), (dense > 0).sum(axis=1))
    # the token at its rank is the gene it belongs to
    np.testing.assert_array_equal(tokens.gene_id_BL[cell, ranks] - 2, cells.counts.indices)


def test_ranks_may_follow_other_values(statistics):
    cells = twins.cell_counts(np.array([[5, 0, 7, 9], [0, 1, 0, 0], [0, 0, 0, 0]]).repeat(3, axis=1)[:, :9])
    value = np.arange(cells.counts.nnz, dtype=np.float32)[::-1].copy()
    ranks = token_ranks(cells, statistics, order="expression", value=value)
    lengths = np.diff(cells.counts.indptr)
    np.testing.assert_array_equal(ranks, np.concatenate([np.arange(n) for n in lengths]))
    own = token_ranks(cells, statistics, order="expression", value=log1p_cp10k(cells))
    np.testing.assert_array_equal(own, token_ranks(cells, statistics, order="expression"))
    assert (own != ranks).any()


def test_random_ranks_are_a_seeded_permutation_of_each_cell(statistics):
    cells = twins.cell_counts(np.ones((50, 9)) * (np.arange(50)[:, None] % 10 > np.arange(9)))
    ranks = token_ranks(cells, statistics, order="random", rng=np.random.default_rng(0))
    for first, last in zip(cells.counts.indptr, cells.counts.indptr[1:], strict=False):
        assert sorted(ranks[first:last]) == list(range(last - first))
    again = token_ranks(cells, statistics, order="random", rng=np.random.default_rng(0))
    np.testing.assert_array_equal(ranks, again)
    assert (ranks != token_ranks(cells, statistics, order="random", rng=np.random.default_rng(1))).any()
    with pytest.raises(ValueError, match="rng"):
        token_ranks(cells, statistics, order="random")


def test_no_cells_have_no_ranks(statistics):
    assert token_ranks(twins.cell_counts(np.zeros((2, 9))), statistics).shape == (0,)
    assert token_ranks(twins.cell_counts(np.zeros((0, 9))), statistics).shape == (0,)
