"""Combinations of two conditions that no training cell had: a cell line by a technology, a type by a treatment.

    python benchmarks/scdiffusion_combination.py --lines sc_mixology_cell_lines.h5ad --kang perturb_kang_ifnb.h5ad \
        --models DIR --out docs/results/scdiffusion_combination

One combination at a time is held out, a latent diffusion is fitted to the other cells with both conditions, and cells
of the combination are generated and judged by its real ones. Beside it: the additive baseline (log mean profile of the
first label + effect of the second in the other cells; multinomial and negative binomial draws), copies (real cells of
the same first label under another second one, thinned to the depth), the null (real cells of other combinations) and
the ceiling (the other half of the real cells); and the real cells encoded and decoded, which says what the autoencoder
takes away. UMIs are those of other cells of the technology, or of the same type without the treatment. Rows are printed
as they finish.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from page import write_page
from sklearn.linear_model import LogisticRegression

from scdiva.data.output import replacing
from scdiva.data.reader import open_counts
from scdiva.data.source import open_source
from scdiva.metrics.generation_classifiers import c2st_auc
from scdiva.metrics.generation_space import ReferenceSpace, log_cp10k
from scdiva.models.scdiffusion import ScDiffusion
from scdiva.tasks.latent_generation import generate_latent, plan_latent_cells
from scdiva.tasks.scdiffusion import fit_scdiffusion

N_TREES, N_HALVES = 100, 5
FEWEST = 20


@dataclass(frozen=True)
class Question:
    name: str
    fields: tuple[str, str]
    combinations: tuple[tuple[str, str], ...]
    depth_of: int
    """Which of the two labels UMIs belong to: a technology has its depth, and a cell type has one."""


LINES = Question(
    "lung cancer lines by technology",
    ("cell_type", "technology"),
    (("HCC827", "Drop-seq"), ("H1975", "Drop-seq"), ("H2228", "CEL-seq2")),
    depth_of=1,
)
IFNB = Question(
    "blood cells by interferon beta",
    ("cell_type", "perturbation"),
    (("CD14 Mono", "IFNB"), ("CD4 Naive T", "IFNB"), ("B", "IFNB")),
    depth_of=0,
)


def row_sums(x: Any) -> np.ndarray:
    return np.asarray(x.sum(axis=1)).ravel()


def multinomial(share: np.ndarray, depth: np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
    return sp.csr_matrix(np.stack([rng.multinomial(int(n), share) for n in depth]).astype(np.int32))


def thinned(x: sp.csr_matrix, depth: np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
    """Thin cells to about given UMIs; cells that have fewer stay as they are."""
    keep = np.minimum(depth / np.maximum(row_sums(x), 1), 1.0)
    data = rng.binomial(x.data, np.repeat(keep, np.diff(x.indptr))).astype(np.int32)
    out = sp.csr_matrix((data, x.indices.copy(), x.indptr.copy()), shape=x.shape)
    out.eliminate_zeros()
    return out


class Holdout:
    def __init__(self, question: Question, cells: ad.AnnData, combination: tuple[str, str], seed: int) -> None:
        self.question, self.combination, self.seed = question, combination, seed
        self.x = sp.csr_matrix(cells.X).astype(np.int32)
        self.labels = [cells.obs[field].astype(str).to_numpy() for field in question.fields]
        self.is_it = (self.labels[0] == combination[0]) & (self.labels[1] == combination[1])
        self.of_second = np.flatnonzero((self.labels[1] == combination[1]) & ~self.is_it)
        self.same_first = np.flatnonzero((self.labels[0] == combination[0]) & ~self.is_it)
        self.real = self.x[self.is_it]
        self.n = self.real.shape[0]
        self.rng = np.random.default_rng([seed, 1])
        self.alike = self.of_second if question.depth_of else self.same_first
        self.depth = row_sums(self.x)[self.rng.choice(self.alike, self.n)]

    def share(self, rows: np.ndarray) -> np.ndarray:
        total = np.asarray(self.x[rows].sum(axis=0), dtype=float).ravel() + 0.1
        return total / total.sum()

    def additive_share(self) -> np.ndarray:
        """Profile of the first label, times the effect of the second in labels that are known under both."""
        first, second = self.combination
        elsewhere = self.labels[1][self.same_first]
        other = pd.Series(elsewhere).mode()[0]
        effects = []
        for label in np.unique(self.labels[0]):
            rows = [
                np.flatnonzero((self.labels[0] == label) & (self.labels[1] == s) & ~self.is_it) for s in (second, other)
            ]
            if label != first and min(map(len, rows)) >= FEWEST:
                effects.append(np.log(self.share(rows[0])) - np.log(self.share(rows[1])))
        log_share = np.log(self.share(self.same_first[elsewhere == other])) + np.mean(effects, axis=0)
        share = np.exp(log_share - log_share.max())
        return share / share.sum()

    def dispersion(self) -> np.ndarray:
        """By moments within the first labels of the second label, beyond Poisson, one number per gene."""
        excess, square = np.zeros(self.x.shape[1]), np.zeros(self.x.shape[1])
        for label in np.unique(self.labels[0][self.of_second]):
            rows = self.of_second[self.labels[0][self.of_second] == label]
            if rows.size < FEWEST:
                continue
            x = self.x[rows].toarray().astype(float)
            mean = x.sum(axis=1, keepdims=True) * self.share(rows)
            excess += ((x - mean) ** 2 - mean).sum(axis=0)
            square += (mean**2).sum(axis=0)
        return np.clip(excess / np.maximum(square, 1e-9), 0.0, 10.0)

    def baselines(self) -> dict[str, sp.csr_matrix]:
        share = self.additive_share()
        spread = self.dispersion()
        shape = 1.0 / np.maximum(spread, 1e-3)
        rate = (
            self.depth[:, None]
            * share
            * np.where(spread > 1e-3, self.rng.gamma(shape, 1 / shape, (self.n, shape.size)), 1)
        )
        others = np.flatnonzero(~self.is_it)
        null = self.x[self.rng.choice(others, self.n, replace=False)]
        copies = self.x[self.rng.choice(self.same_first, self.n, replace=self.n > self.same_first.size)]
        return {
            "additive, multinomial": multinomial(share, self.depth, self.rng),
            "additive, negative binomial": sp.csr_matrix(self.rng.poisson(rate).astype(np.int32)),
            "copies of the first label": thinned(copies, self.depth, self.rng),
            "null: other cells": thinned(null, self.depth, self.rng),
        }


class Fitted:
    """A model of the other cells, and its genes as columns of the file."""

    def __init__(self, holdout: Holdout, cells: ad.AnnData, models: Path) -> None:
        self.holdout = holdout
        fields = holdout.question.fields
        name = "-".join(holdout.combination).replace(" ", "_")
        folder = models / f"combination-{name}-{holdout.seed}"
        if (folder / "bundle").exists():
            self.model = ScDiffusion.from_pretrained(folder / "bundle", device="cpu")
        else:
            train = cells[~holdout.is_it].copy()
            self.model = fit_scdiffusion(
                train, fields, folder, with_classifiers=False, min_cells=1, seed=holdout.seed, device="cpu",
                progress=False,
            ).model  # fmt: skip
        self.reader = open_counts(open_source(cells), self.model.vocabulary, min_coverage=0.0)
        columns = self.reader.alignment.source_of_gene()
        self.genes = np.array([columns[gene][0] for gene in range(self.model.vocabulary.n_genes)])

    def over_genes(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        found = sp.coo_matrix(counts)
        shape = (counts.shape[0], self.holdout.x.shape[1])
        x = sp.csr_matrix((found.data, (found.row, self.genes[found.col])), shape=shape)
        x.sort_indices()
        return x

    def generated(self, weight: float) -> sp.csr_matrix:
        holdout = self.holdout
        condition = dict(zip(holdout.question.fields, holdout.combination, strict=True))
        # UMIs over the model's genes, of the cells that `holdout.depth` was drawn from
        others = holdout.x[holdout.alike]
        known = row_sums(others[:, self.genes]).sum() / row_sums(others).sum()
        depth = np.maximum(np.rint(holdout.depth * known), 1).astype(int)
        # both weights together would pull to where the first label was seen: under the other second one
        weights = {holdout.question.fields[1]: weight}
        plan = plan_latent_cells(self.model, condition, holdout.n, weight=weights, n_umis=depth, seed=holdout.seed)
        return self.over_genes(sp.csr_matrix(generate_latent(self.model, plan).X))

    def reconstructed(self) -> sp.csr_matrix:
        """Return the real cells of the combination, encoded and decoded: what no generator of z can surpass."""
        cells = self.reader.read(np.flatnonzero(self.holdout.is_it))
        rng = np.random.default_rng([self.holdout.seed, 4])
        return self.over_genes(self.model.decode(self.model.encode(cells), row_sums(cells.counts), rng))


class Judge:
    """Classifiers and spaces of the other real cells, and profiles of all combinations."""

    def __init__(self, holdout: Holdout) -> None:
        self.holdout = holdout
        others = ~holdout.is_it
        self.space = ReferenceSpace.fit(holdout.x[others], seed=holdout.seed)
        values = self.space.values(holdout.x[others])
        self.callers = [LogisticRegression(C=0.1, max_iter=2000).fit(values, label[others]) for label in holdout.labels]
        pairs = pd.Series([" + ".join(pair) for pair in zip(*holdout.labels, strict=True)])
        log_values = log_cp10k(holdout.x)
        self.profiles = {
            str(name): np.asarray(log_values[np.flatnonzero(pairs == name)].mean(axis=0)).ravel()
            for name in pairs.unique()
            if (pairs == name).sum() >= FEWEST
        }
        self.name = " + ".join(holdout.combination)
        self.centre = np.mean([p for name, p in self.profiles.items() if name != self.name], axis=0)

    def row(self, made: sp.csr_matrix, real: sp.csr_matrix) -> dict[str, Any]:
        values = [self.space.values(x) for x in (real, made)]
        points = [self.space.project(v) for v in values]
        profile = np.asarray(log_cp10k(made).mean(axis=0)).ravel()
        own = np.asarray(log_cp10k(real).mean(axis=0)).ravel()
        profiles = {**self.profiles, self.name: own}
        delta = {name: float(np.corrcoef(profile - self.centre, p - self.centre)[0, 1]) for name, p in profiles.items()}
        plain = {name: float(np.corrcoef(profile, p)[0, 1]) for name, p in profiles.items()}
        second = max((value, name) for name, value in delta.items() if name != self.name)
        first, other = (caller.predict(values[1]) for caller in self.callers)
        judged = {
            kind: c2st_auc(*pair, classifier="forest", seed=self.holdout.seed, n_trees=N_TREES)
            for kind, pair in (("genes", values), ("components", points))
        }
        return {
            "auc_genes": judged["genes"],
            "auc_components": judged["components"],
            "pearson": plain[self.name],
            "pearson_change": delta[self.name],
            "pearson_nearest_other": second[0],
            "nearest": max(delta, key=lambda name: delta[name]),
            "called_first": float((first == self.holdout.combination[0]).mean()),
            "called_second": float((other == self.holdout.combination[1]).mean()),
            "n_umis": float(np.median(row_sums(made))),
            "n_genes": float(np.median(np.diff(made.indptr))),
        }

    def rows(self, made: sp.csr_matrix | None) -> list[dict[str, Any]]:
        """Against several random halves of the real cells; None: the other half."""
        found = []
        n = self.holdout.n // 2
        for i in range(N_HALVES):
            order = np.random.default_rng([self.holdout.seed, 2, i]).permutation(self.holdout.n)
            other = self.holdout.real[order[n : 2 * n]] if made is None else made[order[:n]]
            found.append(self.row(other, self.holdout.real[order[:n]]))
        return found


HEADER = (
    "| cells | told from real, genes (AUC) | components | r of mean log profile | r of its change from the mean of all "
    "| the same with the nearest other combination | nearest is itself | called first label | called second label "
    "| UMIs | genes |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def line(name: str, rows: list[dict[str, Any]], itself: list[str]) -> str:
    def m(key: str) -> float:
        return float(np.mean([row[key] for row in rows]))

    is_nearest = np.mean([row["nearest"] == own for row, own in zip(rows, itself, strict=True)])
    return (
        f"| {name} | {m('auc_genes'):.3f} | {m('auc_components'):.3f} | {m('pearson'):.3f} | {m('pearson_change'):.3f} "
        f"| {m('pearson_nearest_other'):.3f} | {is_nearest:.2f} | {m('called_first'):.2f} | {m('called_second'):.2f} "
        f"| {m('n_umis'):.0f} | {m('n_genes'):.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--kang", type=Path)
    parser.add_argument("--models", type=Path, required=True, help="folder of the fitted models")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--combinations", type=int, nargs=2, default=[3, 3], help="how many of each set")
    parser.add_argument(
        "--weights", type=float, nargs="+", default=[1.0, 2.0], help="guidance weights of the second label"
    )
    parser.add_argument("--out", type=Path, required=True, help="result without suffix")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sets = [(LINES, arguments.lines)] + ([(IFNB, arguments.kang)] if arguments.kang else [])
    text, kept = [], []
    for (question, path), n_combinations in zip(sets, arguments.combinations, strict=False):
        combinations = question.combinations[:n_combinations]
        cells = ad.read_h5ad(path)
        found: dict[str, list[dict[str, Any]]] = {}
        itself: dict[str, list[str]] = {}
        print(f"\n{question.name}\n{HEADER}", flush=True)
        for seed in range(arguments.seeds):
            for combination in combinations:
                holdout = Holdout(question, cells, combination, seed)
                judge = Judge(holdout)
                made: dict[str, sp.csr_matrix | None] = dict(holdout.baselines())
                fitted = Fitted(holdout, cells, arguments.models)
                for weight in arguments.weights:
                    made[f"scDiffusion, weight {weight:g} of the second label"] = fitted.generated(weight)
                made["scDiffusion's autoencoder: the real cells, encoded and decoded"] = fitted.reconstructed()
                made["ceiling: real cells of it"] = None
                for name, x in made.items():
                    rows = judge.rows(x)
                    found.setdefault(name, []).extend(rows)
                    itself.setdefault(name, []).extend([judge.name] * len(rows))
                    kept += [
                        {"set": question.name, "seed": seed, "combination": judge.name, "cells": name, **r}
                        for r in rows
                    ]
                    print(line(f"{judge.name}, {name}", rows, [judge.name] * len(rows)), flush=True)
        order = [name for name in found if name.startswith("scDiffusion")]
        order += [name for name in found if name not in order]
        said = ", ".join(" + ".join(pair) for pair in combinations)
        text.append(
            f"## {question.name}\n\nMeans over {said}, {arguments.seeds} seed{'s' if arguments.seeds > 1 else ''} and "
            f"{N_HALVES} halves of the real cells.\n\n{HEADER}\n"
            + "\n".join(line(name, found[name], itself[name]) for name in order)
            + "\n"
        )
        print(text[-1], flush=True)
    write_page(arguments.out.with_suffix(".md"), "Combinations that no training cell had", "\n".join(text))
    with replacing(arguments.out.with_suffix(".json")) as partial:
        partial.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
