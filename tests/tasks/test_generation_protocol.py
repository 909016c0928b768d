from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

from scdiva.datasets import synthetic_cells
from scdiva.errors import ConfigError, GeneError, KeyNotFoundError, SourceError, UnsupportedError
from scdiva.metrics import generation as metrics
from scdiva.metrics.generation_space import LabelledCells
from scdiva.tasks import generation_protocol as task
from scdiva.tasks.evaluate_generation import IS_SAMPLE

SAMPLERS = (*task.SAMPLERS, "shuffled", "ceiling")


def keep(folder, seed: int) -> None:
    """What ``evaluate generation`` keeps of one seed, with training cells in the part of a generator's."""
    cells = synthetic_cells(240, 80, n_types=2, n_batches=1, mean_depth=400.0, seed=seed)
    train, heldout = cells[:160].copy(), cells[160:].copy()
    for part in (train, heldout):
        part.obs = part.obs[["cell_type"]]
    train.obs[IS_SAMPLE] = np.arange(160) < 80
    ours = train[80:].copy()
    del ours.obs[IS_SAMPLE]
    (folder / f"seed-{seed}").mkdir(parents=True)
    for name, part in {"train": train, "heldout": heldout, "ours": ours}.items():
        part.write_h5ad(folder / f"seed-{seed}" / f"{name}.h5ad")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "cells"
    for seed in (0, 1):
        keep(path, seed)
    return path


@pytest.fixture
def called_right(monkeypatch):
    """CellTypist, not installed here: calls all cells of one type."""
    calls = []

    def celltypist(train, labels, test, *, seed):
        calls.append((train, labels, test))
        kinds = np.unique(labels)
        return task.annotation.Predictions.of(np.eye(kinds.size)[np.zeros(test.shape[0], dtype=int)], kinds)

    monkeypatch.setattr(task.annotation, "require_celltypist", lambda: None)
    monkeypatch.setattr(task.annotation, "celltypist", celltypist)
    monkeypatch.setattr(task, "version", lambda name: "1")
    return calls


@pytest.fixture
def no_celltypist(monkeypatch):
    def refuse():
        raise UnsupportedError("no CellTypist", expected="it", fix="install it")

    monkeypatch.setattr(task.annotation, "require_celltypist", refuse)


def test_kept_cells_are_measured_beside_samplers_null_and_ceiling(folder, tmp_path, no_celltypist):
    rows, printed = tmp_path / "protocol.jsonl", []
    report = task.evaluate_protocol(folder, rows_path=rows, n_trees=5, on_row=printed.append)
    assert report.methods == ("ours", *SAMPLERS)
    assert [run.seed for run in report.runs if run.method == "ours"] == [0, 1]
    for scope in task.REFERENCES:
        assert (
            report.summary("ours", "forest_auc", scope).mean < report.summary("pca_gaussian", "forest_auc", scope).mean
        )
        assert report.summary("ceiling", "scc", scope).mean > 0.9
        assert report.summary("ours", "pcc", scope).n == 2
    # one pair of samples whichever is the reference
    assert report.summary("ceiling", "scc", task.TRAINING).mean == report.summary("ceiling", "scc", task.HELDOUT).mean
    text = report.write(tmp_path).read_text()
    assert "Against training cells, as published:" in text
    assert "| ours | 2 |" in text
    assert "| – |" in text
    assert "No CellTypist accuracy of ours" in text
    before = rows.read_text()
    again = task.evaluate_protocol(folder, rows_path=rows, n_trees=5)
    assert rows.read_text() == before
    assert again.to_markdown() == report.to_markdown()


def test_celltypist_learns_from_training_cells_and_types_count_alike(folder, called_right):
    report = task.evaluate_protocol(folder, n_trees=2)
    assert len(called_right) == 2  # once for each seed
    _, labels, test = called_right[0]
    assert len(set(np.unique(labels, return_counts=True)[1])) == 1
    assert test.shape[0] == 80 * (1 + len(SAMPLERS))
    assert report.summary("ours", task.CELLTYPIST, metrics.POOLED).mean == pytest.approx(0.5)
    assert report.summary("ours", task.CELLTYPIST, "type 0").mean == 1.0
    assert "CellTypist accuracy, by type:" in report.to_markdown()


def test_rows_without_celltypist_are_measured_again_once_it_is_there(folder, tmp_path, no_celltypist, request):
    rows = tmp_path / "protocol.jsonl"
    task.evaluate_protocol(folder, rows_path=rows, n_trees=2)
    request.getfixturevalue("called_right")
    report = task.evaluate_protocol(folder, rows_path=rows, n_trees=2)
    assert report.summary("ours", task.CELLTYPIST, metrics.POOLED).n == 2


def test_training_cells_are_balanced_and_capped(monkeypatch):
    labels = np.repeat(["a", "b"], [90, 10])
    rows = task.balanced_rows(labels, np.random.default_rng(0))
    n_a, n_b = ((labels[rows] == kind).sum() for kind in "ab")
    assert n_a == n_b
    assert np.unique(rows).size == 80
    monkeypatch.setattr(task, "MAX_BALANCED", 20)
    assert task.balanced_rows(labels, np.random.default_rng(0)).size == 20


def test_what_is_not_there_is_named(folder, tmp_path, no_celltypist):
    with pytest.raises(SourceError, match="no cells in"):
        task.evaluate_protocol(tmp_path)
    with pytest.raises(SourceError, match="theirs"):
        task.evaluate_protocol(folder, methods=["theirs"])
    with pytest.raises(ConfigError, match="any case"):
        task.evaluate_protocol(folder, methods=["ceiling"])
    with pytest.raises(KeyNotFoundError, match="louvain"):
        task.evaluate_protocol(folder, labels_key="louvain")
    keep(tmp_path / "other", 3)
    path = tmp_path / "other" / "seed-3" / "ours.h5ad"
    ad.read_h5ad(path)[:, ::-1].copy().write_h5ad(path.with_name("turned.h5ad"))
    with pytest.raises(GeneError, match="differ"):
        task.evaluate_protocol(tmp_path / "other", n_trees=2)


def test_the_ceiling_never_meets_itself(folder):
    cells = task._KeptCells.read(folder / "seed-0", "cell_type")
    scores = task._scores(cells, cells.heldout, 0, 5)
    assert scores[task.HELDOUT, "mmd"].value > 0
    copied = LabelledCells(cells.heldout.counts, cells.heldout.labels)
    assert task._scores(cells, copied, 0, 5)[task.HELDOUT, "mmd"].value == pytest.approx(0, abs=1e-9)
