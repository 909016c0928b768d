"""Data sets that come with the package, and synthetic cells. ``sd.datasets``."""

from __future__ import annotations

from scdiva.data.bundled import list_datasets, load, pbmc3k, zheng_sorted7_3500
from scdiva.data.synthetic import synthetic_cells

__all__ = ["list_datasets", "load", "pbmc3k", "synthetic_cells", "zheng_sorted7_3500"]
