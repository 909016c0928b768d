"""What was tried: variants of anchor, trunk and adaptation, trained and judged by one command.

    python benchmarks/variants.py pretrain --data FOLDER --config configs/blood-tiny-anchor.toml \
        --out docs/results/variants_pretrain.md
    python benchmarks/variants.py network --data FOLDER --threads 1 --out docs/results/variants_network.md
    python benchmarks/variants.py stages --data FOLDER --out docs/results/variants_stages.md
    python benchmarks/variants.py adapt --data FOLDER --model scdiva-blood-tiny --out docs/results/variants_adapt.md

Judged by held-out NLLs (what training minimises) and by 15-nn accuracy / macro-F1 on sets that training never saw
(means over three seeds of the folds). One training seed per variant; the base of ``pretrain`` has two, to show how far
seeds alone spread. ``network`` gives every variant the same minutes on the same cells, and judges all of them on the
same masks of the same held-out batches.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from embedding import scored_cells

from scdiva.config import RunConfig, apply_overrides, load_config
from scdiva.data.reader import open_counts
from scdiva.metrics import kmeans_nmi, knn_scores
from scdiva.models.scdiva import ScDiVa
from scdiva.tasks.embed import embed
from scdiva.tasks.pretrain import ADAPTATION_OBJECTIVE, adapt, adaptation_config, pretrain

SETS = ("zheng_sorted7_3500", "pbmc3k", "breast_immune_spectra_1k", "pancreas_baron_h1")

# the configuration that all variants start from, so that each row differs in what it says and nothing else
COMMON = ["training.max_steps=400", "training.patience=0", "training.validate_every=100"]
PRETRAIN = {
    "no training: SVD start": ["training.max_steps=1", "optim.lr=1e-9"],
    "base": [],
    "base, seed 1": ["seed=1"],
    "random gene embeddings instead of SVD": ["model.init=random", "model.embedding_std=0.09"],
    "64 dimensions": ["model.n_latent=64", "model.n_embedding=64"],
    "256 dimensions": ["model.n_latent=256", "model.n_embedding=256"],
    "KL weight 5e-5": ["objective.kl_weight=5e-5"],
    "KL weight 5e-4 (the ELBO of a cell of 2,000 UMIs)": ["objective.kl_weight=5e-4"],
    "noise 0.5 on z": ["objective.latent_noise=0.5"],
}
# ten minutes each; a constant learning rate, because a clock does not know where a cosine should end
NETWORK_COMMON = [
    'start_from=""',
    "training.max_steps=1000000",
    "training.max_minutes=10",
    "training.validate_every=1000000",
    "training.checkpoint_every=1000000",
    "training.n_validation_cells=256",
    "optim.schedule=constant",
    "optim.warmup_steps=50",
    "optim.ema_decay=0.99",
    "objective.freeze_anchor=false",
]
NETWORK = {
    "native: set layout, SVD start": [],
    "without a trunk (the simple model)": ["model.trunk.n_layers=0"],
    "random gene embeddings instead of SVD": ["model.init=random", "model.embedding_std=0.09"],
    "sequence layout with RoPE": ["model.trunk.layout=sequence"],
    "official of the same size (LAT reads the answer)": [
        'model={architecture="official", n_layers=4, width=192, n_heads=3, n_hidden=512, max_tokens=256}',
    ],
}
TIMES = (0.1, 0.5, 0.9)
ADAPT: dict[str, tuple[dict[str, float], list[str]]] = {
    "base: learning rate 1e-3": ({}, []),
    "learning rate 3e-4": ({}, ["optim.lr=3e-4"]),
    "learning rate 2e-3": ({}, ["optim.lr=2e-3"]),
    "KL weight 5e-4": ({"kl_weight": 5e-4}, []),
    "noise 0.5 on z": ({"latent_noise": 0.5}, []),
}


def judge(model: ScDiVa, data: Path, names: tuple[str, ...]) -> list[str]:
    cells = []
    for name in names:
        is_scored, labels = scored_cells(data / f"{name}.h5ad")
        z = embed(open_counts(data / f"{name}.h5ad", model.vocabulary), model).z[is_scored]
        folds = [knn_scores(z, labels, seed=seed) for seed in range(3)]
        nmi = kmeans_nmi(z, labels, seeds=list(range(5))).mean()
        accuracy, f1 = np.mean([f.accuracy for f in folds]), np.mean([f.macro_f1 for f in folds])
        cells.append(f"{accuracy:.3f} / {f1:.3f} / {nmi:.2f}")
    return cells


def run_pretrain(arguments: argparse.Namespace) -> list[str]:
    base = apply_overrides(
        load_config(arguments.config, RunConfig), [f"data.root={json.dumps(str(arguments.data))}", *COMMON]
    )
    rows = [header("variant", SETS)]
    for name, overrides in PRETRAIN.items():
        trained = pretrain(apply_overrides(base, overrides), arguments.runs / slug(name), progress=False)
        nll, floor = trained.metrics["heldout_profile_nll"], trained.metrics["heldout_profile_nll_floor"]
        cells = [
            name,
            f"{nll:.4f}",
            f"{floor:.4f}",
            str(trained.fit.best_step),
            *judge(trained.model, arguments.data, SETS),
        ]
        rows.append(f"| {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    return rows


def without_conditions(config: RunConfig) -> RunConfig:
    files = tuple(file.model_copy(update={"conditions": {}}) for file in config.data.files)
    return config.model_copy(update={"data": config.data.model_copy(update={"conditions": (), "files": files})})


def run_stages(arguments: argparse.Namespace) -> list[str]:
    """The bundled model's recipe with its trunk, without it, and with a trainable anchor, all from one first stage."""
    overrides = [f"data.root={json.dumps(str(arguments.data))}", f"start_from={json.dumps(arguments.anchor)}"]
    base = apply_overrides(load_config(arguments.config, RunConfig), overrides)
    variants = {
        "without a trunk (the simple model)": apply_overrides(without_conditions(base), ["model.trunk.n_layers=0"]),
        "with the trunk (the bundled model)": base,
        "with the trunk, anchor trained along": apply_overrides(
            base, ["objective.freeze_anchor=false", "training.max_steps=1400"]
        ),
    }
    terms = ("identity_nll", "value_nll", "value_mae")
    titles = ["model", *(f"{term} at t = 0.1 / 0.5 / 0.9" for term in terms), "profile NLL"]
    titles += [f"{name}: accuracy / macro-F1 / NMI" for name in SETS]
    rows = [f"| {' | '.join(titles)} |\n|---|{'---:|' * (len(titles) - 1)}"]

    def cells(found: Mapping[str, float], end: str) -> list[str]:
        at_times = [" / ".join(f"{found[f'heldout_{term}_t{t}{end}']:.4f}" for t in TIMES) for term in terms]
        return [*at_times, f"{found[f'heldout_profile_nll{end}']:.4f}"]

    for name in arguments.variants or variants:
        trained = pretrain(variants[name], arguments.runs / slug(name), progress=False)
        if len(rows) == 1:
            rows.append(f"| floors | {' | '.join(cells(trained.metrics, '_floor'))} |{' |' * len(SETS)}")
        rows.append(
            f"| {' | '.join([name, *cells(trained.metrics, ''), *judge(trained.model, arguments.data, SETS)])} |"
        )
        print(rows[-1], flush=True)
    return rows


