"""The annotator of a fine-tuned network: what was trained, and its calibration; the base model is named by its hash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from scdiva.errors import BundleError
from scdiva.models.annotators import Calibration, Calls, Features, Regression, class_distance
from scdiva.models.base import Embedder
from scdiva.models.scdiva.classifier import CellClassifier, Design
from scdiva.models.scdiva.model import ScDiVa
from scdiva.types import CellCounts

_WEIGHT = "weight:"
_COMPONENTS_C = 0.03
"""Inverse L2 penalty of the regression on components: of 0.01 to 1 the best by held-out likelihood on pbmc3k."""


@dataclass(frozen=True, slots=True, eq=False)
class Components:
    """A regression on z and on components of the data's own variable genes, as in the probe.

    A network that has learned from other cells does not know what only this reference shows.

    Parameters
    ----------
    features
        What it reads.
    regression
        On the joint features.
    """

    features: Features
    regression: Regression

    @classmethod
    def fit(
        cls,
        features: Features,
        cells: CellCounts,
        z: NDArray[np.float32],
        code: NDArray[np.integer],
        n_classes: int,
        weight: NDArray[np.floating],
    ) -> Self:
        """Fit to labelled cells; ``weight`` is of each cell."""
        # single genes are read by the probe only
        none = np.empty(0, dtype=np.int64)
        features = replace(features, detected=none, detected_mean=none.astype(np.float32))
        return cls(features, Regression.fit(features.of(cells, z)["joint"], code, n_classes, weight, _COMPONENTS_C))

    def log_probability(self, cells: CellCounts, z: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return log-probabilities, ``(N, K)``."""
        return self.regression.log_probability(self.features.of(cells, z)["joint"])

    def with_network(
        self, log_probability: NDArray[np.float64], cells: CellCounts, z: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """Return the log of the geometric mean of both probabilities, ``(N, K)``, not normalised."""
        return 0.5 * (log_probability + self.log_probability(cells, z))


@dataclass(frozen=True, slots=True, eq=False)
class FineTuned:
    """What fine-tuning made of a model. To annotate it needs that very model: :meth:`on`.

    Parameters
    ----------
    method
        "finetune" or "lora".
    design
        What was trained.
    weights
        The trained weights by name, float32.
    class_mean, whitening
        ``(K, F)`` and ``(F, F)`` of the states of training cells (:func:`scdiva.models.annotators.class_shape`).
    calibration
        From cells that were held out of the training.
    components
        What decides together with the network (geometric mean); None: the network alone.
    """

    method: str
    design: Design
    weights: Mapping[str, NDArray[np.float32]]
    class_mean: NDArray[np.float32]
    whitening: NDArray[np.float32]
    calibration: Calibration
    components: Components | None = None

    @property
    def n_classes(self) -> int:
        """K."""
        return int(self.class_mean.shape[0])

    def on(self, model: Embedder) -> FineTunedOnModel:
        """Return the annotator with the network that it needs.

        Raises
        ------
        BundleError
            The weights are of another model, or of another kind of model.
        UnsupportedError, ConfigError
            See :class:`~scdiva.models.scdiva.classifier.CellClassifier`.
        """
        if not isinstance(model, ScDiVa):
            raise BundleError(
                f"a {type(model).__name__} is not the model that the annotator was fitted with",
                expected="a native scDiVa model",
                fix="load that one",
            )
        classifier = CellClassifier(model, self.n_classes, self.design)
        classifier.load_trained(self.weights)
        return FineTunedOnModel(self, classifier.eval())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what is saved."""
        components: dict[str, NDArray[Any]] = {}
        if self.components is not None:
            regression = self.components.regression
            components = {
                **self.components.features.arrays(), "coef": regression.coef, "intercept": regression.intercept,
            }  # fmt: skip
        return {
            **{_WEIGHT + name: value for name, value in self.weights.items()},
            "design": np.array([self.design.n_layers, self.design.rank, self.design.max_tokens], dtype=np.int64),
            "class_mean": self.class_mean,
            "whitening": self.whitening,
            **self.calibration.arrays(),
            **components,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], method: str) -> Self:
        """Read what :meth:`arrays` returned."""
        components = None
        if "coef" in arrays:
            components = Components(Features.from_arrays(arrays), Regression(arrays["coef"], arrays["intercept"]))
        return cls(
            method,
            Design(*(int(number) for number in arrays["design"])),
            {name.removeprefix(_WEIGHT): value for name, value in arrays.items() if name.startswith(_WEIGHT)},
            arrays["class_mean"],
            arrays["whitening"],
            Calibration.from_arrays(arrays),
            components,
        )


@dataclass(frozen=True, slots=True, eq=False)
class FineTunedOnModel:
    """A fine-tuned annotator that can annotate.

    Parameters
    ----------
    annotator
        What was trained.
    classifier
        The network with it.
    """

    annotator: FineTuned
    classifier: CellClassifier

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.annotator.method

    @property
    def calibration(self) -> Calibration:
        """Temperature and threshold."""
        return self.annotator.calibration

    def said(self, cells: CellCounts, z: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return log-probabilities before calibration, ``(N, K)``, and distances from the nearest class, ``(N,)``."""
        state, log_probability = self.classifier.said(cells)
        if self.annotator.components is not None:
            log_probability = self.annotator.components.with_network(log_probability, cells, z)
        return log_probability, class_distance(state, self.annotator.class_mean, self.annotator.whitening)

    def calls(self, cells: CellCounts, z: NDArray[np.float32]) -> Calls:
        """Annotate cells, given with their embedding."""
        return self.calibration.calls(*self.said(cells, z))

    def adapted(self, cells: CellCounts, z: NDArray[np.float32], *, learns: bool) -> Self:
        """Return the annotator itself: a fine-tuned network does not adapt to a query."""
        return self

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what is saved."""
        return self.annotator.arrays()
