"""``evaluate generation``: generated cells against held-out real ones, beside simple generators, a null and a ceiling.

Of each type 70 % of the cells are trained on and 30 % held out. Every method sees the training cells and makes as many
cells of each type as are held out. Among the training cells as many again are set aside as the *sample*: real cells
that take the part of generated ones, the ceiling. Everything that has to be fitted before cells can be compared is
fitted on the training cells that are left, the *third* cells (see :mod:`scdiva.metrics.generation_space`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.baselines import generation as baselines
from scdiva.data.conditions import is_missing, label_text
from scdiva.data.output import replacing
from scdiva.data.reader import find_counts, is_gene_expression, open_counts
from scdiva.data.source import open_source
from scdiva.errors import (
    ConfigError,
    GeneError,
    KeyNotFoundError,
    ScaleError,
    ScdivaError,
    SourceError,
    UnsupportedError,
)
from scdiva.metrics import generation as metrics
from scdiva.metrics.generation_space import LabelledCells, NotMeasurableError
from scdiva.tasks.generation_report import (
    BASELINES,
    CEILING,
    HEADLINE,
    METHODS,
    NULL,
    GenerationReport,
    MethodRun,
    append_row,
    read_rows,
)

if TYPE_CHECKING:
    from anndata import AnnData

    from scdiva.data.source import DataLike
    from scdiva.genes import GeneVocabulary

Generator: TypeAlias = "Callable[[AnnData, Mapping[str, int], int], AnnData]"
"""``(train, wanted, seed) -> generated``: ``train`` holds raw counts in X and types in ``.obs[labels_key]``; ``wanted``
numbers of cells by type; back come raw counts over genes of ``train`` (absent ones count as 0, and are counted) with
their types in ``.obs[labels_key]``. An attribute ``fingerprint`` (text) tells generators of one name apart."""
Unit = Literal["counts", "cp10k", "log1p_cp10k"]

MIN_CELLS = 10
"""Fewest cells of a type that takes part."""

IS_SAMPLE = "is_sample"
"""Column of the kept training cells: set aside as the ceiling's sample."""

_MIN_THIRD = 30
_FORMAT = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GenerationData:
    """Labelled real cells as they are in the file.

    Parameters
    ----------
    name
        For the report.
    cells
        Raw counts of all genes of the file, with types.
    obs_names, var_names
        Names of cells and genes; genes are unique.
    n_left_out
        Cells without a label, or of too small a type.
    """

    name: str
    cells: LabelledCells
    obs_names: NDArray[np.str_]
    var_names: NDArray[np.str_]
    n_left_out: int = 0

    @classmethod
    def open(
        cls, data: DataLike, labels_key: str, *, layer: str | None = None, min_cells: int = MIN_CELLS
    ) -> GenerationData:
        """Read raw counts and types from an AnnData or a file.

        Cells that have no label ("unassigned", missing) are left out and counted, as are types of fewer than ten.

        Raises
        ------
        KeyNotFoundError
            There is no such column.
        ScaleError
            No raw counts.
        GeneError
            Gene names that occur twice.
        SourceError
            No type has enough cells.
        """
        source = open_source(data)
        labels = np.array([label_text(value) for value in source.column(labels_key)], dtype=str)
        found = find_counts(source, layer)
        is_gene = is_gene_expression(found.matrix.var)
        names = found.matrix.var.index.astype(str).to_numpy(dtype=str)[is_gene]
        _refuse_duplicates(names, source.name)
        counts = found.scale.to_counts(found.matrix.rows(0, source.n_cells), found.matrix.name)
        kinds, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        is_kind = np.array([not is_missing(kind) and n >= min_cells for kind, n in zip(kinds, sizes, strict=True)])
        is_kept = is_kind[inverse]
        if not is_kept.any():
            raise SourceError(
                f"no type in .obs[{labels_key!r}] of {source.name} has {min_cells} cells",
                expected="labelled cells",
                fix="name another column with --labels-key",
            )
        cells = LabelledCells(_tidy(counts[:, is_gene]), labels).take(is_kept)
        obs_names = source.obs.index.astype(str).to_numpy(dtype=str)[is_kept]
        n_left_out = int((~is_kept).sum())
        if n_left_out:
            log.warning(
                "%s: %d cells without a usable label in .obs[%r] are left out", source.name, n_left_out, labels_key
            )
        return cls(source.name, cells, obs_names, names, n_left_out)

    def to_anndata(self, rows: NDArray[np.int64], labels_key: str) -> AnnData:
        """Return some cells as a generator is given them: raw counts in X, types in ``.obs``."""
        part = self.cells.take(rows)
        return _as_anndata(part, self.obs_names[rows], self.var_names, labels_key)


