"""Cells in: sources, raw counts in vocabulary order, gene statistics, splits, minibatches, bundled data."""
