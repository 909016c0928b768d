"""``PerturbationModel``: what predicts effects of perturbations, with the base model it stands on; save and load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import nn

from scdiva.config import NativeConfig
from scdiva.data.perturbations import Perturbation
from scdiva.errors import BundleError, UnsupportedError
from scdiva.genes import GeneVocabulary
from scdiva.genes.gene_sets import hallmark_sets
from scdiva.models import bundle
from scdiva.models.base import PretrainedModel, details_of
from scdiva.models.card import model_card
from scdiva.models.scdiva.model import ScDiVa
from scdiva.models.scdiva.objectives import tokeniser_of
from scdiva.models.scdiva.perturbation_base import (
    BasePredictor,
    ContextState,
    MeasuredEffect,
    Question,
    TargetFeatures,
    Weights,
)
from scdiva.models.scdiva.perturbation_network import PerturbationNetwork, blocks_of
from scdiva.models.scdiva.perturbation_tokens import PerturbationCoder, gene_of_symbol
from scdiva.models.scdiva.perturbed_cells import CellDrawer
from scdiva.serialization import log1p_cp10k
from scdiva.types import CellCounts

FAMILY = "scdiva-perturbation"
_BLOCK = 64
_CAUTION = (
    "Human genes only. Predictions are changes of means, extrapolated where perturbation or context is new; the",
    "simple predictors do most of the work, and a mean or additive baseline can be as good: the floor above is theirs.",
)
MIN_SINGLES = 3
"""Fewest single perturbations of training from which an unseen one is predicted."""
MAX_CELLS = 256
"""Control cells of a context that the network reads for a prediction; of more, evenly spaced ones."""


@dataclass(frozen=True, slots=True, eq=False)
class PredictedChange:
    """The predicted effect of a perturbation on some control cells.

    Parameters
    ----------
    change
        ``(n_genes,)`` float32 mean change of log1p(CP10K) over the cells; NaN for genes that are not predicted.
    base
        ``(n_genes,)`` what the simple predictors say.
    control_mean
        ``(n_genes,)`` mean log1p(CP10K) of the control cells; NaN for genes that they were not measured in.
    error
        ``(n_genes,)`` expected error: root mean squared error of predictions of this size for training conditions that
        were left out, NaN where there were too few to tell; of what was measured its standard error.
    spread_cells
        ``(n_genes,)`` standard deviation of the change over control cells.
    spread_seeds
        ``(n_genes,)`` standard deviation over networks trained with several seeds; 0 with one.
    question
        What was asked: "seen", "context", "single" or "combination".
    """

    change: NDArray[np.float32]
    base: NDArray[np.float32]
    control_mean: NDArray[np.float32]
    error: NDArray[np.float32]
    spread_cells: NDArray[np.float32]
    spread_seeds: NDArray[np.float32]
    question: Question


@dataclass(frozen=True, slots=True, eq=False)
class StateReader:
    """Turns control cells into what the simple predictors see of a context.

    Parameters
    ----------
    panel
        ``(P,)`` genes of the vocabulary.
    centre, axes
        ``(P,)`` and ``(F, P)``: principal components of the training set's control cells.
    """

    panel: NDArray[np.int64]
    centre: NDArray[np.float64]
    axes: NDArray[np.float64]

    def values(self, cells: CellCounts) -> sp.csr_matrix:
        """Return log1p(CP10K) of the panel, CSR ``(n_cells, P)``."""
        data = log1p_cp10k(cells)
        whole = sp.csr_matrix((data, cells.counts.indices, cells.counts.indptr), shape=cells.counts.shape)
        return sp.csr_matrix(whole[:, self.panel])

    def state(
        self, values: sp.csr_matrix, z: NDArray[np.floating], is_measured: NDArray[np.bool_] | None = None
    ) -> ContextState:
        """Summarise control cells: their values and their z.

        Genes of the panel that were not measured, where ``is_measured`` ``(P,)`` says so, are unknown, not zero: they
        are taken to be at the mean of the training set's control cells.
        """
        mean = np.asarray(values.mean(axis=0, dtype=np.float64)).ravel()
        square = np.asarray(values.multiply(values).mean(axis=0, dtype=np.float64)).ravel()
        variance = np.maximum(square - mean**2, 0.0)
        if is_measured is not None:
            mean = np.where(is_measured, mean, self.centre)
        return ContextState(
            mean,
            variance,
            self.axes @ (mean - self.centre),
            np.asarray(z, dtype=np.float64).mean(axis=0),
            values.shape[0],
            values,
        )


@dataclass(frozen=True, slots=True, eq=False)
class ExpectedError:
    """Root mean squared error of left-out predictions, by question and by how large the prediction is.

    Parameters
    ----------
    limits
        ``(bins - 1,)`` absolute predicted changes that separate the bins.
    rms
        Of each bin, ``(bins,)``, by question.
    """

    limits: NDArray[np.float64]
    rms: Mapping[str, NDArray[np.float64]]

    def of(self, question: str, change: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the expected error of each gene; NaN where the question was not tried."""
        if question not in self.rms:
            return np.full(change.shape, np.nan)
        return np.asarray(self.rms[question][np.searchsorted(self.limits, np.abs(change))])


