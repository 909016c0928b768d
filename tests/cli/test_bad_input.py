"""Bad input: one line that says what was found, what was expected and how to fix it; exit code 2; nothing written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

import ten_x_files
from conftest import files_under


@dataclass(frozen=True)
class Place:
    """Where a case is built: a good file, a model, an empty folder for output."""

    folder: Path
    adata: ad.AnnData
    good: Path
    bundle: Path
    out: Path

    def file(self, change: Callable[[ad.AnnData], object], name: str = "bad.h5ad") -> Path:
        """Write the good cells with a change; the change may return another AnnData."""
        changed = self.adata.copy()
        result = change(changed)
        (result if isinstance(result, ad.AnnData) else changed).write_h5ad(self.folder / name)
        return self.folder / name


@pytest.fixture
def place(adata, bundle, tmp_path) -> Place:
    folder, out = tmp_path / "data", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    adata.write_h5ad(folder / "good.h5ad")
    return Place(folder, adata, folder / "good.h5ad", bundle, out)


BAD_FILES: dict[str, tuple[Callable[[Place], Path], tuple[str, ...]]] = {}
"""Name -> (builder of a file, words that the message must contain)."""
VERDICTS: set[str] = set()
"""Of these ``check`` prints a report with a verdict, because the file as such can be read."""


def bad_file(*words: str, verdict: bool = False) -> Callable:
    def register(build):
        name = build.__name__.replace("_", " ")
        BAD_FILES[name] = (build, words)
        if verdict:
            VERDICTS.add(name)
        return build

    return register


@bad_file("absent.h5ad", "does not exist")
def missing_file(p):
    return p.folder / "absent.h5ad"


@bad_file("bad.h5ad", "truncated")
def truncated_file(p):
    content = p.good.read_bytes()
    (p.folder / "bad.h5ad").write_bytes(content[: len(content) // 2])
    return p.folder / "bad.h5ad"


@bad_file("bad.h5ad", "0 bytes")
def empty_file(p):
    (p.folder / "bad.h5ad").touch()
    return p.folder / "bad.h5ad"


@bad_file("cells.csv", "not an HDF5 file")
def table_of_text(p):
    (p.folder / "cells.csv").write_text("cell,CD3D\na,1\n")
    return p.folder / "cells.csv"


@bad_file("bad.h5ad", "damaged")
def text_that_is_called_h5ad(p):
    (p.folder / "bad.h5ad").write_text("<html>404 Not Found</html>")
    return p.folder / "bad.h5ad"


@bad_file("neither AnnData nor 10x", "weights")
def hdf5_of_something_else(p):
    with h5py.File(p.folder / "bad.h5", "w") as file:
        file["weights"] = [1, 2]
    return p.folder / "bad.h5"


@bad_file("10x", "bad.h5")
def ten_x_file_without_its_features(p):
    ten_x_files.write_h5_v3(p.adata, p.folder / "bad.h5")
    with h5py.File(p.folder / "bad.h5", "r+") as file:
        del file["matrix/features"]
    return p.folder / "bad.h5"


@bad_file("10x", "filtered")
def ten_x_folder_without_its_barcodes(p):
    folder = ten_x_files.write_mtx_v3(p.adata, p.folder / "filtered")
    (folder / "barcodes.tsv.gz").unlink()
    return folder


@bad_file("neither a .zarr store nor a 10x mtx folder")
def folder_of_something_else(p):
    (p.folder / "photos").mkdir()
    (p.folder / "photos" / "cat.jpg").touch()
    return p.folder / "photos"


@bad_file("zarr")
def empty_zarr_folder(p):
    (p.folder / "bad.zarr").mkdir()
    return p.folder / "bad.zarr"


@bad_file("cannot be read as AnnData")
def anndata_whose_genes_are_gone(p):
    path = p.file(lambda a: None)
    with h5py.File(path, "r+") as file:
        del file["var/_index"]
    return path


@bad_file("shape", "120 cells")
def matrix_shorter_than_obs(p):
    path = p.file(lambda a: None)
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = (60, 200)
    return path


@bad_file("duplicated cell names", "'cell_0'")
def duplicated_cell_names(p):
    def change(a):
        a.obs_names = ["cell_0", "cell_0", *a.obs_names[2:]]

    return p.file(change)


@bad_file("0 cells")
def no_cells(p):
    return p.file(lambda a: a[:0].copy())


@bad_file("0 genes")
def no_genes(p):
    return p.file(lambda a: a[:, :0].copy())


@bad_file("no X")
def no_matrix(p):
    def change(a):
        a.X = None

    return p.file(change)


@bad_file("object", "numeric")
def object_dtype(p):
    path = p.file(lambda a: None)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_dataset("X", data=np.full((120, 200), b"7", dtype=object), dtype=h5py.string_dtype())
        file["X"].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    return path


@bad_file("mouse", "human", verdict=True)
def mouse_genes(p):
    def change(a):
        del a.var["ensembl_id"]
        a.var_names = [f"ENSMUSG{i:011d}" for i in range(200)]

    return p.file(change)


@bad_file("mouse and human", verdict=True)
def human_and_mouse_genes(p):
    def change(a):
        del a.var["ensembl_id"]
        a.var_names = [*a.var_names[:100], *(f"mm10_Gene{i}" for i in range(100))]

    return p.file(change)


@bad_file("not known", "var_names", verdict=True)
def numbers_for_genes(p):
    def change(a):
        del a.var["ensembl_id"]
        a.var_names = [str(i) for i in range(200)]

    return p.file(change)


@bad_file("another case", "upper", verdict=True)
def human_genes_in_lower_case(p):
    def change(a):
        del a.var["ensembl_id"]
        a.var_names = [name.lower() for name in a.var_names]

    return p.file(change)


@bad_file("of the UMIs", "50%", "min_coverage", verdict=True)
def low_coverage(p):
    def change(a):
        del a.var["ensembl_id"]
        depth = np.asarray(a.X.sum(axis=0)).ravel().argsort()
        names = a.var_names.to_numpy().astype(object)
        names[depth[-110:]] = [f"custom-{i}" for i in range(110)]
        a.var_names = list(names)

    return p.file(change)


def with_x(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Place], Path]:
    def build(p):
        def replace(a):
            a.X = change(a.X.toarray().astype(np.float64))

        return p.file(replace)

    return build


@bad_file("all zero", verdict=True)
def all_zero(p):
    return with_x(np.zeros_like)(p)


@bad_file("negative", "layer", verdict=True)
def scaled_data(p):
    return with_x(lambda x: (x - x.mean(axis=0)) / x.std(axis=0).clip(1e-9))(p)


@bad_file("NaN", verdict=True)
def nan_in_the_matrix(p):
    return with_x(lambda x: np.where(np.arange(200) == 7, np.nan, x))(p)


@bad_file("infinite", verdict=True)
def infinity_in_the_matrix(p):
    return with_x(lambda x: np.where(np.arange(200) == 7, np.inf, x))(p)


@bad_file("do not go back to integers", verdict=True)
def values_like_tpm(p):
    return with_x(lambda x: x / np.linspace(0.3, 9.7, 200))(p)


@bad_file("do not go back to integers", verdict=True)
def ambient_corrected_counts(p):
    return with_x(lambda x: x * np.random.default_rng(0).uniform(0.6, 1.0, x.shape))(p)


@bad_file("0 and 1", verdict=True)
def presence_and_absence(p):
    return with_x(lambda x: (x > 0).astype(float))(p)


def assert_one_clear_line(err: str, words: tuple[str, ...]) -> None:
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert "(expected: " in lines[0]
    assert "; fix: " in lines[0]
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"


@pytest.mark.parametrize("name", BAD_FILES)
def test_embed_refuses(name, cli, place):
    build, words = BAD_FILES[name]
    path = build(place)
    before = files_under(place.folder.parent)
    result = cli("embed", path, place.out / "out.h5ad", "--model", place.bundle)
    assert result.code == 2
    assert_one_clear_line(result.err, words)
    assert result.out == ""
    assert files_under(place.folder.parent) == before


@pytest.mark.parametrize("name", BAD_FILES)
def test_check_refuses(name, cli, place):
    build, words = BAD_FILES[name]
    path = build(place)
    before = files_under(place.folder.parent)
    result = cli("check", path)
    assert result.code == 2
    if name in VERDICTS and name != "low coverage":
        assert result.err == ""
        assert "NOT usable" in result.out
        for word in (*words, "found", "expected", "fix"):
            assert word in result.out
    elif name == "low coverage":
        assert "NOT usable" in result.out
        assert "UMIs covered" in result.out
    else:
        assert_one_clear_line(result.err, words)
    assert files_under(place.folder.parent) == before


# a representative half for the two slower commands: they read files through the same function
FOR_TRAINING = [name for i, name in enumerate(BAD_FILES) if i % 3 == 0 or name in ("mouse genes", "scaled data")]


@pytest.mark.parametrize("name", FOR_TRAINING)
def test_finetune_refuses(name, cli, place):
    build, words = BAD_FILES[name]
    path = build(place)
    before = files_under(place.folder.parent)
    result = cli("finetune", path, "--out", place.out / "run", "--model", place.bundle)
    assert result.code == 2
    assert_one_clear_line(result.err, words)
    assert files_under(place.folder.parent) == before


@pytest.mark.parametrize("name", FOR_TRAINING)
def test_pretrain_refuses_when_one_of_its_files_is_bad(name, cli, place):
    build, words = BAD_FILES[name]
    path = build(place)
    config = place.folder / "run.toml"
    config.write_text(f'[[data.files]]\npath = "{place.good}"\n[[data.files]]\npath = "{path}"\n')
    before = files_under(place.folder.parent)
    result = cli("pretrain", "--config", config, "--out", place.out / "run")
    assert result.code == 2
    assert_one_clear_line(result.err, words)
    assert files_under(place.folder.parent) == before


def toml(p: Place, text: str) -> Path:
    path = p.folder / "run.toml"
    path.write_text(text.replace("GOOD", str(p.good)))
    return path


def broken_bundle(p: Place) -> Path:
    (p.bundle / "gene_statistics.npz").unlink()
    return p.bundle


ARGUMENTS: dict[str, tuple[Callable[[Place], list], tuple[str, ...]]] = {
    "check: unknown layer": (lambda p: ["check", p.good, "--layer", "spliced"], ("'spliced'", "X")),
    "check: unknown library size column": (
        lambda p: ["check", p.good, "--library-size-key", "n"], ("'n'", "cell_type")
    ),
    "check: library size that is no number": (
        lambda p: ["check", p.good, "--library-size-key", "cell_type"], ("cell_type", "positive")
    ),
    "check: unknown model": (lambda p: ["check", p.good, "--model", "gpt"], ("'gpt'", "scdiva-blood-tiny")),
    "embed: unknown layer": (
        lambda p: ["embed", p.good, p.out / "o.h5ad", "--model", p.bundle, "--layer", "spliced"], ("'spliced'",)
    ),
    "embed: unknown library size column": (
        lambda p: ["embed", p.good, p.out / "o.h5ad", "--model", p.bundle, "--library-size-key", "n"], ("'n'",)
    ),
    "embed: raw that is not there": (
        lambda p: ["embed", p.good, p.out / "o.h5ad", "--model", p.bundle, "--layer", "raw"], ("'raw'",)
    ),
    "embed: unknown gene to denoise": (
        lambda p: ["embed", p.good, p.out / "o.h5ad", "--model", p.bundle, "--denoise", "CD3DD"], ("'CD3DD'",)
    ),
    "embed: output of another kind": (
        lambda p: ["embed", p.good, p.out / "o.csv", "--model", p.bundle], ("o.csv", ".h5ad")
    ),
    "embed: output folder missing": (
        lambda p: ["embed", p.good, p.out / "no" / "o.h5ad", "--model", p.bundle], ("does not exist",)
    ),
    "embed: output exists": (lambda p: ["embed", p.good, p.good, "--model", p.bundle], ("exists", "--overwrite")),
    "embed: model folder missing": (
        lambda p: ["embed", p.good, p.out / "o.h5ad", "--model", p.folder / "no"], ("is no model",)
    ),
    "embed: model folder of something else": (
        lambda p: ["embed", p.good, p.out / "o.h5ad", "--model", p.folder], ("manifest.json",)
    ),
    "embed: damaged model": (
        lambda p: ["embed", p.good, p.out / "o.h5ad", "--model", broken_bundle(p)], ("gene_statistics.npz",)
    ),
    "embed: unknown device": (
        lambda p: ["embed", p.good, p.out / "o.h5ad", "--model", p.bundle, "--device", "abacus"], ("'abacus'",)
    ),
    "embed: coverage asked for is too high": (
        lambda p: ["embed", p.good, p.out / "o.h5ad", "--model", p.bundle, "--min-coverage", 1], ("of the UMIs", "100%")
    ),
    "inspect: no model": (lambda p: ["inspect", p.folder / "no"], ("is no model",)),
    "inspect: folder of something else": (lambda p: ["inspect", p.folder], ("manifest.json",)),
    "inspect: unknown preset": (lambda p: ["inspect", "--preset", "brain"], ("'brain'",)),
    "inspect: damaged model": (lambda p: ["inspect", broken_bundle(p)], ("gene_statistics.npz",)),
    "pretrain: configuration missing": (
        lambda p: ["pretrain", "--config", p.folder / "no.toml", "--out", p.out / "run"], ("no.toml",)
    ),
    "pretrain: configuration is no TOML": (
        lambda p: ["pretrain", "--config", toml(p, "lr: 3"), "--out", p.out / "run"], ("not TOML",)
    ),
    "pretrain: unknown key": (
        lambda p: ["pretrain", "--config", toml(p, "[optim]\nlearning_rate = 1.0"), "--out", p.out / "run"],
        ("optim.learning_rate",),
    ),
    "pretrain: impossible value": (
        lambda p: ["pretrain", "--config", toml(p, "[optim]\nlr = -1.0"), "--out", p.out / "run"], ("optim.lr",)
    ),
    "pretrain: no files": (
        lambda p: ["pretrain", "--config", toml(p, "seed = 1"), "--out", p.out / "run"], ("data.files",)
    ),
    "pretrain: unknown setting": (
        lambda p: ["pretrain", "--config", toml(p, "seed = 1"), "--out", p.out / "run", "--set", "optim.l=1"],
        ("optim.l",),
    ),
    "pretrain: setting without value": (
        lambda p: ["pretrain", "--config", toml(p, "seed = 1"), "--out", p.out / "run", "--set", "seed"], ("KEY=VALUE",)
    ),
    "pretrain: batch to exclude is not there": (
        lambda p: ["pretrain", "--out", p.out / "run", "--config", toml(
            p, '[[data.files]]\npath = "GOOD"\nbatch_key = "batch"\nexclude_batches = ["batch 9"]')],
        ("batch 9", "batch 0"),
    ),
    "pretrain: batches to exclude of no column": (
        lambda p: ["pretrain", "--out", p.out / "run", "--config", toml(
            p, '[[data.files]]\npath = "GOOD"\nexclude_batches = ["batch 1"]')],
        ("batch_key",),
    ),
    "pretrain: all batches excluded": (
        lambda p: ["pretrain", "--out", p.out / "run", "--config", toml(
            p, '[[data.files]]\npath = "GOOD"\nbatch_key = "batch"\nexclude_batches = ["batch 0", "batch 1"]')],
        ("good.h5ad", "exclude_batches"),
    ),
    "pretrain: unknown batch column": (
        lambda p: ["pretrain", "--out", p.out / "run", "--config", toml(
            p, '[[data.files]]\npath = "GOOD"\nbatch_key = "donor"')],
        ("'donor'", "cell_type"),
    ),
    "pretrain: output is a file": (
        lambda p: ["pretrain", "--out", p.good, "--config", toml(p, '[[data.files]]\npath = "GOOD"')],
        ("good.h5ad",),
    ),
    "pretrain: no gene in enough cells": (
        lambda p: ["pretrain", "--out", p.out / "run", "--config", toml(
            p, '[data]\nmin_cells_per_gene = 9999\n[[data.files]]\npath = "GOOD"')],
        ("min_cells_per_gene",),
    ),
    "finetune: unknown batch column": (
        lambda p: ["finetune", p.good, "--out", p.out / "run", "--model", p.bundle, "--batch-key", "donor"],
        ("'donor'",),
    ),
    "finetune: unknown layer": (
        lambda p: ["finetune", p.good, "--out", p.out / "run", "--model", p.bundle, "--layer", "spliced"],
        ("'spliced'",),
    ),
    "finetune: unknown setting": (
        lambda p: ["finetune", p.good, "--out", p.out / "run", "--model", p.bundle, "--set", "optim.l=1"], ("optim.l",)
    ),
    "finetune: one cell": (
        lambda p: ["finetune", p.file(lambda a: a[:1].copy()), "--out", p.out / "run", "--model", p.bundle], ("cell",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_impossible_arguments_are_refused(name, cli, place, monkeypatch):
    monkeypatch.chdir(place.out)
    build, words = ARGUMENTS[name]
    arguments = build(place)
    before = files_under(place.folder.parent)
    result = cli(*arguments)
    assert result.code == 2
    assert_one_clear_line(result.err, words)
    assert result.out == ""
    assert files_under(place.folder.parent) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["check"],
        ["embed", "in.h5ad"],
        ["embed", "in.h5ad", "out.h5ad", "--batch-size", "0"],
        ["embed", "in.h5ad", "out.h5ad", "--batch-size", "many"],
        ["embed", "in.h5ad", "out.h5ad", "--min-coverage", "2"],
        ["embed", "in.h5ad", "out.h5ad", "--nonsense"],
        ["inspect"],
        ["inspect", "a", "--preset", "b"],
        ["finetune", "in.h5ad"],
        ["finetune", "in.h5ad", "--out", "o", "--objective", "labels"],
        ["annotated"],
    ],
    ids=" ".join,
)
def test_wrong_usage_says_so_and_writes_nothing(arguments, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = cli(*arguments)
    assert result.code == 2
    assert "Usage:" in result.err
    assert "Error" in result.err
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["truncated file", "duplicated cell names", "scaled data"])
def test_the_installed_command_prints_one_line_too(name, place):
    build, words = BAD_FILES[name]
    path = build(place)
    before = files_under(place.folder.parent)
    command = [Path(sys.executable).parent / "scdiva", "embed", path, place.out / "o.h5ad", "--model", place.bundle]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert_one_clear_line(done.stderr, words)
    assert done.stdout == ""
    assert files_under(place.folder.parent) == before


def test_duplicated_gene_names_are_no_error_and_no_noise(place):
    path = place.file(lambda a: setattr(a, "var_names", [*a.var_names[:-1], a.var_names[0]]))
    command = [Path(sys.executable).parent / "scdiva", "embed", path, place.out / "o.h5ad", "--model", place.bundle]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert sp.issparse(ad.read_h5ad(place.out / "o.h5ad").X)


def test_there_are_enough_cases():
    assert len(BAD_FILES) >= 25
    assert len(BAD_FILES) + len(ARGUMENTS) >= 60
