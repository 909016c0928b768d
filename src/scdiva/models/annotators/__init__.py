"""Annotators: from cells to probabilities of cell types, and to how unlike the reference a cell is.

On top of a frozen model:

- :class:`ReferenceIndex`: nothing is trained; the neighbours of a cell in the embedding of a labelled reference vote;
- :class:`Probe`: a logistic regression on z beside components of the reference's own variable genes: z carries what
  other cells have taught, components what only this reference shows. It can be aligned with the cells it is to
  annotate, which may be of another laboratory;
- :class:`Consensus`: several annotators, each as much as the others agree with it on the cells it is to annotate.

Those whose network is trained as well are in ``models/scdiva/finetuned.py`` (fine-tuning, adapters) and
``models/scdiva/integrated.py`` (neighbours in an embedding that has been integrated). All are calibrated on reference
cells that did not vote for themselves: a temperature for probabilities, and a threshold of novelty that a stated share
of known cells exceeds.
"""

from scdiva.models.annotators.calibration import (
    FALSE_UNKNOWN_RATE,
    Annotator,
    Calibration,
    Calls,
    HeldOut,
    temperature_of,
)
from scdiva.models.annotators.consensus import Consensus
from scdiva.models.annotators.features import (
    Features,
    Regression,
    class_distance,
    class_shape,
    classes_of,
    some_of_each,
)
from scdiva.models.annotators.index import ReferenceIndex
from scdiva.models.annotators.probe import FEW_FOR_SELF_TRAINING, Probe

__all__ = [
    "FALSE_UNKNOWN_RATE",
    "FEW_FOR_SELF_TRAINING",
    "Annotator",
    "Calibration",
    "Calls",
    "Consensus",
    "Features",
    "HeldOut",
    "Probe",
    "ReferenceIndex",
    "Regression",
    "class_distance",
    "class_shape",
    "classes_of",
    "some_of_each",
    "temperature_of",
]