def known_cells(
    data: DataLike, vocabulary: GeneVocabulary, labels_key: str, *, layer: str | None = None
) -> tuple[AnnData, str]:
    """Return cells in the genes that a model knows and the data measure, and how much that leaves out.

    Genes that a model cannot make would tell its cells from real ones whatever it makes of the others: all methods are
    judged on the genes that it knows.

    Raises
    ------
    SourceError, ScaleError, GeneError
        The data cannot be used.
    """
    import anndata as ad

    source = open_source(data)
    reader = open_counts(source, vocabulary, layer=layer)
    cells = reader.read(np.arange(len(reader)))
    is_measured = reader.alignment.is_measured
    share = 1.0 - cells.counts.sum() / cells.library_size.sum()
    what = (
        f"{int(is_measured.sum()):,} genes of {source.name} are known to the model; {share:.2%} of the UMIs are in "
        "others, which are left out for all methods"
    )
    obs = source.obs[[labels_key]].copy() if labels_key in source.obs else source.obs.iloc[:, :0].copy()
    return ad.AnnData(X=cells.counts[:, is_measured], obs=obs, var=vocabulary.annotation()[is_measured]), what


@dataclass(frozen=True, slots=True)
class Split:
    """Positions of the cells of one seed.

    Parameters
    ----------
    train, heldout
        Sorted positions.
    is_sample
        ``(n_train,)``: training cells set aside as the ceiling's sample; the rest are the third cells.
    """

    train: NDArray[np.int64]
    heldout: NDArray[np.int64]
    is_sample: NDArray[np.bool_]


def split_cells(labels: NDArray[np.str_], train_fraction: float, seed: int) -> Split:
    """Split every type into cells to train on and to hold out, and set a sample aside among the former.

    Parameters
    ----------
    labels
        ``(n_cells,)`` types, each at least three times.
    train_fraction
        Share to train on; at least one cell of each type is held out, and at least two are trained on.
    seed
        Seed of the draw.

    Returns
    -------
    Split
        The sample has as many cells of each type as are held out, but leaves at least one third cell.
    """
    rng = np.random.default_rng(seed)
    train, heldout, sample = [], [], []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        n = int(np.clip(round((1 - train_fraction) * rows.size), 1, rows.size - 2))
        heldout.append(rows[:n])
        train.append(rows[n:])
        sample.append(rows[n : n + min(n, rows.size - n - 1)])
    in_train = np.sort(np.concatenate(train))
    return Split(in_train, np.sort(np.concatenate(heldout)), np.isin(in_train, np.concatenate(sample)))


