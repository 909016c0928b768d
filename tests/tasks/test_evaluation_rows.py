from __future__ import annotations

import json

import numpy as np
import pytest

from scdiva.data.reader import open_counts
from scdiva.genes import GeneVocabulary
from scdiva.tasks import evaluation_rows as rows


def test_a_line_that_was_cut_off_is_left_out_and_gives_way(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert rows.read_rows(path) == rows.read_rows(None) == []
    rows.append_row(path, {"key": "a"})
    with path.open("a") as file:
        file.write('{"key": "b')
    assert rows.read_rows(path) == [{"key": "a"}]
    rows.append_row(path, {"key": "c"})
    assert rows.read_rows(path) == [{"key": "a"}, {"key": "c"}]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_rows_and_reports_hold_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        rows.append_row(tmp_path / "rows.jsonl", {"value": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        rows.write_report(tmp_path, "text", {"value": float("nan")})
    assert not (tmp_path / "report.json").exists()
    assert rows.or_none(float("nan")) is None
    assert np.isnan(rows.or_nan(rows.or_none(float("inf"))))
    assert rows.or_nan(rows.or_none(0.25)) == 0.25


def test_reports_are_written_whole(tmp_path):
    md, js = rows.write_report(tmp_path, "# text\n", {"a": [1, None]})
    assert md.read_text() == "# text\n"
    assert json.loads(js.read_text()) == {"a": [1, None]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_keys_tell_rows_apart():
    keys = {rows.row_key(1, "pca", 0), rows.row_key(1, "pca", 1), rows.row_key(1, "pca", "0"), rows.row_key(1, "p", 0)}
    assert len(keys) == 4
    assert rows.row_key(1, ["a", 2]) == rows.row_key(1, ["a", 2])


def test_the_content_of_cells_is_counts_measured_genes_and_columns(adata):
    cells = open_counts(adata, GeneVocabulary.default()).read(np.arange(20))
    batch = np.array(["a", "b"] * 10)
    found = {
        rows.content_hash(cells),
        rows.content_hash(cells, batch),
        rows.content_hash(cells, batch[::-1]),
        rows.content_hash(cells.take(np.arange(20)[::-1]), batch),
        rows.content_hash(cells.with_genes(np.arange(cells.n_genes) > 5), batch),
    }
    assert len(found) == 5
    assert rows.content_hash(cells.take(np.arange(20)), batch.copy()) == rows.content_hash(cells, batch)


def test_means_over_seeds():
    assert rows.mean_text([0.5, 0.7]) == "0.600 (0.141)"
    assert rows.mean_text([0.5]) == "0.500"
    assert rows.mean_text([]) == "–"
    assert "numpy" in rows.package_versions(["numpy", "no-such-package"])
    assert "no-such-package" not in rows.package_versions(["no-such-package"])
