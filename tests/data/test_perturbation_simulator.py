from __future__ import annotations

import numpy as np
import pytest

import scdiva as sd
from scdiva.data.perturbation_sets import load_perturbed
from scdiva.data.perturbation_simulator import simulate_perturbations
from scdiva.data.perturbation_splits import split_perturbations
from scdiva.errors import ConfigError


@pytest.fixture(scope="module")
def simulated():
    return simulate_perturbations(np.random.default_rng(0), n_genes=300, n_cells=40, n_control=400)


@pytest.fixture(scope="module")
def measured(simulated):
    """Mean log1p CP10K of every perturbation, (P, G)."""
    data = simulated.data
    scale = 1e4 / data.cells.library_size[:, None]
    logs = data.cells.counts.multiply(scale).log1p().tocsr()
    return np.stack(
        [np.asarray(logs[data.perturbation_code == p].mean(axis=0)).ravel() for p in range(len(data.perturbations))]
    )


def position(simulated) -> dict[str, int]:
    return {known.name: p for p, known in enumerate(simulated.data.perturbations)}


def test_the_truth_has_the_form_that_it_says(simulated):
    data, at = simulated.data, position(simulated)
    assert data.is_control.sum() == 400
    assert len(data.perturbations) == 1 + 24 + 60
    np.testing.assert_allclose(simulated.share.sum(axis=2), 1)
    assert (simulated.effect[0] == 0).all()
    for name, rule in simulated.interaction.items():
        one, other = name.split("+")
        np.testing.assert_allclose(
            simulated.additive_effect[at[name]], simulated.effect[[at[one], at[other]]].sum(axis=0)
        )
        # shares sum to 1, which shifts all genes alike
        rest = simulated.effect[at[name], 0] - simulated.additive_effect[at[name], 0]
        assert (np.std(rest) < 1e-9) == (rule == "additive")
        pathways = simulated.pathway[one], simulated.pathway[other]
        assert (rule == "saturation") == (pathways[0] == pathways[1])
    assert set(simulated.interaction.values()) == {"additive", "saturation", "synergy", "suppression"}
    assert set(simulated.interacting) == {name for name, rule in simulated.interaction.items() if rule != "additive"}
    assert np.bincount(list(simulated.pathway.values())).tolist() == [6, 6, 6, 6]


def test_single_effects_are_of_low_rank_besides_their_own_gene(simulated):
    at, symbols = position(simulated), simulated.vocabulary.symbol.tolist()
    effect = simulated.effect[[at[name] for name in simulated.pathway], 0]
    own = [symbols.index(name) for name in simulated.pathway]
    assert (effect[np.arange(24), own] < -0.3).mean() > 0.8
    rest = np.delete(effect, own, axis=1)
    assert np.linalg.matrix_rank(rest - rest.mean(axis=1, keepdims=True), tol=1e-6) == 8


def test_counts_follow_the_truth(simulated):
    data, found = simulated.data, []
    assert data.cells.counts.dtype == np.int32
    np.testing.assert_array_equal(data.cells.library_size, data.cells.counts.sum(axis=1).A1)
    assert 3000 < data.cells.library_size.mean() < 5000
    assert np.std(np.log(data.cells.library_size)) > 0.25
    sums = np.asarray(data.cells.counts[data.is_control].sum(axis=0)).ravel()
    is_frequent = simulated.share[0, 0] > 2e-3
    np.testing.assert_allclose((sums / sums.sum() / simulated.share[0, 0])[is_frequent], 1, atol=0.2)
    for p in range(1, len(data.perturbations)):
        sums_p = np.asarray(data.cells.counts[data.perturbation_code == p].sum(axis=0)).ravel()
        found.append(
            np.corrcoef(np.log((sums_p + 1) / (sums + 1))[is_frequent], simulated.effect[p, 0, is_frequent])[0, 1]
        )
    assert np.mean(found) > 0.8
    # more than Poisson noise
    dense = data.cells.counts[data.is_control].toarray()[:, is_frequent]
    assert np.median(dense.var(axis=0) / dense.mean(axis=0)) > 1.3


