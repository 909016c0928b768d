"""``scdiva evaluate perturbation`` from file to report."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from perturbed import perturbed_cells, vocabulary
from scdiva.tasks import evaluate_perturbation as task


@pytest.fixture(scope="module")
def cells():
    return perturbed_cells(((0,), (1,), (2,), (3,)), n_cells=40, n_batches=1)


@pytest.fixture
def file(cells, tmp_path):
    names = [p.name for p in cells.perturbations]
    obs = pd.DataFrame(
        {
            "perturbation": [names[code] for code in cells.perturbation_code],
            "lane": np.where(np.arange(cells.n_cells) % 2, "odd", "even"),
        },
        index=[f"c{i}" for i in range(cells.n_cells)],
    )
    var = pd.DataFrame({"ensembl_id": vocabulary().ensembl_id}, index=vocabulary().symbol.astype(str))
    path = tmp_path / "screen.h5ad"
    ad.AnnData(cells.cells.counts, obs=obs, var=var).write_h5ad(path)
    return path


ASKED = ("--perturbation-key", "perturbation", "--control", "control", "--seeds", "1", "--folds", "2")


def test_a_file_and_the_function_give_the_same_numbers(cli, file, cells, tmp_path):
    out = tmp_path / "report"
    asked = ("evaluate", "perturbation", file, *ASKED, "--no-corpus", "--methods", "knn", "--out", out)
    first = cli(*asked)
    assert first.code == 0, first.err
    rows = (out / "rows.jsonl").read_text()
    found = json.loads((out / "report.json").read_text())
    assert {row["method"] for row in found["rows"]} == {"mean", "knn", "shuffled", "ceiling"}
    assert "PearsonΔ" in (out / "report.md").read_text()
    # it goes on from what is there
    assert cli(*asked).code == 0
    assert (out / "rows.jsonl").read_text() == rows
    # the file's genes are the first of the default vocabulary, and so are those of the cells
    from scdiva.data.perturbation_sets import load_perturbed
    from scdiva.genes import GeneVocabulary

    genes = GeneVocabulary.default()
    loaded = load_perturbed(ad.read_h5ad(file), genes, perturbation_key="perturbation", control="control").data
    splits = task.splits_of(loaded, "unseen_single", seeds=(0,), n_folds=2)
    report = task.evaluate_perturbation(loaded, splits, methods=["knn"], vocabulary=genes)
    for row in found["rows"]:
        ours = next(r for r in report.rows if (r.method, r.condition) == (row["method"], row["perturbation"]))
        assert row["scores"]["pearson_delta"] == pytest.approx(ours.scores["pearson_delta"])


def test_filters_and_gene_embeddings_of_a_model(cli, file, bundle, tmp_path):
    out = tmp_path / "report"
    asked = (*ASKED, "--model", bundle, "--methods", "knn_corpus", "--filter", "lane=odd", "--min-cells", "10")
    result = cli("evaluate", "perturbation", file, *asked, "--device", "cpu", "--out", out)
    assert result.code == 0, result.err
    found = json.loads((out / "report.json").read_text())
    assert "knn_corpus" in {row["method"] for row in found["rows"]}
    assert all(row["n_perturbed"] <= 25 for row in found["rows"])


def test_refusals_write_nothing(cli, file, tmp_path):
    out = tmp_path / "report"
    for asked, words in (
        (("--perturbation-key", "guide", "--control", "control"), "guide"),
        ((*ASKED, "--filter", "lane=none"), "no cell passes"),
        ((*ASKED, "--filter", "donor=1"), "donor"),
    ):
        result = cli("evaluate", "perturbation", file, *asked, "--no-corpus", "--out", out)
        assert result.code == 2
        assert words in result.err
        assert not out.exists()
