from __future__ import annotations

import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from scdiva.cli.evaluate_generation import evaluate_generation
from scdiva.datasets import synthetic_cells
from scdiva.errors import ScdivaError
from scdiva.metrics.generation_classifiers import CLASSIFIERS
from scdiva.tasks import evaluate_generation as task

METHODS = ["multinomial", "shuffled", "ceiling"]
FLAGS = [flag for name in METHODS for flag in ("--methods", name)]


@pytest.fixture(scope="module", autouse=True)
def _quick_judges():
    """The judges themselves are tested elsewhere: two that take seconds are replaced by one that takes none."""
    from sklearn.naive_bayes import GaussianNB

    with pytest.MonkeyPatch.context() as patch:
        for name in ("logistic", "mlp"):
            patch.setitem(CLASSIFIERS, name, lambda seed, n_trees: GaussianNB())
        yield


@pytest.fixture
def app():
    app = typer.Typer()
    app.command()(evaluate_generation)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "cells.h5ad"
    synthetic_cells(300, 120, n_types=3, n_batches=1, mean_depth=600.0, seed=3).write_h5ad(path)
    return path


def test_a_file_and_python_give_equal_results(app, file, tmp_path, monkeypatch, bundled_model):
    out = tmp_path / "out"
    drawn = []
    monkeypatch.setattr("scdiva.pl.generation", lambda real, made, path, color: drawn.append((real, made, path, color)))
    dots = []
    monkeypatch.setattr("scdiva.pl.marker_dots", lambda real, made, path, **options: dots.append((real, path, options)))
    done = app(file, "--out", out, *FLAGS, "--seeds", 1, "--trees", 5)
    assert done.exit_code == 0, done.output
    for name in METHODS:
        assert f"{name}, seed 0: C2ST forest" in done.output
    names = sorted(p.name for p in out.iterdir())
    assert names == ["cells", "report.json", "report.md", "rows.jsonl"]
    ((real, made, path, color),) = drawn
    assert (list(made), path, color) == (["multinomial per type"], out / "generation.png", "cell_type")
    assert real.n_obs == made["multinomial per type"].n_obs
    ((shown, path, options),) = dots
    assert (path, options["gene_symbols"]) == (out / "markers.png", "symbol")
    assert not set(options["markers_of"].obs_names) & set(shown.obs_names)
    assert list(shown.var["symbol"]) != list(shown.var_names)
    known, what = task.known_cells(file, bundled_model.vocabulary, "cell_type")
    assert what in done.output
    expected = task.evaluate_generation(known, labels_key="cell_type", methods=METHODS, seeds=(0,), n_trees=5)
    found = json.loads((out / "report.json").read_text())
    assert found["summary"] == json.loads(expected.to_json())["summary"]
    again = app(file, "--out", out, *FLAGS, "--seeds", 1, "--trees", 5)
    assert again.exit_code == 0
    assert json.loads((out / "report.json").read_text())["runs"] == found["runs"]  # seconds too: nothing ran anew


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "scdifusion"], ["scdiva, scdiffusion, scdiffusion_parity, scdiffusion_scdiva, ", "multinomial"]),
        (["--labels-key", "celltype"], ["cell_type, batch"]),
        (["--labels-key", "celltype", "--generated", "FILE", "--heldout", "FILE"], ["cell_type, batch"]),
        (["--methods", "scdiva", "--generated", "FILE", "--heldout", "FILE"], ["generated, ", "multinomial"]),
    ],
)
def test_what_is_unknown_is_named_beside_what_there_is_and_leaves_no_folder(options, words, app, file, tmp_path):
    done = app(file, "--out", tmp_path / "out", *[file if option == "FILE" else option for option in options])
    assert isinstance(done.exception, ScdivaError)
    for text in words:
        assert text in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_cells_made_elsewhere(app, file, tmp_path, monkeypatch):
    import anndata as ad

    drawn = []
    monkeypatch.setattr("scdiva.pl.generation", lambda *a, **k: drawn.append("generation"))
    monkeypatch.setattr("scdiva.pl.marker_dots", lambda *a, **k: drawn.append("markers"))

    cells = ad.read_h5ad(file)
    order = np.random.default_rng(0).permutation(300)
    for name, rows in {"train": order[:200], "heldout": order[200:], "made": order[:100]}.items():
        cells[np.sort(rows)].copy().write_h5ad(tmp_path / f"{name}.h5ad")
    paths = [tmp_path / f"{name}.h5ad" for name in ("train", "made", "heldout")]
    done = app(paths[0], "--generated", paths[1], "--heldout", paths[2], "--out", tmp_path / "out", *FLAGS[:2],
               "--seeds", 1, "--trees", 5)  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["ours"] == ["generated"]
    assert drawn == ["generation", "markers"]
    assert (tmp_path / "out" / "cells" / "seed-0" / "generated.h5ad").exists()
    copies = [r["value"] for r in report["runs"][0]["rows"] if r["metric"] == "n_copies" and r["scope"] == "pooled"]
    assert copies[0] > 80


@pytest.mark.parametrize(
    "arguments", [["--generated", "x.h5ad"], ["--heldout", "x.h5ad"], ["--methods", "scdeva"], ["--labels-key", "type"]]
)
def test_bad_input_is_an_error_of_ours_and_leaves_nothing(arguments, app, file, tmp_path):
    done = app(file, "--out", tmp_path / "out", "--methods", "multinomial", *arguments)
    assert isinstance(done.exception, ScdivaError)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_an_unknown_unit_is_a_bad_parameter(app, file, tmp_path):
    assert app(file, "--out", tmp_path / "out", "--unit", "tpm").exit_code == 2


def test_kept_cells_are_measured_by_the_published_protocol(app, file, tmp_path, monkeypatch):
    from scdiva.cli.evaluate_protocol import evaluate_protocol
    from scdiva.errors import UnsupportedError
    from scdiva.tasks import generation_protocol

    def refuse():
        raise UnsupportedError("no CellTypist", expected="it", fix="install it")

    monkeypatch.setattr(generation_protocol.annotation, "require_celltypist", refuse)
    for name in ("generation", "marker_dots"):
        monkeypatch.setattr(f"scdiva.pl.{name}", lambda *a, **k: None)
    out = tmp_path / "out"
    assert app(file, "--out", out, "--methods", "multinomial", "--seeds", 1, "--trees", 2).exit_code == 0
    protocol = typer.Typer()
    protocol.command()(evaluate_protocol)
    done = CliRunner().invoke(protocol, [str(out), "--trees", "2"])
    assert done.exit_code == 0, done.output
    assert "ceiling, seed 0: scc" in done.output
    assert "| multinomial per type | 1 |" in (out / "protocol.md").read_text()
    assert (out / "protocol.jsonl").exists()