class PerturbationModel(PretrainedModel):
    """Predicts what perturbations do to cells; made by ``scdiva finetune --objective perturbation``.

    Parameters
    ----------
    base
        The native model it was fine-tuned from.
    predictor
        The simple predictors, over the panel.
    reader
        What they see of control cells.
    coder
        Codes of perturbations.
    networks
        What was trained on top, one per seed; none: the simple predictors alone.
    gate
        Share of each network's correction that is added, in [0, 1]: what held-out conditions bear out. Where a question
        was not tried on left-out conditions, that of measured conditions included, nothing is added.
    expected_error
        Errors of left-out conditions.
    drawer
        Draws single cells; None: means only.
    details
        What goes into ``config.json``.
    bundle_hash
        sha256 of the bundle it was loaded from; empty for a model that was never saved.
    """

    family = FAMILY

    def __init__(
        self,
        base: ScDiVa,
        predictor: BasePredictor,
        reader: StateReader,
        coder: PerturbationCoder,
        networks: Sequence[PerturbationNetwork],
        gate: Sequence[float],
        expected_error: ExpectedError,
        *,
        drawer: CellDrawer | None = None,
        details: Mapping[str, Any] | None = None,
        bundle_hash: str = "",
    ) -> None:
        self.base = base
        self.drawer = drawer
        self.predictor, self.reader, self.coder = predictor, reader, coder
        self.networks = nn.ModuleList(networks).eval()
        self.gate = tuple(float(g) for g in gate)
        self.expected_error = expected_error
        self.vocabulary: GeneVocabulary = base.vocabulary
        self.statistics = base.statistics
        self.details = dict(details or {})
        self.bundle_hash = bundle_hash

    @property
    def module(self) -> nn.Module:
        """The weights; those of the base where no network was trained."""
        return self.networks if len(self.networks) else self.base.module

    @property
    def n_latent(self) -> int:
        """Z of the base model."""
        return self.base.n_latent

    @property
    def perturbations(self) -> tuple[Perturbation, ...]:
        """Perturbations that were seen in training, in the order of their names."""
        seen = {effect.perturbation for effect in self.predictor.effects}
        return tuple(sorted(seen, key=lambda p: (len(p.targets), p.name)))

    @property
    def contexts(self) -> tuple[str, ...]:
        """Contexts that were seen in training."""
        return tuple(sorted(self.predictor.states))

    def to(self, device: str) -> Self:
        """Move the weights, also those of the base model."""
        self.base.to(device)
        self.networks.to(self.base.device)
        if self.drawer is not None:
            self.drawer.network.to(self.base.device)
        return self

    def check_answers(self, perturbation: Perturbation) -> None:
        """Refuse a perturbation that the model cannot say anything of.

        Raises
        ------
        UnsupportedError
            Control; a kind that was not in training, or a dose where it had none; a drug or cytokine, or a name that is
            no gene, that was not in training; a gene that the vocabulary lacks; or more targets than the model has
            places for.
        """
        if perturbation.is_control:
            raise UnsupportedError("control is no perturbation", expected="a target", fix="name what is perturbed")
        kinds = sorted({p.kind for p in self.perturbations})
        if perturbation.kind not in kinds:
            raise UnsupportedError(
                f"no {perturbation.kind} was in the training data",
                expected=" or ".join(kinds),
                fix="fine-tune with cells that had one; effects of one kind do not tell those of another",
            )
        if perturbation.dose is not None and all(p.dose is None for p in self.perturbations):
            raise UnsupportedError(
                f"{perturbation.name} has a dose, and none was in the training data",
                expected="no dose",
                fix="leave it out, or fine-tune on doses (--dose-key, or names such as drug@2.5)",
            )
        seen = sorted({target for p in self.perturbations if p.kind == perturbation.kind for target in p.targets})
        shown = ", ".join(seen[:20]) + (" ..." if len(seen) > 20 else "")
        for target in perturbation.targets:
            if target in seen or self.coder.is_known(Perturbation((target,), perturbation.kind)):
                continue
            if perturbation.kind == "treatment":
                raise UnsupportedError(
                    f"the treatment {target!r} was not in the training data, and nothing else is known of it",
                    expected=f"one of those that were: {shown}",
                    fix="fine-tune with cells that had it; only genes can be predicted unseen",
                )
            raise UnsupportedError(
                f"{target!r} is no gene of this model's vocabulary",
                expected=f"a gene symbol, or one of the targets of training: {shown}",
                fix="check the spelling (scdiva check says how genes are named)",
            )
        if len(perturbation.targets) > self.coder.n_places:
            raise UnsupportedError(
                f"{perturbation.name} has {len(perturbation.targets)} targets",
                expected=f"at most {self.coder.n_places}",
                fix="fine-tune with larger combinations, or with --set max_targets=N",
            )

    @torch.inference_mode()
    def predict(self, perturbation: Perturbation, control: CellCounts, context: str = "") -> PredictedChange:
        """Predict what a perturbation does to the cells of a context.

        Parameters
        ----------
        perturbation
            What is done; it need not have been seen.
        control
            Control cells of the context, in the order of the vocabulary.
        context
            Its name; it need not have been seen.

        Raises
        ------
        UnsupportedError
            See :meth:`check_answers`; or there is no control cell.
        """
        self.check_answers(perturbation)
        if control.n_cells == 0:
            raise UnsupportedError(
                f"there is no control cell of {context or 'the data'} to predict from",
                expected="at least one", fix="give control cells",
            )  # fmt: skip
        values = self.reader.values(control)
        is_measured = np.asarray(control.is_measured.all(axis=0))[self.reader.panel]
        state = self.reader.state(values, self.base.latent(control), is_measured)
        question = self.predictor.question(perturbation, context)
        unseen = [] if question in ("seen", "context") else self.predictor.unseen(perturbation)
        n_singles = self.predictor.n_singles(perturbation.kind)
        if unseen and n_singles < MIN_SINGLES:
            raise UnsupportedError(
                f"{', '.join(unseen)} was never perturbed in training, which has {n_singles} single perturbations",
                expected=f"at least {MIN_SINGLES} to learn from what they do to what another would do",
                fix="ask for what was perturbed, or fine-tune with more perturbations",
            )
        base = self.predictor.predict(perturbation, context, state)
        corrections = self._corrections(perturbation, control, context, state, base)
        change = base + corrections.mean(axis=(0, 1)) if corrections.size else base
        n_genes = self.vocabulary.n_genes

        def spread_out(values_P: NDArray[np.floating]) -> NDArray[np.float32]:
            whole = np.full(n_genes, np.nan, dtype=np.float32)
            whole[self.reader.panel] = values_P
            return whole

        nothing = np.zeros_like(base)
        return PredictedChange(
            change=spread_out(change),
            base=spread_out(base),
            control_mean=spread_out(np.where(is_measured, state.mean, np.nan)),
            error=spread_out(self._error(perturbation, context, question, change, len(unseen))),
            spread_cells=spread_out(corrections.mean(axis=0).std(axis=0) if corrections.size else nothing),
            spread_seeds=spread_out(corrections.mean(axis=1).std(axis=0) if corrections.size else nothing),
            question=question,
        )

    def _error(
        self, perturbation: Perturbation, context: str, question: Question, change: NDArray[np.float64], n_unseen: int
    ) -> NDArray[np.float64]:
        """Return the expected error of each gene, ``(P,)``.

        Combinations that were left out had parts that were seen; each that was not adds the error of a single one.
        """
        if question == "seen":
            return self.predictor.sampling_error(perturbation, context)
        error = self.expected_error.of(question, change)
        if question == "combination" and n_unseen:
            error = np.sqrt(error**2 + n_unseen * self.expected_error.of("single", change) ** 2)
        return error

    def _corrections(
        self,
        perturbation: Perturbation,
        control: CellCounts,
        context: str,
        state: ContextState,
        base: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Return what the networks add, ``(seeds, cells, P)``, their gates applied."""
        # gates are of questions that conditions were left out for: nothing bears out a correction of what was measured
        is_judged = self.predictor.question(perturbation, context) in self.expected_error.rms
        if not self.networks or not any(self.gate) or not is_judged or not self.coder.is_known(perturbation):
            return np.zeros((0, 0, 0))
        rows = np.unique(np.linspace(0, control.n_cells - 1, min(control.n_cells, MAX_CELLS)).astype(np.int64))
        codes = self.coder.codes([perturbation])
        described = self.predictor.described(perturbation, context, state, base)
        found = []
        for network, gate in zip(self.networks, self.gate, strict=True):
            assert isinstance(network, PerturbationNetwork)
            parts = []
            for block in blocks_of(rows.size, _BLOCK):
                n = block.size
                inputs = network.inputs(
                    control.take(rows[block]),
                    codes.take(torch.zeros(n, dtype=torch.int64)),
                    np.broadcast_to(state.mean, (n, state.mean.size)),
                    np.broadcast_to(base, (n, base.size)),
                    np.broadcast_to(described, (n, described.size)),
                )
                parts.append(network(inputs.to(self.device)).double().cpu().numpy())
            found.append(gate * np.concatenate(parts))
        return np.stack(found)

    @torch.inference_mode()
    def draw(
        self, perturbation: Perturbation, control: CellCounts, context: str = "", *, n_cells: int, seed: int = 0
    ) -> CellCounts:
        """Draw single perturbed cells: masked diffusion told what was done, with the predicted change of the mean.

        Parameters
        ----------
        perturbation, control, context
            As for :meth:`predict`.
        n_cells
            How many.
        seed
            Equal calls give equal cells.

        Returns
        -------
        CellCounts
            Integer counts; ``cell_index`` is that of the control cell that each cell started at.

        Raises
        ------
        UnsupportedError
            See :meth:`predict`; or the model was fine-tuned without single cells.
        """
        if self.drawer is None:
            raise UnsupportedError(
                f"{self.name} predicts means only",
                expected="a model that was fine-tuned with single cells",
                fix="fine-tune it without --no-cells",
            )
        found = self.predict(perturbation, control, context)
        codes = self.coder.codes([perturbation])
        return self.drawer.draw(codes, control, found.change, n_cells, seed).cells

    # --- save and load ---

    def save_pretrained(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the model as a bundle, with the base model in it, whole or not at all.

        Raises
        ------
        OutputError
            The folder exists.
        """
        predictor = self.predictor
        contexts = list(predictor.states)
        weights: dict[str, torch.Tensor] = {}
        for i, network in enumerate(self.networks):
            assert isinstance(network, PerturbationNetwork)
            weights |= {f"network.{i}.{name}": tensor for name, tensor in network.trained().items()}
        arrays: dict[str, NDArray[Any]] = {
            "panel": self.reader.panel,
            "centre": self.reader.centre,
            "axes": self.reader.axes,
            "spread": predictor.spread,
            "loadings": predictor.loadings.astype(np.float32),
            "effect_axes": predictor.axes,
            "effect_scale": predictor.axis_scale,
            "change": np.stack([effect.change for effect in predictor.effects]).astype(np.float32),
            "noise": np.stack([effect.noise for effect in predictor.effects]).astype(np.float32),
            "error_limits": self.expected_error.limits,
        }
        for name in ("mean", "variance", "components", "z"):
            stacked = np.stack([getattr(predictor.states[context], name) for context in contexts])
            arrays[f"state_{name}"] = stacked
        for question, fitted in predictor.weights.items():
            arrays |= {f"weight.{question}": fitted.weight, f"limits.{question}": fitted.limits}
        arrays |= {f"error.{question}": rms for question, rms in self.expected_error.rms.items()}
        weights |= {f"base.{name}": torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        if self.drawer is not None:
            weights |= {f"cells.{name}": tensor for name, tensor in self.drawer.state().items()}
        effects = [
            {
                "targets": list(effect.perturbation.targets),
                "kind": effect.perturbation.kind,
                "dose": effect.perturbation.dose,
                "context": effect.context,
                "n_cells": effect.n_cells,
            }
            for effect in predictor.effects
        ]
        description = {
            "architecture": "perturbation",
            "names": list(self.coder.names),
            "n_places": self.coder.n_places,
            "n_networks": len(self.networks),
            "n_trained_layers": self.details.get("n_trained_layers", 0),
            "gate": list(self.gate),
            "cells": None
            if self.drawer is None
            else {"spread": self.drawer.spread, "depth_ratio": self.drawer.depth_ratio},
            "effects": effects,
            "contexts": {context: predictor.states[context].n_cells for context in contexts},
            "weights": {
                question: {"names": list(fitted.names), "n_problems": fitted.n_problems}
                for question, fitted in predictor.weights.items()
            },
        }
        config = {"family": FAMILY, "model": description, **self.details, "n_parameters": self.n_parameters}
        first = self.perturbations[0]
        bundle.write_bundle(
            Path(path),
            config=config,
            weights=weights,
            vocabulary=self.vocabulary,
            statistics=self.statistics,
            labels={
                "perturbation": [p.name for p in self.perturbations],
                "context": [context for context in contexts if context],
            },
            codec=self.base.save_pretrained,
            card=model_card(
                config,
                self.vocabulary,
                self.n_parameters,
                self.n_latent,
                use=(
                    "import scdiva as sd",
                    'model = sd.load_model("PATH")',
                    f'effect = sd.tl.perturb(control_cells, model, "{first.name}")  # a new AnnData',
                ),
                caution=_CAUTION,
            ),
            overwrite=overwrite,
        )

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, device: str = "auto") -> Self:
        """Load a model.

        Raises
        ------
        BundleError
            There is no such model, it is of another family, or a file is missing, changed or does not fit.
        """
        content = cls.read_bundle(name_or_path)
        path = content.path
        weights = bundle.read_weights(path)
        nested = bundle.read_codec(path)
        if nested.vocabulary != content.vocabulary:
            raise BundleError(
                f"{nested.path} has {nested.vocabulary.n_genes:,} genes",
                expected=f"the {content.vocabulary.n_genes:,} genes of the model around it",
                fix="fetch the bundle again",
            )
        base = ScDiVa.from_pretrained(nested.path, device="cpu")
        described = content.config["model"]
        try:
            model = _rebuilt(cls, base, described, weights, content, path)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BundleError(
                f"{path}: its parts do not fit each other ({type(error).__name__}: {str(error)[:120]})",
                expected="the bundle as it was written",
                fix="fetch the bundle again, or use the scdiva version that wrote it",
            ) from error
        return model.to(device)


def target_features(base: ScDiVa) -> TargetFeatures:
    """Return what is known of genes: the model's embeddings, and the hallmark sets that each is in."""
    sets_of: dict[str, list[int]] = {}
    sets = hallmark_sets()
    for position, genes in enumerate(sets.values()):
        for gene in genes:
            sets_of.setdefault(gene, []).append(position)
    embedding = base.native("perturbation prediction").anchor.gene_embedding.detach().float().cpu().numpy()
    return TargetFeatures(gene_of_symbol(base.vocabulary), embedding, sets_of, len(sets))


def on_panel(features: TargetFeatures, panel: NDArray[np.integer]) -> dict[str, int]:
    """Return the position in the panel of each symbol that is on it."""
    position = {int(gene): i for i, gene in enumerate(panel)}
    return {symbol: position[gene] for symbol, gene in features.gene_of.items() if gene in position}


def _check_shapes(arrays: Mapping[str, NDArray[Any]], n_effects: int, n_contexts: int, n_genes: int) -> None:
    panel = arrays["panel"]
    n = panel.size
    if n and not (panel.min() >= 0 and panel.max() < n_genes):
        raise ValueError("panel: genes that the vocabulary does not have")
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(("panel", "centre", "spread"), (n,))
    expected |= {name: (arrays[name].shape[0], n) for name in ("axes", "effect_axes")}
    expected |= {"loadings": (n, arrays["loadings"].shape[-1]), "effect_scale": (arrays["effect_axes"].shape[0],)}
    expected |= dict.fromkeys(("change", "noise"), (n_effects, n))
    expected |= dict.fromkeys(("state_mean", "state_variance"), (n_contexts, n))
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} is {arrays[name].shape}, not {shape}")


