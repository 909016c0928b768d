"""Follow one real cell from its row in a file to its embedding: ``python examples/follow_one_cell.py``."""

from __future__ import annotations

import numpy as np
import torch

import scdiva as sd
from scdiva.data.bundled import dataset_path
from scdiva.data.reader import open_counts
from scdiva.data.source import open_source
from scdiva.data.thinning import split_counts
from scdiva.diffusion import exact_count_masks
from scdiva.models.scdiva.inputs import PackedCells
from scdiva.models.scdiva.objectives import tokeniser_of
from scdiva.serialization import serialize


def main(row: int = 1, model_name: str = "scdiva-blood-tiny") -> None:
    print("1. The file: cells x genes of raw counts, left on disk")
    source = open_source(dataset_path("pbmc3k"))
    x = source.matrices["X"]
    print(f"   {source.name}: {x.shape[0]:,} cells x {x.shape[1]:,} genes")
    print(f"   cell {source.obs.index[row]!r}, called {source.obs['cell_type'].iloc[row]!r} by its authors")

    print("2. The genes: every column finds its row in the model's vocabulary, or is counted as lost")
    model = sd.ScDiVa.from_pretrained(model_name, device="cpu")
    reader = open_counts(source, model.vocabulary)
    report = reader.alignment.counts()
    print(
        f"   {report['n_used']:,} of {report['n_source']:,} columns -> {report['n_genes']:,} genes of "
        f"{model.vocabulary.n_genes:,}; counts found in {reader.found.description}"
    )

    print("3. CellCounts: one row of raw counts in vocabulary order")
    cell = reader.read(np.array([row]))
    print(
        f"   counts {cell.counts.shape} {cell.counts.dtype}, {cell.counts.nnz} genes detected, "
        f"library size {cell.library_size[0]:.0f} UMIs"
    )

    print("4. CellTokens: the cell as a set of (gene, value), ranked by value over entropy; the first 1,200 are kept")
    tokens = serialize(cell, model.statistics)
    genes = model.vocabulary.gene_of_row(tokens.gene_id_BL[0])
    print(f"   gene_id_BL {tokens.gene_id_BL.shape}, value_BL {tokens.value_BL.shape}")
    for name, part in (("first", slice(0, 6)), ("last", slice(-6, None))):
        shown = zip(model.vocabulary.symbol[genes[part]], tokens.value_BL[0, part], strict=True)
        print(f"   {name}: {', '.join(f'{symbol} {value:.2f}' for symbol, value in shown)}")

    print("5. Two views of the cell for training: each molecule goes to A or to B")
    view_a, view_b = split_counts(cell, 0.5, np.random.default_rng(0))
    print(
        f"   A {view_a.counts.sum()} UMIs in {view_a.counts.nnz} genes, B {view_b.counts.sum()} UMIs in "
        f"{view_b.counts.nnz} genes, together {cell.counts.sum()}"
    )

    print("6. The anchor: pool the values times their gene embeddings, then z")
    packed = PackedCells.pack(cell)
    with torch.inference_mode():
        pooled = model.network.pooled(packed)
    z = model.embed(cell)
    print(f"   gene_N {tuple(packed.gene_N.shape)} -> pooled_BD {tuple(pooled.shape)} -> z_BZ {z.shape}")
    print(f"   z starts {np.round(z[0, :5], 2)}")

    print("7. The profile decoder: from z back to the expected expression of every gene")
    everything = np.arange(model.vocabulary.n_genes)
    expected = model.expected_profile(z, everything)[0]
    top = np.argsort(-expected)[:6]
    print(f"   log-rates of {everything.size:,} genes; they sum to {expected.sum():,.0f} CP10K")
    print(f"   largest: {', '.join(f'{model.vocabulary.symbol[g]} {expected[g]:.0f}' for g in top)}")
    markers = model.vocabulary.find(["MS4A1", "CD3D", "LYZ"])
    seen = np.asarray(cell.counts[0, markers].todense()).ravel()
    print(f"   MS4A1, CD3D, LYZ: counted {seen.tolist()}, expected CP10K {np.round(expected[markers], 1).tolist()}")

    print("8. Masked diffusion: half of its genes are hidden; the network sees the others and how many are missing")
    rng = np.random.default_rng(0)
    masks = exact_count_masks(np.array([cell.counts.nnz]), 0.5, rng)
    masked, targets = tokeniser_of(model.config, model.statistics).corrupt(cell, masks, rng)
    with torch.inference_mode():
        output = model.network(masked)
        probability = model.network.gene_probabilities(masked, output)[0].numpy()
    hidden = targets.gene_M.numpy()
    guessed = np.argsort(-probability)[: hidden.size]
    frequent = np.argsort(-np.where(masked.is_admissible_BG[0].numpy(), model.statistics.detection, 0))[: hidden.size]
    print(
        f"   {masked.gene_N.numel()} gene tokens read, {hidden.size} genes hidden; "
        f"probabilities of {np.count_nonzero(probability):,} admissible genes sum to {probability.sum():.1f}"
    )
    print(
        f"   among the {hidden.size} most probable are {np.isin(guessed, hidden).mean():.0%} of the hidden genes; "
        f"among the most frequent of the corpus {np.isin(frequent, hidden).mean():.0%}"
    )


if __name__ == "__main__":
    main()
