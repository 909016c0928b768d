from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from scdiva.metrics import generation as metrics
from scdiva.metrics import generation_distances as distances
from scdiva.metrics import generation_genes as by_gene
from scdiva.metrics.generation_classifiers import CLASSIFIERS, TypeClassifier, accuracy_and_f1, c2st_auc
from scdiva.metrics.generation_space import (
    LabelledCells,
    NotMeasurableError,
    ReferenceSpace,
    Score,
    log_cp10k,
    variable_genes,
)

N_TYPES, N_GENES = 3, 150


def draw(n_per_type: int, seed: int, *, shift: float = 1.0) -> LabelledCells:
    """Poisson cells of three types that differ in ten genes each; ``shift`` multiplies every fifth gene."""
    rng = np.random.default_rng(seed)
    rate = np.random.default_rng(99).lognormal(0.0, 1.0, N_GENES) + np.zeros((N_TYPES, 1))
    for kind in range(N_TYPES):
        rate[kind, 10 * kind : 10 * kind + 10] *= 6
    rate[:, ::5] *= shift
    kinds = np.repeat(np.arange(N_TYPES), n_per_type)
    depth = rng.lognormal(0.0, 0.3, kinds.size)
    counts = rng.poisson(rate[kinds] * depth[:, None]).astype(np.int32)
    return LabelledCells(sp.csr_matrix(counts), np.array(["a", "b", "c"])[kinds])


@pytest.fixture(scope="module")
def reference() -> metrics.RealismReference:
    train = draw(140, seed=0)
    is_sample = np.arange(train.n_cells) % 140 < 60
    return metrics.RealismReference.fit(train, is_sample, seed=0)


@pytest.fixture(scope="module")
def heldout() -> LabelledCells:
    return draw(60, seed=1)


def judged(heldout, generated, reference, fewest=1000):
    return metrics.realism(heldout, generated, reference, seed=0, n_trees=12, min_cells_per_type=fewest)


@pytest.fixture(scope="module")
def same(heldout, reference):
    return judged(heldout, draw(60, seed=2), reference, fewest=50)


@pytest.fixture(scope="module")
def shifted(heldout, reference):
    return judged(heldout, draw(60, seed=2, shift=2.0), reference)


def test_cells_of_one_distribution_cannot_be_told_apart(same):
    pooled = {name: score.value for (scope, name), score in same.items() if scope == metrics.POOLED}
    for judge in CLASSIFIERS:
        for space in ("hvg", "pca"):
            assert pooled[f"c2st_{judge}_{space}"] == pytest.approx(0.5, abs=0.12)
    assert abs(pooled["mmd2"]) < 0.003
    assert abs(pooled["energy_distance"]) < 0.1
    for name in ("precision", "recall", "density", "coverage"):
        assert pooled[name] == pytest.approx(1.0, abs=0.2)
    assert pooled["ilisi"] > 0.8
    for name in ("pairwise_distance_ratio", "effective_cluster_ratio", "nearest_distance_ratio"):
        assert pooled[name] == pytest.approx(1.0, abs=0.12)
    assert pooled["nearer_to_train"] == pytest.approx(0.5, abs=0.12)
    assert pooled["closer_than_5_percent"] < 0.15
    assert pooled["conditional_accuracy"] > 0.95
    assert pooled["tstr_f1"] > 0.95
    assert pooled["spearman_mean"] > 0.95
    assert pooled["marker_fold_change"] > 0.4  # most of so few genes are no markers
    assert pooled["library_size_ks"] < 0.15
    assert pooled["n_copies"] == 0


def test_a_shifted_copy_is_detected(same, shifted):
    for (_, name), score in ((key, s) for key, s in shifted.items() if key[0] == metrics.POOLED):
        before = same[metrics.POOLED, name].value
        if name.startswith("c2st"):
            assert score.value > 0.7, name
        if name in ("mmd2", "energy_distance", "sliced_wasserstein"):
            assert score.value > before + 0.005, name
        if name in ("ilisi", "coverage", "spearman_mean", "pearson_zero_fraction"):
            assert score.value < before - 0.01, name
        if name in ("zero_fraction_error", "library_size_ks", "mean_variance_error"):
            assert score.value > 1.2 * before, name