def _rebuilt(
    cls: type[PerturbationModel],
    base: ScDiVa,
    described: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    content: bundle.BundleContent,
    path: Path,
) -> Any:
    arrays = {name.removeprefix("base."): t.numpy() for name, t in weights.items() if name.startswith("base.")}
    panel = arrays["panel"]
    contexts = list(described["contexts"])
    _check_shapes(arrays, len(described["effects"]), len(contexts), base.vocabulary.n_genes)
    states = {
        context: ContextState(
            arrays["state_mean"][i],
            arrays["state_variance"][i],
            arrays["state_components"][i],
            arrays["state_z"][i],
            int(described["contexts"][context]),
        )
        for i, context in enumerate(contexts)
    }
    effects = tuple(
        MeasuredEffect(
            Perturbation(tuple(row["targets"]), row["kind"], row["dose"]),
            row["context"],
            arrays["change"][i].astype(np.float64),
            arrays["noise"][i].astype(np.float64),
            int(row["n_cells"]),
        )
        for i, row in enumerate(described["effects"])
    )
    features = target_features(base)
    fitted: dict[Question, Weights] = {
        question: Weights(
            tuple(row["names"]), arrays[f"weight.{question}"], arrays[f"limits.{question}"], int(row["n_problems"])
        )
        for question, row in described["weights"].items()
    }
    predictor = BasePredictor(
        effects,
        states,
        features,
        on_panel(features, panel),
        arrays["spread"],
        arrays["loadings"].astype(np.float64),
        fitted,
        arrays["effect_axes"],
        arrays["effect_scale"],
    )
    coder = PerturbationCoder(base.vocabulary, tuple(described["names"]), int(described["n_places"]))
    networks = []
    used = {name for name in weights if name.startswith("base.")}
    for i in range(int(described["n_networks"])):
        network = PerturbationNetwork(
            base, coder, panel, predictor.axes, n_trained_layers=int(described["n_trained_layers"])
        )
        prefix = f"network.{i}."
        own = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
        if own.keys() != network.trained().keys():
            raise BundleError(
                f"{path}: network {i} has other weights than its configuration says",
                expected="the bundle as it was written",
                fix="fetch the bundle again",
            )
        network.load_trained(own)
        used |= {prefix + name for name in own}
        networks.append(network)
    drawer = None
    if described["cells"] is not None:
        own = {name.removeprefix("cells."): t for name, t in weights.items() if name.startswith("cells.")}
        assert isinstance(base.config, NativeConfig)
        drawer = CellDrawer.rebuilt(
            base,
            len(coder.names),
            own,
            tokeniser_of(base.config, base.statistics),
            float(described["cells"]["spread"]),
            float(described["cells"]["depth_ratio"]),
        )
        used |= {f"cells.{name}" for name in own}
    if used != set(weights):
        raise BundleError(
            f"{path}: unknown weights {', '.join(sorted(set(weights) - used)[:3])}",
            expected="those of its configuration",
            fix="use the scdiva version that wrote it",
        )
    error = ExpectedError(
        arrays["error_limits"],
        {name.removeprefix("error."): rms for name, rms in arrays.items() if name.startswith("error.")},
    )
    return cls(
        base,
        predictor,
        StateReader(panel, arrays["centre"], arrays["axes"]),
        coder,
        networks,
        described["gate"],
        error,
        drawer=drawer,
        details=details_of(content),
        bundle_hash=content.hash,
    )
