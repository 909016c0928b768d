"""Gene sets that come with the package."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from functools import cache
from importlib import resources


@cache
def hallmark_sets() -> Mapping[str, tuple[str, ...]]:
    """Return the 50 hallmark gene sets of MSigDB 7.5.1 (Liberzon et al. 2015), symbols by name.

    Sources and licences are in ``tables/README.md``.
    """
    packed = resources.files("scdiva.genes").joinpath("tables", "hallmark_sets.json.gz").read_bytes()
    return {name: tuple(genes) for name, genes in json.loads(gzip.decompress(packed)).items()}
