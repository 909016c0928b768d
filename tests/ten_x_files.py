"""Small 10x outputs as Cell Ranger writes them: .h5 and mtx folders, version 2 and 3."""

from __future__ import annotations

import gzip
from pathlib import Path

import h5py
import numpy as np
import scipy.io
import scipy.sparse as sp

ANTIBODIES = ("CD4_TotalSeqB", "TSPAN6")  # the second bears the name of a gene


def features(adata) -> tuple[list[str], list[str], list[str]]:
    """Ids, names and types of the genes and two antibodies."""
    ids = [*adata.var["ensembl_id"], *ANTIBODIES]
    names = [*adata.var_names, *ANTIBODIES]
    return ids, names, ["Gene Expression"] * adata.n_vars + ["Antibody Capture"] * len(ANTIBODIES)


def with_antibodies(adata) -> sp.csr_matrix:
    """Counts with two columns more; antibody counts are large."""
    antibody = np.full((adata.n_obs, len(ANTIBODIES)), 900)
    return sp.csr_matrix(sp.hstack([adata.X, sp.csr_matrix(antibody)]))


def write_mtx_v3(adata, folder: Path, prefix: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    ids, names, kinds = features(adata)
    with gzip.open(folder / f"{prefix}matrix.mtx.gz", "wb") as file:
        scipy.io.mmwrite(file, with_antibodies(adata).T.tocoo(), field="integer")
    with gzip.open(folder / f"{prefix}features.tsv.gz", "wt") as file:
        file.writelines(f"{i}\t{n}\t{k}\n" for i, n, k in zip(ids, names, kinds, strict=True))
    with gzip.open(folder / f"{prefix}barcodes.tsv.gz", "wt") as file:
        file.writelines(f"{name}\n" for name in adata.obs_names)
    return folder


def write_mtx_v2(adata, folder: Path) -> Path:
    folder.mkdir()
    scipy.io.mmwrite(str(folder / "matrix.mtx"), adata.X.T.tocoo(), field="integer")
    genes = zip(adata.var["ensembl_id"], adata.var_names, strict=True)
    (folder / "genes.tsv").write_text("".join(f"{i}\t{n}\n" for i, n in genes))
    (folder / "barcodes.tsv").write_text("".join(f"{name}\n" for name in adata.obs_names))
    return folder


def write_h5_v3(adata, path: Path) -> Path:
    ids, names, kinds = features(adata)
    by_cell = with_antibodies(adata)  # CSR over cells is CSC over barcodes, which is what Cell Ranger stores
    with h5py.File(path, "w") as file:
        matrix = file.create_group("matrix")
        matrix["barcodes"] = np.array(list(adata.obs_names), dtype="S")
        matrix["data"], matrix["indices"], matrix["indptr"] = by_cell.data, by_cell.indices, by_cell.indptr
        matrix["shape"] = np.array(by_cell.shape[::-1], dtype=np.int32)
        group = matrix.create_group("features")
        columns = {"id": ids, "name": names, "feature_type": kinds, "genome": ["GRCh38"] * len(ids)}
        for key, values in columns.items():
            group[key] = np.array(values, dtype="S")
    return path
