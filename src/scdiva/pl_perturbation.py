"""The picture of a predicted effect; shown as ``sd.pl.perturbation``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from scdiva.errors import ConfigError, KeyNotFoundError
from scdiva.pl_network import _figure, _save

if TYPE_CHECKING:
    from anndata import AnnData

_UP, _DOWN = "#c1392b", "#2166ac"


def perturbation(
    effects: AnnData, path: str | Path, *, name: str | None = None, n_genes: int = 25, title: str | None = None
) -> None:
    """Draw the most changed genes of a predicted effect as bars, with the expected error of each.

    Parameters
    ----------
    effects
        From ``sd.tl.perturb``.
    path
        PNG to write.
    name
        Row of ``effects`` (``.obs_names``: "STAT1", or "STAT1 | CD14 Mono"); may be left out where there is one.
    n_genes
        The most changed so many; targets are left out.
    title
        Title of the picture.

    Raises
    ------
    KeyNotFoundError
        There is no such row.
    ConfigError
        There are several rows and none is named, or ``effects`` are not from ``sd.tl.perturb``.
    """
    import numpy as np

    if "expected_error" not in effects.layers or "symbol" not in effects.var:
        raise ConfigError("an AnnData without expected errors", expected="what sd.tl.perturb returns", fix="use that")
    rows = effects.obs_names.tolist()
    if name is None and len(rows) > 1:
        raise ConfigError(f"{len(rows)} effects", expected="the name of one", fix=f"for example name={rows[0]!r}")
    if name is not None and name not in rows:
        raise KeyNotFoundError(f"no effect {name!r}", expected=f"one of {', '.join(rows[:20])}", fix="correct the name")
    row = 0 if name is None else rows.index(name)
    symbol = effects.var["symbol"].astype(str).to_numpy()
    change = np.nan_to_num(np.asarray(effects.X)[row])
    error = np.nan_to_num(np.asarray(effects.layers["expected_error"])[row])
    targets = str(effects.obs["perturbation"].iloc[row]).split("@")[0].split("+")
    order = np.argsort(-np.abs(np.where(np.isin(symbol, targets), 0.0, change)), kind="stable")[:n_genes]
    order = order[np.argsort(-change[order], kind="stable")]
    figure, axes = _figure(5.4, 1.3 + 0.21 * len(order))
    axes.barh(
        range(len(order)),
        change[order],
        xerr=error[order],
        color=np.where(change[order] > 0, _UP, _DOWN),
        height=0.75,
        error_kw={"elinewidth": 0.8, "ecolor": "0.35"},
    )
    axes.set_yticks(range(len(order)), symbol[order], fontsize=8)
    axes.set(ylim=(len(order) - 0.4, -0.6), xlabel="change of mean log1p(CP10K); lines: expected error")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    said = {
        "seen": "measured in training", "context": "new context", "single": "never perturbed in training",
        "combination": "new combination",
    }  # fmt: skip
    question = said.get(str(effects.obs["question"].iloc[row]), "")
    axes.set_title(title or f"{rows[row]} ({question})", fontsize=11)
    _save(figure, path)
