"""Does the embedding separate cell types better than a PCA? Our rows beside their baselines, a null and a ceiling.

    python benchmarks/embedding.py --data FOLDER --model scdiva-blood-tiny --corpus configs/blood-tiny.toml \
        --out docs/results/embedding

Sets that are not in FOLDER are skipped, and named. Labels are never used to make an embedding, except in the ceiling.
Cells labelled "unassigned" and types of fewer than ten cells are left out of the scores, not of the embeddings.
Embeddings are kept in --cache, so that an interrupted run goes on; remove the folder to start afresh.

Needs the extra ``eval`` for the scVI row (--methods chooses rows).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import torch
from numpy.typing import NDArray

from scdiva.baselines import CorpusPCA, pca_of_hvg, random_projection, scvi_latent
from scdiva.config import RunConfig, apply_overrides, load_config
from scdiva.data.output import replacing
from scdiva.data.reader import open_counts
from scdiva.metrics import kmeans_nmi, knn_scores, paired_difference
from scdiva.models.scdiva import ScDiVa
from scdiva.tasks.embed import embed
from scdiva.tasks.pretrain import adapt, open_corpus_of

SETS = (
    "zheng_sorted7_3500",
    "pbmc3k",
    "breast_immune_spectra_1k",
    "heart_san_1k",
    "sc_mixology_cell_lines",
    "pancreas_baron_h1",
    "pancreas_baron_h234",
)
# the sets on which methods differ most; elsewhere the slow scVI gets one seed
UNSATURATED = SETS[:3]
METHODS = {
    "scdiva": "scdiva, as it comes",
    "scdiva_adapted": "scdiva, adapted to the set without labels",
    "pca_own": "PCA-50 of the set's own 2,000 HVG",
    "pca_own_scaled": "the same, genes scaled to unit variance",
    "pca_corpus": "PCA-50 of the training corpus",
    "scvi": "scVI trained on the set (2,000 HVG)",
    "random": "random projection to 50 (null)",
}
MIN_CELLS_PER_TYPE = 10


@dataclass
class Bench:
    data: Path
    model: ScDiVa
    corpus: Path
    cache: Path
    corpus_pca: CorpusPCA | None = None

    def path(self, name: str) -> Path:
        return self.data / f"{name}.h5ad"

    def embedding(self, name: str, method: str, seed: int) -> tuple[NDArray, float]:
        key = f"{name}.{method}.{seed}"
        if method.startswith("scdiva"):
            key += f".{self.model.bundle_hash[:12]}"
        file = self.cache / f"{key}.npz"
        if not file.exists():
            started = time.perf_counter()
            z = self._compute(name, method, seed)
            self.cache.mkdir(parents=True, exist_ok=True)
            with replacing(file) as partial, partial.open("wb") as handle:
                np.savez(handle, z=z, seconds=time.perf_counter() - started)
            print(f"  {name} {method} seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
        with np.load(file, allow_pickle=False) as archive:
            return archive["z"], float(archive["seconds"])

    def _compute(self, name: str, method: str, seed: int) -> NDArray:
        path = self.path(name)
        if method == "scdiva":
            return embed(open_counts(path, self.model.vocabulary), self.model).z
        if method == "scdiva_adapted":
            run = self.cache / "runs" / f"{name}.{seed}.{self.model.bundle_hash[:12]}"
            adapted = adapt(path, self.model, run, seed=seed, progress=False).model
            return embed(open_counts(path, adapted.vocabulary), adapted).z
        if method.startswith("pca_own"):
            return pca_of_hvg(ad.read_h5ad(path), seed=seed, scale=method.endswith("scaled"))
        if method == "scvi":
            return scvi_latent(ad.read_h5ad(path), seed=seed)
        reader = open_counts(path, self.model.vocabulary)
        cells = reader.read(np.arange(len(reader)))
        if method == "random":
            return random_projection(cells, seed=seed)
        if self.corpus_pca is None:
            config = apply_overrides(load_config(self.corpus, RunConfig), [f"data.root={json.dumps(str(self.data))}"])
            corpus = open_corpus_of(config, self.model.vocabulary)
            self.corpus_pca = CorpusPCA.fit(corpus.read(np.arange(len(corpus))), seed=0)
        return self.corpus_pca.transform(cells)


def scored_cells(path: Path) -> tuple[NDArray[np.bool_], NDArray[np.str_]]:
    labels = ad.read_h5ad(path, backed="r").obs["cell_type"].astype(str).to_numpy()
    _, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    is_scored = (sizes >= MIN_CELLS_PER_TYPE)[inverse] & ~np.isin(labels, ("unassigned", "nan", "unknown"))
    return is_scored, labels[is_scored]


def ceiling(bench: Bench, name: str, seed: int) -> tuple[float, float]:
    """Logistic regression with labels on log1p(CP10K) of all genes, five folds.

    What a classifier that is shown labels makes of the counts: the height that embeddings without labels are measured
    by. It is no bound; where the authors' labels come from clusters of a PCA, neighbours in a PCA can agree better.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    from scdiva.baselines.embedding import _log_matrix

    is_scored, labels = scored_cells(bench.path(name))
    reader = open_counts(bench.path(name), bench.model.vocabulary)
    x = _log_matrix(reader.read(np.flatnonzero(is_scored)))
    x = x[:, np.asarray((x > 0).sum(axis=0)).ravel() >= 3]
    classifier = LogisticRegression(C=0.1, max_iter=100)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    predicted = cross_val_predict(classifier, x, labels, cv=folds)
    return float((predicted == labels).mean()), float(f1_score(labels, predicted, average="macro"))


