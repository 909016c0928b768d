"""Splits of perturbed cells: what is trained on, what is predicted, and the control cells of either side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from scdiva.data.output import replacing
from scdiva.data.perturbation_sets import MIN_CELLS, scored_conditions
from scdiva.data.perturbations import PerturbedCells
from scdiva.errors import ConfigError, SourceError

Scheme: TypeAlias = Literal["unseen_single", "combination", "unseen_context", "seen"]
"""What is new in a test condition: its gene, the combination of its genes, its context, or its cells only."""

_FORMAT = "scdiva-perturbation-split-1"
_N_TRIES = 1000
_ENOUGH = 3  # combinations of each group that one draw of genes should give (our decision)


@dataclass(frozen=True, slots=True, eq=False)
class PerturbationSplit:
    """A split of perturbed cells; made by :func:`split_perturbations`. All rows are sorted.

    Parameters
    ----------
    scheme
        What is new in the test conditions.
    train
        Rows that may be trained on, those of ``control`` among them.
    test
        Rows of the test conditions; none of them is in ``train``.
    control
        Control cells that a model may see, in training and as what it predicts from.
    heldout_control
        Control cells that true effects are measured against; in neither ``train`` nor ``test``.
    conditions
        Test conditions: positions in ``data.perturbations`` and ``data.contexts``.
    groups
        Of each condition: "unseen single"; "seen 0 of 2" to "seen 2 of 2", the number of its targets that are
        perturbed in training; "unseen context", or "unseen context and perturbation" where no context shows the
        perturbation; "seen".
    manifest
        What defines the split and recognises its data, for JSON.
    """

    scheme: Scheme
    train: NDArray[np.int64]
    test: NDArray[np.int64]
    control: NDArray[np.int64]
    heldout_control: NDArray[np.int64]
    conditions: tuple[tuple[int, int], ...]
    groups: tuple[str, ...]
    manifest: Mapping[str, Any]

    def rows_of(self, data: PerturbedCells, condition: tuple[int, int]) -> NDArray[np.int64]:
        """Return the test cells of a condition: rows of the data that was split."""
        perturbation, context = condition
        is_of = (data.perturbation_code[self.test] == perturbation) & (data.context_code[self.test] == context)
        return self.test[is_of]

    def write_json(self, path: str | Path) -> None:
        """Write the manifest; an existing file is replaced."""
        with replacing(Path(path)) as partial:
            partial.write_text(json.dumps(self.manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read_json(cls, path: str | Path, data: PerturbedCells) -> PerturbationSplit:
        """Read a split of the same cells, in whatever order they are.

        Raises
        ------
        SourceError
            The file cannot be read or is no manifest; or it was written for other cells, or other names of
            perturbations, contexts or batches; or it does not give the cells that it was written with.
        """
        try:
            manifest = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SourceError(
                f"{path} cannot be read ({error})", expected="the manifest of a split", fix="write it with write_json"
            ) from error
        if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
            raise SourceError(
                f"{path} is no manifest of a split of perturbed cells",
                expected=f"format {_FORMAT!r}",
                fix="write it with write_json",
            )
        digests = _digests(data)
        if manifest.get("fingerprint") != _fingerprint(digests):
            raise SourceError(
                f"{path} was written for other cells ({manifest.get('n_cells')} cells; these are {data.n_cells})",
                expected="the very cells, genes, labels, contexts and batches that were split",
                fix="load the file with the same keys and vocabulary, or split it anew",
            )
        try:
            split = _applied(data, digests, manifest)
        except (KeyError, TypeError, ValueError) as error:
            raise SourceError(
                f"{path} is damaged ({type(error).__name__}: {error})",
                expected="the manifest as it was written",
                fix="split the data anew",
            ) from error
        if split.manifest["cells"] != manifest["cells"]:
            raise SourceError(
                f"{path} does not give the cells that it was written with",
                expected="a manifest of this version of scdiva, as it was written",
                fix="split the data anew",
            )
        return split


def split_perturbations(
    data: PerturbedCells,
    scheme: Scheme,
    *,
    seed: int = 0,
    fold: int | str = 0,
    n_folds: int | None = 5,
    fraction: float = 0.25,
    control_fraction: float = 0.5,
    min_cells: int = MIN_CELLS,
) -> PerturbationSplit:
    """Split perturbed cells for training and for a test of predictions.

    ``"unseen_single"``: a fold of the genes (or treatments) that are perturbed alone is not trained on, at any dose,
    nor are combinations with them.
    ``"combination"`` (as in GEARS, Roohani et al. 2023, doi:10.1038/s41587-023-01905-6): a share of these genes is not
    trained on, alone or in combinations; neither is a share of the combinations of genes that are all seen alone. The
    test conditions are of the groups "unseen single", "seen 0 of 2", "seen 1 of 2" and "seen 2 of 2".
    ``"unseen_context"``: the perturbed cells of one context are not trained on; its control cells are.
    ``"seen"``: a share of the cells of every condition is not trained on.

    In every scheme a share of the control cells of each context and batch is held out, so that no true effect is
    measured against the cells that a prediction starts from. It depends on ``seed`` and ``control_fraction`` alone.
    Conditions with too few cells are never test conditions; they are trained on unless that would show what is held
    out. Which cells are taken depends on what the cells are, not on their order in the file. (Our decisions.)

    Parameters
    ----------
    data
        The cells.
    scheme
        What is new in the test conditions.
    seed
        Seed of all choices.
    fold
        Which fold, for ``"unseen_single"``; which context (position among those that can be tested, or name), for
        ``"unseen_context"``.
    n_folds
        Number of folds of ``"unseen_single"``; None: one gene each (leave-one-out).
    fraction
        Share of genes and combinations (``"combination"``) or of cells (``"seen"``) that is held out.
    control_fraction
        Share of control cells that is held out.
    min_cells
        See :func:`~scdiva.data.perturbation_sets.scored_conditions`.

    Raises
    ------
    ConfigError
        An unknown scheme, a share outside (0, 1), or a fold that does not exist.
    SourceError
        The data has no such test conditions.
    """
    if scheme not in get_args(Scheme):
        raise ConfigError(
            f"no scheme {scheme!r}", expected=f"one of {', '.join(get_args(Scheme))}", fix="name one of them"
        )
    for name, share in (("fraction", fraction), ("control_fraction", control_fraction)):
        if not 0 < share < 1:
            raise ConfigError(f"{name} = {share}", expected="a share between 0 and 1", fix="give another one")
    seed, fold = int(seed), fold if isinstance(fold, str) else int(fold)
    is_scored = scored_conditions(data, max(min_cells, 2 if scheme == "seen" else 1))
    rng = np.random.default_rng(seed)
    context: str | None = None
    untrained: set[int] = set()
    if scheme == "unseen_single":
        untrained, tested = _fold_of_singles(data, is_scored, rng, fold, n_folds)
    elif scheme == "combination":
        untrained, tested = _combinations(data, is_scored, rng, fraction)
    else:
        if scheme == "unseen_context":
            at = _context(data, is_scored, fold)
            context, is_scored = data.contexts[at], is_scored & (np.arange(len(data.contexts)) == at)
        tested = set(_tested(is_scored))
    conditions = [(p, c) for p, c in np.argwhere(is_scored).tolist() if p in tested]
    if not conditions:
        raise SourceError(
            "no perturbation has enough cells and control cells to be tested",
            expected=f"{min_cells} of either in some context",
            fix="lower min_cells on purpose",
        )
    seen = _targets(data, _present(data) - untrained)
    groups = [_group(data, scheme, condition, seen, context) for condition in conditions]
    digests = _digests(data)
    manifest = {
        "format": _FORMAT,
        "scheme": scheme,
        "seed": seed,
        "fold": fold,
        "n_folds": n_folds,
        "fraction": fraction,
        "control_fraction": control_fraction,
        "min_cells": min_cells,
        "fingerprint": _fingerprint(digests),
        "n_cells": data.n_cells,
        "heldout_context": context,
        "untrained": [data.perturbations[p].name for p in sorted(untrained)],
        "conditions": [
            {"perturbation": data.perturbations[p].name, "context": data.contexts[c], "group": group}
            for (p, c), group in zip(conditions, groups, strict=True)
        ],
    }
    return _applied(data, digests, manifest)


def _fold_of_singles(
    data: PerturbedCells, is_scored: NDArray[np.bool_], rng: np.random.Generator, fold: int | str, n_folds: int | None
) -> tuple[set[int], set[int]]:
    """Return the perturbations that are not trained on, and those of them that are tested."""
    names = _testable_singles(data, is_scored)
    n_folds = len(names) if n_folds is None else n_folds
    if len(names) < 2 or not 2 <= n_folds <= len(names):
        raise SourceError(
            f"{len(names)} perturbations of one gene or treatment have enough cells, for {n_folds} folds",
            expected="at least two, and as many as there are folds",
            fix="use fewer folds, or lower min_cells on purpose",
        )
    if not isinstance(fold, int) or not 0 <= fold < n_folds:
        raise ConfigError(f"fold = {fold!r}", expected=f"0 to {n_folds - 1}", fix="name one of the folds")
    held = {names[i] for i in rng.permutation(len(names))[fold::n_folds]}
    untrained = {p for p, known in enumerate(data.perturbations) if held & set(known.targets)}
    return untrained, {p for p in untrained if len(data.perturbations[p].targets) == 1}


def _combinations(
    data: PerturbedCells, is_scored: NDArray[np.bool_], rng: np.random.Generator, fraction: float
) -> tuple[set[int], set[int]]:
    """Hold out genes and combinations, drawn until there are pairs of every group."""
    names, present = _testable_singles(data, is_scored), _present(data)
    targets = {p: set(data.perturbations[p].targets) for p in present}
    alone = {target for p in present if len(targets[p]) == 1 for target in targets[p]}
    combinations = [p for p in _tested(is_scored) if len(targets[p]) > 1]
    n_held = max(1, round(fraction * len(names)))
    best, smallest = set[int](), 0
    for _ in range(_N_TRIES if len(names) > 2 and combinations else 0):
        held = {names[i] for i in rng.permutation(len(names))[:n_held]}
        # the effect of each gene alone is to be known, so that an additive prediction can be made
        seen_alone = [p for p in combinations if not held & targets[p] and targets[p] <= alone]
        n_taken = min(max(1, round(fraction * len(seen_alone))), len(seen_alone) - 1)
        if n_taken < 1:
            continue
        taken = {seen_alone[i] for i in rng.permutation(len(seen_alone))[:n_taken]}
        untrained = {p for p in present if held & targets[p]} | taken
        seen = _targets(data, present - untrained)
        n_seen = [len(seen & targets[p]) for p in combinations if p in untrained and len(targets[p]) == 2]
        size = min(n_seen.count(0), n_seen.count(1), n_seen.count(2))
        if size > smallest:
            best, smallest = untrained, size
        if smallest >= _ENOUGH:
            break
    if best:
        return best, best
    raise SourceError(
        f"{len(names)} single perturbations and {len(combinations)} combinations with enough cells cannot be split so "
        "that pairs with 0, 1 and 2 seen genes are tested",
        expected="more pairs, of genes that are also perturbed alone",
        fix="hold out another fraction, lower min_cells on purpose, or use the scheme unseen_single",
    )


def _tested(is_scored: NDArray[np.bool_]) -> list[int]:
    return [int(p) for p in np.flatnonzero(is_scored.any(axis=1))]


def _testable_singles(data: PerturbedCells, is_scored: NDArray[np.bool_]) -> list[str]:
    """Return the genes or treatments that are perturbed alone in enough cells, sorted."""
    targets = [data.perturbations[p].targets for p in _tested(is_scored)]
    return sorted({known[0] for known in targets if len(known) == 1})


def _context(data: PerturbedCells, is_scored: NDArray[np.bool_], fold: int | str) -> int:
    possible = np.flatnonzero(is_scored.any(axis=0)).tolist()
    if len(data.contexts) < 2 or not possible:
        raise SourceError(
            f"{len(data.contexts)} contexts, {len(possible)} of them with enough cells to be tested",
            expected="at least two contexts",
            fix="name the column of cell types or lines (context_key)",
        )
    names = [data.contexts[c] for c in possible]
    if isinstance(fold, str) and fold in names:
        return int(possible[names.index(fold)])
    if isinstance(fold, str) or not 0 <= fold < len(possible):
        raise ConfigError(
            f"fold = {fold!r}",
            expected=f"0 to {len(possible) - 1}, or one of {', '.join(names)}",
            fix="name a context with enough cells",
        )
    return int(possible[fold])


def _present(data: PerturbedCells) -> set[int]:
    return set(np.unique(data.perturbation_code).tolist())


def _targets(data: PerturbedCells, perturbations: set[int]) -> set[str]:
    return {target for p in perturbations for target in data.perturbations[p].targets}


def _group(
    data: PerturbedCells, scheme: Scheme, condition: tuple[int, int], seen: set[str], context: str | None
) -> str:
    known = data.perturbations[condition[0]]
    if scheme == "seen":
        return "seen"
    if scheme == "unseen_context":
        is_of = data.perturbation_code == condition[0]
        is_elsewhere = bool((data.context_code[is_of] != condition[1]).any())
        return "unseen context" if is_elsewhere else "unseen context and perturbation"
    if len(known.targets) == 1:
        return "unseen single"
    return f"seen {len(seen & set(known.targets))} of {len(known.targets)}"


def _applied(data: PerturbedCells, digests: list[bytes], manifest: Mapping[str, Any]) -> PerturbationSplit:
    """Return the rows that a manifest stands for, and the manifest with a digest of them."""
    position = {known.name: p for p, known in enumerate(data.perturbations)}
    context_of = {name: c for c, name in enumerate(data.contexts)}
    conditions = tuple((position[row["perturbation"]], context_of[row["context"]]) for row in manifest["conditions"])
    n_contexts = len(data.contexts)
    pair = data.perturbation_code * n_contexts + data.context_code
    is_tested = np.isin(pair, [p * n_contexts + c for p, c in conditions])
    order = _order(digests, int(manifest["seed"]))
    place = np.stack([pair, data.batch_code], axis=1)
    is_heldout_control = data.is_control & _some_of_each(place, data.is_control, order, manifest["control_fraction"])
    is_trained = ~np.isin(data.perturbation_code, [position[name] for name in manifest["untrained"]])
    if manifest["scheme"] == "seen":
        is_tested = _some_of_each(pair[:, None], is_tested, order, manifest["fraction"])
    if manifest["heldout_context"] is not None:
        is_trained &= data.is_control | (data.context_code != context_of[manifest["heldout_context"]])
    is_trained &= ~is_tested & ~is_heldout_control
    parts = {
        "train": np.flatnonzero(is_trained),
        "test": np.flatnonzero(is_tested),
        "control": np.flatnonzero(is_trained & data.is_control),
        "heldout_control": np.flatnonzero(is_heldout_control),
    }
    cells = {
        name: {"n": int(rows.size), "digest": _fingerprint([digests[i] for i in rows])} for name, rows in parts.items()
    }
    return PerturbationSplit(
        scheme=manifest["scheme"],
        conditions=conditions,
        groups=tuple(row["group"] for row in manifest["conditions"]),
        manifest={**manifest, "cells": cells},
        **parts,
    )


def _some_of_each(
    place: NDArray[np.int64], is_eligible: NDArray[np.bool_], order: NDArray[np.int64], fraction: float
) -> NDArray[np.bool_]:
    """Choose a share of the eligible cells of every place; of two cells or more at least one, and not all."""
    is_chosen = np.zeros(order.size, dtype=bool)
    ordered = order[is_eligible[order]]
    _, group, sizes = np.unique(place[ordered], axis=0, return_inverse=True, return_counts=True)
    by_group = ordered[np.argsort(group.ravel(), kind="stable")]
    for start, size in zip(np.cumsum(sizes) - sizes, sizes.tolist(), strict=True):
        is_chosen[by_group[start : start + min(max(1, round(fraction * size)), size - 1)]] = True
    return is_chosen


def _digests(data: PerturbedCells) -> list[bytes]:
    """Digest each cell with all that is known of it, so that cells are recognised in any order."""
    counts = data.cells.counts
    indptr, genes = counts.indptr.tolist(), counts.indices.astype(np.int32)
    values, size = counts.data.astype(np.int32), data.cells.library_size.astype(np.float64)
    names = [f"{known.kind}\t{known.name}" for known in data.perturbations]
    labels = zip(data.perturbation_code.tolist(), data.context_code.tolist(), data.batch_code.tolist(), strict=True)
    found = []
    for i, (p, c, b) in enumerate(labels):
        cell = hashlib.blake2b(f"{names[p]}\t{data.contexts[c]}\t{data.batches[b]}\t".encode(), digest_size=16)
        cell.update(genes[indptr[i] : indptr[i + 1]].tobytes())
        cell.update(values[indptr[i] : indptr[i + 1]].tobytes())
        cell.update(size[i].tobytes())
        found.append(cell.digest())
    return found


def _fingerprint(digests: list[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _order(digests: list[bytes], seed: int) -> NDArray[np.int64]:
    """Return the cells in a random order that depends on what they are and on the seed."""
    keys = [hashlib.blake2b(digest, digest_size=16, key=str(seed).encode()).digest() for digest in digests]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
