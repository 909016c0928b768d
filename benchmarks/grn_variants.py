"""What was tried for gene networks, on one set to choose by and others to confirm: docs/results/grn_variants.md.

    python benchmarks/grn_variants.py TRUTHS OUT.md CORPUS NAME=FILE[,FILE...] [NAME=FILE...]

CORPUS is the folder of the files that the bundled model was trained on (configs/blood-tiny.toml), TRUTHS that of the
tables of known regulation. Each row is a matrix of scores.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.utils.extmath import randomized_svd

from scdiva.baselines import network as baselines
from scdiva.config import RunConfig, apply_overrides, load_config
from scdiva.data.known_network import read_truth
from scdiva.metrics import network as metrics
from scdiva.models.scdiva import ScDiVa
from scdiva.models.scdiva.init import corpus_components, normalised_matrix
from scdiva.models.scdiva.response import mean_jacobian
from scdiva.tasks.evaluate_grn import Candidates, NetworkCells
from scdiva.tasks.grn_report import drawn
from scdiva.tasks.pretrain import open_corpus_of

TRUTHS = {
    "union": "grn_union_signed.tsv.gz",
    "CollecTRI": "grn_collectri.tsv.gz",
    "TRRUST": "grn_trrust_v2_human.tsv.gz",
    "ENCODE": "grn_encode_tfchip_subset.parquet",
}
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "blood-tiny.toml"
THRESHOLDS = (0.0, 1.0, 1.5, 2.0, 2.5, 3.0)
Array = NDArray[np.float64]


def unit(vectors: Array) -> Array:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def by_row(score: Array) -> Array:
    return (score - score.mean(axis=1, keepdims=True)) / score.std(axis=1, keepdims=True)


def by_column(score: Array) -> Array:
    return (score - score.mean(axis=0)) / score.std(axis=0)


def ranks(score: Array) -> Array:
    return rankdata(score).reshape(score.shape) / score.size


def half(score: Array) -> Array:
    return np.where(score < 0, -score / 2, score)


def like_norm(norm: Array, rng: np.random.Generator, size: int = 200) -> NDArray[np.int64]:
    """Exchange genes with genes of about the same norm."""
    order, place = np.argsort(norm), np.arange(norm.size)
    for start in range(0, norm.size, size):
        place[order[start : start + size]] = rng.permutation(order[start : start + size])
    return place


def of_corpus(corpus: Array, regulators: NDArray, targets: NDArray) -> Iterator[tuple[str, Array]]:
    """Give what the model's training starts from: the truncated SVD of its corpus."""
    dot = corpus[regulators] @ corpus[targets].T
    yield "SVD of the model's corpus (128): dot product", dot
    yield "SVD of the model's corpus (128): cosine", unit(corpus[regulators]) @ unit(corpus[targets]).T
    yield "SVD of the model's corpus (128): dot product, z by regulator, repressions half", half(by_row(dot))


def corpus_loadings(folder: str, model: ScDiVa) -> Array:
    config = apply_overrides(load_config(CONFIG, RunConfig), [f"data.root={folder}"])
    corpus = open_corpus_of(config, model.vocabulary)
    return corpus_components([corpus.read(np.arange(len(corpus)))], 128, 0)[0].astype(np.float64)


