"""[PERT] tokens: what was done to a cell, as the trunk reads it.

A token per perturbed gene: its gene embedding, seen through the trunk's own gene layer, plus the kind of perturbation.
So any gene of the vocabulary can be perturbed, also one that never was in training. A drug or cytokine has a learned
vector by its name, plus its dose. Control cells read a learned [CTRL]. (scDiVa, arXiv 2602.03477, names a [PERT] token;
what is in it is our decision.)

Every cell has the same number of places for them, so that no truncation drops one and that what a cell reads does not
depend on the cells it is in a minibatch with; empty places hold a learned vector.

Shape letters: B cells, K places, E gene embedding, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from scdiva.data.perturbations import Kind, Perturbation
from scdiva.errors import ConfigError
from scdiva.genes import GeneVocabulary
from scdiva.models.scdiva.inputs import OnDevice

KINDS: tuple[Kind, ...] = ("knockout", "activation", "treatment")
_EMPTY, _CONTROL, _GENE, _NAME = range(4)


@dataclass(frozen=True, slots=True)
class PerturbationCodes(OnDevice):
    """The perturbations of some cells, place by place.

    Parameters
    ----------
    what_BK
        int64: nothing, control, a gene, or a name.
    index_BK
        int64 gene of the vocabulary, or position among the names.
    kind_BK
        int64 position in :data:`KINDS`.
    dose_BK
        float32 log1p(dose); 0 where there is none.
    has_dose_BK
        Whether there is a dose.
    """

    what_BK: torch.Tensor
    index_BK: torch.Tensor
    kind_BK: torch.Tensor
    dose_BK: torch.Tensor
    has_dose_BK: torch.Tensor

    def take(self, rows: torch.Tensor) -> PerturbationCodes:
        """Return some cells' codes."""
        return PerturbationCodes(
            self.what_BK[rows], self.index_BK[rows], self.kind_BK[rows], self.dose_BK[rows], self.has_dose_BK[rows]
        )


def gene_of_symbol(vocabulary: GeneVocabulary) -> dict[str, int]:
    """Return the index of each symbol; of a symbol that two genes share, the first."""
    symbols = vocabulary.symbol.tolist()
    return {symbol: index for index, symbol in reversed(list(enumerate(symbols)))}


@dataclass(frozen=True, slots=True)
class PerturbationCoder:
    """Turns perturbations into codes.

    Parameters
    ----------
    vocabulary
        Genes.
    names
        Drugs and cytokines that have a learned vector, and perturbed things that are no gene of the vocabulary.
    n_places
        K, places of a cell.
    """

    vocabulary: GeneVocabulary
    names: tuple[str, ...]
    n_places: int
    gene_of: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Look the symbols up once: there are tens of thousands of them."""
        object.__setattr__(self, "gene_of", gene_of_symbol(self.vocabulary))

    def is_known(self, perturbation: Perturbation) -> bool:
        """Tell whether every target is a gene of the vocabulary, or has a learned vector."""
        return all(
            target in self.names or (perturbation.kind != "treatment" and target in self.gene_of)
            for target in perturbation.targets
        )

    def codes(self, perturbations: Sequence[Perturbation]) -> PerturbationCodes:
        """Return the codes of a list of perturbations, one row each.

        Raises
        ------
        ConfigError
            A target that is neither a gene of the vocabulary nor a name seen in training, or more targets than places.
        """
        shape = len(perturbations), self.n_places
        what, index, kind = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        dose, has_dose = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=bool)
        for row, perturbation in enumerate(perturbations):
            if perturbation.is_control:
                what[row, 0] = _CONTROL
            if len(perturbation.targets) > self.n_places:
                raise ConfigError(
                    f"{perturbation.name} has {len(perturbation.targets)} targets",
                    expected=f"at most {self.n_places}, the places of this model",
                    fix="train the model with larger combinations (n_places)",
                )
            for place, target in enumerate(perturbation.targets):
                kind[row, place] = KINDS.index(perturbation.kind)
                if target in self.names:
                    what[row, place], index[row, place] = _NAME, self.names.index(target)
                elif perturbation.kind != "treatment" and target in self.gene_of:
                    what[row, place], index[row, place] = _GENE, self.gene_of[target]
                else:
                    raise ConfigError(
                        f"{target!r} cannot be perturbed in this model",
                        expected="a gene of its vocabulary"
                        + (f", or one of {', '.join(self.names)}" if self.names else ""),
                        fix="use the gene's symbol; a drug or cytokine must have been seen in training",
                    )
                if perturbation.dose is not None:
                    dose[row, place], has_dose[row, place] = np.log1p(perturbation.dose), True
        return PerturbationCodes(*(torch.from_numpy(array) for array in (what, index, kind, dose, has_dose)))


class PerturbationTokens(nn.Module):
    """Embeds perturbations as tokens of the trunk.

    Parameters
    ----------
    width
        D.
    n_names
        Drugs, cytokines and things that are no gene of the vocabulary.
    generator
        Randomness of the start.
    """

    def __init__(self, width: int, n_names: int, generator: torch.Generator) -> None:
        super().__init__()
        self.kind = nn.Embedding(len(KINDS), width)
        self.name = nn.Embedding(max(n_names, 1), width)
        self.control = nn.Parameter(torch.empty(width))
        self.empty = nn.Parameter(torch.empty(width))
        self.dose_scale = nn.Parameter(torch.empty(width))
        self.dose_shift = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.name.weight, std=1.0, generator=generator)
        for weight in (self.kind.weight, self.control, self.empty, self.dose_scale, self.dose_shift):
            nn.init.normal_(weight, std=0.02, generator=generator)

    def forward(self, codes: PerturbationCodes, gene_layer: nn.Module, gene_embedding: torch.Tensor) -> torch.Tensor:
        """Return tokens, ``(B, K, D)``.

        Parameters
        ----------
        codes
            What was done.
        gene_layer
            The trunk's map of gene embeddings to its width.
        gene_embedding
            ``(G, E)``.
        """
        is_gene, is_name = codes.what_BK == _GENE, codes.what_BK == _NAME
        gene = gene_layer(F.embedding(torch.where(is_gene, codes.index_BK, 0), gene_embedding))
        name = self.name(torch.where(is_name, codes.index_BK, 0))
        token = torch.where(is_gene[..., None], gene, name) + self.kind(codes.kind_BK)
        dose = codes.dose_BK[..., None] * self.dose_scale + self.dose_shift
        token = token + torch.where(codes.has_dose_BK[..., None], dose, 0.0)
        token = torch.where((codes.what_BK == _CONTROL)[..., None], self.control, token)
        return torch.where((codes.what_BK == _EMPTY)[..., None], self.empty, token)
