"""How many genes and UMIs the cells of a corpus have, per condition: what generation draws its sizes from."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scdiva.errors import BundleError
from scdiva.types import CellCounts

MAX_RECORDS = 20_000
"""Cells whose sizes are kept; more say little about a distribution of two numbers."""


@dataclass(frozen=True, slots=True)
class DrawnSizes:
    """Sizes of cells that are to be generated.

    Parameters
    ----------
    n_genes, depth
        ``(n,)`` int64 genes, and UMIs in genes of the vocabulary.
    library_size
        ``(n,)`` float64 UMIs over all genes.
    source
        ``(n,)`` int32 row of ``CellSizes.is_measured`` that says which genes the cell may have.
    """

    n_genes: NDArray[np.int64]
    depth: NDArray[np.int64]
    library_size: NDArray[np.float64]
    source: NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class CellSizes:
    """Sizes of a random choice of training cells: an empirical joint distribution (our decision).

    Parameters
    ----------
    n_genes, depth
        ``(R,)`` int32 detected genes, and UMIs in genes of the vocabulary.
    library_size
        ``(R,)`` float64 UMIs over all genes of the file.
    condition
        ``(R, n_fields)`` int32 codes; 0 is unknown.
    source
        ``(R,)`` int32 row of ``is_measured``.
    is_measured
        ``(n_sources, G)`` genes that each source measures.
    """

    n_genes: NDArray[np.int32]
    depth: NDArray[np.int32]
    library_size: NDArray[np.float64]
    condition: NDArray[np.int32]
    source: NDArray[np.int32]
    is_measured: NDArray[np.bool_]

    @classmethod
    def of(cls, blocks: Iterable[CellCounts], rng: np.random.Generator) -> Self:
        """Collect the sizes of cells; at most :data:`MAX_RECORDS` of them, chosen at random, are kept."""
        parts: dict[str, list[NDArray[Any]]] = {
            name: [] for name in ("n_genes", "depth", "library_size", "condition", "source")
        }
        masks: dict[bytes, int] = {}
        for cells in blocks:
            packed = np.packbits(cells.is_measured, axis=1)
            row = np.array([masks.setdefault(mask.tobytes(), len(masks)) for mask in packed], dtype=np.int32)
            parts["n_genes"].append(np.diff(cells.counts.indptr))
            parts["depth"].append(np.asarray(cells.counts.sum(axis=1)).ravel())
            parts["library_size"].append(cells.library_size)
            parts["condition"].append(cells.condition)
            parts["source"].append(row[cells.source_of_cell])
            n_vocabulary_genes = cells.n_genes
        values = {name: np.concatenate(part) for name, part in parts.items()}
        is_kept = values["n_genes"] > 0  # an empty cell is no cell to imitate
        kept = np.flatnonzero(is_kept)
        if kept.size > MAX_RECORDS:
            kept = np.sort(rng.choice(kept, MAX_RECORDS, replace=False))
        is_measured = np.array([np.unpackbits(np.frombuffer(mask, np.uint8)) for mask in masks], dtype=bool)
        return cls(
            n_genes=values["n_genes"][kept].astype(np.int32),
            depth=values["depth"][kept].astype(np.int32),
            library_size=values["library_size"][kept].astype(np.float64),
            condition=values["condition"][kept].astype(np.int32),
            source=values["source"][kept],
            is_measured=is_measured[:, :n_vocabulary_genes],
        )

    @property
    def n_records(self) -> int:
        """Number of cells."""
        return int(self.n_genes.size)

    def matching(self, codes: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Find the records of a condition.

        Parameters
        ----------
        codes
            ``(n_fields,)`` codes; 0 matches everything.

        Returns
        -------
        rows
            Records that have all of the wanted labels; if none has, those that have most of them, and of several such
            choices of labels the one that says most of depth (in tenths of its variance), or else most records have.
        is_met
            ``(n_fields,)`` False for wanted labels that had to be given up because no record has all.
        """
        wanted = np.flatnonzero(codes > 0)
        is_met = np.ones(codes.size, dtype=bool)
        if wanted.size == 0:
            return np.arange(self.n_records), is_met
        agrees = self.condition[:, wanted] == codes[wanted]
        n_agreeing = agrees.sum(axis=1)
        most = int(n_agreeing.max(initial=0))
        if most == 0:
            is_met[wanted] = False
            return np.arange(self.n_records), is_met
        best = agrees[n_agreeing == most]
        # of several choices of labels the one that says most of depth, or else the one that most records have
        choices, number = np.unique(best, axis=0, return_counts=True)
        says = np.round(choices @ self._share_of_depth(wanted), 1)
        choice = choices[np.lexsort((number, says))[-1]]
        is_met[wanted[~choice]] = False
        return np.flatnonzero((agrees == choice).all(axis=1)), is_met

    def _share_of_depth(self, fields: NDArray[np.integer]) -> NDArray[np.float64]:
        """Return the share of the variance of log depth between the labels of each field, ``(len(fields),)``.

        Where a combination was never seen, its size is that of the technology it names, not that of its cell type.
        (Our decision.)
        """
        log_depth = np.log1p(self.depth.astype(np.float64))
        log_depth -= log_depth.mean()
        total = max(float((log_depth**2).sum()), 1e-12)
        shares = []
        for codes in self.condition[:, fields].T:
            n = np.maximum(np.bincount(codes), 1)
            between = np.bincount(codes, weights=log_depth) ** 2 / n
            shares.append(float(between[1:].sum()) / total)  # code 0 is no label
        return np.array(shares)

    def draw(
        self,
        condition: NDArray[np.integer],
        rng: np.random.Generator,
        *,
        n_genes: ArrayLike | None = None,
        depth: ArrayLike | None = None,
    ) -> DrawnSizes:
        """Draw the sizes of cells jointly, each from the records of its condition.

        Parameters
        ----------
        condition
            ``(n, n_fields)`` codes.
        rng
            Source of randomness.
        n_genes, depth
            Given by the user, one number or ``(n,)``. If one of the two is given, the other is drawn from the records
            nearest to it.
        """
        n = condition.shape[0]
        row = np.empty(n, dtype=np.int64)
        given = {
            name: np.broadcast_to(np.asarray(value, dtype=np.int64), (n,)).copy()
            for name, value in (("n_genes", n_genes), ("depth", depth))
            if value is not None
        }
        distinct, group = np.unique(condition, axis=0, return_inverse=True)
        for i, codes in enumerate(distinct):
            rows, _ = self.matching(codes)
            members = np.flatnonzero(group.ravel() == i)
            # without replacement as far as the records go: sizes vary no more than those of as many real cells
            row[members] = np.resize(rng.permutation(rows), members.size)
            if len(given) == 1:
                ((name, value),) = given.items()
                row[members] = _near(getattr(self, name)[rows], value[members], rows, rng)
        drawn = DrawnSizes(
            n_genes=self.n_genes[row].astype(np.int64),
            depth=self.depth[row].astype(np.int64),
            library_size=self.library_size[row],
            source=self.source[row],
        )
        if not given:
            return drawn
        wanted_depth = given.get("depth", drawn.depth)
        # genes outside the vocabulary keep their share of the library
        library = drawn.library_size * wanted_depth / np.maximum(drawn.depth, 1)
        return DrawnSizes(given.get("n_genes", drawn.n_genes), wanted_depth, library, drawn.source)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what is written to the bundle."""
        return {
            "n_genes": self.n_genes,
            "depth": self.depth,
            "library_size": self.library_size,
            "condition": self.condition,
            "source": self.source,
            "is_measured": np.packbits(self.is_measured, axis=1),
            "n_vocabulary_genes": np.array(self.is_measured.shape[1]),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Read what :meth:`arrays` returned."""
        n = int(arrays["n_vocabulary_genes"])
        is_measured = np.unpackbits(arrays["is_measured"], axis=1)[:, :n].astype(bool)
        names = ("n_genes", "depth", "library_size", "condition", "source")
        return cls(**{name: arrays[name] for name in names}, is_measured=is_measured)

    def take_genes(self, is_kept: NDArray[np.bool_]) -> CellSizes:
        """Return the sizes for a vocabulary of some of the genes.

        Numbers of genes and UMIs stay those of the whole vocabulary: what they were in the kept genes is not known.
        """
        return CellSizes(
            self.n_genes, self.depth, self.library_size, self.condition, self.source, self.is_measured[:, is_kept]
        )


_N_NEAR = 32


def _near(
    size: NDArray[np.integer], wanted: NDArray[np.int64], rows: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw, for each wanted size, one of the records nearest to it in the log."""
    order = np.argsort(size, kind="stable")
    ordered = np.log1p(size[order].astype(float))
    n_near = min(_N_NEAR, size.size)
    centre = np.searchsorted(ordered, np.log1p(wanted.astype(float)))
    first = np.clip(centre - n_near // 2, 0, size.size - n_near)
    return rows[order[first + rng.integers(n_near, size=wanted.size)]]


def read_arrays(path: Path, wanted: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Read plain arrays from ``.npz``.

    Raises
    ------
    BundleError
        The file is damaged or lacks an array.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise BundleError(
            f"{path.name} is damaged ({str(error).splitlines()[0][:120]})",
            expected="an .npz file of plain arrays",
            fix="fetch the bundle again",
        ) from error
    missing = [name for name in wanted if name not in arrays]
    if missing:
        raise BundleError(
            f"{path.name} lacks {', '.join(missing)}", expected=", ".join(wanted), fix="fetch the bundle again"
        )
    return arrays
