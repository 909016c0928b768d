"""Tools, scanpy-style: ``adata`` first, then the model; in place, or ``copy=True`` for a copy."""

from scdiva.tasks.annotate import fit_cell_typer
from scdiva.tasks.fine_tuned import FineTuning
from scdiva.tl.annotation import annotate, annotate_file
from scdiva.tl.augmentation import augment
from scdiva.tl.embedding import embed, embed_file
from scdiva.tl.generation import generate, generate_file
from scdiva.tl.imputation import impute, impute_file
from scdiva.tl.integration import integrate, integrate_file
from scdiva.tl.interpolation import interpolate
from scdiva.tl.networks import GrnOptions, grn, grn_file, regulons
from scdiva.tl.perturbation import perturb, perturb_cells, perturb_file
from scdiva.tl.reconstruction import reconstruct, reconstruct_file

__all__ = [
    "FineTuning",
    "GrnOptions",
    "annotate",
    "annotate_file",
    "augment",
    "embed",
    "embed_file",
    "fit_cell_typer",
    "generate",
    "generate_file",
    "grn",
    "grn_file",
    "impute",
    "impute_file",
    "integrate",
    "integrate_file",
    "interpolate",
    "perturb",
    "perturb_cells",
    "perturb_file",
    "reconstruct",
    "reconstruct_file",
    "regulons",
]
