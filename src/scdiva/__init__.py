"""scdiva: generative single-cell foundation models, from an .h5ad of raw counts to results one can trust.

>>> import scdiva as sd
>>> model = sd.ScDiVa.from_pretrained("scdiva-blood-tiny")
>>> sd.tl.embed(adata, model)  # .obsm["X_scdiva"]

Names are loaded when they are first used: importing scdiva loads neither torch nor anndata.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scdiva import datasets, errors, genes, pl, pp, tl
    from scdiva.diffusion.samplers import Sampler
    from scdiva.genes import GeneVocabulary
    from scdiva.models.base import load_model
    from scdiva.models.scdiffusion import LatentSampler, ScDiffusion
    from scdiva.models.scdiva import ScDiVa
    from scdiva.models.scdiva.perturbation_model import PerturbationModel

__all__ = [
    "GeneVocabulary",
    "LatentSampler",
    "PerturbationModel",
    "Sampler",
    "ScDiVa",
    "ScDiffusion",
    "__version__",
    "datasets",
    "errors",
    "genes",
    "load_model",
    "pl",
    "pp",
    "tl",
]

_MODULES = {"datasets", "errors", "genes", "pl", "pp", "tl"}
_OBJECTS = {
    "GeneVocabulary": "scdiva.genes",
    "LatentSampler": "scdiva.models.scdiffusion",
    "PerturbationModel": "scdiva.models.scdiva.perturbation_model",
    "Sampler": "scdiva.diffusion.samplers",
    "ScDiVa": "scdiva.models.scdiva",
    "ScDiffusion": "scdiva.models.scdiffusion",
    "load_model": "scdiva.models.base",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"scdiva.{name}")
    if name in _OBJECTS:
        return getattr(importlib.import_module(_OBJECTS[name]), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("scdiva")
    raise AttributeError(f"module 'scdiva' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
