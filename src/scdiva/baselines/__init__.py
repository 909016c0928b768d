"""The simple methods that each task is judged against."""

from scdiva.baselines.embedding import CorpusPCA, pca_of_hvg, random_projection, scvi_latent

__all__ = ["CorpusPCA", "pca_of_hvg", "random_projection", "scvi_latent"]
