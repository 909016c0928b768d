"""Metrics as plain functions; thin calls to scikit-learn where it has them."""

from scdiva.metrics.embedding import KnnScores, kmeans_nmi, knn_scores, paired_difference

__all__ = ["KnnScores", "kmeans_nmi", "knn_scores", "paired_difference"]