def test_who_has_seen_other_pairs_of_the_pathways_predicts_a_pair_better_than_the_sum(simulated, measured):
    at, delta = position(simulated), measured - measured[0]
    errors: dict[str, list[tuple[float, float]]] = {}
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in simulated.interaction:
        groups.setdefault(tuple(sorted(simulated.pathway[target] for target in name.split("+"))), []).append(name)
    for pathways, members in groups.items():
        singles = {
            name: [
                delta[at[target]]
                for target in sorted(name.split("+"), key=lambda t: (simulated.pathway[t] != pathways[0], t))
            ]
            for name in members
        }
        for name in members:
            others = [other for other in members if other != name]
            inputs = np.array([np.ravel([singles[other][i] for other in others]) for i in (0, 1)]).T
            target = np.ravel([delta[at[other]] for other in others])
            weight = np.linalg.lstsq(inputs, target, rcond=None)[0]
            rest = np.mean([delta[at[other]] - weight @ singles[other] for other in others], axis=0)
            learnt, added = weight @ singles[name] + rest, np.sum(singles[name], axis=0)
            truth = delta[at[name]]
            errors.setdefault(simulated.interaction[name], []).append(
                (float(((learnt - truth) ** 2).mean()), float(((added - truth) ** 2).mean()))
            )
    for rule in ("saturation", "synergy", "suppression"):
        learnt, added = np.mean(errors[rule], axis=0)
        assert learnt < 0.7 * added, rule


def test_what_varies_with_a_gene_in_control_cells_is_what_its_knock_out_changes(simulated, measured):
    data, at, symbols = simulated.data, position(simulated), simulated.vocabulary.symbol.tolist()
    scale = 1e4 / data.cells.library_size[:, None]
    logs = data.cells.counts.multiply(scale).log1p().tocsr()[data.is_control].toarray()
    logs -= logs.mean(axis=0)
    delta, names = measured - measured[0], list(simulated.pathway)
    by_covariance, by_mean = [], []
    for name in names:
        gene = symbols.index(name)
        others = np.delete(np.arange(logs.shape[1]), gene)
        covariance = logs[:, gene] @ logs[:, others]
        mean = np.mean([delta[at[other]] for other in names if other != name], axis=0)
        by_covariance.append(np.corrcoef(-covariance, delta[at[name], others])[0, 1])
        by_mean.append(np.corrcoef(mean[others], delta[at[name], others])[0, 1])
    assert np.mean(by_covariance) > 0.5
    assert np.mean(by_covariance) > np.mean(by_mean) + 0.1


def test_contexts_change_the_size_of_effects():
    found = sd.datasets.simulate_perturbations(
        np.random.default_rng(1), n_genes=120, n_targets=8, n_pathways=2, n_pairs=0, n_cells=5, n_control=10,
        contexts=("x", "y", "z"),
    )  # fmt: skip
    assert found.data.contexts == ("x", "y", "z")
    assert np.bincount(found.data.context_code).tolist() == [50, 50, 50]
    size = found.effect.std(axis=2)
    of_pathway = [[size[position(found)[n]] for n, p in found.pathway.items() if p == pathway] for pathway in (0, 1)]
    ratios = [np.mean([row[1] / row[0] for row in rows]) for rows in of_pathway]
    assert abs(ratios[0] - ratios[1]) > 0.05 or abs(ratios[0] - 1) > 0.05
    assert not np.allclose(found.share[0, 0], found.share[0, 1])


def test_it_is_seeded_and_loads_like_a_file(simulated):
    again = simulate_perturbations(np.random.default_rng(0), n_genes=300, n_cells=40, n_control=400)
    assert (again.data.cells.counts != simulated.data.cells.counts).nnz == 0
    loaded = load_perturbed(
        simulated.to_adata(), simulated.vocabulary, perturbation_key="perturbation", control="control",
        context_key="cell_type",
    )  # fmt: skip
    assert loaded.data.perturbations == simulated.data.perturbations
    np.testing.assert_array_equal(loaded.data.perturbation_code, simulated.data.perturbation_code)
    assert (loaded.data.cells.counts != simulated.data.cells.counts).nnz == 0
    assert loaded.report.renamed == loaded.report.unknown == ()
    assert loaded.report.n_measured_targets == 24


def test_it_can_be_split_in_every_way_that_its_contexts_allow(simulated):
    groups = split_perturbations(simulated.data, "combination").groups
    assert set(groups) == {"unseen single", "seen 0 of 2", "seen 1 of 2", "seen 2 of 2"}
    assert len(split_perturbations(simulated.data, "unseen_single").conditions) in (4, 5)


@pytest.mark.parametrize(
    "numbers", [{"n_pairs": 277}, {"n_cells": 0}, {"n_targets": 200}, {"n_genes": 20_000}, {"contexts": ()}]
)
def test_impossible_numbers(numbers):
    with pytest.raises(ConfigError):
        simulate_perturbations(np.random.default_rng(0), **{"n_genes": 300, **numbers})
