from __future__ import annotations

import json

import numpy as np
import pytest

from scdiva.datasets import synthetic_cells
from scdiva.models.scdiva import ScDiVa
from scdiva.tasks import evaluate_integration as task

METHODS = ["pca", "zero_shot", "random", "oracle"]
FLAGS = [flag for name in METHODS for flag in ("--methods", name)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(task, "N_DRAWS", 4)
    monkeypatch.setattr(task, "find_spec", lambda module: None)


@pytest.fixture
def file(tmp_path):
    adata = synthetic_cells(200, 200, n_types=3, mean_depth=400.0, seed=3)
    adata.obs["str_labels"] = adata.obs["cell_type"].astype(str)
    adata.obs["donor"] = adata.obs["batch"]
    adata.obs.iloc[:5, adata.obs.columns.get_loc("str_labels")] = "unassigned"
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def test_a_file_and_python_give_equal_results(cli, file, bundle, tmp_path):
    out = tmp_path / "out"
    done = cli("evaluate", "integration", file, "--out", out, "--batch-key", "donor", "--label-key", "str_labels",
               "--model", bundle, *FLAGS, "--seeds", 1)  # fmt: skip
    assert done.code == 0, done.err
    assert done.out.startswith("Every type occurs in several batches")
    assert "5 cells have no label" in done.out
    assert "zero_shot, seed 0: AvgBATCH" in done.out
    assert sorted(p.name for p in out.iterdir()) == ["report.json", "report.md", "report.png", "rows.jsonl"]
    model = ScDiVa.from_pretrained(bundle, device="cpu")
    data = task.BatchedCells.open(file, model, "donor", "str_labels")
    expected = task.evaluate_integration(data, model, methods=METHODS, seeds=(0,)).to_dict()
    found = json.loads((out / "report.json").read_text())
    assert found["summary"] == expected["summary"]
    assert found["confounding"] == expected["confounding"] == done.out.splitlines()[0]


def test_a_published_set_has_its_keys(cli, file, bundle, tmp_path):
    done = cli("evaluate", "integration", file, "--out", tmp_path / "out", "--published", "PBMC12k",
               "--model", bundle, *FLAGS, "--seeds", 1)  # fmt: skip
    assert done.code == 0, done.err
    assert "PBMC12k: " in done.out  # what differs from the published set
    assert "### PBMC12k: 200 cells" in (tmp_path / "out" / "report.md").read_text()
    bad = cli("evaluate", "integration", file, "--out", tmp_path / "x", "--published", "Adamson", "--model", bundle)
    assert bad.code == 2
    assert not (tmp_path / "x").exists()


def test_bad_input_writes_nothing(cli, file, bundle, tmp_path):
    for name in ("integration", "embedding"):
        (tmp_path / "taken").write_text("")
        done = cli("evaluate", name, file, "--out", tmp_path / "taken", "--model", bundle)
        assert done.code == 2
        assert "is a file" in done.err
        done = cli("evaluate", name, file, "--out", tmp_path / "x", "--label-key", "no_such", "--model", bundle)
        assert done.code == 2
        assert "no_such" in done.err
        assert not (tmp_path / "x").exists()
    done = cli("evaluate", "integration", file, "--out", tmp_path / "x", "--batch-key", "no_batch", "--model", bundle)
    assert done.code == 2
    assert "no_batch" in done.err


def test_the_embedding_as_it_comes(cli, file, bundle, tmp_path):
    out = tmp_path / "out"
    options = ("--label-key", "str_labels", "--batch-key", "donor", "--model", bundle, "--seeds", 2)
    done = cli("evaluate", "embedding", file, "--out", out, *options)
    assert done.code == 0, done.err
    assert sorted(p.name for p in out.iterdir()) == ["report.json", "report.md", "report.png", "rows.jsonl"]
    content = json.loads((out / "report.json").read_text())
    assert {row["method"] for row in content["summary"]} == {
        "scdiva", "pca", "random_projection", "shuffled", "ceiling",
    }  # fmt: skip
    accuracy = {row["method"]: row["mean"] for row in content["summary"] if row["score"] == "knn_accuracy"}
    assert accuracy["shuffled"] < accuracy["pca"]
    n_rows = len((out / "rows.jsonl").read_text().splitlines())
    assert cli("evaluate", "embedding", file, "--out", out, *options).code == 0
    assert len((out / "rows.jsonl").read_text().splitlines()) == n_rows == 10
    assert np.isfinite(list(accuracy.values())).all()