def variants(
    data: NetworkCells, model: ScDiVa, corpus: Array, regulators: NDArray, targets: NDArray
) -> Iterator[tuple[str, Array]]:
    """Give the name and the scores of each variant."""
    values = baselines.log_values(data.cells, regulators, targets)
    rho = baselines.spearman(data.cells, data.symbols, regulators, targets)
    signed = np.nan_to_num(rho.score * rho.sign).astype(np.float64)
    size = np.abs(signed)
    centred = [each - each.mean(axis=0, dtype=np.float64) for each in values]
    covariance = centred[0].T @ centred[1] / data.cells.n_cells
    spread = [each.std(axis=0) for each in centred]
    yield "Spearman, absolute (co-expression)", size
    yield "Spearman, signed", signed
    yield "Spearman, absolute, CLR (z by regulator + z by target)", by_row(size) + by_column(size)
    yield "Spearman, signed, CLR", by_row(signed) + by_column(signed)
    yield "Pearson, absolute", np.abs(covariance) / spread[0][:, None] / spread[1]
    yield "covariance, absolute", np.abs(covariance)
    yield "standard deviations alone", spread[0][:, None] * spread[1]
    _, weight, loadings = randomized_svd(normalised_matrix(data.cells), 50, random_state=0)
    for name, own in (("", loadings.T), (", times root of singular value", loadings.T * np.sqrt(weight))):
        yield f"SVD of these cells (50): dot product{name}", own[regulators] @ own[targets].T
    yield "SVD of these cells (50): cosine", unit(loadings.T[regulators]) @ unit(loadings.T[targets]).T

    yield from of_corpus(corpus, regulators, targets)

    anchor = model.native("gene networks").anchor
    genes = anchor.gene_embedding.detach().double().cpu().numpy()
    one, other = genes[regulators], genes[targets]
    norm = np.linalg.norm(other, axis=1)
    cosine, dot = unit(one) @ unit(other).T, one @ other.T
    yield "gene embeddings: norms alone", np.linalg.norm(one, axis=1)[:, None] * norm
    yield "gene embeddings: cosine", cosine
    yield "gene embeddings: absolute cosine", np.abs(cosine)
    middle = genes[np.union1d(regulators, targets)].mean(axis=0)
    yield "gene embeddings: cosine, mean taken off", unit(one - middle) @ unit(other - middle).T
    yield "gene embeddings: cosine, CLR", by_row(cosine) + by_column(cosine)
    yield "gene embeddings: cosine × root of norms", cosine * np.sqrt(np.linalg.norm(one, axis=1)[:, None] * norm)
    yield "gene embeddings: dot product", dot
    yield "gene embeddings: dot product, z by regulator", by_row(dot)
    yield "gene embeddings: dot product, z by target", by_column(dot)
    yield "rank average: absolute Spearman, cosine of embeddings", ranks(size) + ranks(cosine)
    yield "rank average: absolute Spearman, dot product", ranks(size) + ranks(dot)

    z = model.latent(data.cells)
    direction = _directions(anchor, z)
    turned = np.cov(direction.T, bias=True)
    power, axes = np.linalg.eigh(turned)
    for exponent in (1.0, 0.5, 0.25):
        root = axes * np.maximum(power, 1e-12) ** (exponent / 2)
        name = f"decoded profiles: correlation over cells, covariance to the power {exponent:g}"
        yield name, unit(one @ root) @ unit(other @ root).T
    yield "decoded profiles: covariance over cells", one @ turned @ other.T

    jacobian = mean_jacobian(model, data.cells)
    response = one @ jacobian.T @ other.T
    back = (other @ jacobian.T @ one.T).T
    yield "response of the target (Jacobian)", response
    yield "response of the target, absolute", np.abs(response)
    yield "response of the regulator to the target", back
    yield "sum of both", response + back
    yield "response, cosine", unit(one @ jacobian.T) @ unit(other).T
    yield "response, z by regulator", by_row(response)
    yield "response, z by regulator, absolute", np.abs(by_row(response))
    yield "**response, z by regulator, repressions half (the method)**", half(by_row(response))
    yield "response, CLR", by_row(response) + by_column(response)
    yield "response z + Spearman z", by_row(response) + by_row(signed)
    yield (
        "size of the target's responses alone",
        np.broadcast_to(np.square(half(by_row(response))).mean(axis=0), size.shape),
    )
    place = like_norm(norm, np.random.default_rng(0))
    yield "null: the method, targets exchanged for genes of like norm", half(by_row(one @ jacobian.T @ other[place].T))
    shuffled = mean_jacobian(model, baselines.permuted(data.cells, seed=0))
    yield "the method on shuffled cells", half(by_row(one @ shuffled.T @ other.T))


