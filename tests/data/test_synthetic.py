from __future__ import annotations

import numpy as np

from scdiva.datasets import synthetic_cells


def test_cells_are_raw_counts_over_known_genes_with_labels():
    adata = synthetic_cells(30, 50, n_types=2, n_batches=3, seed=4)
    assert adata.shape == (30, 50)
    assert adata.X.dtype == np.int32
    assert adata.X.data.min() > 0
    assert set(adata.obs["cell_type"]) == {"type 0", "type 1"}
    assert adata.obs["batch"].nunique() == 3
    assert adata.var["ensembl_id"].str.startswith("ENSG").all()
    assert "seed=4" in adata.uns["source"]


def test_equal_seeds_give_equal_cells_and_other_seeds_others():
    first, again, other = (synthetic_cells(20, 30, seed=s).X.toarray() for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_depth_and_markers_are_what_was_asked_for():
    adata = synthetic_cells(2000, 100, n_types=2, mean_depth=500.0, marker_fold=20.0, seed=0)
    totals = np.asarray(adata.X.sum(axis=1)).ravel()
    assert abs(totals.mean() / 500 - 1) < 0.05
    share = adata.X.toarray() / totals[:, None]
    means = [share[(adata.obs["cell_type"] == name).to_numpy()].mean(axis=0) for name in ("type 0", "type 1")]
    ratio = means[0] / means[1].clip(1e-9)
    assert (ratio > 5).sum() >= 3
    assert (ratio < 1 / 5).sum() >= 3