def test_every_metric_of_the_table_is_there_and_nothing_else(same):
    assert {name for scope, name in same if scope == metrics.POOLED} == set(metrics.METRICS)
    assert {scope for scope, _ in same} == {metrics.POOLED, "a", "b", "c"}
    assert {name for scope, name in same if scope == "a"} < set(metrics.METRICS)


def test_scores_are_seeded(heldout, reference, same):
    again = judged(heldout, draw(60, seed=2), reference, fewest=50)
    assert {key: score.value for key, score in again.items() if np.isfinite(score.value)} == {
        key: score.value for key, score in same.items() if np.isfinite(score.value)
    }


def test_nan_always_has_a_reason(heldout, reference):
    few = heldout.take(np.array([0, 1, 2, 60, 61]))
    for scores in (
        judged(few, draw(3, seed=2), reference),
        judged(heldout, LabelledCells(sp.csr_matrix(np.zeros((180, N_GENES), np.int32)), heldout.labels), reference),
        judged(heldout.take(heldout.labels == "a"), draw(60, seed=2), reference),
    ):
        assert {name for scope, name in scores if scope == metrics.POOLED} == set(metrics.METRICS)
        for key, score in scores.items():
            assert np.isfinite(score.value) != bool(score.reason), key


def test_a_generator_without_a_held_out_type_has_reasons_only(heldout, reference):
    nobody = LabelledCells(heldout.counts, np.repeat("z", heldout.n_cells))
    scores = judged(heldout, nobody, reference)
    assert all(np.isnan(score.value) and score.reason for score in scores.values())


def test_space_is_fitted_on_the_cells_in_neither_sample(reference):
    """The trap: components fitted on the training cells would tell real from real."""
    train = reference.train
    is_third = np.arange(train.n_cells) % 140 >= 60
    expected = ReferenceSpace.fit(train.counts[is_third], seed=0)
    np.testing.assert_array_equal(reference.space.genes, expected.genes)
    np.testing.assert_array_equal(reference.space.components, expected.components)
    trapped = ReferenceSpace.fit(train.take(~is_third).counts, seed=0)
    assert np.abs(trapped.mean - reference.space.mean).max() > 0
    assert reference.third.n_cells + reference.sample.n_cells == train.n_cells


def test_the_trap_is_real():
    # genes without structure, fewer cells than genes: what PCA finds is the noise of the cells it was fitted on
    rng = np.random.default_rng(0)
    train, held, third = (sp.csr_matrix(rng.poisson(1.0, (120, 600))) for _ in range(3))
    auc = {}
    for name, fitted_on in (("trapped", train), ("honest", third)):
        space = ReferenceSpace.fit(fitted_on, seed=0)
        x, y = (space.project(space.values(c)) for c in (held, train))
        auc[name] = c2st_auc(x, y, classifier="forest", seed=0, n_trees=50)
    assert auc["trapped"] > 0.9
    assert auc["honest"] < 0.65


def test_copied_cells_are_found(heldout, reference):
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.choice(np.flatnonzero(reference.train.labels == k), 60) for k in "abc"])
    copied = judged(heldout, reference.train.take(rows), reference)
    assert copied[metrics.POOLED, "n_copies"].value == 180
    assert copied[metrics.POOLED, "nearer_to_train"].value > 0.6
    assert copied[metrics.POOLED, "closer_than_5_percent"].value > 0.3
    # ... and the judges that look at one sample only have nothing against them
    assert copied[metrics.POOLED, "c2st_forest_hvg"].value < 0.65


def test_the_ceiling_is_not_circular(heldout, reference):
    scores = metrics.ceiling(heldout, reference, seed=0, n_trees=12, min_cells_per_type=1000)
    pooled = {name: score.value for (scope, name), score in scores.items() if scope == metrics.POOLED}
    assert pooled["c2st_forest_hvg"] == pytest.approx(0.5, abs=0.12)
    assert pooled["n_copies"] == 0
    assert pooled["nearer_to_train"] == pytest.approx(0.5, abs=0.15)
    predicted = reference.classifier.predict(reference.space.values(heldout.counts))
    assert pooled["conditional_accuracy"] == accuracy_and_f1(predicted, heldout.labels)[0]


