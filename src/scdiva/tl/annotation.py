"""``tl.annotate``: cell types from a labelled reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scdiva.data.output import check_output, check_recorded_in, write_with_slots
from scdiva.data.source import open_source
from scdiva.errors import ConfigError
from scdiva.models.base import Embedder
from scdiva.tasks.annotate import CONFIDENCE, Annotation, CellTyper, Method, default_method, fit_cell_typer
from scdiva.tasks.annotate import annotate as _annotate

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData
    from pandas import DataFrame

    from scdiva.data.source import DataLike
from scdiva.tl.common import check_adata


def annotate(
    adata: AnnData,
    model: Embedder,
    reference: DataLike | CellTyper,
    label_key: str | None = None,
    *,
    method: Method | None = None,
    layer: str | None = None,
    self_training: bool | Literal["auto"] = "auto",
    confidence: float = CONFIDENCE,
    copy: bool = False,
    **options: Any,
) -> AnnData | None:
    """Annotate cells with the types of a labelled reference.

    Parameters
    ----------
    adata
        Raw counts in ``X``, a layer or ``.raw``; they are found, or named by ``layer``. ``X`` is not changed.
    model
        From ``sd.ScDiVa.from_pretrained``.
    reference
        Labelled cells (AnnData or path), or what :func:`fit_cell_typer` returned.
    label_key
        Column of the reference's ``.obs``; only with cells.
    method
        "consensus" (taken if left out; of models that are not native: "probe"): the next three, weighted by their
        agreement on ``adata``. "probe": regressions on the frozen embedding and on the data's own components, chosen by
        cross-validation on the reference. "reference": nearest neighbours in the embedding, nothing is trained.
        "integrate": neighbours in an embedding that is integrated over both. "finetune": the last layers of the trunk
        and a head are trained. "lora": adapters on all layers, and a head. The last two take minutes. Only with cells.
    layer
        Layer with the counts of ``adata``; ``"raw"`` for ``adata.raw``.
    self_training, confidence
        As in :func:`scdiva.tasks.annotate.annotate`.
    copy
        Return a copy with the result instead of writing into ``adata``.
    **options
        Of :func:`fit_cell_typer`: ``ontology``, ``tissue``, ``is_balanced``, ``false_unknown_rate``, ``fine_tuning``
        (``sd.tl.FineTuning(epochs=...)``), ``extend``, ``seed``.

    Returns
    -------
    AnnData or None
        ``.obs``: ``scdiva_cell_type``, ``scdiva_confidence`` (calibrated probability), ``scdiva_second_cell_type``,
        ``scdiva_novelty``, ``scdiva_unknown``, ``scdiva_ontology_id``, ``scdiva_ontology_label``;
        ``.obsm["scdiva_cell_type_probability"]`` (a table, one column per type, in the order of the record's classes;
        "/" in a name becomes "_"); ``.uns["scdiva"]["annotate"]``.

    Raises
    ------
    SourceError, ScaleError, GeneError, KeyNotFoundError, BundleError, ConfigError, UnsupportedError
        The data, the reference or, for fine-tuning, the model cannot be used; nothing is written.
    """
    check_adata(adata, copy=copy)
    typer = _cell_typer(adata, layer, model, reference, label_key, method, options)
    found = _annotate(adata, model, typer, layer=layer, self_training=self_training, confidence=confidence)
    target = adata.copy() if copy else adata
    columns = found.to_obs(target.obs_names)
    for name in columns:
        target.obs[name] = columns[name]
    target.obsm["scdiva_cell_type_probability"] = _probability_table(found, target.obs_names)
    target.uns["scdiva"] = {**target.uns.get("scdiva", {}), "annotate": dict(found.record)}
    return target if copy else None


def annotate_file(
    path_in: str | Path,
    path_out: str | Path,
    model: Embedder,
    reference: DataLike | CellTyper,
    label_key: str | None = None,
    *,
    method: Method | None = None,
    layer: str | None = None,
    self_training: bool | Literal["auto"] = "auto",
    confidence: float = CONFIDENCE,
    overwrite: bool = False,
    on_block: Callable[[int], None] | None = None,
    **options: Any,
) -> tuple[Annotation, CellTyper]:
    """Annotate the cells of a file and write a copy of it with the result; everything as in :func:`annotate`.

    Raises
    ------
    OutputError
        The output exists, has another suffix, or its folder does not exist; raised before any work is done.
    """
    target = Path(path_out)
    check_output(target, overwrite=overwrite)
    check_recorded_in(Path(path_in))
    typer = _cell_typer(path_in, layer, model, reference, label_key, method, options)
    found = _annotate(
        path_in, model, typer, layer=layer, self_training=self_training, confidence=confidence, on_block=on_block
    )
    source = open_source(path_in)
    columns = found.to_obs(source.obs.index)
    slots: dict[str, Any] = {
        "obs": source.obs.assign(**{str(name): columns[name] for name in columns}),
        "obsm/scdiva_cell_type_probability": _probability_table(found, source.obs.index),
        "uns/scdiva/annotate": dict(found.record),
    }
    write_with_slots(source, target, slots)
    return found, typer


def _cell_typer(
    query: DataLike,
    query_layer: str | None,
    model: Embedder,
    reference: DataLike | CellTyper,
    label_key: str | None,
    method: Method | None,
    options: Mapping[str, Any],
) -> CellTyper:
    if isinstance(reference, CellTyper):
        given = {"label_key": label_key, "method": method, **options}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise ConfigError(
                f"{', '.join(wrong)} with an annotator that is fitted already",
                expected="labelled cells as the reference, or nothing but the annotator",
                fix="leave them out",
            )
        return reference
    if label_key is None:
        raise ConfigError("no label_key", expected="the column of the reference's .obs with labels", fix="name it")
    given = {"method": method or default_method(model), "query": query, "query_layer": query_layer, **options}
    return fit_cell_typer(reference, model, label_key, **given)


def _probability_table(found: Annotation, index: Any) -> DataFrame:
    import pandas as pd

    # HDF5 takes a slash for a folder
    names = [name.replace("/", "_") for name in found.classes]
    if len(set(names)) < len(names):
        names = [f"{name} ({i})" for i, name in enumerate(names, start=1)]
    return pd.DataFrame(found.probability, columns=names, index=index)