def score(z: NDArray, is_scored: NDArray, labels: NDArray, seeds: range, nmi_seeds: range) -> dict:
    chosen = np.nan_to_num(z[is_scored])
    folds = [knn_scores(chosen, labels, seed=seed) for seed in seeds]
    nmi = kmeans_nmi(chosen, labels, seeds=list(nmi_seeds))
    return {
        "accuracy": [f.accuracy for f in folds],
        "macro_f1": [f.macro_f1 for f in folds],
        "nmi": nmi.tolist(),
        "is_correct": np.mean([f.is_correct for f in folds], axis=0),
    }


def seeds_of(name: str, method: str, n_seeds: int) -> int:
    return 1 if method == "scvi" and name not in UNSATURATED else n_seeds


def run(bench: Bench, names: list[str], methods: list[str], n_seeds: int) -> dict:
    results: dict = {}
    for name in names:
        is_scored, labels = scored_cells(bench.path(name))
        rows: dict = {}
        for method in methods:
            per_seed = []
            for seed in range(seeds_of(name, method, n_seeds)):
                z, seconds = bench.embedding(name, method, seed)
                # every seed of a method meets every seed of the folds once: embeddings that have no seed still vary
                per_seed.append(score(z, is_scored, labels, range(seed, seed + 1), range(10)))
                per_seed[-1]["seconds"] = seconds
            rows[method] = {
                key: [v for s in per_seed for v in (s[key] if isinstance(s[key], list) else [s[key]])]
                for key in ("accuracy", "macro_f1", "nmi", "seconds")
            }
            rows[method]["is_correct"] = np.mean([s["is_correct"] for s in per_seed], axis=0)
        upper = [ceiling(bench, name, seed) for seed in range(n_seeds)]
        rows["ceiling"] = {"accuracy": [u[0] for u in upper], "macro_f1": [u[1] for u in upper]}
        majority = np.unique(labels, return_counts=True)[1].max() / labels.size
        rows["majority"] = {"accuracy": [majority]}
        comparisons = {}
        for ours in ("scdiva", "scdiva_adapted"):
            for other in ("pca_own", "pca_corpus", "scvi"):
                if ours in rows and other in rows:
                    difference = paired_difference(
                        rows[ours]["is_correct"], rows[other]["is_correct"], rng=np.random.default_rng(0)
                    )
                    comparisons[f"{ours} - {other}"] = difference
        for row in rows.values():
            row.pop("is_correct", None)
        results[name] = {
            "n_cells": int(labels.size),
            "n_types": int(np.unique(labels).size),
            "rows": rows,
            "differences": comparisons,
        }
        print(table({name: results[name]}), flush=True)
    return results


def table(results: dict) -> str:
    lines = []
    for name, result in results.items():
        lines += [
            f"### {name}: {result['n_cells']:,} cells, {result['n_types']} types",
            "",
            "| embedding | 15-nn accuracy | macro-F1 | NMI (k-means) | seconds |",
            "|---|---:|---:|---:|---:|",
        ]
        titles = {
            **METHODS,
            "ceiling": "logistic regression that is shown labels, all genes (ceiling)",
            "majority": "always the most frequent type",
        }
        for method, row in result["rows"].items():
            cells = [
                f"{np.mean(row[key]):.3f} ± {np.std(row[key]):.3f}"
                if key in row and len(row[key]) > 1
                else (f"{row[key][0]:.3f}" if key in row else "")
                for key in ("accuracy", "macro_f1", "nmi")
            ]
            seconds = f"{np.median(row['seconds']):.1f}" if "seconds" in row else ""
            lines.append(f"| {titles[method]} | {' | '.join(cells)} | {seconds} |")
        if result["differences"]:
            lines += ["", "Difference in accuracy, with a 95 % interval (bootstrap over cells, paired):", ""]
            lines += [
                f"- {pair}: {difference:+.3f} [{low:+.3f}, {high:+.3f}]"
                for pair, (difference, low, high) in result["differences"].items()
            ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="scdiva-blood-tiny")
    parser.add_argument("--corpus", type=Path, default=Path("configs/blood-tiny.toml"))
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    parser.add_argument("--cache", type=Path, default=Path("runs/embedding_benchmark"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only-embed", action="store_true", help="fill the cache, score nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # scVI's weights decay into denormal numbers, which a CPU computes with many times slower
    torch.set_flush_denormal(True)
    model = ScDiVa.from_pretrained(arguments.model, device="cpu")
    bench = Bench(arguments.data, model, arguments.corpus, arguments.cache)
    names = [name for name in arguments.sets if bench.path(name).exists()]
    if missing := sorted(set(arguments.sets) - set(names)):
        print(f"not in {arguments.data}, skipped: {', '.join(missing)}")
    if arguments.only_embed:
        for name in names:
            for method in arguments.methods:
                for seed in range(seeds_of(name, method, arguments.seeds)):
                    bench.embedding(name, method, seed)
        return
    results = run(bench, names, arguments.methods, arguments.seeds)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        head = (
            "# Embedding: nearest neighbours and clusters by known cell types\n\n"
            f"Model {model.name}, hash {model.bundle_hash[:12]}. Made by `benchmarks/embedding.py`; "
            f"{arguments.seeds} seeds (folds, methods), ten seeds of k-means; mean ± standard deviation over seeds; "
            "scVI one seed outside the first three sets. The ceiling is what a classifier makes of the counts that is "
            "shown labels; where labels come from clusters of a PCA, neighbours in an embedding can agree better. "
            "HVG: scanpy's `seurat` flavour on log1p(CP10K).\n\n"
        )
        arguments.out.with_suffix(".md").write_text(head + table(results), encoding="utf-8")
        arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