def test_wrong_types_are_noticed(heldout, reference):
    turned = LabelledCells(draw(60, seed=2).counts, np.roll(heldout.labels, 60))
    scores = judged(heldout, turned, reference, fewest=50)
    assert scores[metrics.POOLED, "conditional_accuracy"].value < 0.05
    assert scores[metrics.POOLED, "marker_fold_change"].value < 0
    assert scores[metrics.POOLED, "c2st_forest_hvg"].value < 0.65  # pooled, it cannot know
    assert scores["a", "c2st_forest_hvg"].value > 0.95


def test_a_type_that_collapsed_shows_in_diversity(heldout, reference):
    made = draw(60, seed=2)
    same_cell = made.take(np.repeat([0, 60, 120], 60))
    scores = judged(heldout, same_cell, reference, fewest=50)
    assert scores["a", "pairwise_distance_ratio"].value == 0.0
    assert scores[metrics.POOLED, "recall"].value < 0.2
    assert scores[metrics.POOLED, "effective_cluster_ratio"].value < 0.5


def test_matched_samples_have_equally_many_of_each_type(heldout):
    made = draw(80, seed=3).take(np.arange(100))  # 80 a, 20 b, no c
    real, other = metrics.match_types(heldout, made, np.random.default_rng(0))
    assert real.n_cells == other.n_cells == 80
    np.testing.assert_array_equal(real.labels, other.labels)


def test_rare_types_are_looked_for_by_name(reference):
    few = np.concatenate([np.arange(100), np.arange(140, 240), np.arange(280, 286)])
    real = draw(140, seed=4).take(few)
    made = draw(140, seed=5).take(few)
    whole = judged(real, made, reference)[metrics.POOLED, "rare_type_recall"].value
    # the rare type is called what it is, but made as another
    lost = LabelledCells(sp.csr_matrix(sp.vstack([made.counts[:200], made.counts[:6]])), made.labels)
    assert whole > 0.6
    assert judged(real, lost, reference)[metrics.POOLED, "rare_type_recall"].value < whole / 2


def test_mmd_is_unbiased_and_its_kernel_as_written():
    rng = np.random.default_rng(0)
    draws = [distances.mmd2(*rng.normal(size=(2, 30, 4))) for _ in range(200)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / np.sqrt(200)
    x, y = rng.normal(size=(5, 2)), rng.normal(size=(6, 2))
    d2 = [[((a - b) ** 2).sum() for b in y] for a in x]
    median = np.median([((x[i] - x[j]) ** 2).sum() for i in range(5) for j in range(i)])

    def kernel(value):
        return np.mean([np.exp(-value / (2 * w * median)) for w in distances.WIDTHS])

    within = [
        np.mean([kernel(((p[i] - p[j]) ** 2).sum()) for i in range(len(p)) for j in range(len(p)) if i != j])
        for p in (x, y)
    ]
    expected = sum(within) - 2 * np.mean([kernel(v) for row in d2 for v in row])
    assert distances.mmd2(x, y) == pytest.approx(expected)


def test_wasserstein_of_a_translation_is_its_length():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3))
    step = np.array([3.0, 4.0, 0.0])
    for order in (1, 2):
        assert distances.wasserstein(x, x + step, order=order, rng=rng) == pytest.approx(5.0)
    # every direction sees the step's cosine: its root mean square is 1 / sqrt(3)
    assert distances.sliced_wasserstein(x, x + step, rng=rng) == pytest.approx(5 / 3**0.5, rel=0.15)


def test_energy_distance_by_its_definition():
    x, y = np.array([[0.0], [1.0]]), np.array([[3.0], [5.0], [4.0]])
    assert distances.energy_distance(x, y) == pytest.approx(2 * 3.5 - 1 - 4 / 3)


