from __future__ import annotations

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata.io import write_elem

import ten_x_files
from scdiva.data.reader import open_counts
from scdiva.data.source import open_source
from scdiva.errors import KeyNotFoundError, SourceError
from scdiva.genes import GeneVocabulary
from scdiva.types import CellCounts

FORMATS = {
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "csr array": sp.csr_array,
    "csc array": sp.csc_array,
    "dense": lambda x: x.toarray(),
    "float dense": lambda x: x.toarray().astype(np.float32),
}


def assert_equal(found: CellCounts, expected: CellCounts) -> None:
    assert found.counts.dtype == expected.counts.dtype == np.int32
    np.testing.assert_array_equal(found.counts.toarray(), expected.counts.toarray())
    np.testing.assert_array_equal(found.library_size, expected.library_size)
    np.testing.assert_array_equal(
        found.is_measured[found.source_of_cell], expected.is_measured[expected.source_of_cell]
    )


@pytest.fixture(scope="module")
def vocabulary() -> GeneVocabulary:
    return GeneVocabulary.default().subset(np.arange(5, 230))


@pytest.fixture
def expected(adata, vocabulary) -> CellCounts:
    """By hand: columns 5 to 199 of the file are the first 195 genes of the vocabulary."""
    dense = np.zeros((adata.n_obs, vocabulary.n_genes), dtype=np.int32)
    dense[:, :195] = adata.X[:, 5:].toarray()
    measured = np.arange(vocabulary.n_genes) < 195
    library = np.asarray(adata.X.sum(axis=1), dtype=np.float64).ravel()
    n = adata.n_obs
    return CellCounts(sp.csr_matrix(dense), library, np.arange(n), np.zeros(n, dtype=np.int32), measured[None])


def read_all(data, vocabulary, **options) -> CellCounts:
    reader = open_counts(data, vocabulary, **options)
    return reader.read(np.arange(len(reader)))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("place", ["memory", "view", "backed", "h5ad", "gzip h5ad", "zarr"])
def test_every_source_gives_the_same_cells(kind, place, adata, expected, vocabulary, tmp_path):
    adata.X = FORMATS[kind](adata.X)
    if place in ("h5ad", "gzip h5ad", "backed"):
        path = tmp_path / "cells.h5ad"
        adata.write_h5ad(path, compression="gzip" if place == "gzip h5ad" else None)
        data = ad.read_h5ad(path, backed="r") if place == "backed" else path
    elif place == "zarr":
        data = tmp_path / "cells.zarr"
        adata.write_zarr(data)
    else:
        data = adata[:, :] if place == "view" else adata
    assert_equal(read_all(data, vocabulary), expected)


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
@pytest.mark.parametrize("place", ["memory", "h5ad", "zarr", "backed"])
def test_reading_any_order_equals_slicing(kind, place, adata, expected, vocabulary, tmp_path):
    adata.X = FORMATS[kind](adata.X)
    data = adata
    if place != "memory":
        data = tmp_path / f"cells.{'zarr' if place == 'zarr' else 'h5ad'}"
        adata.write_zarr(data) if place == "zarr" else adata.write_h5ad(data)
        data = ad.read_h5ad(data, backed="r") if place == "backed" else data
    reader = open_counts(data, vocabulary)
    for indices in ([5], [7, 3, 4, 5, 119, 0], [2, 2, 9, 2], [], np.random.default_rng(0).permutation(120)):
        rows = np.asarray(indices, dtype=np.int64)
        found = reader.read(rows)
        assert_equal(found, expected.take(rows))
        np.testing.assert_array_equal(found.cell_index, rows)


def test_text_paths_work_as_well(h5ad, expected, vocabulary):
    assert_equal(read_all(str(h5ad), vocabulary), expected)


@pytest.mark.parametrize("form", ["h5 v3", "mtx v3", "mtx v3 with prefix", "mtx v2"])
def test_ten_x_output_gives_the_same_cells(form, adata, expected, vocabulary, tmp_path):
    path = {
        "h5 v3": lambda: ten_x_files.write_h5_v3(adata, tmp_path / "raw.h5"),
        "mtx v3": lambda: ten_x_files.write_mtx_v3(adata, tmp_path / "filtered"),
        "mtx v3 with prefix": lambda: ten_x_files.write_mtx_v3(adata, tmp_path / "geo", prefix="GSM1_s_"),
        "mtx v2": lambda: ten_x_files.write_mtx_v2(adata, tmp_path / "hg19"),
    }[form]()
    # antibodies count neither as genes nor towards the depth
    assert_equal(read_all(path, vocabulary), expected)
    assert list(open_source(path).obs.index) == list(adata.obs_names)


