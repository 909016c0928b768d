from __future__ import annotations

import numpy as np
import pytest

from scdiva.errors import ConfigError, SourceError, UnsupportedError
from scdiva.metrics import integration
from scdiva.metrics.generation_space import NotMeasurableError
from scdiva.metrics.integration import (
    BATCH_METRICS,
    BIO_METRICS,
    MEANS,
    METRICS,
    PLAIN_METRICS,
    Neighbours,
    asw_batch,
    asw_label,
    batch_label_confounding,
    best_agreement,
    bras,
    clisi,
    graph_connectivity,
    ilisi,
    integration_scores,
    isolated_labels,
    lisi,
    pcr_comparison,
    variance_of_batches,
)

N_DIMENSIONS = 6


def cells(
    *, batch_shift: float, type_shift: float = 6.0, n: int = 240, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three types in two batches; the batches are moved along a direction of their own."""
    rng = np.random.default_rng(seed)
    kind, batch = rng.choice(3, n, p=[0.5, 0.3, 0.2]), rng.integers(0, 2, n)
    z = rng.normal(size=(n, N_DIMENSIONS)) + 3
    z[np.arange(n), kind] += type_shift
    z[:, 4] += batch_shift * batch
    return z, np.array(["a", "b", "c"])[kind], np.array(["x", "y"])[batch]


@pytest.fixture(scope="module")
def mixed():
    return cells(batch_shift=0.0)


@pytest.fixture(scope="module")
def split():
    return cells(batch_shift=12.0)


def distances(z: np.ndarray, metric: str = "euclidean") -> np.ndarray:
    if metric == "cosine":
        unit = z / np.linalg.norm(z, axis=1, keepdims=True)
        return 1 - unit @ unit.T
    return np.sqrt(((z[:, None] - z[None]) ** 2).sum(axis=-1))


def widths_by_loop(d: np.ndarray, groups: np.ndarray, *, to: str = "nearest") -> np.ndarray:
    """Silhouette widths cell by cell; ``to`` says what stands for the other groups."""
    widths = []
    for i in range(len(d)):
        own = np.flatnonzero((groups == groups[i]) & (np.arange(len(d)) != i))
        others = {g: d[i, groups == g] for g in np.unique(groups) if g != groups[i]}
        if own.size == 0:
            widths.append(0.0)
            continue
        a = d[i, own].mean()
        b = min(x.mean() for x in others.values()) if to == "nearest" else np.concatenate([*others.values()]).mean()
        widths.append((b - a) / max(a, b))
    return np.array(widths)


def batch_score_by_loop(z, labels, batches, *, metric="euclidean", to="nearest"):
    means = []
    for label in np.unique(labels):
        inside = labels == label
        if 1 < np.unique(batches[inside]).size < inside.sum():
            widths = widths_by_loop(distances(z[inside], metric), batches[inside], to=to)
            means.append(np.mean(1 - np.abs(widths)))
    return np.mean(means)


@pytest.fixture(scope="module")
def uneven():
    """Three batches, one of them with a single cell of a type, and a type in one batch only."""
    rng = np.random.default_rng(5)
    labels = np.repeat(["a", "b", "c"], [20, 12, 9])
    batches = rng.choice(["x", "y", "z"], 41)
    batches[labels == "c"] = "x"
    batches[20:32] = np.array(["x"] * 6 + ["y"] * 5 + ["z"])
    return rng.normal(size=(41, 4)) + 1, labels, batches


def test_batch_widths_are_those_of_a_loop(uneven):
    z, labels, batches = uneven
    assert asw_batch(z, labels, batches) == pytest.approx(batch_score_by_loop(z, labels, batches))
    expected = batch_score_by_loop(z, labels, batches, metric="cosine", to="all others")
    assert bras(z, labels, batches) == pytest.approx(expected)
    assert asw_label(z, labels) == pytest.approx((widths_by_loop(distances(z), labels).mean() + 1) / 2)


def test_isolated_types_are_those_in_the_fewest_batches(uneven):
    z, labels, batches = uneven
    widths = (widths_by_loop(distances(z), labels) + 1) / 2
    assert isolated_labels(z, labels, batches) == pytest.approx(widths[labels == "c"].mean())
    everywhere = np.tile(["x", "y"], 21)[:41]
    by_type = [widths[labels == name].mean() for name in "abc"]
    assert isolated_labels(z, labels, everywhere) == pytest.approx(np.mean(by_type))


def test_batches_that_mix_in_pairs_fool_the_nearest_batch_only():
    rng = np.random.default_rng(0)
    z = np.abs(rng.normal(0, 0.1, size=(200, 2))) + np.repeat([[5.0, 0.0], [0.0, 5.0]], 100, axis=0)
    batches = np.tile(["p", "q"], 100) + np.repeat(["1", "2"], 100)
    labels = np.full(200, "a")
    assert asw_batch(z, labels, batches) > 0.85
    assert bras(z, labels, batches) < 0.3


def test_avg_bio_is_the_mean_that_scgpt_takes():
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    labels = np.array(list("aaabbbccc"))
    coarse, right, fine = np.repeat([0, 1], [3, 6]), np.repeat([5, 3, 4], 3), np.arange(9)
    found = best_agreement({0.1: coarse, 0.5: right, 0.6: right, 2.0: fine}, labels)
    assert (found.nmi, found.ari, found.resolution, found.n_clusters) == (1.0, 1.0, 0.5, 3)
    found = best_agreement({0.1: coarse, 2.0: fine}, labels)
    nmi = [normalized_mutual_info_score(labels, c, average_method="arithmetic") for c in (coarse, fine)]
    assert found.nmi == pytest.approx(max(nmi))
    assert found.ari == pytest.approx(adjusted_rand_score(labels, (coarse, fine)[int(np.argmax(nmi))]))


def test_connected_parts_are_counted_within_types():
    # two far clumps of the same type, 30 and 20 cells; another type in one clump
    rng = np.random.default_rng(0)
    z = rng.normal(0, 0.1, size=(80, 2))
    z[30:50] += 100
    z[50:] -= 100
    labels = np.repeat(["a", "b"], [50, 30])
    near = Neighbours.fit(z)
    assert graph_connectivity(near, labels) == pytest.approx((30 / 50 + 1) / 2)
    # an outlier has neighbours, and is nobody's: connected, but not in both directions
    z = np.concatenate([rng.normal(size=(40, 2)), [[50.0, 0.0]]])
    near = Neighbours.fit(z)
    assert graph_connectivity(near, np.full(41, "a")) == 1
    assert graph_connectivity(near, np.full(41, "a"), is_directed=True) == pytest.approx(40 / 41)


def test_neighbours_are_the_nearest_others_even_of_cells_that_coincide():
    z = np.concatenate([np.zeros((20, 3)), np.random.default_rng(0).normal(5, 1, (30, 3))])
    near = Neighbours.fit(z, 16)
    assert near.index.shape == (50, 15)
    assert near.k == 16
    assert (near.index != np.arange(50)[:, None]).all()
    expected = np.sort(distances(z) + np.diag(np.full(50, np.inf)), axis=1)[:, :15]
    np.testing.assert_allclose(near.distance, expected, atol=1e-6)
    np.testing.assert_array_equal(near.first(5).index, near.index[:, :4])
    with pytest.raises(NotMeasurableError, match="20 neighbours need 20 cells, found 16"):
        near.first(20)


def test_lisi_counts_labels_among_neighbours():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(400, 2))
    near = Neighbours.fit(z)
    assert lisi(near, np.full(400, "a")) == pytest.approx(np.ones(400))
    batches = rng.choice(["x", "y", "z"], 400)
    assert 0.85 < ilisi(near, batches) < 1.0
    assert clisi(near, np.where(z[:, 0] > 0, "a", "b")) > 0.9
    assert ilisi(near, np.where(z[:, 0] > 0, "a", "b")) < 0.1
    # by hand for one cell: perplexity 30 over 89 neighbours
    from scipy.optimize import brentq

    d = near.distance[7] - near.distance[7, 0]

    def weights(beta):
        w = np.exp(-beta * d)
        return w / w.sum()

    beta = brentq(lambda b: -(weights(b) * np.log(weights(b))).sum() - np.log(30), 1e-3, 50)
    share = [weights(beta)[batches[near.index[7]] == name].sum() for name in "xyz"]
    assert lisi(near, batches)[7] == pytest.approx(1 / np.square(share).sum(), rel=1e-4)


def test_variance_of_batches_is_principal_component_regression():
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LinearRegression

    z, _, batches = cells(batch_shift=2.0)
    batches[:30] = "w"
    pca = PCA().fit(z)
    one_hot = (batches[:, None] == np.unique(batches)).astype(float)
    scores = pca.transform(z)
    r2 = [LinearRegression().fit(one_hot, s).score(one_hot, s) for s in scores.T]
    assert variance_of_batches(z, batches) == pytest.approx(np.dot(r2, pca.explained_variance_ratio_))
    centred = z.copy()
    for name in np.unique(batches):
        centred[batches == name] -= centred[batches == name].mean(axis=0)
    assert pcr_comparison(z, centred, batches) == pytest.approx(1)
    assert pcr_comparison(z, z, batches) == pytest.approx(0)
    assert pcr_comparison(z, z + 5 * one_hot[:, [0]], batches) == 0  # more than before


def test_every_metric_orders_a_good_and_a_bad_embedding(mixed, split):
    good = integration_scores(*mixed, seed=0, unintegrated=split[0], metrics=PLAIN_METRICS)
    bad = integration_scores(*split, seed=0, unintegrated=split[0], metrics=PLAIN_METRICS)
    for name in set(BATCH_METRICS) & set(PLAIN_METRICS) | {"asw_batch", "graph_connectivity", "avg_batch"}:
        assert good[name] > bad[name] + 0.05, name
    types_lost = integration_scores(
        np.random.default_rng(0).normal(size=mixed[0].shape), *mixed[1:], seed=0, metrics=PLAIN_METRICS
    )
    for name in (*BIO_METRICS, "scib_bio", "graph_connectivity_directed"):
        assert good[name] > types_lost[name] + 0.05, name
    for name in PLAIN_METRICS:
        assert -1e-9 <= good[name] <= 1 + 1e-9, name
    assert good["kmeans_nmi"] == pytest.approx(1)
    assert good["scib_bio"] == pytest.approx(np.mean([good[name] for name in BIO_METRICS]))
    assert good["avg_batch"] == pytest.approx((good["asw_batch"] + good["graph_connectivity"]) / 2)


def test_scores_do_not_depend_on_order_names_or_rotation(mixed, split):
    z, labels, batches = mixed
    first = integration_scores(z, labels, batches, seed=0, unintegrated=split[0], metrics=PLAIN_METRICS)
    order = np.random.default_rng(1).permutation(len(z))
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(N_DIMENSIONS, N_DIMENSIONS)))[0]
    renamed = np.array([{"a": "zz", "b": "q", "c": "1"}[x] for x in labels])
    moved = integration_scores(
        (z @ rotation)[order],
        renamed[order],
        batches[order],
        seed=0,
        unintegrated=split[0][order],
        metrics=PLAIN_METRICS,
    )
    for name in PLAIN_METRICS:
        assert moved[name] == pytest.approx(first[name], abs=1e-6), name


def test_only_what_is_asked_for_is_measured_with_what_it_needs(mixed):
    found = integration_scores(*mixed, seed=0, metrics=["avg_batch", "bras"])
    assert set(found.scores) == {"avg_batch", "asw_batch", "graph_connectivity", "bras"}
    assert found.leiden is None
    with pytest.raises(ConfigError, match="no metric nmi"):
        integration_scores(*mixed, seed=0, metrics=["nmi"])


def test_what_cannot_be_measured_is_nan_with_its_reason(mixed):
    z, labels, batches = mixed
    one_batch = integration_scores(z, labels, np.full(len(z), "x"), seed=0, unintegrated=z, metrics=PLAIN_METRICS)
    for name in ("asw_batch", "bras", "ilisi", "pcr_comparison", "avg_batch"):
        assert np.isnan(one_batch[name]), name
        assert "only one batch" in one_batch.scores[name].reason
    assert one_batch["kmeans_nmi"] > 0.9
    one_type = integration_scores(z, np.full(len(z), "a"), batches, seed=0, metrics=PLAIN_METRICS)
    for name in ("asw_label", "isolated_labels", "kmeans_nmi", "kmeans_ari", "clisi", "scib_bio"):
        assert "only one type" in one_type.scores[name].reason, name
    assert "before integration was not given" in one_type.scores["pcr_comparison"].reason
    assert one_type["asw_batch"] > 0.9
    confounded = integration_scores(z, labels, labels, seed=0, metrics=["avg_batch", "bras", "ilisi"])
    for name in ("asw_batch", "bras"):
        assert "no type occurs in two batches" in confounded.scores[name].reason
    assert confounded.scores["avg_batch"].reason.startswith("asw_batch: ")
    few = integration_scores(z[:12], labels[:12], batches[:12], seed=0, metrics=PLAIN_METRICS)
    assert "15 neighbours need 15 cells, found 12" in few.scores["graph_connectivity"].reason
    assert "90 neighbours need 90 cells, found 12" in few.scores["ilisi"].reason
    one = integration_scores(z[:1], labels[:1], batches[:1], seed=0, metrics=PLAIN_METRICS)
    assert all(np.isnan(score.value) and score.reason for score in one.scores.values())
    own = integration_scores(z[:30], np.arange(30), batches[:30], seed=0, metrics=["asw_label", "asw_batch"])
    assert "type of its own" in own.scores["asw_label"].reason


def test_a_collapsed_embedding_is_no_crash_and_its_perfect_widths_are_known(mixed):
    _, labels, batches = mixed
    flat = np.ones((len(labels), 3))
    found = integration_scores(
        flat, labels, batches, seed=0, unintegrated=mixed[0], metrics=["asw_batch", "bras", "pcr_comparison"]
    )
    assert found["asw_batch"] == found["bras"] == 1  # which is why they are never read alone
    assert "coincide" in found.scores["pcr_comparison"].reason
    assert "origin" in integration_scores(flat * 0, labels, batches, seed=0, metrics=["bras"]).scores["bras"].reason


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda z, a, b: (z, a[:-1], b), "239 labels"),
        (lambda z, a, b: (z, a, b[:-1]), "239 batches"),
        (lambda z, a, b: (z[:, 0], a, b), "shape"),
        (lambda z, a, b: (np.where(np.arange(240)[:, None] == 3, np.nan, z), a, b), "1 cells whose embedding"),
        (lambda z, a, b: (z, [None, *a[1:]], b), "1 missing"),
        (lambda z, a, b: (z[:0], a[:0], b[:0]), "0 cells"),
    ],
)
def test_bad_input_is_refused(mixed, change, match):
    with pytest.raises(SourceError, match=match):
        integration_scores(*change(*mixed), seed=0, metrics=PLAIN_METRICS)


def test_missing_extras_are_named(monkeypatch, mixed):
    monkeypatch.setattr(integration, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"leiden_nmi.*igraph and scib-metrics.*scdiva\[eval\]"):
        integration_scores(*mixed, seed=0)
    with pytest.raises(UnsupportedError, match="igraph"):
        integration.leiden_clusterings(mixed[0], seed=0)
    with pytest.raises(UnsupportedError, match="scib-metrics"):
        integration.kbet(Neighbours.fit(mixed[0]), *mixed[1:])
    assert not {"leiden_nmi", "leiden_ari", "kbet", "avg_bio", "scib_batch", "scib_total"} & set(PLAIN_METRICS)
    assert set(PLAIN_METRICS) <= set(METRICS) | set(MEANS)


def test_confounding_by_hand():
    labels = ["T", "T", "B", "B", "NK", "NK"]
    batches = ["1", "2", "1", "2", "3", "3"]
    found = batch_label_confounding(labels, batches)
    assert found.labels_in_one_batch == ("NK",)
    assert found.share_in_one_batch == pytest.approx(2 / 6)
    assert found.batches_without_shared_label == (("1", "3"), ("2", "3"))
    # chi2 = 6 for this table of 6 cells, V = sqrt(6 / (6 * 2)); mutual information log 3 - (2/3) log 2, entropies log 3
    assert found.cramers_v == pytest.approx(np.sqrt(0.5))
    assert found.nmi == pytest.approx(1 - (2 / 3) * np.log(2) / np.log(3))
    assert "1 of 3 types (33% of cells) occurs in one batch only: NK" in found.sentence
    assert "2 pairs of batches have no type in common: 1 and 3, 2 and 3" in found.sentence


def test_confounding_of_the_extremes():
    both = batch_label_confounding(["a", "b"] * 4, np.repeat(["x", "y"], 4))
    assert both.cramers_v == pytest.approx(0)
    assert both.nmi == pytest.approx(0)
    assert both.labels_in_one_batch == both.batches_without_shared_label == ()
    assert both.sentence.startswith("Every type occurs in several batches")
    same = batch_label_confounding(["a", "b"] * 4, ["x", "y"] * 4)
    assert same.cramers_v == pytest.approx(1)
    assert same.nmi == pytest.approx(1)
    assert same.share_in_one_batch == 1
    assert "cannot be told apart" in same.sentence
    single = batch_label_confounding(["a", "b"], ["x", "x"])
    assert np.isnan(single.cramers_v)
    assert single.labels_in_one_batch == ()
    assert single.sentence.startswith("There is one batch")
    assert batch_label_confounding(["a", "a"], ["x", "y"]).sentence.startswith("There is one type")
    many = batch_label_confounding(np.arange(8), [*"xxxxyyyy"])
    assert many.share_in_one_batch == 1
    with pytest.raises(SourceError, match="2 labels, 1 batches"):
        batch_label_confounding(["a", "b"], ["x"])


# with the extra `eval` -----------------------------------------------------------------------------------------------


def test_leiden_finds_separate_types_and_says_at_which_resolution(mixed):
    pytest.importorskip("igraph")
    z, labels, batches = mixed
    found = integration_scores(z, labels, batches, seed=0, metrics=["avg_bio"])
    assert found.leiden is not None
    assert found["leiden_nmi"] == pytest.approx(1)
    assert found.leiden.n_clusters == 3
    assert found.leiden.resolution < 0.5
    assert found["avg_bio"] == pytest.approx((2 + asw_label(z, labels)) / 3)
    again = integration_scores(z, labels, batches, seed=0, metrics=["avg_bio"])
    assert again["avg_bio"] == found["avg_bio"]
    noise = np.random.default_rng(0).normal(size=z.shape)
    assert integration_scores(noise, labels, batches, seed=0, metrics=["avg_bio"])["avg_bio"] < 0.3
    few = integration_scores(z[:12], labels[:12], batches[:12], seed=0, metrics=["avg_bio"])
    assert "15 neighbours" in few.scores["avg_bio"].reason


def test_our_metrics_are_those_of_scib_metrics():
    pytest.importorskip("scib_metrics")
    z, labels, batches = cells(batch_shift=1.5, type_shift=3.0)
    before = cells(batch_shift=3.0, type_shift=3.0)[0]
    theirs = integration.scib_metrics_scores(z, labels, batches, unintegrated=before)
    names = ("scib_total",)
    ours = integration_scores(z, labels, batches, seed=0, unintegrated=before, metrics=names)
    for name in (*BIO_METRICS, *BATCH_METRICS):
        assert 0 < theirs[name] <= 1
        tolerance = 0.05 if name.startswith("kmeans") else 2e-3 if name == "kbet" else 1e-4
        assert ours[name] == pytest.approx(theirs[name], abs=tolerance), name
    assert ours["scib_total"] == pytest.approx(0.6 * ours["scib_bio"] + 0.4 * ours["scib_batch"])
    assert theirs["scib_total"] == pytest.approx(0.6 * theirs["scib_bio"] + 0.4 * theirs["scib_batch"])
    with pytest.raises(NotMeasurableError, match="no type"):
        integration.kbet(Neighbours.fit(z), labels, labels)