def run_network(arguments: argparse.Namespace) -> list[str]:
    base = apply_overrides(
        load_config(arguments.config, RunConfig),
        [f"data.root={json.dumps(str(arguments.data))}", *NETWORK_COMMON, f"training.max_minutes={arguments.minutes}"],
    )
    base = without_conditions(base)  # some variants take none: none gets any
    titles = ["variant", "cell passes", "NELBO per token at t = 0.1 / 0.5 / 0.9", "floor: detection frequencies"]
    titles += ["value NLL at 0.1 / 0.5 / 0.9", "profile NLL", *(f"{n}: accuracy / macro-F1 / NMI" for n in SETS)]
    rows = [f"| {' | '.join(titles)} |\n|---|{'---:|' * (len(titles) - 1)}"]
    for name in arguments.variants or NETWORK:
        config = apply_overrides(base, NETWORK[name])
        trained = pretrain(config, arguments.runs / slug(name), progress=False)
        found = trained.metrics

        def at_times(term: str, end: str = "", found: Mapping[str, float] = found) -> str:
            values = [found.get(f"heldout_{term}_t{t}{end}") for t in TIMES]
            return "" if None in values else " / ".join(f"{value:.3f}" for value in values)

        cells = [name, f"{trained.fit.n_cells:,}", at_times("identity_nll")]
        cells += [at_times("identity_nll", "_floor") or at_times("identity_nll_floor"), at_times("value_nll")]
        cells.append(f"{found['heldout_profile_nll']:.3f}" if "heldout_profile_nll" in found else "")
        rows.append(f"| {' | '.join([*cells, *judge(trained.model, arguments.data, SETS)])} |")
        if visible := at_times("identity_nll_visible"):
            rows.append(f"| the same, LAT from visible tokens only | | {visible} |{' |' * (len(titles) - 3)}")
        print("\n".join(rows[-2:]), json.dumps(found), flush=True)
    return rows