def _directions(anchor: object, z: NDArray[np.float32]) -> Array:
    import torch

    with torch.no_grad():
        return anchor.direction(torch.from_numpy(z)).double().numpy()


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    model = ScDiVa.from_pretrained("scdiva-blood-tiny", device="cpu")
    truths = [read_truth(folder / file, model.vocabulary, name=name) for name, file in TRUTHS.items()]
    lines, sign_lines = [], []
    corpus = corpus_loadings(sys.argv[3], model)
    for argument in sys.argv[4:]:
        name, files = argument.split("=", 1)
        data = NetworkCells.open(files.split(","), model, name=name)
        candidates = [Candidates.of(truth, data) for truth in truths]
        regulators = np.unique(np.concatenate([each.regulators for each in candidates]))
        rows = [np.searchsorted(regulators, each.regulators) for each in candidates]
        draws = [drawn(each.regulators.size) for each in candidates]
        reference: list[metrics.NetworkScores] = []
        lines += [f"| {name} | {' | '.join(TRUTHS)} |", "|---|" + "---:|" * len(TRUTHS)]
        for title, score in variants(data, model, corpus, regulators, data.expressed):
            found = [
                metrics.network_scores(score[row], each.is_edge, each.is_candidate, drawn_)
                for row, each, drawn_ in zip(rows, candidates, draws, strict=True)
            ]
            reference = reference or found
            cells = [_cell(*each) for each in zip(found, reference, draws, strict=True)]
            lines.append(f"| {title} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
            if title == "Spearman, absolute (co-expression)":
                other = baselines.spearman(data.cells, data.symbols, regulators, data.expressed).sign
            if title == "response, z by regulator":
                sign_lines += _sign_lines(name, score, other, candidates, rows, draws)
        lines.append("")
    head = [
        "# Gene networks: what was tried",
        "",
        "Each cell: AUPRC ratio / pooled AUPRC ratio / degree-matched AUROC; means over regulators but for the pooled "
        "one. An up or down arrow: above or below absolute Spearman by the 95 % interval of the paired difference over "
        "regulators. Method and threshold were chosen on the first set; the others confirm. Made by "
        "`benchmarks/grn_variants.py`.",
        "",
        "Unlike in `scdiva evaluate grn`, a gene's response to itself is among those that a regulator's "
        "responses are standardised by: spreads are a little larger, so that fewer edges reach a threshold "
        "for signs, and figures differ a little from those in [results](grn.md#signs), with the same cells "
        'and candidates. "Size of the target\'s responses alone" holds it, too, and so says which genes are '
        "regulators; without it: [popularity alone](grn.md#popularity-alone).",
        "",
    ]
    signs = [
        "## When to tell a sign",
        "",
        "Signs of known edges by the response's z, told from a threshold on; balanced accuracy, that of Spearman's "
        "sign on the same edges, and the difference with its interval.",
        "",
        "| set | truth | threshold | edges (repressions) | response | Spearman | difference |",
        "|---|---|---:|---:|---:|---:|---:|",
        *sign_lines,
    ]
    out.write_text("\n".join([*head, *lines, *signs]) + "\n", encoding="utf-8")


def _cell(found: metrics.NetworkScores, other: metrics.NetworkScores, draws: NDArray) -> str:
    pooled = metrics.drawn_interval(0.0, found.auprc_ratio_draws - other.auprc_ratio_draws)
    parts = [
        f"{found.ratio_of_regulator.mean():.2f}"
        + _arrow(metrics.mean_interval(found.ratio_of_regulator - other.ratio_of_regulator, draws)),
        f"{found.auprc / found.chance:.2f}" + _arrow(pooled),
        f"{np.nanmean(found.matched_of_regulator):.3f}"
        + _arrow(metrics.mean_interval(found.matched_of_regulator - other.matched_of_regulator, draws)),
    ]
    return " / ".join(parts)


def _arrow(gap: metrics.Interval) -> str:
    return "↑" if gap.low > 0 else "↓" if gap.high < 0 else ""


def _sign_lines(name, score, other, candidates, rows, draws) -> list[str]:
    lines = []
    for each, row, drawn_ in zip(candidates, rows, draws, strict=True):
        has_sign = (each.sign != 0) & each.is_candidate
        if not has_sign.any():
            continue
        regulator, truth = np.nonzero(has_sign)[0], each.sign[has_sign].astype(int)
        z, spearman = score[row][has_sign], other[row][has_sign].astype(int)
        for threshold in THRESHOLDS:
            told = np.where(np.abs(z) >= threshold, np.sign(z), 0).astype(int)
            ours = metrics.sign_scores(truth, told, regulator, drawn_)
            theirs = metrics.sign_scores(truth, np.where(told != 0, spearman, 0), regulator, drawn_)
            gap = metrics.sign_difference(truth, told, spearman, regulator, drawn_)
            b = ours.balanced_accuracy
            lines.append(
                f"| {name} | {each.truth} | {threshold:g} | {ours.n_edges:,} ({ours.n_edges - ours.n_activations:,}) | "
                f"{b.value:.3f} ({b.low:.3f} to {b.high:.3f}) | {theirs.balanced_accuracy.value:.3f} | "
                f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f}) |"
            )
    return lines


if __name__ == "__main__":
    main()
