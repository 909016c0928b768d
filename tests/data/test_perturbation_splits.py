from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from scdiva.data.perturbation_splits import PerturbationSplit, split_perturbations
from scdiva.data.perturbations import Perturbation, PerturbedCells
from scdiva.errors import ConfigError, SourceError
from scdiva.types import CellCounts

GENES = "ABCDEFGH"
PAIRS = [*itertools.combinations("ABCDEF", 2), ("G", "H")]
SCHEMES = ("unseen_single", "combination", "unseen_context", "seen")


def perturbed(targets, n_cells=6, n_control=12, contexts=("x", "y"), n_batches=2, seed=0) -> PerturbedCells:
    """Cells of given targets in every context; batches in turn."""
    known = sorted({(), *targets})
    per_context = np.repeat(np.arange(len(known)), [n_control, *[n_cells] * (len(known) - 1)])
    code = np.tile(per_context, len(contexts)).astype(np.int64)
    n = code.size
    counts = sp.csr_matrix(np.random.default_rng(seed).poisson(0.7, (n, 15)).astype(np.int32))
    cells = CellCounts(
        counts, np.full(n, 50.0), np.arange(n), np.zeros(n, dtype=np.int32), np.ones((1, 15), dtype=bool)
    )
    context_code = np.repeat(np.arange(len(contexts)), per_context.size).astype(np.int64)
    batch_code = (np.arange(n) % n_batches).astype(np.int64)
    batches = tuple(f"b{i}" for i in range(n_batches))
    perturbations = tuple(Perturbation(row) for row in known)
    return PerturbedCells(cells, perturbations, code, tuple(contexts), context_code, batches, batch_code)


SINGLES = [(gene,) for gene in GENES]
DATA = perturbed([*SINGLES, *PAIRS])


def split(data=DATA, scheme="combination", **options) -> PerturbationSplit:
    return split_perturbations(data, scheme, **{"min_cells": 4, **options})


def check(data: PerturbedCells, found: PerturbationSplit) -> None:
    """What holds for every split: no test cell and no held-out control cell is trained on."""
    train, test = set(found.train.tolist()), set(found.test.tolist())
    control, heldout = set(found.control.tolist()), set(found.heldout_control.tolist())
    assert train.isdisjoint(test)
    assert train.isdisjoint(heldout)
    assert control <= train
    assert control.isdisjoint(heldout)
    assert control | heldout == set(np.flatnonzero(data.is_control).tolist())
    assert not data.is_control[found.test].any()
    for rows in (found.train, found.test, found.control, found.heldout_control):
        assert (np.diff(rows) > 0).all()
    for context, batch in set(zip(data.context_code.tolist(), data.batch_code.tolist(), strict=True)):
        both = (data.context_code == context) & (data.batch_code == batch)
        assert both[found.control].any()
        assert both[found.heldout_control].any()
    of_conditions = [found.rows_of(data, condition).tolist() for condition in found.conditions]
    assert sorted(itertools.chain(*of_conditions)) == found.test.tolist()
    assert all(of_conditions)
    assert len(found.groups) == len(found.conditions) == len(set(found.conditions))
    trained = {data.perturbations[p] for p in np.unique(data.perturbation_code[found.train])}
    seen = {target for perturbation in trained for target in perturbation.targets}
    for (p, context), group in zip(found.conditions, found.groups, strict=True):
        known = data.perturbations[p]
        in_train = (data.perturbation_code[found.train] == p) & (data.context_code[found.train] == context)
        assert in_train.any() == (found.scheme == "seen")
        if found.scheme == "unseen_single":
            assert (len(known.targets), group) == (1, "unseen single")
            assert not seen & set(known.targets)
        if found.scheme == "combination":
            n_seen = len(seen & set(known.targets))
            assert known not in trained
            assert group == ("unseen single" if len(known.targets) == 1 else f"seen {n_seen} of {len(known.targets)}")
            if n_seen == len(known.targets):
                assert {Perturbation((target,)) for target in known.targets} <= trained
        if found.scheme == "unseen_context":
            assert group == ("unseen context" if known in trained else "unseen context and perturbation")


@settings(max_examples=60, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    pairs=st.lists(st.sampled_from(PAIRS), min_size=8, unique=True),
    seed=st.integers(0, 99),
    fold=st.integers(0, 1),
    fraction=st.floats(0.15, 0.6),
    control_fraction=st.floats(0.05, 0.95),
)
def test_nothing_that_is_tested_is_trained_on(scheme, pairs, seed, fold, fraction, control_fraction):
    data = perturbed([*SINGLES, *pairs])
    options = {"seed": seed, "fold": fold, "n_folds": 3, "fraction": fraction, "control_fraction": control_fraction}
    try:
        found = split(data, scheme, **options)
    except SourceError:
        assert scheme == "combination"  # not every choice of pairs has all groups
        return
    check(data, found)


