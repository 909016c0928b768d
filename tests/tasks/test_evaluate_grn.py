"""``evaluate grn``: candidates, rows that are used again, differences, controls, the command."""

import json

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scdiva.data.known_network import read_truth
from scdiva.data.network import GeneNetwork
from scdiva.errors import ConfigError, ScdivaError
from scdiva.genes import GeneVocabulary
from scdiva.tasks import evaluate_grn as task
from scdiva.tasks.grn_report import DEGREE, NULL, GrnReport, Run
from scdiva.types import CellCounts

N_CELLS, N_REGULATORS, N_TARGETS = 300, 5, 60
VOCABULARY = GeneVocabulary.default().subset(np.arange(N_REGULATORS + N_TARGETS))
SYMBOLS = np.asarray(VOCABULARY.symbol, dtype=np.str_)


@pytest.fixture(scope="module")
def cells() -> CellCounts:
    rng = np.random.default_rng(0)
    activity = rng.normal(size=(N_CELLS, N_REGULATORS))
    rate = np.full((N_CELLS, SYMBOLS.size), 3.0)
    rate[:, :N_REGULATORS] *= np.exp(activity)
    rate[:, N_REGULATORS:40] *= np.exp(activity[:, np.arange(40 - N_REGULATORS) % N_REGULATORS])
    rate[:, -1] = 0.001
    counts = sp.csr_matrix(rng.poisson(rate).astype(np.int32))
    counts.sort_indices()
    return CellCounts(
        counts=counts,
        library_size=np.asarray(counts.sum(axis=1), dtype=float).ravel(),
        cell_index=np.arange(N_CELLS),
        source_of_cell=np.zeros(N_CELLS, dtype=np.int32),
        is_measured=np.ones((1, SYMBOLS.size), dtype=bool),
    )


def edges(n_per_regulator: int = 7) -> pd.DataFrame:
    rows = [
        (SYMBOLS[i], SYMBOLS[N_REGULATORS + i + N_REGULATORS * j], 1 if j % 2 else -1)
        for i in range(N_REGULATORS)
        for j in range(n_per_regulator)
    ]
    rows += [(SYMBOLS[0], SYMBOLS[0], 1), (SYMBOLS[0], SYMBOLS[-1], 1), (SYMBOLS[7], SYMBOLS[8], 1)]
    return pd.DataFrame(rows, columns=["source", "target", "sign"])


@pytest.fixture(scope="module")
def data(cells) -> task.NetworkCells:
    return task.NetworkCells.of(cells, SYMBOLS, name="planted")


@pytest.fixture(scope="module")
def truth():
    return read_truth(edges(), VOCABULARY, name="known")


def test_candidates_are_regulators_with_enough_targets_times_expressed_genes(data, truth):
    found = task.Candidates.of(truth, data, min_targets=3)
    assert data.symbols[found.regulators].tolist() == SYMBOLS[:N_REGULATORS].tolist()
    # the last gene is not expressed; a gene with itself is no candidate
    assert found.targets.size == SYMBOLS.size - 1
    assert found.is_edge.sum() == N_REGULATORS * 7
    assert not found.is_candidate[0, 0]
    assert (found.sign[found.is_edge] != 0).all()
    with pytest.raises(ConfigError, match="no regulator"):
        task.Candidates.of(truth, data, min_targets=30)


def test_methods_are_judged_beside_co_expression(data, truth):
    report = task.evaluate_grn(data, [truth], methods=["expression", NULL], seeds=(0, 1), min_targets=3)
    (key,) = report.tasks
    assert report.methods(key) == ("spearman", "expression", NULL)
    assert len(report.of(key, "spearman")) == 1
    assert len(report.of(key, NULL)) == 2
    assert report.of(key, "spearman")[0].n_edges == N_REGULATORS * 7
    best, null, expression = (report.compare(key, name) for name in ("spearman", NULL, "expression"))
    assert best.auprc_ratio.value > 3
    assert best.above_genes.low > 1
    assert best.matched.low > 0.8
    assert null.matched_difference.high < -0.2
    assert best.auprc_difference is None
    assert null.auprc_difference.high < 0
    assert null.auprc_ratio.value < 2
    assert expression.signs is None
    # all planted effects are activations, and the table says that half are
    assert best.signs.balanced_accuracy.value == pytest.approx(0.5, abs=0.1)
    assert best.signs.n_edges == N_REGULATORS * 7
    text = report.to_markdown()
    assert "on shuffled cells (null)" in text
    assert "5 regulators × 64 targets, 35 known edges" in text
    json.dumps(report.to_dict(), allow_nan=False)


