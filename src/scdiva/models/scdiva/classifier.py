"""A classifier of cells on the native network: the head, which weights are trained, and the loss.

The head reads what every supervised head reads, LayerNorm([z; h_LAT]) of the unmasked cell. It is a linear layer, which
starts at a logistic regression on the states of the frozen network, plus a residual MLP, which starts at zero: before
the first step the classifier is that regression, and training can only be kept where it does better on held-out cells
(our decision; Kumar et al., arXiv:2202.10054, show that a head at random first spoils what it is put on). The anchor,
and with it z, stays as it is.

Shape letters: B cells, T tokens of all cells together, S first tokens (one of each cell), D width, H heads, K width of
a head, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from scdiva.config import NativeConfig
from scdiva.errors import BundleError, ConfigError, UnsupportedError
from scdiva.models.scdiva.inputs import MaskedCells, OnDevice
from scdiva.models.scdiva.native import NativeNetwork, Trunk
from scdiva.models.scdiva.objectives import tokeniser_of
from scdiva.nn import Packing, ResidualMLP
from scdiva.nn.lora import add_lora
from scdiva.nn.transformer import Block
from scdiva.types import CellCounts, LossOutput

if TYPE_CHECKING:
    from scdiva.models.scdiva.model import ScDiVa

ADAPTED = ("qkv", "out", "gate_up", "down")
"""Linear layers of a trunk that adapters are put on: both of attention, both of the feed-forward layer."""
LORA_ALPHA = 16.0
"""Size of the adapters' correction: its factor is this over the rank (as is usual)."""
N_HIDDEN = 256
"""Width of the head's MLP."""
DROPOUT = 0.1
"""On what the head's MLP reads, in training (our decision)."""
MONITOR = "macro_f1_error"
"""Held-out value that the best step has the least of."""
_TIE = 1e-3
"""Weight of the likelihood beside the macro-F1: less than what one more cell called right is worth."""
_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Design:
    """Which weights of a trunk are trained, and how much of a cell it reads.

    Parameters
    ----------
    n_layers
        Last layers that are trained, with the final norm; 0: none.
    rank
        Rank of the adapters on all layers; 0: there are none.
    max_tokens
        L, best-ranked tokens of a cell that the trunk reads.
    """

    n_layers: int
    rank: int
    max_tokens: int


def native_trunk(model: ScDiVa, task: str) -> tuple[NativeNetwork, Trunk]:
    """Return the network of a model, and its trunk.

    Raises
    ------
    UnsupportedError
        The model is not native, or has no trunk; names the task.
    """
    network = model.native(task)
    if network.trunk is None:
        raise UnsupportedError(
            f"{model.name} has no trunk: there is nothing in it to train for {task}",
            expected="a native model with a trunk (scdiva inspect: model, trunk, n_layers)",
            fix="use a model such as scdiva-blood-tiny, or the methods 'probe' and 'reference'",
        )
    return network, network.trunk