def evaluate_generation(
    data: DataLike,
    generators: Mapping[str, Generator] | None = None,
    *,
    labels_key: str,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    train_fraction: float = 0.7,
    layer: str | None = None,
    rows_path: Path | None = None,
    cells_folder: Path | None = None,
    n_trees: int = metrics.N_TREES,
    min_cells_per_type: int = metrics.MIN_CELLS_PER_TYPE,
    on_row: Callable[[MethodRun], None] | None = None,
) -> GenerationReport:
    """Train generators on most cells of a set, and judge what they make by the rest.

    Parameters
    ----------
    data
        AnnData or path, raw counts.
    generators
        Methods under evaluation, by name (:data:`Generator`).
    labels_key
        Column of ``.obs`` with the types.
    methods
        Which methods to run, in this order: names of ``generators`` and of :data:`METHODS`; all of them if left out.
    seeds
        Each seed splits the cells anew, and seeds generators and judges.
    train_fraction
        Share of each type that is trained on.
    layer
        Where the counts are; found if left out.
    rows_path
        JSONL file that takes each run as it finishes. Runs that are there already, of the same data and settings, are
        not run again.
    cells_folder
        Folder that takes the cells of each seed: ``seed-K/train.h5ad`` (``.obs["is_sample"]``: set aside as the
        ceiling's sample), ``seed-K/heldout.h5ad`` and ``seed-K/METHOD.h5ad``, compressed. A run that is in
        ``rows_path`` already is not run again for its cells.
    n_trees, min_cells_per_type
        As in :func:`scdiva.metrics.generation.realism`.
    on_row
        Called with each run as it finishes.

    Returns
    -------
    GenerationReport

    Raises
    ------
    KeyNotFoundError, ScaleError, GeneError, SourceError
        The data cannot be used.
    ConfigError
        An unknown method, a name of a generator that is taken, or an impossible fraction.
    ScdivaError
        A generator broke its word, or the controls are out of order (:func:`check_controls`).
    """
    own = dict(generators or {})
    chosen = chosen_methods(own, methods)
    if not 0 < train_fraction < 1 or not seeds:
        raise ConfigError(
            f"train_fraction={train_fraction}, {len(seeds)} seeds",
            expected="a fraction between 0 and 1, at least one seed",
            fix="leave them out",
        )
    loaded = GenerationData.open(data, labels_key, layer=layer)
    splits = {seed: split_cells(loaded.cells.labels, train_fraction, seed) for seed in seeds}
    return _evaluate(
        loaded, splits, own, chosen, labels_key, n_trees, min_cells_per_type, rows_path, cells_folder, on_row
    )