@settings(max_examples=25, deadline=None)
@given(scheme=st.sampled_from(SCHEMES), seed=st.integers(0, 9), shuffle=st.integers(0, 99))
def test_the_order_of_cells_does_not_matter(scheme, seed, shuffle):
    order = np.random.default_rng(shuffle).permutation(DATA.n_cells)
    here, there = split(DATA, scheme, seed=seed), split(DATA.take(order), scheme, seed=seed)
    assert here.manifest == there.manifest
    for part in ("train", "test", "control", "heldout_control"):
        content = [
            DATA.cells.counts[rows].toarray().tolist() for rows in (getattr(here, part), order[getattr(there, part)])
        ]
        assert sorted(content[0]) == sorted(content[1])


class TestUnseenSingle:
    def test_folds_share_nothing_and_cover_everything(self):
        held = [
            {DATA.perturbations[p].targets for p, _ in split(scheme="unseen_single", fold=i).conditions}
            for i in range(5)
        ]
        assert sorted(itertools.chain(*held)) == SINGLES
        assert [len(fold) for fold in held] == [2, 2, 2, 1, 1]

    def test_leave_one_out(self):
        held = [split(scheme="unseen_single", fold=i, n_folds=None).conditions for i in range(8)]
        assert all(len({p for p, _ in fold}) == 1 for fold in held)
        assert len({fold[0][0] for fold in held}) == 8

    def test_combinations_with_a_held_out_gene_are_not_trained_on(self):
        found = split(scheme="unseen_single", n_folds=None, seed=1)
        gene = DATA.perturbations[found.conditions[0][0]].targets[0]
        trained = [DATA.perturbations[p] for p in np.unique(DATA.perturbation_code[found.train])]
        assert not any(gene in known.targets for known in trained)
        assert any(len(known.targets) == 2 for known in trained)
        assert {DATA.perturbations[p].targets for p in np.unique(DATA.perturbation_code[found.test])} == {(gene,)}

    def test_all_doses_of_a_treatment_are_held_out_together(self):
        data = perturbed([("a",), ("b",), ("c",), ("d",)], contexts=("",))
        doses = {1: ("a", 1.0), 2: ("a", 5.0), 3: ("b", 1.0), 4: ("b", 5.0)}
        known = tuple(
            Perturbation((doses[p][0],), "treatment", doses[p][1]) if p else Perturbation((), "treatment")
            for p in range(5)
        )
        data = PerturbedCells(
            data.cells, known, data.perturbation_code, ("",), data.context_code, data.batches, data.batch_code
        )
        found = split(data, "unseen_single", n_folds=None)
        assert len({known[p].targets for p, _ in found.conditions}) == 1
        assert len(found.conditions) == 2

    def test_impossible_folds(self):
        with pytest.raises(ConfigError, match="0 to 4"):
            split(scheme="unseen_single", fold=5)
        with pytest.raises(
            SourceError, match="8 perturbations of one gene or treatment have enough cells, for 9 folds"
        ):
            split(scheme="unseen_single", n_folds=9)


class TestCombination:
    @pytest.mark.parametrize("seed", range(5))
    def test_every_group_occurs(self, seed):
        found = split(seed=seed)
        check(DATA, found)
        assert set(found.groups) == {"unseen single", "seen 0 of 2", "seen 1 of 2", "seen 2 of 2"}

    def test_a_gene_that_is_never_perturbed_alone_is_in_no_tested_combination_of_seen_genes(self):
        data = perturbed([(gene,) for gene in "BCDEFGH"] + PAIRS)  # A only in combinations
        for seed in range(5):
            found = split(data, seed=seed)
            check(data, found)
            both_seen = [
                data.perturbations[p]
                for (p, _), g in zip(found.conditions, found.groups, strict=True)
                if g == "seen 2 of 2"
            ]
            assert both_seen
            assert not any("A" in known.targets for known in both_seen)

    def test_data_without_enough_combinations_are_refused(self):
        with pytest.raises(SourceError, match="8 single perturbations and 1 combinations"):
            split(perturbed([*SINGLES, ("A", "B")]))


class TestUnseenContext:
    def test_perturbed_cells_of_the_context_are_held_out_and_its_control_cells_stay(self):
        found = split(scheme="unseen_context", fold="y")
        trained_in_y = found.train[DATA.context_code[found.train] == 1]
        assert DATA.is_control[trained_in_y].all()
        assert trained_in_y.size == 6
        assert set(DATA.context_code[found.test]) == {1}
        assert set(found.groups) == {"unseen context"}
        assert found.manifest == split(scheme="unseen_context", fold="y").manifest
        assert split(scheme="unseen_context", fold=1).conditions == found.conditions

    def test_one_context_or_an_unknown_one(self):
        with pytest.raises(SourceError, match="1 contexts"):
            split(perturbed(SINGLES, contexts=("",)), "unseen_context")
        with pytest.raises(ConfigError, match="one of x, y"):
            split(scheme="unseen_context", fold="z")