def run_adapt(arguments: argparse.Namespace) -> list[str]:
    base = ScDiVa.from_pretrained(arguments.model, device="cpu")
    rows = []
    for name in arguments.sets:
        path = arguments.data / f"{name}.h5ad"
        rows += ["", f"{name}:", "", header("variant", (name,))]
        rows.append(f"| not adapted | | | | {judge(base, arguments.data, (name,))[0]} |")
        for variant, (objective, overrides) in ADAPT.items():
            config = apply_overrides(adaptation_config(len(scored_cells(path)[0])), overrides)
            out = arguments.runs / f"{name}_{slug(variant)}"
            shutil.rmtree(out, ignore_errors=True)
            settings = ADAPTATION_OBJECTIVE.model_copy(update=objective)
            trained = adapt(path, base, out, config=config, objective=settings, progress=False)
            nll, floor = trained.metrics["heldout_profile_nll"], trained.metrics["heldout_profile_nll_floor"]
            cells = [variant, f"{nll:.4f}", f"{floor:.4f}", str(trained.fit.best_step)]
            rows.append(f"| {' | '.join([*cells, *judge(trained.model, arguments.data, (name,))])} |")
            print(name, rows[-1], flush=True)
    return rows


def header(first: str, names: tuple[str, ...]) -> str:
    titles = [first, "held-out NLL", "floor", "best step", *(f"{n}: accuracy / macro-F1 / NMI" for n in names)]
    return f"| {' | '.join(titles)} |\n|---|{'---:|' * (len(titles) - 1)}"


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)[:40]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pretrain", "network", "stages", "adapt"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path("configs/blood-tiny.toml"))
    parser.add_argument("--model", default="scdiva-blood-tiny")
    parser.add_argument("--runs", type=Path, default=Path("runs/variants"))
    parser.add_argument(
        "--sets", nargs="*", default=["breast_immune_spectra_1k"], help="for adapt: the sets to adapt to"
    )
    parser.add_argument("--variants", nargs="*", help="for network and stages: which of them")
    parser.add_argument("--anchor", default="runs/blood-tiny-anchor/bundle", help="for stages: the first stage")
    parser.add_argument("--minutes", type=float, default=10.0, help="for network: of training, for each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs = {"pretrain": run_pretrain, "network": run_network, "stages": run_stages, "adapt": run_adapt}
    rows = runs[arguments.what](arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
