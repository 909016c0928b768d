"""The response beside a ranking that knows nothing of pairs: a table of docs/results/grn.md.

    python benchmarks/grn_popularity.py TRUTHS NAME=FILE[,FILE...] [NAME=FILE...]

The ranking is one for all regulators: the mean square of a target's responses over the regulators (of any truth).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from grn_variants import TRUTHS, half

from scdiva.data.known_network import read_truth
from scdiva.metrics import network as metrics
from scdiva.models.scdiva import ScDiVa
from scdiva.models.scdiva.response import responses
from scdiva.tasks.evaluate_grn import Candidates, NetworkCells
from scdiva.tasks.grn_report import drawn


def main() -> None:
    folder = Path(sys.argv[1])
    model = ScDiVa.from_pretrained("scdiva-blood-tiny", device="cpu")
    truths = [read_truth(folder / file, model.vocabulary, name=name) for name, file in TRUTHS.items()]
    print("| set | truth | response | size of the target's responses alone | response minus size |")
    print("|---|---|---:|---:|---:|")
    for argument in sys.argv[2:]:
        name, files = argument.split("=", 1)
        data = NetworkCells.open(files.split(","), model, name=name)
        candidates = [Candidates.of(truth, data) for truth in truths]
        regulators = np.unique(np.concatenate([each.regulators for each in candidates]))
        raw = responses(model, data.cells, regulators, data.expressed)
        raw[regulators[:, None] == data.expressed[None, :]] = np.nan  # a gene and itself
        score = half((raw - np.nanmean(raw, axis=1, keepdims=True)) / np.nanstd(raw, axis=1, keepdims=True))
        size = np.broadcast_to(np.nanmean(np.square(score), axis=0), score.shape)
        for each in candidates:
            row, draws = np.searchsorted(regulators, each.regulators), drawn(each.regulators.size)
            ours, alone = (
                metrics.network_scores(matrix[row], each.is_edge, each.is_candidate, draws) for matrix in (score, size)
            )
            gap = metrics.mean_interval(ours.ratio_of_regulator - alone.ratio_of_regulator, draws)
            cells = [
                f"{found.ratio_of_regulator.mean():.2f} / {found.auprc / found.chance:.2f} / "
                f"{np.nanmean(found.matched_of_regulator):.3f}"
                for found in (ours, alone)
            ]
            cells.append(f"{gap.value:+.2f} ({gap.low:+.2f} to {gap.high:+.2f})")
            print(f"| {name} | {each.truth} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
