from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

import ten_x_files
from conftest import files_under
from scdiva.data.output import check_output, replacing, write_with_slots
from scdiva.data.source import open_source
from scdiva.errors import OutputError

SLOTS = {"obsm/X_new": np.arange(240.0).reshape(120, 2), "uns/scdiva/embed": {"model": "m", "n": 3}}


@pytest.fixture
def rich(adata):
    """Cells with something in every slot."""
    adata.layers["it's"] = adata.X.copy()
    adata.obsm["X_pca"] = np.random.default_rng(0).normal(size=(120, 3))
    adata.varm["PCs"] = np.ones((200, 3))
    adata.obsp["graph"] = adata.X @ adata.X.T
    adata.uns["scdiva"] = {"annotate": {"key": "kept"}}
    adata.raw = adata.copy()
    return adata


@pytest.mark.parametrize("kind_in", ["h5ad", "zarr"])
@pytest.mark.parametrize("kind_out", ["h5ad", "zarr"])
def test_the_output_is_the_input_with_new_slots(kind_in, kind_out, rich, tmp_path):
    path_in, path_out = tmp_path / f"in.{kind_in}", tmp_path / f"out.{kind_out}"
    getattr(rich, f"write_{kind_in}")(path_in)
    before = files_under(tmp_path)
    write_with_slots(open_source(path_in), path_out, SLOTS)
    after = files_under(tmp_path)
    assert {name: after[name] for name in before} == before  # the input, byte for byte
    assert not [name for name in after if name.startswith(".")]
    found = getattr(ad, f"read_{kind_out}")(path_out)
    np.testing.assert_array_equal(found.obsm["X_new"], SLOTS["obsm/X_new"])
    assert found.uns["scdiva"]["embed"]["model"] == "m"
    assert found.uns["scdiva"]["annotate"]["key"] == "kept"
    np.testing.assert_array_equal(found.X.toarray(), rich.X.toarray())
    np.testing.assert_array_equal(found.layers["it's"].toarray(), rich.X.toarray())
    np.testing.assert_array_equal(found.obsm["X_pca"], rich.obsm["X_pca"])
    assert set(found.varm) == {"PCs"}
    assert set(found.obsp) == {"graph"}
    assert found.uns["source"] == rich.uns["source"]
    assert found.raw.shape == (120, 200)
    assert list(found.obs["cell_type"]) == list(rich.obs["cell_type"])
    assert list(found.var["ensembl_id"]) == list(rich.var["ensembl_id"])


def test_ten_x_input_becomes_an_anndata_file(adata, tmp_path):
    source = open_source(ten_x_files.write_h5_v3(adata, tmp_path / "raw.h5"))
    write_with_slots(source, tmp_path / "out.h5ad", SLOTS)
    found = ad.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(found.X[:, :200].toarray(), adata.X.toarray())
    np.testing.assert_array_equal(found.obsm["X_new"], SLOTS["obsm/X_new"])


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_a_file_can_take_the_place_of_itself(kind, rich, tmp_path):
    path = tmp_path / f"a.{kind}"
    getattr(rich, f"write_{kind}")(path)
    for n in (1, 2):
        write_with_slots(open_source(path), path, {**SLOTS, "uns/scdiva/embed": {"n": n}})
    found = getattr(ad, f"read_{kind}")(path)
    assert found.uns["scdiva"]["embed"]["n"] == 2
    assert list(found.uns["scdiva"]["embed"]) == ["n"]
    np.testing.assert_array_equal(found.X.toarray(), rich.X.toarray())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_write_leaves_everything_as_it_was(error, exists, h5ad, tmp_path, monkeypatch):
    target = tmp_path / "out.h5ad"
    if exists:
        target.write_bytes(b"old")

    def fail(*args):
        raise error

    source = open_source(h5ad)
    monkeypatch.setattr("scdiva.data.output._write_slots", fail)
    before = files_under(tmp_path)
    with pytest.raises(type(error)):
        write_with_slots(source, target, SLOTS)
    assert files_under(tmp_path) == before


def test_a_folder_takes_the_place_of_a_folder_or_stays_away(tmp_path):
    target = tmp_path / "a.zarr"
    target.mkdir()
    (target / "old").write_text("old")
    with replacing(target) as partial:
        partial.mkdir()
        (partial / "new").write_text("new")
        assert (target / "old").exists()
    assert [p.name for p in target.iterdir()] == ["new"]

    def fails():
        with replacing(target) as partial:
            partial.mkdir()
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        fails()
    assert [p.name for p in tmp_path.rglob("*")] == ["a.zarr", "new"]


@pytest.mark.parametrize(
    ("name", "words"), [("out.csv", "out.csv"), ("nowhere/out.h5ad", "does not exist"), ("old.h5ad", "exists")]
)
def test_impossible_outputs_are_refused_first(name, words, tmp_path):
    (tmp_path / "old.h5ad").touch()
    with pytest.raises(OutputError, match=words):
        check_output(tmp_path / name, overwrite=False)
    if name == "old.h5ad":
        check_output(tmp_path / name, overwrite=True)
