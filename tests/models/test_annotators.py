"""Annotators on made cells: what votes, what is chosen, what is calibrated, and what is new."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from scdiva.models.annotators import (
    Calibration,
    Features,
    Probe,
    ReferenceIndex,
    Regression,
    classes_of,
)
from scdiva.models.annotators import probe as probe_module
from scdiva.models.annotators.calibration import log_softmax
from scdiva.models.annotators.probe import _best_of_each, _kept_part
from scdiva.types import CellCounts

N_GENES, N_TYPES = 60, 4


def made(n: int, seed: int, *, types: tuple[int, ...] = (0, 1, 2), measured: np.ndarray | None = None):
    """Cells whose type doubles ten genes of its own; z is a noisy copy of the type."""
    rng = np.random.default_rng(seed)
    code = rng.choice(types, n)
    rate = np.full((n, N_GENES), 2.0)
    for row, of in enumerate(code):
        rate[row, 10 * of : 10 * of + 10] *= 4
    counts = rng.poisson(rate).astype(np.int32)
    is_measured = np.ones(N_GENES, dtype=bool) if measured is None else measured
    counts[:, ~is_measured] = 0
    matrix = sp.csr_matrix(counts)
    cells = CellCounts(
        matrix,
        np.asarray(matrix.sum(axis=1), dtype=float).ravel(),
        np.arange(n),
        np.zeros(n, np.int32),
        is_measured[None],
    )
    z = np.zeros((n, 6), dtype=np.float32)
    z[np.arange(n), code] = 3.0
    return cells, (z + rng.normal(size=z.shape)).astype(np.float32), code.astype(np.int32)


@pytest.fixture(scope="module")
def probe() -> Probe:
    cells, z, code = made(180, 0)
    return Probe.fit(cells, z, code, 3, seed=0)


class TestReferenceIndex:
    def test_neighbours_vote(self):
        _, z, code = made(200, 0)
        index = ReferenceIndex.fit(z, code, 3)
        cells, new, truth = made(100, 1)
        calls = index.calls(cells, new)
        assert (calls.probability.argmax(axis=1) == truth).mean() > 0.9
        np.testing.assert_allclose(calls.probability.sum(axis=1), 1, atol=1e-5)
        # by hand: half a vote is spread over the classes, and the temperature divides the logs
        distance = np.linalg.norm(z - new[0], axis=1)
        votes = np.bincount(code[np.argsort(distance)[:15]], minlength=3) + 0.5 / 3
        p = (votes / votes.sum()) ** (1 / index.calibration.temperature)
        np.testing.assert_allclose(calls.probability[0], p / p.sum(), rtol=1e-4)

    def test_no_cell_votes_for_itself_in_the_calibration(self):
        # labels at random: leave-one-out probabilities must not know them, and the temperature makes them flat
        _, z, _ = made(300, 0)
        code = np.random.default_rng(5).integers(0, 3, 300).astype(np.int32)
        index = ReferenceIndex.fit(z, code, 3)
        assert index.calibration.temperature > 1.5

    def test_small_classes_are_not_outvoted_by_distance(self):
        _, z, code = made(600, 0)
        rows = np.concatenate([np.flatnonzero(code == c)[:4] for c in range(3)])
        index = ReferenceIndex.fit(z[rows], code[rows], 3)
        assert index.n_votes == 4
        cells, new, truth = made(200, 1)
        assert (index.calls(cells, new).probability.argmax(axis=1) == truth).mean() > 0.8

    def test_cells_at_the_same_place(self):
        z = np.zeros((40, 3), dtype=np.float32)
        index = ReferenceIndex.fit(z, np.arange(40, dtype=np.int32) % 2, 2)
        assert np.isfinite(index.calls(made(5, 0)[0], z[:5]).probability).all()

    def test_about_the_stated_share_of_known_cells_is_unknown(self):
        _, z, code = made(2000, 0)
        index = ReferenceIndex.fit(z, code, 3, false_unknown_rate=0.1)
        cells, new, _ = made(2000, 1)
        share = (index.calls(cells, new).novelty > index.calibration.threshold).mean()
        assert 0.06 < share < 0.14

    def test_an_approximate_index_finds_nearly_the_same(self, monkeypatch):
        _, z, code = made(600, 0)
        cells, new, _ = made(60, 1)
        exact = ReferenceIndex.fit(z, code, 3)
        monkeypatch.setattr("scdiva.models.annotators.index._MANY_CELLS", 100)
        rough = ReferenceIndex.fit(z, code, 3)
        assert type(rough._index[0]).__name__ == "NNDescent"
        np.testing.assert_allclose(exact.calls(cells, new).probability, rough.calls(cells, new).probability, atol=0.2)


class TestProbe:
    def test_it_calls_types(self, probe):
        cells, z, code = made(200, 1)
        calls = probe.calls(cells, z)
        assert (calls.probability.argmax(axis=1) == code).mean() > 0.95
        assert set(probe.loss) == {"joint", "joint+genes", "model+own+genes"}
        assert "+".join(probe.regressions) == min(probe.loss, key=probe.loss.get)

    def test_a_useless_z_is_not_listened_to(self):
        cells, z, code = made(180, 0)
        noise = np.random.default_rng(0).normal(size=z.shape).astype(np.float32)
        probe = Probe.fit(cells, noise, code, 3, seed=0)
        new, _, truth = made(200, 1)
        fresh = np.random.default_rng(1).normal(size=(200, 6)).astype(np.float32)
        assert (probe.calls(new, fresh).probability.argmax(axis=1) == truth).mean() > 0.95

    @pytest.mark.parametrize("n", [24, 180])
    def test_z_is_as_large_as_it_is_useful(self, n):
        cells, z, code = made(n, 0)
        noise = np.random.default_rng(0).normal(size=z.shape).astype(np.float32)
        assert Probe.fit(cells, noise, code, 3, seed=0).features.latent_size < 3
        silent = cells.with_genes(np.arange(N_GENES) >= 40)  # no gene tells these types apart
        clear = z + 5 * np.eye(6, dtype=np.float32)[code]
        found = Probe.fit(silent, clear, code, 3, seed=0)
        assert found.features.latent_size > 0
        assert (found.calls(silent, clear).probability.argmax(axis=1) == code).mean() > 0.95

    def test_novel_cells_are_novel(self, probe):
        known, z, _ = made(200, 1)
        novel, z_novel, _ = made(200, 2, types=(3,))
        one, two = (probe.calls(*cells).novelty for cells in ((known, z), (novel, z_novel)))
        assert np.median(two) > np.quantile(one, 0.95)
        assert (one > probe.calibration.threshold).mean() < 0.12

    def test_with_few_cells_there_is_nothing_to_choose(self):
        cells, z, code = made(24, 0)
        probe = Probe.fit(cells, z, code, 3, seed=0)
        assert list(probe.regressions) == ["joint"]

    def test_one_cell_of_each_type(self):
        cells, z, code = made(100, 0)
        rows = np.array([np.flatnonzero(code == c)[0] for c in range(3)])
        probe = Probe.fit(cells.take(rows), z[rows], code[rows], 3, seed=0)
        calls = probe.calls(cells, z)
        assert np.isfinite(calls.probability).all()
        assert probe.calibration.threshold == np.inf

    def test_one_class_with_one_cell(self):
        cells, z, code = made(100, 0)
        code = np.where(np.arange(100) == 7, 3, code)
        probe = Probe.fit(cells, z, code, N_TYPES, seed=0)
        assert np.isfinite(probe.calls(cells, z).probability).all()

    def test_weights_by_class_move_the_border(self):
        cells, z, code = made(400, 0, types=(0,) * 9 + (1,))
        flat = np.zeros_like(z)
        counts = cells.with_genes(np.arange(N_GENES) >= 40)  # nothing tells the types apart
        plain, balanced = (
            Probe.fit(counts, flat, code, 2, seed=0, is_balanced=is_balanced) for is_balanced in (False, True)
        )
        assert plain.calls(counts, flat).probability[:, 1].mean() < 0.2
        assert balanced.calls(counts, flat).probability[:, 1].mean() > 0.3

    def test_self_training_learns_from_the_query(self):
        cells, z, code = made(300, 0)
        rows = np.concatenate([np.flatnonzero(code == c)[:2] for c in range(3)])
        probe = Probe.fit(cells.take(rows), z[rows], code[rows], 3, seed=0, unlabelled=(cells, z))
        after = probe.self_trained(cells, z)
        right = [(p.calls(cells, z).probability.argmax(axis=1) == code).mean() for p in (probe, after)]
        assert right[1] >= right[0]
        assert not np.array_equal(probe.regressions["joint"].coef, after.regressions["joint"].coef)
        assert list(after.regressions) == list(after.class_logit) == ["joint"]
        before, now = (p.calls(cells, z).probability.max(axis=1).mean() for p in (probe, after))
        assert now == pytest.approx(before, abs=0.02)

    def test_genes_that_are_not_measured_are_unknown_not_zero(self, monkeypatch):
        monkeypatch.setattr("scdiva.models.annotators.probe.CANDIDATES", (("joint", "genes"),))
        reference, z, code = made(180, 0)
        probe = Probe.fit(reference, z, code, 3, seed=0)
        measured = np.ones(N_GENES, dtype=bool)
        measured[[3, 14, 25, 50]] = False
        cells, z, code = made(200, 1, measured=measured)
        x = probe.features.of(cells, z)["genes"]
        where = [list(probe.features.detected).index(gene) for gene in (3, 14, 25, 50)]
        np.testing.assert_allclose(
            x[:, where].toarray(), np.tile(probe.features.detected_mean[where], (200, 1)), rtol=1e-6
        )
        assert (probe.calls(cells, z).probability.argmax(axis=1) == code).mean() > 0.9

    def test_genes_that_nothing_reads_are_not_filled_in(self, monkeypatch):
        monkeypatch.setattr("scdiva.models.annotators.probe.CANDIDATES", (("joint",),))
        reference, z, code = made(180, 0)
        assert Probe.fit(reference, z, code, 3, seed=0).features.detected.size == 0

    def test_rare_types_do_not_decide_where_the_choice_sees_one_of_their_cells(self, monkeypatch):
        # of a type with one cell in the part that size and penalty are chosen on, no fold knows the type
        monkeypatch.setattr("scdiva.models.annotators.probe._CHOICE_CELLS", 60)
        cells, z, code = made(300, 0)
        judged = []
        real = probe_module._nll
        monkeypatch.setattr(probe_module, "_nll", lambda said, true: judged.append((said, true)) or real(said, true))
        rare = code.copy()
        rare[np.flatnonzero(code == 2)[8:]] = 0  # eight cells of the third type are left, about two of them in the part
        Probe.fit(cells, z, rare, 3, seed=0)
        for said, true in judged:
            assert said[np.arange(true.size), true].min() > -25

    def test_saved_and_read_it_says_the_same(self, probe, tmp_path):
        np.savez(tmp_path / "a.npz", **probe.arrays())
        with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
            again = Probe.from_arrays(dict(archive))
        cells, z, _ = made(50, 1)
        for one, two in zip(vars_of(probe.calls(cells, z)), vars_of(again.calls(cells, z)), strict=True):
            np.testing.assert_array_equal(one, two)
        assert again.loss == probe.loss

    def test_the_seed_decides(self):
        cells, z, code = made(120, 0)
        one, two = (Probe.fit(cells, z, code, 3, seed=1).arrays() for _ in range(2))
        assert all(np.array_equal(one[name], two[name], equal_nan=one[name].dtype.kind == "f") for name in one)


def vars_of(calls):
    return calls.probability, calls.novelty


def elsewhere(n: int, seed: int, **options):
    """Cells of another laboratory: z is moved from the first type towards the second; genes say nothing."""
    cells, z, code = made(n, seed, **options)
    moved = z + np.array([-2.0, 2.0, 1.0, 1.0, 0.0, -1.0], dtype=np.float32)
    return cells.with_genes(np.arange(N_GENES) >= 40), moved, code


@pytest.fixture(scope="module")
def silent() -> Probe:
    cells, z, code = made(300, 0)
    return Probe.fit(cells.with_genes(np.arange(N_GENES) >= 40), z, code, 3, seed=0)


class TestAlignment:
    def right(self, probe, cells, z, code) -> float:
        return (probe.calls(cells, z).probability.argmax(axis=1) == code).mean()

    @pytest.mark.parametrize("types", [(0, 1, 2), (0, 1, 1, 1, 1, 1, 2), (0, 0, 0, 0, 0, 1, 2)], ids=str)
    def test_a_shift_is_taken_away_whatever_the_composition(self, silent, types):
        query = elsewhere(400, 1, types=types)
        after = silent.aligned(*query[:2])
        here = made(400, 1, types=types)
        best = self.right(silent, here[0].with_genes(np.arange(N_GENES) >= 40), *here[1:])
        assert self.right(silent, *query) < best - 0.05
        assert self.right(after, *query) > best - 0.03

    def test_known_cells_of_elsewhere_are_known(self, silent):
        cells, z, _ = elsewhere(400, 1)
        before, after = (
            (p.calls(cells, z).novelty > p.calibration.threshold).mean() for p in (silent, silent.aligned(cells, z))
        )
        assert after < min(before, 0.12)

    def test_cells_of_the_same_laboratory_are_called_as_before(self, probe):
        cells, z, _ = made(300, 1)
        one, two = (p.calls(cells, z) for p in (probe, probe.aligned(cells, z)))
        assert (one.probability.argmax(axis=1) == two.probability.argmax(axis=1)).mean() > 0.98
        np.testing.assert_allclose(one.probability, two.probability, atol=0.15)

    def test_foreign_cells_move_nothing(self, probe):
        cells, z, _ = made(200, 2, types=(3,))
        assert probe.aligned(cells, z + np.float32(5)) is probe

    def test_one_class_moves_nothing(self, probe):
        cells, z, _ = made(100, 3, types=(1,))
        assert probe.aligned(cells, z) is probe

    def test_all_regressions_move(self, monkeypatch):
        # the geometric mean of three regressions, of which one reads genes
        monkeypatch.setattr("scdiva.models.annotators.probe.CANDIDATES", (("model", "own", "genes"),))
        monkeypatch.setattr("scdiva.models.annotators.probe.LATENT_SIZES", (3.0,))
        cells, z, code = made(300, 0)
        probe = Probe.fit(cells, z, code, 3, seed=0)
        query, moved, _ = made(300, 1)
        after = probe.aligned(query, moved + np.float32([-2, 2, 1, 1, 0, -1]))
        assert after is not probe
        for name, fitted in probe.regressions.items():
            np.testing.assert_array_equal(fitted.coef, after.regressions[name].coef)
        # z has moved, genes have not
        change = {
            name: np.ptp(after.regressions[name].intercept - probe.regressions[name].intercept)
            for name in ("model", "genes")
        }
        assert change["model"] > 5 * change["genes"]

    def test_of_a_linear_model_it_is_the_shift_of_the_features(self, silent):
        cells, z, _ = elsewhere(300, 1)
        after = silent.aligned(cells, z)
        x = silent.features.of(cells, z)
        shift = (after.class_mean - silent.class_mean)[0]
        for name in set(silent.regressions) & {"joint"}:
            moved = silent.regressions[name].log_probability(x[name] - shift)
            np.testing.assert_allclose(after.regressions[name].log_probability(x[name]), moved, atol=0.15)

    def test_saved_and_read_it_moves_in_the_same_way(self, silent, tmp_path):
        np.savez(tmp_path / "a.npz", **silent.arrays())
        with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
            again = Probe.from_arrays(dict(archive))
        cells, z, _ = elsewhere(200, 1)
        for move in ("aligned", "self_trained"):
            one, two = (getattr(p, move)(cells, z).calls(cells, z) for p in (silent, again))
            np.testing.assert_array_equal(one.probability, two.probability)
            np.testing.assert_array_equal(one.novelty, two.novelty)

    def test_what_classes_disagree_on_is_no_shift(self):
        share = np.array([0.5, 0.3, 0.2])
        alike = np.tile([3.0, -1.0], (3, 1))
        assert _kept_part(alike, share) == pytest.approx(1)
        apart = np.array([[2.0, 0.0], [-2.0, 1.0], [-2.0, -1.5]])
        assert _kept_part(apart, share) == 0
        assert 0.5 < _kept_part(4 * alike + apart, share) < 1


def test_the_best_of_each_class_are_taken_and_none_is_lost():
    code = np.array([0, 0, 0, 0, 1, 1, 2])
    probability = np.array([0.9, 0.8, 0.99, 0.7, 0.5, 0.4, 0.34])
    best = _best_of_each(probability, code, 0.5)
    assert best.tolist() == [True, False, True, False, True, False, True]


class TestRegression:
    @pytest.mark.parametrize("n_classes", [2, 3])
    def test_it_is_scikit_learns(self, n_classes):
        from sklearn.linear_model import LogisticRegression

        rng = np.random.default_rng(0)
        x, code = rng.normal(size=(90, 5)).astype(np.float32), rng.integers(0, n_classes, 90)
        found = Regression.fit(x, code, n_classes, None, 1.0)
        expected = LogisticRegression(C=1.0, max_iter=300).fit(x, code).predict_log_proba(x)
        np.testing.assert_allclose(found.log_probability(x), expected, atol=1e-4)

    def test_a_class_without_cells_is_never_called(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(30, 4)).astype(np.float32)
        found = Regression.fit(x, np.arange(30) % 2 * 2, 3, None, 1.0).log_probability(x)
        assert (found[:, 1] < -20).all()


class TestCalibration:
    def test_the_temperature_undoes_overconfidence(self):
        rng = np.random.default_rng(0)
        log_p = log_softmax(rng.normal(size=(4000, 3)))
        code = np.array([rng.choice(3, p=np.exp(row)) for row in log_p])
        fitted = Calibration.fit(3.0 * log_p, np.ones(4000) + rng.random(4000), code)
        assert fitted.temperature == pytest.approx(3.0, rel=0.1)

    def test_it_survives_being_saved(self):
        fitted = Calibration(1.5, np.array([1.0, 2.0]), np.array([3.0, 4.0]), 5.0)
        again = Calibration.from_arrays(fitted.arrays())
        assert (again.temperature, again.threshold) == (1.5, 5.0)
        np.testing.assert_array_equal(again.centre, fitted.centre)
        np.testing.assert_array_equal(again.spread, fitted.spread)


def test_components_are_those_of_all_cells_that_are_given():
    cells, z, _ = made(200, 0)
    few = cells.take(np.arange(3))
    assert Features.fit((few, z[:3]), seed=0).loading.shape[1] == 2
    assert Features.fit((few, z[:3]), (cells, z), seed=0).loading.shape[1] == 50


def test_classes_are_sorted():
    names, code = classes_of(["b", "a", "b"])
    assert names == ("a", "b")
    assert code.tolist() == [1, 0, 1]