def test_ilisi_is_one_when_mixed_and_zero_when_apart():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3))
    assert distances.ilisi(x, rng.normal(size=(200, 3))) > 0.9
    assert distances.ilisi(x, x + 100) == pytest.approx(0.0, abs=1e-6)
    assert distances.ilisi(x, x.copy()) > 0.8  # points that coincide


def test_ilisi_of_few_points_by_its_definition():
    # three neighbours each and perplexity 1: all weight on the nearest, which is of the other sample
    real, generated = (
        np.array([[0.0], [10.0], [20.0], [30.0], [40.0]]),
        np.array([[1.0], [11.0], [21.0], [31.0], [41.0]]),
    )
    weights = distances._perplexity_weights(np.array([[1.0, 9.0, 10.0]]), 2.0)
    entropy = -(weights * np.log(weights)).sum()
    assert weights.sum() == pytest.approx(1)
    assert entropy == pytest.approx(np.log(2.0), abs=1e-4)
    assert 0 < distances.ilisi(real, generated) < 1.01


def test_prdc_by_hand():
    real = np.array([[0.0], [1.0], [2.0], [3.0], [10.0]])
    generated = np.array([[0.4], [1.4], [2.4], [3.4], [100.0]])
    found = distances.prdc(real, generated, k=1)
    # radii of the real: 1, 1, 1, 1, 7; of the generated: 1, 1, 1, 1, 96.6
    assert found["precision"] == pytest.approx(4 / 5)
    assert found["recall"] == pytest.approx(1.0)  # the last ball reaches all of them
    assert found["coverage"] == pytest.approx(1.0)
    inside = np.abs(real - generated.T) <= np.array([[1.0], [1.0], [1.0], [1.0], [7.0]])
    assert found["density"] == pytest.approx(inside.sum() / 5)


def test_memorisation_by_hand():
    heldout = np.arange(0, 100, 2.0)[:, None]
    train = heldout + 1.0
    near = distances.memorisation(train + 0.1, train, heldout)
    assert near["nearer_to_train"] == 1.0
    assert near["nearest_distance_ratio"] == pytest.approx(0.1 / 0.9)
    assert near["closer_than_5_percent"] == 1.0  # held-out cells are 1 from a training cell, all of them
    far = distances.memorisation(heldout + 0.1, train, heldout)
    assert far["nearer_to_train"] == 0.0
    ties = distances.memorisation(heldout + 0.5, train, heldout)
    assert ties["nearer_to_train"] == 0.5


def test_log_values_and_variable_genes():
    counts = sp.csr_matrix(np.array([[1, 3, 0], [0, 0, 0], [2, 0, 2]]))
    values = log_cp10k(counts).toarray()
    np.testing.assert_allclose(values[0], np.log1p([2500, 7500, 0]), rtol=1e-6)
    assert not values[1].any()
    made = draw(100, seed=0)
    chosen = variable_genes(made.counts, 30)
    assert np.isin(chosen, np.arange(30)).mean() > 0.6  # the genes that tell types apart
    with pytest.raises(NotMeasurableError, match="3 cells"):
        variable_genes(counts[:2])


