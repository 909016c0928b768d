from __future__ import annotations

import numpy as np
import pytest

import scdiva as sd
from scdiva.errors import KeyNotFoundError


def test_a_picture_is_written_whole_or_not_at_all(adata, tmp_path, monkeypatch):
    adata.obsm["X_umap"] = np.random.default_rng(0).normal(size=(120, 2))
    sd.pl.umap(adata, tmp_path / "a.png", color="cell_type")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        sd.pl.umap(adata, tmp_path / "b.png", color="cell_type")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(("color", "basis"), [("donor", "X_umap"), ("cell_type", "X_tsne")])
def test_what_is_missing_is_named(color, basis, adata, tmp_path):
    adata.obsm["X_umap"] = np.zeros((120, 2))
    with pytest.raises(KeyNotFoundError, match=color if color == "donor" else basis):
        sd.pl.umap(adata, tmp_path / "a.png", color=color, basis=basis)
    assert list(tmp_path.iterdir()) == []