def evaluate_generated(
    real_train: DataLike,
    real_holdout: DataLike,
    generated: DataLike,
    *,
    labels_key: str,
    name: str = "generated",
    unit: Unit = "counts",
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    layer: str | None = None,
    rows_path: Path | None = None,
    cells_folder: Path | None = None,
    n_trees: int = metrics.N_TREES,
    min_cells_per_type: int = metrics.MIN_CELLS_PER_TYPE,
    on_row: Callable[[MethodRun], None] | None = None,
) -> GenerationReport:
    """Judge cells that were generated elsewhere, beside baselines trained on the same training cells.

    Parameters
    ----------
    real_train
        The cells that the generator was trained on. Memorisation can only be seen if it is really these.
    real_holdout
        Real cells that it was not trained on.
    generated
        Its cells, with their types; of each type as many are compared as are held out, or as there are.
    labels_key
        Column of ``.obs`` with the types, in all three.
    name
        What to call them.
    unit
        What X of ``generated`` holds: raw counts, or expression as methods emit that know no counts.
    methods
        Baselines and controls to run beside (:data:`METHODS`); all if left out.
    seeds
        The split is given; seeds draw baselines, samples and folds.
    layer, rows_path, cells_folder, n_trees, min_cells_per_type, on_row
        As in :func:`evaluate_generation`.

    Raises
    ------
    KeyNotFoundError, ScaleError, GeneError, SourceError
        The data cannot be used.
    ConfigError
        An unknown method.
    """
    train, heldout = (GenerationData.open(d, labels_key, layer=layer, min_cells=3) for d in (real_train, real_holdout))
    names = train.var_names
    there = np.isin(heldout.cells.labels, train.cells.labels)
    if not there.any():
        raise SourceError(
            "no type of the held-out cells is among the training cells",
            expected="the same types in both",
            fix="use the labels of one annotation",
        )
    aligned = _aligned(heldout.cells.take(there), heldout.var_names, names)[0]
    both = GenerationData(
        train.name,
        LabelledCells(
            sp.csr_matrix(sp.vstack([train.cells.counts, aligned.counts], format="csr")),
            np.concatenate([train.cells.labels, aligned.labels]),
        ),
        np.concatenate([train.obs_names, heldout.obs_names[there]]),
        names,
        train.n_left_out + heldout.n_left_out + int((~there).sum()),
    )
    cells, n_absent = _read_generated(generated, labels_key, names, unit, set(aligned.labels))
    rows = np.arange(both.cells.n_cells)
    n_train = train.cells.n_cells
    splits = {}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        is_sample = np.zeros(n_train, dtype=bool)
        for label, n in _sizes(aligned.labels).items():
            of_type = rng.permutation(np.flatnonzero(train.cells.labels == label))
            is_sample[of_type[: min(n, of_type.size // 2)]] = True
        splits[seed] = Split(rows[:n_train], rows[n_train:], is_sample)
    chosen = chosen_methods({name: None}, None if methods is None else [name, *methods])
    fixed = _Fixed(cells, n_absent)
    return _evaluate(
        both, splits, {name: fixed}, chosen, labels_key, n_trees, min_cells_per_type, rows_path, cells_folder, on_row
    )


_FACTORIES = {
    "scdiva": "scdiva.tasks.generate:scdiva_generator",
    "scdiffusion": "scdiva.tasks.scdiffusion:scdiffusion_generator",
    "scdiffusion_parity": "scdiva.tasks.scdiffusion:scdiffusion_parity_generator",
    "scdiffusion_scdiva": "scdiva.tasks.scdiva_latent:scdiffusion_scdiva_generator",
    "scdiffusion_scdiva_masked": "scdiva.tasks.scdiva_latent:scdiffusion_scdiva_masked_generator",
}
GENERATORS = tuple(_FACTORIES)
"""Generators of the package, by name."""


def generator_of(name: str, *arguments: Any, **options: Any) -> Generator:
    """Build a generator of the package by name; the code of the others is not loaded.

    Parameters
    ----------
    name
        "scdiva": ``scdiva_generator(model, labels_key)`` of :mod:`scdiva.tasks.generate`; "scdiffusion":
        ``scdiffusion_generator(labels_key)`` of :mod:`scdiva.tasks.scdiffusion`; "scdiffusion_parity":
        ``scdiffusion_parity_generator(labels_key)``; "scdiffusion_scdiva" and "scdiffusion_scdiva_masked":
        ``scdiffusion_scdiva_generator(model, labels_key)`` and
        ``scdiffusion_scdiva_masked_generator(model, labels_key)`` of :mod:`scdiva.tasks.scdiva_latent`.
    *arguments, **options
        What its factory takes.

    Raises
    ------
    UnsupportedError
        There is no such generator.
    """
    module, _, factory = _FACTORIES.get(name, "").partition(":")
    if not module or find_spec(module) is None:
        raise UnsupportedError(
            f"this version has no generator {name!r}",
            expected=f"one of {', '.join((*GENERATORS, *METHODS))}, or a generator of your own in Python",
            fix="name the methods to run: --methods multinomial ...",
        )
    made: Generator = getattr(import_module(module), factory)(*arguments, **options)
    return made


def check_controls(report: GenerationReport) -> None:
    """Refuse a report whose controls are out of order: real cells must be harder to tell apart than shuffled ones.

    Raises
    ------
    ScdivaError
        The ceiling's C2ST AUC (forest, variable genes) is not nearer to 0.5 than the null's, or has no value.
    """
    if not {NULL, CEILING} <= set(report.methods):
        return
    null, ceiling = (report.summary(name, HEADLINE).mean for name in (NULL, CEILING))
    if abs(ceiling - 0.5) < abs(null - 0.5):
        return
    raise ScdivaError(
        f"the controls are out of order: C2ST AUC {ceiling:.3f} of real cells, {null:.3f} of shuffled",
        expected="real cells nearer to 0.5",
        fix="the set is too small or its genes too few for this evaluation; the rows that were measured are kept",
    )


class _Fixed:
    """Cells that exist already, in the place of a generator."""

    def __init__(self, cells: LabelledCells, n_absent: int) -> None:
        self.cells, self.n_absent = cells, n_absent
        self.fingerprint = _content_hash(cells, np.array([], dtype=str))


def _evaluate(
    data: GenerationData,
    splits: Mapping[int, Split],
    own: Mapping[str, Any],
    methods: Sequence[str],
    labels_key: str,
    n_trees: int,
    min_cells_per_type: int,
    rows_path: Path | None,
    cells_folder: Path | None,
    on_row: Callable[[MethodRun], None] | None,
) -> GenerationReport:
    import torch  # deferred: heavy, and --help does not need it

    # scikit-learn and scanpy set the number of OpenMP threads of the whole process, and with it torch's
    n_threads = torch.get_num_threads()
    known = {} if rows_path is None else {run.key: run for run in read_rows(rows_path)}
    content = _content_hash(data.cells, data.var_names)
    runs: list[MethodRun] = []
    with_own_space: tuple[str, ...] = ()
    for seed, split in splits.items():
        train, heldout = data.cells.take(split.train), data.cells.take(split.heldout)
        if int((~split.is_sample).sum()) < _MIN_THIRD:
            raise SourceError(
                f"{int((~split.is_sample).sum())} training cells of {data.name} are in neither sample",
                expected=f"at least {_MIN_THIRD}, for variable genes and components",
                fix="give more cells",
            )
        try:
            reference = metrics.RealismReference.fit(train, split.is_sample, seed=seed)
        except NotMeasurableError as error:
            raise SourceError(
                f"{data.name} cannot be compared: {error}", expected="cells that differ", fix="give other cells"
            ) from error
        with_own_space = tuple(reference.space_of_type)
        keep = None if cells_folder is None else cells_folder / f"seed-{seed}"
        if keep is not None:
            _write_real(data, split, labels_key, keep)
        for method in methods:
            key = _key(
                content, split, method, seed, getattr(own.get(method), "fingerprint", ""), n_trees, min_cells_per_type
            )
            if key in known:
                run = known[key]
            else:
                job = _Job(data, split, train, heldout, reference, labels_key, seed, n_trees, min_cells_per_type)
                torch.set_num_threads(n_threads)
                run = _run(job, method, own.get(method), key, keep)
                if rows_path is not None:
                    append_row(rows_path, run)
            runs.append(run)
            if on_row is not None:
                on_row(run)
    report = GenerationReport(
        name=data.name,
        labels_key=labels_key,
        n_train=int(split.train.size),
        n_heldout=int(split.heldout.size),
        n_third=int((~split.is_sample).sum()),
        n_left_out=data.n_left_out,
        sizes=_sizes(heldout.labels),
        types_with_own_space=with_own_space,
        ours=tuple(name for name in methods if name in own),
        runs=tuple(runs),
        n_trees=n_trees,
    )
    check_controls(report)
    return report


@dataclass(frozen=True, slots=True)
class _Job:
    data: GenerationData
    split: Split
    train: LabelledCells
    heldout: LabelledCells
    reference: metrics.RealismReference
    labels_key: str
    seed: int
    n_trees: int
    min_cells_per_type: int
    wanted: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "wanted", _sizes(self.heldout.labels))


def _run(job: _Job, method: str, generator: Any, key: str, keep: Path | None) -> MethodRun:
    options: dict[str, Any] = {
        "seed": job.seed,
        "n_trees": job.n_trees,
        "min_cells_per_type": job.min_cells_per_type,
    }
    started = time.perf_counter()
    n_absent = 0
    made: LabelledCells | None = None
    if isinstance(generator, _Fixed):
        made, n_absent = generator.cells, generator.n_absent
    elif generator is not None:
        train = job.data.to_anndata(job.split.train, job.labels_key)
        found = generator(train, dict(job.wanted), job.seed)
        made, n_absent = _checked(found, method, job)
    elif method != CEILING:
        draw = BASELINES.get(method, baselines.shuffled)
        made = LabelledCells(*draw(job.train.counts, job.train.labels, job.wanted, job.seed))
    generated_in = time.perf_counter() - started
    if keep is not None and made is not None:
        names = np.array([f"{method}_{i}" for i in range(made.n_cells)])
        _write_cells(_as_anndata(made, names, job.data.var_names, job.labels_key), keep / f"{method}.h5ad")
    started = time.perf_counter()
    if made is None:
        scores = metrics.ceiling(job.heldout, job.reference, **options)
    else:
        scores = metrics.realism(job.heldout, made, job.reference, **options)
    try:
        nearest = metrics.nearest_types(job.heldout, job.reference.sample if made is None else made, job.reference)
    except NotMeasurableError:  # the score of that name says why
        nearest = {}
    return MethodRun(method, job.seed, key, scores, generated_in, time.perf_counter() - started, n_absent, nearest)


def _checked(found: AnnData, method: str, job: _Job) -> tuple[LabelledCells, int]:
    """Return what a generator made, in the order of the data's genes; refuse what is not as promised."""
    if job.labels_key not in found.obs.columns:
        raise KeyNotFoundError(
            f"the generator {method!r} gives no .obs[{job.labels_key!r}]",
            expected="the types that were asked for",
            fix="correct the generator",
        )
    labels = np.array([label_text(value) for value in found.obs[job.labels_key]], dtype=str)
    sizes = _sizes(labels)
    if sizes != dict(job.wanted):
        wrong = [f"{k}: {sizes.get(k, 0)} of {n}" for k, n in job.wanted.items() if sizes.get(k, 0) != n]
        more = sorted(set(sizes) - set(job.wanted))
        raise ScdivaError(
            f"the generator {method!r} made {'; '.join([*wrong, *more])} cells",
            expected="exactly the numbers that were asked for",
            fix="correct the generator",
        )
    cells = LabelledCells(_linear(found.X, "counts", f"the generator {method!r}"), labels)
    return _aligned(cells, found.var_names.astype(str).to_numpy(dtype=str), job.data.var_names)


def _read_generated(
    generated: DataLike, labels_key: str, names: NDArray[np.str_], unit: Unit, types: set[str]
) -> tuple[LabelledCells, int]:
    source = open_source(generated)
    labels = np.array([label_text(value) for value in source.column(labels_key)], dtype=str)
    matrix = source.matrix(None)
    cells = LabelledCells(_linear(matrix.rows(0, source.n_cells), unit, source.name), labels)
    is_known = np.isin(labels, sorted(types))
    if not is_known.any():
        raise SourceError(
            f"no cell of {source.name} is of a held-out type",
            expected=f"types in .obs[{labels_key!r}]: {', '.join(sorted(types)[:10])}",
            fix="write the types that were asked for into that column",
        )
    if not is_known.all():
        log.warning("%s: %d cells of types that are not held out are left out", source.name, int((~is_known).sum()))
    return _aligned(cells.take(is_known), matrix.var.index.astype(str).to_numpy(dtype=str), names)


def _linear(x: Any, unit: Unit, name: str) -> sp.csr_matrix:
    """Return values on a linear scale; refuse what is no unit of the kind."""
    values = _tidy(sp.csr_matrix(x))
    data = np.asarray(values.data)
    if data.size and (not np.isfinite(data).all() or data.min() < 0):
        raise ScaleError(f"{name} holds negative or non-finite values", expected=unit, fix="correct the generator")
    if unit == "counts":
        if not np.array_equal(data, np.rint(data)):
            raise ScaleError(
                f"{name} holds values that are no whole numbers",
                expected="raw counts",
                fix="say what they are: --unit cp10k or --unit log1p_cp10k",
            )
        return sp.csr_matrix(values.astype(np.int32))
    if unit == "log1p_cp10k":
        values.data = np.expm1(data.astype(np.float64))
    return sp.csr_matrix(values.astype(np.float32))


def _aligned(cells: LabelledCells, found: NDArray[np.str_], names: NDArray[np.str_]) -> tuple[LabelledCells, int]:
    """Bring cells into the order of other genes; return how many of those they lack."""
    _refuse_duplicates(found, "the generated cells")
    position = {name: i for i, name in enumerate(names)}
    column = np.array([position.get(name, -1) for name in found], dtype=np.int64)
    if (column >= 0).sum() == 0:
        raise GeneError(
            f"no gene of the cells ({', '.join(found[:3])}, ...) is a gene of the training cells",
            expected=f"names such as {', '.join(names[:3])}",
            fix="name genes as the training cells do",
        )
    entries = sp.coo_matrix(cells.counts)
    is_known = column[entries.col] >= 0
    counts = sp.csr_matrix(
        (entries.data[is_known], (entries.row[is_known], column[entries.col[is_known]])),
        shape=(cells.n_cells, names.size),
    )
    return LabelledCells(_tidy(counts), cells.labels), int(names.size - (column >= 0).sum())


def _refuse_duplicates(names: NDArray[np.str_], where: str) -> None:
    kinds, sizes = np.unique(names, return_counts=True)
    if (sizes > 1).any():
        raise GeneError(
            f"{int((sizes > 1).sum())} gene names of {where} occur more than once ({', '.join(kinds[sizes > 1][:3])})",
            expected="unique names",
            fix="adata.var_names_make_unique()",
        )


def chosen_methods(own: Collection[str], methods: Sequence[str] | None) -> tuple[str, ...]:
    """Return the methods to run.

    Parameters
    ----------
    own
        Names of generators that there are beside :data:`METHODS`.
    methods
        What is asked for; None: all.

    Raises
    ------
    ConfigError
        An unknown method, or a generator with the name of another.
    UnsupportedError
        scVI is asked for and not installed.
    """
    reserved = (*METHODS, "train", "heldout")  # the latter two are names of files beside the cells
    taken = sorted(set(own) & set(reserved))
    if taken:
        raise ConfigError(
            f"a generator is called {taken[0]!r}", expected="a name that is free", fix=f"not {', '.join(reserved)}"
        )
    chosen = tuple(dict.fromkeys((*own, *METHODS) if methods is None else methods))
    unknown = [name for name in chosen if name not in own and name not in METHODS]
    if unknown or not chosen:
        raise ConfigError(
            f"no method is called {unknown[0]!r}" if unknown else "no methods",
            expected=f"some of {', '.join((*own, *METHODS))}",
            fix="correct the name",
        )
    if "scvi" in chosen:
        baselines.require_scvi()
    return chosen


def _key(content: str, split: Split, *settings: Any) -> str:
    digest = hashlib.sha256(json.dumps([_FORMAT, content, *settings]).encode())
    for part in (split.train, split.heldout, split.is_sample):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:24]


def _content_hash(cells: LabelledCells, names: NDArray[np.str_]) -> str:
    digest = hashlib.sha256()
    for part in (cells.counts.indptr, cells.counts.indices):
        digest.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
    digest.update(np.ascontiguousarray(cells.counts.data, dtype=np.float64).tobytes())
    for texts in (cells.labels, names):
        digest.update("\x1f".join(texts.tolist()).encode())
    return digest.hexdigest()


def _sizes(labels: NDArray[np.str_]) -> dict[str, int]:
    return {str(name): int(n) for name, n in zip(*np.unique(labels, return_counts=True), strict=True)}


def _tidy(counts: Any) -> sp.csr_matrix:
    result = sp.csr_matrix(counts)
    result.sum_duplicates()
    result.eliminate_zeros()
    result.sort_indices()
    return result


def _as_anndata(
    cells: LabelledCells, obs_names: NDArray[np.str_], var_names: NDArray[np.str_], labels_key: str
) -> AnnData:
    import anndata as ad
    import pandas as pd

    obs = pd.DataFrame({labels_key: pd.Categorical(cells.labels)}, index=obs_names)
    return ad.AnnData(cells.counts.copy(), obs=obs, var=pd.DataFrame(index=var_names))


def _write_real(data: GenerationData, split: Split, labels_key: str, folder: Path) -> None:
    train = data.to_anndata(split.train, labels_key)
    train.obs[IS_SAMPLE] = split.is_sample
    _write_cells(train, folder / "train.h5ad")
    _write_cells(data.to_anndata(split.heldout, labels_key), folder / "heldout.h5ad")


def _write_cells(adata: AnnData, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        adata.write_h5ad(partial, compression="gzip")