def test_moments_by_numpy():
    counts = draw(20, seed=0).counts
    dense = log_cp10k(counts).toarray().astype(float)
    found = by_gene.gene_moments(counts)
    np.testing.assert_allclose(found["mean"], dense.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found["variance"], dense.var(axis=0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(found["zero_fraction"], (dense == 0).mean(axis=0))
    np.testing.assert_allclose(found["cv"], dense.std(axis=0, ddof=1) / dense.mean(axis=0), rtol=1e-5)


def test_kolmogorov_smirnov_as_in_scipy():
    from scipy.stats import ks_2samp

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 20, 50).astype(float), rng.integers(3, 25, 70).astype(float)
    assert by_gene.kolmogorov_smirnov(x, y) == pytest.approx(ks_2samp(x, y).statistic)


def test_correlations_of_ranks_and_of_values():
    x = np.array([1.0, 2.0, 3.0, 10.0])
    assert by_gene.correlation(x, x**3, by_rank=True) == pytest.approx(1.0)
    assert by_gene.correlation(x, x**3, by_rank=False) == pytest.approx(np.corrcoef(x, x**3)[0, 1])
    constant = Score.of(by_gene.correlation, x, np.ones(4), by_rank=True)
    assert np.isnan(constant.value)
    assert "constant" in constant.reason


def test_gene_correlation_agreement_counts_constant_generated_genes_as_uncorrelated():
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(200, 1))
    real, made = (factor[rng.permutation(200)] * [1, 1, 1, 0, 0] + 0.1 * rng.normal(size=(200, 5)) for _ in range(2))
    assert by_gene.gene_correlation_agreement(real, made) > 0.95
    dead = made.copy()
    dead[:, 0] = 0
    assert by_gene.gene_correlation_agreement(real, dead) < 0.9
    permuted = rng.permuted(made, axis=0)
    assert abs(by_gene.gene_correlation_agreement(real, permuted)) < 0.7


def test_types_explain_correlations_that_are_gone_within_types():
    labels = np.repeat(["a", "b"], 100)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(200, 6)) + np.where(labels == "a", 5.0, 0.0)[:, None]
    assert by_gene.gene_correlations(values).min() > 0.7
    assert np.abs(by_gene.gene_correlations(by_gene.centred_by_type(values, labels))).max() < 0.3


def test_markers_are_the_raised_genes():
    cells = draw(100, seed=0)
    fold = by_gene.log_fold_changes(cells, "b")
    assert set(np.argsort(-fold)[:10]) == set(range(10, 20))
    assert set(range(30)) <= set(by_gene.marker_genes(cells, 10))


def test_curves_of_poisson_counts_follow_theory():
    rng = np.random.default_rng(0)
    rate = np.geomspace(0.01, 20, 2000)
    counts = sp.csr_matrix(rng.poisson(rate, (400, 2000)))
    edges = by_gene.curve_edges(counts)
    middle = (edges[1:] + edges[:-1]) / 2
    scale = 1e4 / counts.sum(axis=1).mean()
    dropout = by_gene.curve(counts, "dropout", edges)
    np.testing.assert_allclose(dropout, np.exp(-(10**middle) / scale), atol=0.05)
    variance = by_gene.curve(counts, "variance", edges)
    # among genes of one or two molecules, those that fell into the same cell are what varies most
    np.testing.assert_allclose(variance[1:], middle[1:] + np.log10(scale), atol=0.12)


def test_copies_need_the_whole_vector():
    train = LabelledCells(sp.csr_matrix(np.array([[1, 0, 2], [0, 0, 0]])), np.array(["a", "a"]))
    made = LabelledCells(sp.csr_matrix(np.array([[1, 0, 2], [1, 0, 3], [1, 2, 0], [0, 0, 0]])), np.repeat("a", 4))
    assert by_gene.n_copies(made, train) == 1.0


def test_continuous_values_have_no_counts(heldout, reference):
    made = LabelledCells(sp.csr_matrix(draw(60, seed=2).counts * 1.37), heldout.labels)
    scores = judged(heldout, made, reference)
    for name in ("library_size_ks", "n_copies"):
        assert np.isnan(scores[metrics.POOLED, name].value)
        assert "no counts" in scores[metrics.POOLED, name].reason
    # a common factor changes nothing else
    assert scores[metrics.POOLED, "c2st_forest_hvg"].value == pytest.approx(0.5, abs=0.12)


def test_classifier_of_types_needs_two():
    with pytest.raises(NotMeasurableError, match="two"):
        TypeClassifier(np.zeros((4, 2)), np.repeat("a", 4))


@pytest.mark.parametrize(("ideal", "value", "expected"), [(0.5, 0.7, 0.2), (None, 0.7, 0.1), (0.0, -0.3, 0.3)])
def test_distance_to_the_ideal(ideal, value, expected):
    assert metrics.Metric("x", ideal).distance(value, 0.8) == pytest.approx(expected)