class FirstTokenBlock(nn.Module):
    """A block that is computed for the first token of every sequence (:meth:`scdiva.nn.transformer.Block.first`).

    Annotators name their trained weights by it, as the last layer of a trunk.

    Parameters
    ----------
    block
        The block.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(
        self, x_TD: torch.Tensor, packing: Packing, rotary: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """Map ``(T, D)`` to ``(T, D)``."""
        return self.block.first(x_TD, packing, rotary)

    first = forward


class ClassifierHead(nn.Module):
    """Class logits: a linear layer plus a residual MLP that adds nothing at the start.

    Parameters
    ----------
    n_state, n_classes
        Widths.
    generator
        Randomness of the MLP's first layer.
    """

    def __init__(self, n_state: int, n_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = nn.Linear(n_state, n_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.mlp = ResidualMLP(n_state, N_HIDDEN, n_classes, generator=generator)

    @torch.no_grad()
    def start(self, coef: NDArray[np.floating], intercept: NDArray[np.floating]) -> None:
        """Start at a regression: ``coef`` is ``(n_state, n_classes)``."""
        self.linear.weight.copy_(torch.from_numpy(np.asarray(coef, dtype=np.float32).T))
        self.linear.bias.copy_(torch.from_numpy(np.asarray(intercept, dtype=np.float32)))

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """Map ``(B, n_state)`` to ``(B, C)``."""
        return self.linear(state) + self.mlp(F.dropout(state, DROPOUT, self.training))


class CellClassifier(nn.Module):
    """The native network with a head; a copy, so that the model it is made of stays as it is.

    Parameters
    ----------
    model
        A native model with a trunk.
    n_classes
        C.
    design
        What is trained.
    seed
        Seed of the adapters' and the head's start.

    Raises
    ------
    UnsupportedError
        The model is not native, or has no trunk.
    ConfigError
        More layers to train than there are, or an impossible rank.
    """

    def __init__(self, model: ScDiVa, n_classes: int, design: Design, *, seed: int = 0) -> None:
        super().__init__()
        native, trunk = native_trunk(model, "fine-tuned annotation")
        _check(design, trunk)
        network = copy.deepcopy(native).requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        transformer = cast(Trunk, network.trunk).transformer
        # PyTorch's layers draw their first weights from the global generator, which is the caller's
        with torch.random.fork_rng(devices=[]):
            if design.rank:
                add_lora(transformer.layers, ADAPTED, design.rank, alpha=LORA_ALPHA, generator=generator)
            if design.n_layers:
                transformer.norm.requires_grad_(True)
                transformer.layers[-design.n_layers :].requires_grad_(True)
            self.head = ClassifierHead(network.n_latent + transformer.width, n_classes, generator).to(model.device)
        transformer.layers[-1] = FirstTokenBlock(cast(Block, transformer.layers[-1]))
        self.network = network
        assert isinstance(model.config, NativeConfig)
        tokeniser = tokeniser_of(model.config, model.statistics)
        self.tokeniser = replace(tokeniser, max_tokens=min(tokeniser.max_tokens, design.max_tokens))

    def forward(self, cells: MaskedCells) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states, ``(B, n_state)``, and logits, ``(B, C)``, both float32.

        Frozen layers build no graph: nothing that reaches them needs a gradient.
        """
        state = self.network.cell_state(cells)
        return state, self.head(state).float()

    def read(self, cells: CellCounts, rng: np.random.Generator) -> MaskedCells:
        """Return whole cells, nothing hidden and no condition told, as the network reads them.

        The generator is used by the random order of the ordering ablation only.
        """
        return self.tokeniser.unmasked(cells, rng)

    @torch.inference_mode()
    def said(self, cells: CellCounts, *, use_bf16: bool = False) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Return states, ``(N, n_state)``, and log-probabilities, ``(N, C)``, of raw counts; block by block.

        Without bf16 a cell's rows do not depend on what it is in a block with, but for the last digits of float32.
        """
        device = next(self.parameters()).device
        states, logits = [], []
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=use_bf16):
            for first in range(0, cells.n_cells, _BLOCK):
                rows = np.arange(first, min(first + _BLOCK, cells.n_cells))
                state, logit = self(self.read(cells.take(rows), np.random.default_rng(0)).to(device))
                states.append(state.float().cpu())
                logits.append(logit.double().cpu())
        if not states:
            width, n_classes = self.head.linear.in_features, self.head.linear.out_features
            return np.empty((0, width), dtype=np.float32), np.empty((0, n_classes))
        return torch.cat(states).numpy(), torch.log_softmax(torch.cat(logits), dim=1).numpy()

    def trained(self) -> dict[str, NDArray[np.float32]]:
        """Return the weights that training changes, by name."""
        return {
            name: parameter.detach().float().cpu().numpy()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def load_trained(self, weights: Mapping[str, NDArray[np.float32]]) -> None:
        """Take over what :meth:`trained` returned.

        Raises
        ------
        BundleError
            Names or shapes are others.
        """
        own = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        wrong = sorted(own.keys() ^ weights.keys()) or sorted(
            name for name, value in weights.items() if tuple(value.shape) != tuple(own[name].shape)
        )
        if wrong:
            raise BundleError(
                f"the trained weights do not fit the model: {', '.join(wrong[:3])}",
                expected="those that were trained with this very model",
                fix="load the model that the annotator was fitted with, or fit it again",
            )
        for name, parameter in own.items():
            parameter.copy_(torch.from_numpy(np.asarray(weights[name], dtype=np.float32)))


def _check(design: Design, trunk: Trunk) -> None:
    layers = trunk.transformer.layers
    if not 0 <= design.n_layers <= len(layers):
        raise ConfigError(
            f"{design.n_layers} layers to train", expected=f"0 to {len(layers)}, what the trunk has", fix="give fewer"
        )
    limit = min(trunk.transformer.width, trunk.transformer.n_hidden)
    if not 0 <= design.rank <= limit:
        raise ConfigError(f"adapters of rank {design.rank}", expected=f"1 to {limit}", fix="8 is usual")
    if design.max_tokens < 1:
        raise ConfigError(f"max_tokens = {design.max_tokens}", expected="at least 1", fix="leave it out")


@dataclass(frozen=True, slots=True)
class LabelledCells(OnDevice):
    """Cells with their classes.

    Parameters
    ----------
    cells
        What the network reads.
    code_B
        int64 classes.
    """

    cells: MaskedCells
    code_B: torch.Tensor


class ClassifierObjective(nn.Module):
    """Cross-entropy of the classes of whole, unmasked cells.

    Cells are not thinned in training: a head that has learned what is right for cells of half the depth is wrong for
    whole ones (held-out nats per cell 0.22, and 0.33 after one epoch, on pbmc3k).

    Held-out cells give ``nll`` (nats per cell, unweighted), ``accuracy`` and ``macro_f1`` over the classes that are
    among them. A macro-F1 is no mean over cells; but the shares of cells that are of a class, are called so, and both,
    are, and it is a function of these. So it is exact, whatever the minibatches and however many processes.

    Parameters
    ----------
    classifier
        What is trained.
    code
        ``(N,)`` class of each cell, by ``cells.cell_index``.
    class_weight
        ``(C,)`` weight of a cell of each class, mean over training cells 1.
    trunk_ratio
        Learning rate of what is trained of the trunk, as a multiple of the head's.
    """

    class_weight: torch.Tensor

    def __init__(
        self,
        classifier: CellClassifier,
        code: NDArray[np.integer],
        class_weight: NDArray[np.floating],
        *,
        trunk_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.code = np.asarray(code, dtype=np.int64)
        self.trunk_ratio = trunk_ratio
        weight = torch.from_numpy(np.asarray(class_weight, dtype=np.float32))
        self.register_buffer("class_weight", weight, persistent=False)

    @property
    def n_classes(self) -> int:
        """C."""
        return self.class_weight.numel()

    def learning_rate_ratios(self) -> dict[nn.Parameter, float]:
        """Return multiples of the learning rate: of the trunk's weights."""
        return dict.fromkeys(
            (parameter for parameter in self.classifier.network.parameters() if parameter.requires_grad),
            self.trunk_ratio,
        )

    def prepare(self, cells: CellCounts, rng: np.random.Generator) -> LabelledCells:
        """Read whole cells, and look up their classes."""
        return LabelledCells(self.classifier.read(cells, rng), torch.from_numpy(self.code[cells.cell_index]))

    def prepare_heldout(self, cells: CellCounts, rng: np.random.Generator) -> LabelledCells:
        """Do the same as :meth:`prepare`."""
        return self.prepare(cells, rng)

    def forward(self, inputs: LabelledCells, generator: torch.Generator) -> LossOutput:
        """Return the weighted cross-entropy and, of held-out cells, what :meth:`heldout_summary` needs."""
        code_B = inputs.code_B
        _, logit_BC = self.classifier(inputs.cells)
        nll_B = F.cross_entropy(logit_BC, code_B, reduction="none")
        loss = (self.class_weight[code_B] * nll_B).mean()
        called_B = logit_BC.argmax(dim=1)
        is_right_B = called_B == code_B
        terms = {"nll": nll_B.mean().detach(), "accuracy": is_right_B.float().mean()}
        if not self.training:
            n_classes = self.n_classes
            counts = (code_B, called_B, code_B[is_right_B])
            for name, found in zip(("is", "called", "both"), counts, strict=True):
                share_C = torch.bincount(found, minlength=n_classes).double() / code_B.numel()
                terms |= {f"{name}_{c}": share_C[c] for c in range(n_classes)}
        return LossOutput(loss, terms, inputs.cells.n_cells)

    def heldout_summary(self, values: Mapping[str, float]) -> dict[str, float]:
        """Turn means over held-out cells into scores; :data:`MONITOR` is 1 - macro-F1, with ties broken by ``nll``."""
        shares = {
            name: np.array([values[f"{name}_{c}"] for c in range(self.n_classes)]) for name in ("is", "called", "both")
        }
        is_there = shares["is"] > 0
        f1 = 2 * shares["both"][is_there] / (shares["is"] + shares["called"])[is_there]
        macro_f1 = float(f1.mean())
        kept = {name: values[name] for name in ("loss", "nll", "accuracy")}
        return {**kept, "macro_f1": macro_f1, MONITOR: 1.0 - macro_f1 + _TIE * values["nll"]}


def class_weights(code: NDArray[np.integer], n_classes: int, *, is_balanced: bool) -> NDArray[np.float64]:
    """Weight of a cell of each class, ``(C,)``; mean over the given cells 1.

    Balanced, it falls with the square root of the class's size. Full balance, as in the probe, is for an optimum that
    sees all cells at once: in a minibatch, the only cell of a rare class would pull a hundred times as hard as any
    other, one step in ten (our decision).
    """
    sizes = np.bincount(code, minlength=n_classes)
    if not is_balanced:
        return np.ones(n_classes)
    weight = np.maximum(sizes, 1) ** -0.5
    return np.asarray(weight * sizes.sum() / (weight * sizes).sum())
