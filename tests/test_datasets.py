from __future__ import annotations

import pytest

import scdiva as sd
from scdiva.data.bundled import dataset_path
from scdiva.errors import KeyNotFoundError

SIZES = {"pbmc3k": (2700, 9), "zheng_sorted7_3500": (3500, 7)}


@pytest.mark.parametrize("name", SIZES)
def test_bundled_cells_are_raw_counts_with_labels_and_attribution(name):
    assert name in sd.datasets.list_datasets()
    adata = sd.datasets.load(name)
    n_cells, n_types = SIZES[name]
    assert adata.n_obs == n_cells
    assert len(set(adata.obs["cell_type"]) - {"unassigned"}) == n_types
    assert "CC BY" in str(adata.uns["attribution"])
    assert adata.obs_names.is_unique
    report = sd.pp.check(adata)
    assert report.is_usable
    assert report.counts_in == "X: raw counts"
    assert report.coverage > 0.9
    assert report.n_empty_cells == 0


def test_the_short_names_load_the_same_cells():
    assert sd.datasets.pbmc3k().shape == sd.datasets.load("pbmc3k").shape
    assert sd.datasets.zheng_sorted7_3500().n_obs == 3500


def test_every_listed_set_is_there():
    for name in sd.datasets.list_datasets():
        assert dataset_path(name).is_file()


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(KeyNotFoundError, match="pbmc3k"):
        sd.datasets.load("pbmc4k")


def test_changing_the_list_changes_nothing():
    sd.datasets.list_datasets().clear()
    assert sd.datasets.list_datasets()