def test_seen_splits_the_cells_of_every_condition():
    found = split(scheme="seen", fraction=0.34)
    check(DATA, found)
    assert len(found.conditions) == 2 * (len(DATA.perturbations) - 1)
    assert {found.rows_of(DATA, condition).size for condition in found.conditions} == {2}


def test_seen_tests_conditions_of_one_cell_in_every_batch():
    data = perturbed(SINGLES, n_batches=6)
    check(data, split(data, "seen"))


def test_small_conditions_are_trained_on_but_not_tested():
    code = DATA.perturbation_code.copy()
    rows = np.flatnonzero((code == 1) & (DATA.context_code == 0))
    data = DATA.take(np.setdiff1d(np.arange(DATA.n_cells), rows[:3]))
    assert (1, 0) in split(DATA, "seen").conditions
    found = split(data, "seen")
    assert (1, 0) not in found.conditions
    assert (1, 1) in found.conditions
    kept = np.flatnonzero((data.perturbation_code == 1) & (data.context_code == 0))
    assert set(kept) <= set(found.train)
    # but not where they would show what is held out
    found = next(f for f in (split(data, "unseen_single", fold=i) for i in range(5)) if (1, 1) in f.conditions)
    assert set(kept).isdisjoint(found.train)
    assert set(kept).isdisjoint(found.test)


def test_control_cells_are_the_same_in_every_fold_and_scheme():
    heldout = [split(scheme=scheme, fold=fold).heldout_control.tolist() for scheme in SCHEMES for fold in (0, 1)]
    assert all(rows == heldout[0] for rows in heldout)
    assert heldout[0] != split(seed=1).heldout_control.tolist()


class TestManifest:
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_it_comes_back_from_a_file(self, scheme, tmp_path):
        found = split(scheme=scheme, fold=1)
        found.write_json(tmp_path / "split.json")
        back = PerturbationSplit.read_json(tmp_path / "split.json", DATA)
        assert (back.scheme, back.conditions, back.groups) == (found.scheme, found.conditions, found.groups)
        assert back.manifest == found.manifest
        for part in ("train", "test", "control", "heldout_control"):
            np.testing.assert_array_equal(getattr(back, part), getattr(found, part))

    def test_names_are_in_it(self, tmp_path):
        found = split(seed=3)
        found.write_json(tmp_path / "split.json")
        manifest = json.loads((tmp_path / "split.json").read_text())
        assert manifest["seed"] == 3
        named = {(row["perturbation"], row["context"], row["group"]) for row in manifest["conditions"]}
        assert named == {
            (DATA.perturbations[p].name, DATA.contexts[c], group)
            for (p, c), group in zip(found.conditions, found.groups, strict=True)
        }
        assert set(manifest["untrained"]) == {name for name, _, _ in named}
        assert manifest["cells"]["train"]["n"] == found.train.size

    @pytest.mark.parametrize("change", ["count", "label", "context", "batch", "library size", "fewer"])
    def test_other_data_are_refused(self, change, tmp_path):
        split().write_json(tmp_path / "split.json")
        data = perturbed([*SINGLES, *PAIRS])
        if change == "count":
            data.cells.counts.data[0] += 1
        elif change == "label":
            data.perturbation_code[0] = 1
        elif change == "context":
            data.context_code[0] = 1
        elif change == "batch":
            data.batch_code[0] = 1
        elif change == "library size":
            data.cells.library_size[0] += 1
        else:
            data = data.take(np.arange(1, data.n_cells))
        with pytest.raises(SourceError, match="written for other cells"):
            PerturbationSplit.read_json(tmp_path / "split.json", data)

    def test_a_manifest_that_was_edited_is_refused(self, tmp_path):
        path = tmp_path / "split.json"
        split().write_json(path)
        text = path.read_text()
        path.write_text(text.replace('"seed": 0', '"seed": 1'))
        with pytest.raises(SourceError, match="does not give the cells"):
            PerturbationSplit.read_json(path, DATA)
        manifest = json.loads(text)
        manifest["untrained"] = ["nothing"]
        path.write_text(json.dumps(manifest))
        with pytest.raises(SourceError, match="damaged"):
            PerturbationSplit.read_json(path, DATA)

    @pytest.mark.parametrize("text", ["", "[]", '{"format": "else"}'])
    def test_files_of_another_kind(self, text, tmp_path):
        (tmp_path / "split.json").write_text(text)
        with pytest.raises(SourceError, match=r"split\.json"):
            PerturbationSplit.read_json(tmp_path / "split.json", DATA)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scheme": "unseen"}, "'unseen'"),
        ({"fraction": 1.0}, "fraction"),
        ({"control_fraction": 0.0}, "control_fraction"),
    ],
)
def test_impossible_arguments(options, text):
    with pytest.raises(ConfigError, match=text):
        split(**options)


def test_nothing_to_test():
    with pytest.raises(SourceError, match="no perturbation has enough cells"):
        split(scheme="seen", min_cells=100)
