"""scDiffusion: latent diffusion of cells with guidance (methods C; Luo et al., Bioinformatics 2024, btae518)."""

from scdiva.models.scdiffusion.model import FAMILY, ScDiffusion
from scdiva.models.scdiffusion.presets import PRESETS
from scdiva.models.scdiffusion.sampling import LatentSampler

__all__ = ["FAMILY", "PRESETS", "LatentSampler", "ScDiffusion"]