def test_a_folder_with_the_matrices_of_two_samples_is_refused(adata, tmp_path):
    for prefix in ("GSM1_", "GSM2_"):
        ten_x_files.write_mtx_v3(adata, tmp_path / "geo", prefix=prefix)
    with pytest.raises(SourceError, match="GSM1_"):
        open_source(tmp_path / "geo")


@pytest.mark.parametrize("missing", ["features.tsv.gz", "barcodes.tsv.gz"])
def test_an_incomplete_ten_x_folder_is_refused(missing, adata, tmp_path):
    folder = ten_x_files.write_mtx_v3(adata, tmp_path / "filtered")
    (folder / missing).unlink()
    with pytest.raises(SourceError, match="10x"):
        open_source(folder)


def test_layers_and_raw_are_matrices_with_their_own_genes(adata, tmp_path):
    adata.layers["counts"] = adata.X.copy()
    adata.raw = adata
    small = adata[:, :50].copy()
    small.write_h5ad(tmp_path / "a.h5ad")
    for source in (open_source(small), open_source(tmp_path / "a.h5ad")):
        assert list(source.matrices) == ["X", "layers['counts']", "raw.X"]
        assert source.matrix("raw").shape == (120, 200)
        assert source.matrix("counts").shape == source.matrix(None).shape == (120, 50)
        with pytest.raises(KeyNotFoundError, match=r"layers\['counts'\]"):
            source.matrix("spliced")


def test_an_anndata_without_x_is_read_from_its_layer(adata, vocabulary, expected, tmp_path):
    adata.layers["counts"] = adata.X.copy()
    adata.X = None
    adata.write_h5ad(tmp_path / "a.h5ad")
    for data in (adata, tmp_path / "a.h5ad"):
        assert_equal(read_all(data, vocabulary), expected)


def test_stored_zeros_unsorted_and_repeated_indices_do_no_harm(adata, expected, vocabulary):
    counts = adata.X.tocsr()
    data, indices, indptr = [], [], [0]
    for row in range(counts.shape[0]):
        part = slice(counts.indptr[row], counts.indptr[row + 1])
        genes, values = counts.indices[part][::-1], counts.data[part][::-1]
        data += [*values[:1] - 1, 1, *values[1:], 0]  # the first value in two pieces, and a stored zero
        indices += [*genes[:1], *genes[:1], *genes[1:], 0]
        indptr.append(len(data))
    adata.X = sp.csr_matrix((np.array(data, np.int32), np.array(indices), np.array(indptr)), shape=counts.shape)
    before = adata.X.data.copy(), adata.X.indices.copy(), adata.X.indptr.copy()
    assert_equal(read_all(adata, vocabulary), expected)
    after = adata.X.data, adata.X.indices, adata.X.indptr
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("kind", FORMATS)
def test_reading_leaves_the_input_alone(kind, adata, vocabulary):
    adata.X = FORMATS[kind](adata.X)
    before = adata.copy()
    cells = read_all(adata, vocabulary)
    cells.counts.data[:] = 0
    assert type(adata.X) is type(before.X)
    np.testing.assert_array_equal(np.asarray(adata.X[:].todense() if sp.issparse(adata.X) else adata.X),
                                  np.asarray(before.X[:].todense() if sp.issparse(before.X) else before.X))  # fmt: skip
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pd.testing.assert_frame_equal(adata.var, before.var)
    assert list(adata.uns) == list(before.uns)


def test_a_damaged_block_inside_a_file_is_a_clear_error(adata, tmp_path, vocabulary):
    import h5py

    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path, compression="gzip")
    with h5py.File(path, "r") as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + 20 : chunk.byte_offset + 60] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"rows 0 to 120 of X"):
        open_counts(path, vocabulary)


@pytest.mark.parametrize("thing", [np.eye(3), None, 7, ["a"]])
def test_other_objects_are_refused(thing):
    with pytest.raises(SourceError, match="no source of cells"):
        open_source(thing)


def test_no_cells_no_genes_and_no_matrix_are_refused(adata):
    for part, words in ((adata[:0], "0 cells"), (adata[:, :0], "0 genes"), (ad.AnnData(obs=adata.obs), "no X")):
        with pytest.raises(SourceError, match=words):
            open_source(part.copy())


def test_duplicated_cell_names_are_named(adata):
    adata.obs_names = ["twin", "twin", *adata.obs_names[2:]]
    with pytest.raises(SourceError, match="'twin'"):
        open_source(adata)


def test_an_empty_element_in_the_place_of_raw_is_no_raw(adata, tmp_path):
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        write_elem(file, "/", adata)  # writes a null for .raw, which adata.write_h5ad leaves out
        assert "raw" in file
    source = open_source(tmp_path / "a.h5ad")
    assert list(source.matrices) == ["X"]