def test_rows_are_used_again_and_give_the_same_report(data, truth, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    first = task.evaluate_grn(data, [truth], methods=["random"], seeds=(0, 1), min_targets=3, rows_path=rows)
    n_lines = len(rows.read_text().splitlines())
    assert n_lines == (1 + 2) * 2
    monkeypatch.setattr(task, "_run", None)
    again = task.evaluate_grn(data, [truth], methods=["random"], seeds=(0, 1), min_targets=3, rows_path=rows)
    assert again.to_markdown() == first.to_markdown()
    assert len(rows.read_text().splitlines()) == n_lines
    monkeypatch.undo()
    # other candidates: measured anew
    task.evaluate_grn(data, [truth], methods=["random"], seeds=(0,), min_targets=3, n_sampled=9, rows_path=rows)
    assert len(rows.read_text().splitlines()) == n_lines
    fewer = read_truth(edges(5), VOCABULARY, name="known")
    task.evaluate_grn(data, [fewer], methods=["random"], seeds=(0,), min_targets=3, rows_path=rows)
    assert len(rows.read_text().splitlines()) == n_lines + 4


def test_regressions_are_compared_on_a_sample_of_targets(data, truth, monkeypatch):
    monkeypatch.setattr("scdiva.baselines.network.N_TREES", 10)
    report = task.evaluate_grn(data, [truth], methods=["extra_trees"], seeds=(0,), min_targets=3, n_sampled=30)
    everything, sample = report.tasks
    assert (everything[2], sample[2]) == (False, True)
    assert report.methods(everything) == ("spearman",)
    assert report.methods(sample) == ("spearman", "extra_trees")
    assert report.of(sample, "spearman")[0].n_targets == 30
    assert report.compare(sample, "extra_trees").auprc_difference is not None


def test_further_methods_lack_what_they_do_not_know(data, truth):
    seen = []

    def known_pairs(cells, symbols, regulators, targets, *, seed):
        seen.append(cells)
        score = np.full((len(regulators), 10), 1.0, dtype=np.float32)
        sign = np.ones(score.shape, dtype=np.int8)
        return GeneNetwork("mine", symbols[regulators], symbols[targets[:10]], score, sign, True, "", cells.n_cells)

    report = task.evaluate_grn(
        data, [truth], methods=["mine", "mine_shuffled"], networks={"mine": known_pairs}, titles={"mine": "our method"},
        seeds=(0,), min_targets=3,
    )  # fmt: skip
    (key,) = report.tasks
    assert report.title("mine_shuffled") == "our method, on shuffled cells (null)"
    n_self = N_REGULATORS
    assert report.of(key, "mine")[0].n_nan == N_REGULATORS * 64 - (N_REGULATORS * 10 - n_self) - n_self
    signs = report.compare(key, "mine").signs
    assert signs.n_undecided > 0
    assert signs.n_edges + signs.n_undecided == 35
    assert (seen[0].counts != seen[1].counts).nnz > 0


def test_nulls_that_do_better_are_refused(data, truth):
    report = task.evaluate_grn(data, [truth], methods=[NULL], seeds=(0,), min_targets=3)
    names = {"spearman": NULL, NULL: "spearman"}
    swapped = []
    for run in report.runs:
        fields = run.to_dict()
        fields["method"] = names[run.method]
        swapped.append(Run.from_dict(fields))
    with pytest.raises(ScdivaError, match="out of order"):
        task.check_controls(GrnReport(tuple(swapped)))


def test_rows_survive_the_disk(data, truth):
    run = task.evaluate_grn(data, [truth], methods=["spearman"], min_targets=3).runs[0]
    again = Run.from_dict(json.loads(json.dumps(run.to_dict())))
    assert again.to_dict() == run.to_dict()
    assert (again.sign_truth == run.sign_truth).all()
    assert run.part == ""
    assert DEGREE == "genes alone"


@pytest.mark.parametrize("methods", [["spear"], [], ["spear_shuffled"]])
def test_unknown_methods_are_refused(data, truth, methods):
    with pytest.raises(ConfigError, match="method"):
        task.evaluate_grn(data, [truth], methods=methods)


def test_truths_of_one_name_are_refused(data, truth):
    with pytest.raises(ConfigError, match="2 truths"):
        task.evaluate_grn(data, [truth, truth], methods=["spearman"])


def test_the_command_writes_what_the_function_finds(cli, h5ad, bundle, tiny_model, adata, tmp_path):
    genes = np.asarray(tiny_model.vocabulary.symbol, dtype=np.str_)
    rng = np.random.default_rng(0)
    known = pd.DataFrame({"source": rng.choice(genes[20:26], 150), "target": rng.choice(genes[:150], 150)})
    known["sign"] = rng.choice([-1, 1], 150)
    known.to_csv(tmp_path / "known.tsv", sep="\t", index=False)
    arguments = [
        "evaluate",
        "grn",
        h5ad,
        "--truth",
        tmp_path / "known.tsv",
        "--model",
        bundle,
        "--methods",
        "expression",
    ]
    done = cli(*arguments, "--out", tmp_path / "out", "--min-targets", 3, "--device", "cpu")
    assert done.code == 0, done.err
    data = task.NetworkCells.open(adata, tiny_model, name="cells")
    truth = read_truth(tmp_path / "known.tsv", tiny_model.vocabulary)
    report = task.evaluate_grn(data, [truth], methods=["expression"], min_targets=3)
    assert (tmp_path / "out" / "report.md").read_text() == report.to_markdown()
    assert cli(*arguments, "--out", tmp_path / "known.tsv").code == 2
    assert cli(*arguments, "--truth", tmp_path / "no.tsv", "--out", tmp_path / "o2").code == 2
    assert not (tmp_path / "o2").exists()
