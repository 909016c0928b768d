"""What the autoencoder of the latent diffusion owes to each of its parts.

Real training cells are encoded and decoded, and judged by held-out real cells: what the diffusion can reach at best.

    python benchmarks/scdiffusion_autoencoder.py FILE [FILE ...] --out docs/results/scdiffusion_autoencoder.md
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import scipy.sparse as sp
from page import write_page

from scdiva.data import outliers
from scdiva.data.reader import open_counts
from scdiva.data.source import open_source
from scdiva.genes import GeneVocabulary
from scdiva.metrics import generation as metrics
from scdiva.metrics.generation_classifiers import c2st_auc
from scdiva.metrics.generation_space import LabelledCells
from scdiva.models.scdiffusion import objectives
from scdiva.tasks.evaluate_generation import GenerationData, known_cells, split_cells
from scdiva.tasks.scdiffusion import fit_scdiffusion

CAPS, PRIOR = (outliers, "TIMES", 1e9), (objectives, "PRIOR_PRECISION", 0.0)
RATE, LABELS = (objectives, "GENE_LAYER_RATIO", 1.0), (objectives, "LABEL_WEIGHT", 0.0)
VARIANTS = {
    "as it is": (),
    "isolated counts left as they are": (CAPS,),
    "no prior on gene weights": (PRIOR,),
    "gene layers at the usual learning rate": (RATE,),
    "labels not read from z": (LABELS,),
    "none of the four": (CAPS, PRIOR, RATE, LABELS),
}
SHORT = ("denoiser.training.max_steps=2",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--labels-key", default="cell_type")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--trees", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    lines = []
    for file in arguments.files:
        lines += ["", f"## {file.stem}"]
        head = "| autoencoder | C2ST genes | C2ST components | called as labelled | held-out loss | seconds |"
        lines += ["", head, "|---|---:|---:|---:|---:|---:|"]
        for name in (*VARIANTS, "real cells"):
            found = [_score(file, arguments.labels_key, seed, name, arguments.trees) for seed in range(arguments.seeds)]
            mean = np.mean(found, axis=0)
            text = " | ".join(f"{value:.3f}" if np.isfinite(value) else "–" for value in mean[:4])
            lines.append(f"| {name} | {text} | {mean[4]:.0f} |")
            print(lines[-1], flush=True)
    title = "The autoencoder of the latent diffusion: what decoded real cells owe to each part"
    write_page(arguments.out, title, "\n".join(lines))


def _score(file: Path, labels_key: str, seed: int, variant: str, n_trees: int) -> tuple[float, ...]:
    # genes that no model could make would tell its cells from real ones
    data = GenerationData.open(known_cells(file, GeneVocabulary.default(), labels_key)[0], labels_key)
    split = split_cells(data.cells.labels, 0.7, seed)
    train, heldout = data.cells.take(split.train), data.cells.take(split.heldout)
    reference = metrics.RealismReference.fit(train, split.is_sample, seed=seed)
    began, loss = time.perf_counter(), float("nan")
    if variant == "real cells":
        made = reference.sample
    else:
        cells = data.to_anndata(split.train, labels_key)
        with ExitStack() as stack:
            for change in VARIANTS[variant]:
                stack.enter_context(patch.object(*change))
            fitted = fit_scdiffusion(
                cells, [labels_key], settings=SHORT, with_classifiers=False, min_cells=1, seed=seed, progress=False
            )
        loss = fitted.metrics["heldout_autoencoder_loss"]
        made = _decoded(fitted.model, cells, train, seed)
    seconds = time.perf_counter() - began
    real, ours = metrics.match_types(heldout, made, np.random.default_rng(seed))
    a, b = reference.space.values(real.counts), reference.space.values(ours.counts)
    aucs = [
        c2st_auc(x, y, classifier="forest", seed=seed, n_trees=n_trees)
        for x, y in ((a, b), (reference.space.project(a), reference.space.project(b)))
    ]
    assert reference.classifier is not None
    # the classifier has seen the sample: held-out cells take its part
    called = reference.classifier.predict(a if variant == "real cells" else b)
    right = float((called == (real.labels if variant == "real cells" else ours.labels)).mean())
    return *aucs, right, loss, seconds


def _decoded(model, cells, train: LabelledCells, seed: int) -> LabelledCells:
    """Encode and decode cells at their own depth, over the genes of ``train``."""
    reader = open_counts(open_source(cells), model.vocabulary, min_coverage=0.0)
    read = reader.read(np.arange(len(reader)))
    depth = np.asarray(read.counts.sum(axis=1)).ravel()
    drawn = model.decode(model.encode(read), depth, np.random.default_rng(seed)).tocoo()
    of_gene = reader.alignment.source_of_gene()
    column = np.array([of_gene[gene][0] for gene in range(model.vocabulary.n_genes)])
    counts = sp.csr_matrix((drawn.data, (drawn.row, column[drawn.col])), shape=train.counts.shape, dtype=np.int32)
    return LabelledCells(counts, train.labels)


if __name__ == "__main__":
    main()
