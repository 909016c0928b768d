"""Does imputing help? Our rows beside population mean, nearest neighbours and scVI, a null control and a label oracle.

    python benchmarks/imputation.py --data FOLDER --model scdiva-blood-tiny --out docs/results/imputation

Three tasks on real counts, each with several seeds; genes detected in at least 5 % of the cells and known to the model.

- *split*: a method sees A ~ Binomial(x, 0.5) and is judged on B = x - A: Poisson deviance per entry, and Pearson
  correlation across cells of each gene's log1p(CP10K), mean over genes. Differences of deviance from our default row
  have bootstrap intervals over cells.
- *hidden*: half of the nonzero counts of these genes are set to zero, and nobody is told which zeros are true.
- *unmeasured*: a tenth of these genes lose their columns; judged on the whole counts.

Baselines and the adapted model are fitted on the very matrix they impute; ours is frozen. Sets that are not in FOLDER
are skipped, and named. Rows are kept in --cache, so that an interrupted run goes on; remove the folder to start afresh.
Needs the extra ``eval`` for the scVI rows (--methods chooses rows).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from scdiva.baselines.imputation import genes_permuted, knn_smoothing, population_mean, scvi_expected
from scdiva.data.output import replacing
from scdiva.data.reader import open_counts
from scdiva.data.thinning import split_counts
from scdiva.diffusion import Masks
from scdiva.metrics.embedding import paired_difference
from scdiva.metrics.imputation import coverage, gene_correlations, hidden_scores, hide_entries, poisson_deviance
from scdiva.models.scdiva import ScDiVa
from scdiva.models.scdiva.imputation import PRIOR_STRENGTH, fold_of_genes
from scdiva.models.scdiva.objectives import tokeniser_of
from scdiva.tasks.embed import embed
from scdiva.tasks.impute import impute
from scdiva.tasks.pretrain import adapt
from scdiva.types import CellCounts

SETS = ("pbmc3k", "breast_immune_spectra_1k", "heart_san_1k")
OURS = "scdiva"
METHODS = {
    "scdiva": "**scdiva, as it comes** (own counts used)",
    "scdiva_hidden": "scdiva, own counts hidden",
    "scdiva_profile": "scdiva, profile decoder alone (`embed --denoise`)",
    "scdiva_adapted": "scdiva, adapted to the visible counts",
    "population": "population mean × depth",
    "population_own": "the same, corrected by the own count as ours",
    "knn": "kNN-15 on PCA-50",
    "knn_own": "the same, corrected by the own count as ours",
    "scvi": "scVI trained on the visible counts",
    "scvi_own": "the same, corrected by the own count as ours",
    "own": "the visible counts themselves",
    "types": "mean of the cell's true type × depth (told the labels)",
    "types_own": "the same, corrected by the own count as ours",
    "permuted": "null: scdiva with genes permuted",
}
SLOW = ("scdiva_hidden", "scdiva_adapted", "scvi", "scvi_own")
TASKS = ("split", "hidden", "unmeasured", "intervals")
MIN_DETECTION = 0.05
SHARE = 0.5
N_SAMPLES, N_INTERVAL_CELLS = 20, 300


@dataclass
class Task:
    """Counts that methods see, with what is needed to fit them."""

    name: str
    set: str
    seed: int
    adata: ad.AnnData  # visible counts in X
    genes: NDArray  # columns that are judged

    @property
    def counts(self) -> sp.csr_matrix:
        return self.adata.X

    @property
    def depth(self) -> NDArray:
        return np.asarray(self.counts.sum(axis=1), dtype=float).ravel()


def ours(model: ScDiVa, task: Task, own_counts: str = "used") -> NDArray:
    reader = open_counts(task.adata, model.vocabulary)
    return impute(reader, model, genes=None, own_counts=own_counts, unit="counts").measured[""][:, task.genes].toarray()


def profile_alone(model: ScDiVa, task: Task) -> NDArray:
    reader = open_counts(task.adata, model.vocabulary)
    gene_of = reader.alignment.gene_of_source[task.genes]
    z = embed(reader, model).z
    # CP10K of the whole vocabulary; brought to the file's molecules as a user would: by its depth
    rate = model.expected_profile(z, gene_of).astype(float) / 1e4
    measured = np.flatnonzero(reader.alignment.is_measured)
    total = np.concatenate([model.expected_profile(part, measured).sum(axis=1) for part in np.array_split(z, 20)]) / 1e4
    return rate / total[:, None] * task.depth[:, None]


def corrected_by_own(model: ScDiVa, task: Task, mean: NDArray) -> NDArray:
    """What is left of the gain when another expectation gets our correction, our dispersions and their strength?"""
    gene_of = open_counts(task.adata, model.vocabulary).alignment.gene_of_source[task.genes]
    shape = PRIOR_STRENGTH * np.exp(model.network.log_theta.detach().numpy()[gene_of].astype(float))
    return mean * (shape + task.counts[:, task.genes].toarray()) / (shape + mean)


def adapted_model(bench: Bench, task: Task) -> ScDiVa:
    run = bench.cache / "runs" / f"{task.set}.{task.name}.{task.seed}"
    return adapt(task.adata, bench.model, run, seed=task.seed, progress=False).model


def own_counts_smoothed(task: Task) -> NDArray:
    """A tenth of population mean, so that what was not seen is not impossible."""
    return (task.counts[:, task.genes].toarray() + 0.1 * population_mean(task.counts, task.genes)) / 1.1


def type_means(task: Task) -> NDArray:
    labels = task.adata.obs["cell_type"].astype(str).to_numpy()
    expected = np.empty((task.adata.n_obs, task.genes.size))
    overall = population_mean(task.counts, task.genes) / np.maximum(task.depth, 1)[:, None]
    extra = float(np.median(task.depth))
    for label in np.unique(labels):
        of = labels == label
        total = np.asarray(task.counts[of][:, task.genes].sum(axis=0)).ravel() + extra * overall[of][0]
        expected[of] = task.depth[of][:, None] * total / (task.depth[of].sum() + extra)
    return expected


@dataclass
class Bench:
    data: Path
    model: ScDiVa
    cache: Path

    def methods(self) -> dict[str, Callable[[Task], NDArray]]:
        return {
            "scdiva": lambda t: ours(self.model, t),
            "scdiva_hidden": lambda t: ours(self.model, t, "hidden"),
            "scdiva_profile": lambda t: profile_alone(self.model, t),
            "scdiva_adapted": lambda t: ours(adapted_model(self, t), t),
            "population": lambda t: population_mean(t.counts, t.genes),
            "population_own": lambda t: corrected_by_own(self.model, t, population_mean(t.counts, t.genes)),
            "knn_own": lambda t: corrected_by_own(self.model, t, knn_smoothing(t.counts, t.genes, seed=t.seed)),
            "knn": lambda t: knn_smoothing(t.counts, t.genes, seed=t.seed),
            "scvi": self.scvi,
            "scvi_own": lambda t: corrected_by_own(self.model, t, self.scvi(t)),
            "own": own_counts_smoothed,
            "types": type_means,
            "types_own": lambda t: corrected_by_own(self.model, t, type_means(t)),
            "permuted": lambda t: genes_permuted(ours(self.model, t), t.depth, seed=t.seed),
        }

    def scvi(self, task: Task) -> NDArray:
        """One training for two rows: what it expects is kept."""
        file = self.cache / f"{task.set}.{task.name}.{task.seed}.scvi.npy"
        if not file.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            expected = scvi_expected(task.counts, task.genes, seed=task.seed).astype(np.float32)
            with replacing(file) as partial, partial.open("wb") as handle:
                np.save(handle, expected)
        return np.load(file, allow_pickle=False).astype(float)

    def load(self, name: str) -> tuple[ad.AnnData, NDArray]:
        adata = ad.read_h5ad(self.data / f"{name}.h5ad")
        adata.X = sp.csr_matrix(adata.X)
        detected = adata.X.getnnz(axis=0) / adata.n_obs
        reader = open_counts(adata, self.model.vocabulary)
        columns = reader.alignment.source_of_gene()
        single = {c[0] for c in columns.values() if len(c) == 1}
        genes = [g for g in np.flatnonzero(detected >= MIN_DETECTION) if int(g) in single]
        return adata, np.array(genes)

    def row(
        self,
        task: Task,
        method: str,
        score: Callable[[NDArray], tuple[dict, NDArray]],
        run: Callable[[Task], NDArray] | None = None,
    ) -> None:
        key = f"{task.set}.{task.name}.{method}.{task.seed}"
        if method.startswith(("scdiva", "permuted")):
            key += f".{self.model.bundle_hash[:12]}"
        file = self.cache / f"{key}.npz"
        if not file.exists():
            started = time.perf_counter()
            expected = np.maximum((run or self.methods()[method])(task), 1e-8)
            seconds = time.perf_counter() - started
            scores, per_cell = score(expected)
            self.cache.mkdir(parents=True, exist_ok=True)
            with replacing(file) as partial, partial.open("wb") as handle:
                np.savez(handle, per_cell=per_cell, seconds=seconds, scores=json.dumps(scores))
        with np.load(file, allow_pickle=False) as archive:
            scores, seconds = json.loads(str(archive["scores"])), float(archive["seconds"])
            self.rows.setdefault((task.name, task.set, method), []).append({**scores, "seconds": seconds})
            self.per_cell.setdefault((task.name, task.set, method), []).append(archive["per_cell"])
        shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        print(f"{task.set:25s} {task.name:10s} {method:22s} seed {task.seed}  {shown}  {seconds:.0f} s", flush=True)

    def __post_init__(self) -> None:
        self.rows: dict[tuple[str, str, str], list[dict]] = {}
        self.per_cell: dict[tuple[str, str, str], list[NDArray]] = {}


def log_cp10k(counts: NDArray, depth: NDArray) -> NDArray:
    return np.log1p(1e4 * counts / np.maximum(depth, 1.0)[:, None])


def run_split(bench: Bench, name: str, seed: int, methods: list[str]) -> None:
    adata, genes = bench.load(name)
    counts = adata.X
    seen = np.random.default_rng([seed, 1]).binomial(counts.data, SHARE).astype(counts.data.dtype)
    a, b = (sp.csr_matrix((d, counts.indices, counts.indptr), shape=counts.shape) for d in (seen, counts.data - seen))
    heldout, depth_b = b[:, genes].toarray().astype(float), np.asarray(b.sum(axis=1), dtype=float).ravel()
    a = a.copy()
    a.eliminate_zeros()
    task = Task("split", name, seed, ad.AnnData(a, obs=adata.obs, var=adata.var), genes)
    value = log_cp10k(heldout, depth_b)

    def score(expected: NDArray) -> tuple[dict, NDArray]:
        per_cell = poisson_deviance(heldout, expected)
        correlations = gene_correlations(value, log_cp10k(expected, task.depth))
        return {"deviance": float(per_cell.mean()), "pearson": float(correlations.mean())}, per_cell

    for method in methods:
        bench.row(task, method, score)


def run_hidden(bench: Bench, name: str, seed: int, methods: list[str]) -> None:
    adata, genes = bench.load(name)
    masked, entries = hide_entries(adata.X, genes, share=SHARE, rng=np.random.default_rng([seed, 2]))
    task = Task("hidden", name, seed, ad.AnnData(masked, obs=adata.obs, var=adata.var), genes)
    depth = np.asarray(adata.X.sum(axis=1), dtype=float).ravel()
    column = np.full(adata.n_vars, -1)
    column[genes] = np.arange(genes.size)
    truth = log_cp10k(adata.X[:, genes].toarray(), depth)[entries.cell, column[entries.gene]]

    def score(expected: NDArray) -> tuple[dict, NDArray]:
        count = expected[entries.cell, column[entries.gene]]
        value = log_cp10k(expected, task.depth)[entries.cell, column[entries.gene]]
        return asdict(hidden_scores(truth, count, value, entries.n_hidden)), np.zeros(0)

    for method in methods:
        bench.row(task, method, score)


def run_unmeasured(bench: Bench, name: str, seed: int) -> None:
    adata, genes = bench.load(name)
    lost = np.sort(np.random.default_rng([seed, 3]).choice(genes, genes.size // 10, replace=False))
    left = adata[:, np.setdiff1d(np.arange(adata.n_vars), lost)].copy()
    gene_of = open_counts(adata, bench.model.vocabulary).alignment.gene_of_source[lost]
    truth, depth = adata.X[:, lost].toarray().astype(float), np.asarray(adata.X.sum(axis=1), dtype=float).ravel()
    task = Task("unmeasured", name, seed, left, lost)
    ids = [str(bench.model.vocabulary.ensembl_id[g]) for g in gene_of]

    def model_rows(task: Task) -> NDArray:
        result = impute(open_counts(task.adata, bench.model.vocabulary), bench.model, genes=ids, unit="counts")
        return result.unmeasured[""][:, [result.unmeasured_names.index(i) for i in ids]]

    def corpus_mean(task: Task) -> NDArray:
        reader = open_counts(task.adata, bench.model.vocabulary)
        mean = bench.model.statistics.mean
        return task.depth[:, None] * mean[gene_of] / mean[reader.alignment.is_measured].sum()

    def score(expected: NDArray) -> tuple[dict, NDArray]:
        per_cell = poisson_deviance(truth, expected)
        correlations = gene_correlations(log_cp10k(truth, depth), log_cp10k(expected, task.depth))
        return {"deviance": float(per_cell.mean()), "pearson": float(correlations.mean())}, per_cell

    for method, function in ((OURS, model_rows), ("population", corpus_mean)):
        bench.row(task, method, score, function)


def intervals(bench: Bench, name: str) -> list[float]:
    """Share of held-out counts B within the 5 % to 95 % draws from A, of all entries and of expected counts > 0.5."""
    file = bench.cache / f"{name}.intervals.{bench.model.bundle_hash[:12]}.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    adata, genes = bench.load(name)
    some = np.sort(np.random.default_rng(4).permutation(adata.n_obs)[:N_INTERVAL_CELLS])
    counts = adata.X[some]
    seen = np.random.default_rng(5).binomial(counts.data, SHARE).astype(counts.data.dtype)
    a, b = (sp.csr_matrix((d, counts.indices, counts.indptr), shape=counts.shape) for d in (seen, counts.data - seen))
    reader = open_counts(ad.AnnData(a, obs=adata.obs.iloc[some], var=adata.var), bench.model.vocabulary)
    ids = [str(bench.model.vocabulary.ensembl_id[g]) for g in reader.alignment.gene_of_source[genes]]
    heldout = b[:, genes].toarray()
    found = []
    for own_counts in ("used", "hidden"):
        result = impute(reader, bench.model, genes=ids, own_counts=own_counts, unit="counts", n_samples=N_SAMPLES)
        expected, low, high = (result.measured[k][:, genes].toarray() for k in ("", "_q05", "_q95"))
        is_seen = expected > 0.5
        found += [coverage(heldout, low, high), coverage(heldout[is_seen], low[is_seen], high[is_seen])]
    print(f"{name}: coverage of 5 % to 95 % {found}", flush=True)
    with replacing(file) as partial:
        partial.write_text(json.dumps(found), encoding="utf-8")
    return found


def estimators(bench: Bench, name: str) -> list[tuple[str, float, float, float]]:
    """What else the parts could say, on the split task: (estimator, deviance, Pearson per gene, expected / found)."""
    adata, genes = bench.load(name)
    some = np.sort(np.random.default_rng(4).permutation(adata.n_obs)[:N_INTERVAL_CELLS])
    reader = open_counts(adata, bench.model.vocabulary)
    a, b = split_counts(reader.read(some), SHARE, np.random.default_rng(5))
    gene_of = reader.alignment.gene_of_source[genes]
    own, heldout = (x.counts[:, gene_of].toarray().astype(float) for x in (a, b))
    depth, depth_b = (np.asarray(x.counts.sum(axis=1), dtype=float).ravel() for x in (a, b))
    value = log_cp10k(heldout, depth_b)
    model, measured = bench.model, np.flatnonzero(reader.alignment.is_measured)
    theta = model.network.log_theta.detach().numpy()[gene_of].astype(float).clip(-10, 10)

    def share(z: NDArray, among: NDArray) -> NDArray:
        blocks = np.array_split(z, max(len(z) // 50, 1))
        total = np.concatenate([model.expected_profile(part, among).sum(axis=1) for part in blocks])
        return model.expected_profile(z, gene_of).astype(float) / total[:, None]

    def corrected(mean: NDArray, strength: float) -> NDArray:
        shape = strength * np.exp(theta)
        return mean * (shape + own) / (shape + mean)

    profile = share(model.embed(a), measured) * depth[:, None]
    rows = {"profile decoder, z of the whole cell": profile}
    for strength in (0.5, 1, 2, 3, 5, 8):
        rows[f"the same with the own count, prior strength {strength:g}"] = corrected(profile, strength)
    trunk = np.concatenate([of_trunk(model, a.take(part), gene_of) for part in np.array_split(np.arange(some.size), 6)])
    rows["trunk: P(detected) × E(count if detected), z of the whole cell"] = trunk
    rows["trunk with the own count, prior strength 3"] = corrected(trunk, 3)
    fold, unfilled = fold_of_genes(model.vocabulary), np.empty_like(profile)
    for k in np.unique(fold):
        dense = a.counts.copy()
        dense.data[fold[dense.indices] == k] = 0
        dense.eliminate_zeros()
        z = model.embed(replace(a, counts=dense))
        seen = np.asarray(dense.sum(axis=1), dtype=float).ravel()
        at = fold[gene_of] == k
        unfilled[:, at] = (share(z, measured[fold[measured] != k]) * seen[:, None])[:, at]
    rows["profile decoder, own counts hidden, z of the other genes"] = unfilled
    hidden = model.impute(a, gene_of, own_counts="hidden", n_samples=0, seed=0).expected
    rows["the same with what is hidden filled in"] = hidden
    found = []
    for label, mean in rows.items():
        mean = np.maximum(mean, 1e-8)
        correlation = gene_correlations(value, log_cp10k(mean, depth)).mean()
        total = float(mean.sum() / heldout.sum())
        found.append((label, float(poisson_deviance(heldout, mean).mean()), float(correlation), total))
        print(
            f"{name:25s} {label:62s} deviance {found[-1][1]:.4f}  pearson {found[-1][2]:.4f}  sum {total:.3f}",
            flush=True,
        )
    return found


@torch.inference_mode()
def of_trunk(model: ScDiVa, cells: CellCounts, genes: NDArray) -> NDArray:
    """Expected counts from identity and value heads: everything hidden from the trunk, z and totals of the cell."""
    n_tokens = np.diff(cells.counts.indptr)
    everything = np.ones(int(n_tokens.sum()), dtype=bool)
    cells = replace(cells, condition=np.zeros((cells.n_cells, model.labels.n_fields), dtype=np.int32))
    masked, _ = tokeniser_of(model.config, model.statistics).corrupt(
        cells,
        Masks(everything, everything, n_tokens.astype(np.int64)),
        np.random.default_rng(0),
        view=cells,
        reads_view=np.ones(cells.n_cells, dtype=bool),
    )
    network, output = model.network, model.network(masked)
    gene = torch.from_numpy(genes).repeat(cells.n_cells)
    cell = torch.arange(cells.n_cells).repeat_interleave(genes.size)
    log_mean = network.log_mean(output, cell, gene, network.trunk.value_direction(output.states.query_BD)[cell])
    log_theta = network.log_theta[gene]
    zero = -log_theta.exp() * torch.nn.functional.softplus(log_mean - log_theta)
    if_detected = log_mean.exp() / -torch.expm1(zero.clamp_max(-1e-30))
    p = network.gene_probabilities(masked, output)[:, torch.from_numpy(genes)]
    return (p * if_detected.view(cells.n_cells, -1)).double().numpy()


def table(bench: Bench, task: str, sets: list[str], columns: dict[str, str], labels: dict[str, str]) -> list[str]:
    lines = []
    for name in sets:
        lines += ["", f"**{name}**", "", f"| method | {' | '.join(columns.values())} | seconds |"]
        lines.append(f"|---|{'---:|' * (len(columns) + 1)}")
        for method, label in labels.items():
            rows = bench.rows.get((task, name, method))
            if not rows:
                continue
            cells = []
            for key in columns:
                if key == "difference":
                    cells.append(difference(bench, task, name, method))
                    continue
                values = np.array([row[key] for row in rows])
                spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
                cells.append(f"{values.mean():.3f}{spread}")
            seconds = np.mean([row["seconds"] for row in rows])
            lines.append(f"| {label} | {' | '.join(cells)} | {seconds:.0f} |")
    return lines


def difference(bench: Bench, task: str, name: str, method: str) -> str:
    if method == OURS or (task, name, OURS) not in bench.per_cell:
        return ""
    own, other = bench.per_cell[task, name, OURS], bench.per_cell[task, name, method]
    n = min(len(own), len(other))
    mean, low, high = paired_difference(
        np.mean(other[:n], axis=0), np.mean(own[:n], axis=0), rng=np.random.default_rng(0)
    )
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def write_estimators(found: dict[str, list[tuple[str, float, float, float]]], arguments: argparse.Namespace) -> None:
    lines = [
        "# Which estimator?",
        "",
        f"Made by `python benchmarks/imputation.py --estimators --data FOLDER --model {arguments.model} --sets "
        f"{' '.join(found)} --out {arguments.out}`;",
        f"{N_INTERVAL_CELLS} cells of each set, one seed, seen A and judged on B (count splitting): Poisson deviance",
        "per entry, lower is better / Pearson per gene, higher is better / molecules expected for one that was found.",
        "",
        f"| estimator | {' | '.join(found)} |",
        f"|---|{'---:|' * len(found)}",
    ]
    for i, (label, *_) in enumerate(next(iter(found.values()))):
        scores = [f"{rows[i][1]:.4f} / {rows[i][2]:.3f} / {rows[i][3]:.2f}" for rows in found.values()]
        lines.append(f"| {label} | {' | '.join(scores)} |")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(arguments.out.with_suffix(".md")) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="scdiva-blood-tiny")
    parser.add_argument("--out", type=Path, required=True, help="without ending: .md and .json are written")
    parser.add_argument("--cache", type=Path, default=Path("runs/imputation"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--slow-seeds", type=int, default=1, help="seeds of scVI, of hidden own counts and of the adapted model"
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--estimators", action="store_true", help="compare what the parts of the model could say")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(arguments.data, ScDiVa.from_pretrained(arguments.model, device="cpu"), arguments.cache)
    sets = [name for name in arguments.sets if (bench.data / f"{name}.h5ad").exists()]
    for name in set(arguments.sets) - set(sets):
        print(f"{name}: not in {bench.data}, skipped", flush=True)
    if arguments.estimators:
        write_estimators({name: estimators(bench, name) for name in sets}, arguments)
        return
    covered = {}
    for name in sets:
        for seed in range(arguments.seeds):
            chosen = [
                m
                for m in arguments.methods
                if seed < arguments.slow_seeds
                or not (m.startswith("scvi") or m.endswith("_hidden") or m == "scdiva_adapted")
            ]
            if "split" in arguments.tasks:
                run_split(bench, name, seed, chosen)
            if "hidden" in arguments.tasks:
                run_hidden(bench, name, seed, chosen)
            if "unmeasured" in arguments.tasks:
                run_unmeasured(bench, name, seed)
        if "intervals" in arguments.tasks:
            covered[name] = intervals(bench, name)

    labels = {m: METHODS[m] for m in METHODS if m in arguments.methods}
    split = {"deviance": "deviance", "difference": "more than scdiva [95 %]", "pearson": "Pearson per gene"}
    hidden = {
        "auroc_cell": "AUROC, zeros of the cell",
        "auroc_gene": "AUROC, zeros of the gene",
        "pearson": "Pearson, hidden",
        "spearman": "Spearman, hidden",
        "mae": "error, hidden and zeros",
    }
    lines = [
        "# Imputation",
        "",
        f"Made by `python benchmarks/imputation.py --data FOLDER --model {arguments.model} --out {arguments.out}`"
        f"; {arguments.seeds} seeds (scVI, hidden and adapted: {arguments.slow_seeds}), mean ± standard deviation.",
        f"Model: {bench.model!r}. What the columns mean: [docs/imputation.md](../imputation.md).",
        "",
        "## Count splitting: seen A, judged on B",
        *table(bench, "split", sets, split, labels),
        "",
        "## Half of the nonzero counts hidden",
        *table(bench, "hidden", sets, hidden, labels),
        "",
        "## Genes without a column",
        *table(
            bench,
            "unmeasured",
            sets,
            {k: split[k] for k in ("deviance", "difference", "pearson")},
            {OURS: "**scdiva, as it comes**", "population": "training corpus's mean × depth"},
        ),
        "",
        "## Intervals",
        "",
        f"Share of held-out counts B within the 5 % to 95 % quantiles of {N_SAMPLES} draws made from A (nominal: 0.90;"
        f" of counts, of which most are 0, more is right), {N_INTERVAL_CELLS} cells, one seed.",
        "",
        "| set | own counts used: all | expected > 0.5 | own counts hidden: all | expected > 0.5 |",
        "|---|---:|---:|---:|---:|",
        *(f"| {name} | {' | '.join(f'{v:.3f}' for v in values)} |" for name, values in covered.items()),
        "",
    ]
    text = "\n".join(lines)
    rows = [
        {"task": task, "set": name, "method": method, "seed": seed, **row}
        for (task, name, method), found in bench.rows.items()
        for seed, row in enumerate(found)
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(arguments.out.with_suffix(".md")) as partial:
        partial.write_text(text, encoding="utf-8")
    with replacing(arguments.out.with_suffix(".json")) as partial:
        partial.write_text(json.dumps({"rows": rows, "coverage": covered}, indent=1), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
