"""Single perturbed cells: the masked diffusion, told what was done, emits integer counts with a predicted mean.

A predictor of mean changes says how much of each gene a perturbation adds or removes on average; it says nothing of
single cells. A drawn cell starts at a control cell whose counts are moved by the predicted change
(:class:`scdiva.data.shifting.CountShift`). Then genes are hidden and drawn again by the masked diffusion, which reads
what was done ([PERT] tokens), z of the moved cell, and everything that stays visible. Hidden are the genes that change
(inpainting: what the perturbation leaves alone stays as in the control cell), or all. One number per gene, a log rate,
added to the gene's log-odds and to its log-mean count, makes the mean over drawn cells the predicted one; it is found
by a few pilot rounds. (Our decisions.)

Shape letters: B cells, G genes, K places of perturbations, Z latent.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import nn

from scdiva.config import NativeConfig, NativeObjectiveConfig
from scdiva.data.shifting import CountShift, checked_change, mean_log1p
from scdiva.diffusion.samplers import Sampler, SetState, sample_sets
from scdiva.errors import ConfigError
from scdiva.models.scdiva.calibration import calibrate
from scdiva.models.scdiva.classifier import native_trunk
from scdiva.models.scdiva.generation import GuidedPrediction, Wish, visible_cells
from scdiva.models.scdiva.inputs import MaskedCells, PackedCells, Targets, Tokeniser
from scdiva.models.scdiva.native import PER_GENE, DenoiserOutput, NativeNetwork, SimpleModel
from scdiva.models.scdiva.objectives import DenoisedCells, HeldoutCells, NativeObjective, SplitViews, tokeniser_of
from scdiva.models.scdiva.perturbation_tokens import PerturbationCodes, PerturbationCoder, PerturbationTokens
from scdiva.nn.precision import uses_bf16
from scdiva.types import CellCounts, LossOutput

if TYPE_CHECKING:
    from scdiva.models.scdiva.model import ScDiVa

OBJECTIVE = NativeObjectiveConfig(p_split=0.3, p_visible=0.2, p_whole=0.4, p_joint=0.5, p_values=0.2, p_staged=0.2)
"""Shares of the training modes: those of fine-tuning with conditions, most cells denoised as they are generated."""
DROPOUT = 0.1
"""Share of training cells that are not told what was done: guidance needs a prediction without."""
GROUP = 64
"""Cells that are drawn together, with one random stream."""
_CALIBRATION_CELLS, _CALIBRATION_BATCH = 1024, 64
_VIEW_SHARE = 0.5
_STEP_LIMIT, _OFFSET_LIMIT = 1.0, 3.0
_PRIOR_CELLS = 8.0
"""Weight, in pilot cells that have the gene, of the network's own opinion against what they show."""
_ROWS, _SHIFT, _CELLS, _PILOT, _DRAWS = 201, 202, 203, 204, 205  # tags of the random streams

Redrawn = Literal["changed", "all"]
Trained = Literal["all", "last"]


@dataclass(frozen=True, slots=True)
class ToldCells(MaskedCells):
    """Cells as the network sees them at time t, with what was done to them.

    Parameters
    ----------
    codes
        The perturbations; all places empty: it is not told.
    """

    codes: PerturbationCodes

    @classmethod
    def of(cls, cells: MaskedCells, codes: PerturbationCodes) -> Self:
        """Tell some cells' perturbations."""
        return cls(**{f.name: getattr(cells, f.name) for f in fields(MaskedCells)}, codes=codes)


class PerturbedNetwork(NativeNetwork):
    """A native network whose trunk reads [PERT] tokens.

    Parameters
    ----------
    n_genes, config, label_sizes
        As of :class:`~scdiva.models.scdiva.native.NativeNetwork`.
    n_names
        Drugs, cytokines and things that are no gene of the vocabulary.
    seed
        Seed of the tokens' start.
    """

    def __init__(
        self, n_genes: int, config: NativeConfig, label_sizes: tuple[int, ...], n_names: int, *, seed: int = 0
    ) -> None:
        super().__init__(n_genes, config, label_sizes)
        self.tokens = PerturbationTokens(config.trunk.width, n_names, torch.Generator().manual_seed(seed))

    @classmethod
    def of(cls, model: ScDiVa, n_names: int, *, seed: int = 0) -> Self:
        """Copy a model's network, and add tokens; the model stays as it is.

        Raises
        ------
        UnsupportedError, UntrainedHeadError
            The model cannot generate, or has no trunk.
        """
        native = model.check_generates()
        native_trunk(model, "generation of perturbed cells")
        config = model.config
        assert isinstance(config, NativeConfig)
        # PyTorch's layers draw their first weights from the global generator, which is the caller's
        with torch.random.fork_rng(devices=[]):
            network = cls(native.n_genes, config, tuple(model.labels.sizes), n_names, seed=seed)
        if native.label_field is not None:
            network.add_label_offsets(native.label_field, native.label_confidence.numel() - 1)
        state = {name: tensor.detach().cpu() for name, tensor in native.state_dict().items()}
        own = {f"tokens.{name}": tensor for name, tensor in network.tokens.state_dict().items()}
        network.load_state_dict({**state, **own}, strict=True)
        return network.eval()

    def forward(
        self, cells: MaskedCells, z_BZ: torch.Tensor | None = None, extra_BKD: torch.Tensor | None = None
    ) -> DenoiserOutput:
        """Predict what is hidden; the perturbations are those of ``cells``, which are :class:`ToldCells`."""
        if extra_BKD is None:
            if not isinstance(cells, ToldCells):
                raise TypeError("a PerturbedNetwork reads ToldCells")
            assert self.trunk is not None
            extra_BKD = self.tokens(cells.codes, self.trunk.gene, self.anchor.gene_embedding)
        return super().forward(cells, z_BZ, extra_BKD)


class PerturbationDenoising(NativeObjective):
    """The loss of the native model on perturbed and control cells, told what was done to them.

    Masks, views, terms and the guarantee that nothing scored reaches the network are those of
    :class:`~scdiva.models.scdiva.objectives.NativeObjective`. Of a share of the training cells the perturbation is not
    told. Held-out terms come without floors: those are of corpora.

    Parameters
    ----------
    model
        A native model with a trunk, which stays as it is: a copy is trained.
    codes
        Perturbation of every cell, row ``cells.cell_index``; control cells with theirs.
    n_names
        As of :class:`PerturbedNetwork`.
    config
        Shares of training modes, and weights.
    trained
        "all": everything but the gene embeddings. "last": of the trunk the last ``n_layers`` layers, the heads, the
        tokens, and the numbers of single genes.
    n_layers
        Layers that "last" trains.
    dropout
        Share of training cells that are not told.
    seed
        Seed of the tokens' start.

    Raises
    ------
    UnsupportedError, UntrainedHeadError
        The model cannot generate, or has no trunk.
    ConfigError
        More layers than there are, or an impossible share.
    """

    network: PerturbedNetwork

    def __init__(
        self,
        model: ScDiVa,
        codes: PerturbationCodes,
        *,
        n_names: int,
        config: NativeObjectiveConfig = OBJECTIVE,
        trained: Trained = "all",
        n_layers: int = 1,
        dropout: float = DROPOUT,
        seed: int = 0,
    ) -> None:
        network = PerturbedNetwork.of(model, n_names, seed=seed)
        assert isinstance(model.config, NativeConfig)
        floors = SimpleModel(
            network.anchor.log_profile,
            network.detection_logit,
            network.log_theta,
            float(network.mean_log_depth),
            torch.zeros(network.n_genes),
        )
        super().__init__(network, config, model.config, model.statistics, floors)
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout={dropout}", expected="0 up to, not including, 1", fix="0.1 is usual")
        self.codes, self.dropout = codes, dropout
        _choose_trained(network, trained, n_layers)

    def prepare(self, cells: CellCounts, rng: np.random.Generator) -> SplitViews | DenoisedCells:
        """Split, mask and pack cells for training."""
        inputs = super().prepare(cells, rng)
        assert isinstance(inputs, DenoisedCells)
        codes = self.codes.take(torch.from_numpy(cells.cell_index))
        is_told = torch.from_numpy(rng.random(cells.n_cells) >= self.dropout)
        return replace(inputs, cells=ToldCells.of(inputs.cells, untold(codes, is_told)))

    def prepare_heldout(self, cells: CellCounts, rng: np.random.Generator) -> HeldoutCells:
        """Split and mask held-out cells; all are told."""
        inputs = super().prepare_heldout(cells, rng)
        codes = self.codes.take(torch.from_numpy(cells.cell_index))
        return replace(inputs, at=tuple(replace(at, cells=ToldCells.of(at.cells, codes)) for at in inputs.at))

    def forward(self, inputs: SplitViews | DenoisedCells | HeldoutCells, generator: torch.Generator) -> LossOutput:
        """Return the weighted loss and its terms."""
        said = super().forward(inputs, generator)
        terms = {name: value for name, value in said.terms.items() if not name.endswith("_floor")}
        return replace(said, terms=terms)

    @torch.no_grad()
    def calibrate(self, cells: CellCounts, rng: np.random.Generator, *, use_bf16: bool = False) -> None:
        """Set the numbers of single genes to their best for some training cells, at most 1,024 of them.

        The cells are masked as they are generated: whole, told, and with a z of a half of their molecules
        (``models.scdiva.calibration``).
        """
        usual, told = self.config, self.dropout
        self.config = usual.model_copy(
            update={
                "p_split": 0.0, "p_visible": 0.0, "p_whole": 1.0, "p_joint": 0.9, "p_values": 0.0, "p_staged": 0.0,
                "rho_min": _VIEW_SHARE, "rho_max": _VIEW_SHARE, "condition_dropout": 0.0,
            }
        )  # fmt: skip
        self.dropout = 0.0
        chosen = rng.permutation(cells.n_cells)[:_CALIBRATION_CELLS]

        def masked() -> list[tuple[MaskedCells, Targets]]:
            found = []
            for first in range(0, chosen.size, _CALIBRATION_BATCH):
                inputs = self.prepare(cells.take(chosen[first : first + _CALIBRATION_BATCH]), rng)
                assert isinstance(inputs, DenoisedCells)
                found.append((inputs.cells, inputs.targets))
            return found

        try:
            calibrate(self.network.cpu(), masked(), use_bf16=use_bf16)
        finally:
            self.config, self.dropout = usual, told


def untold(codes: PerturbationCodes, is_told_B: torch.Tensor) -> PerturbationCodes:
    """Empty all places of some cells: what was done to them is not told."""
    return replace(codes, what_BK=torch.where(is_told_B[:, None], codes.what_BK, 0))


def _choose_trained(network: PerturbedNetwork, trained: Trained, n_layers: int) -> None:
    trunk = network.trunk
    assert trunk is not None
    layers = trunk.transformer.layers
    if trained == "last":
        if not 0 <= n_layers <= len(layers):
            raise ConfigError(
                f"{n_layers} layers to train", expected=f"0 to {len(layers)}, what the trunk has", fix="give fewer"
            )
        network.requires_grad_(False)
        heads = [trunk.query_direction, trunk.value_head_up, trunk.value_head_down, trunk.dispersion_head]
        for module in [network.tokens, trunk.transformer.norm, *layers[len(layers) - n_layers :], *heads]:
            if module is not None:
                module.requires_grad_(True)
        for name, parameter in network.named_parameters():
            if name in PER_GENE:
                parameter.requires_grad_(True)
    network.anchor.gene_embedding.requires_grad_(False)


@dataclass(frozen=True, slots=True)
class DrawnCells:
    """Drawn perturbed cells.

    Parameters
    ----------
    cells
        Integer counts; ``library_size`` holds what the control cell had outside the vocabulary, and ``cell_index`` is
        that of the control cell that the cell started at.
    is_redrawn_G
        Genes that the masked diffusion drew; the others are the control cell's, moved by the predicted change.
    offset_G
        float32 log rates that made the mean the predicted one; 0 of genes that were not drawn.
    target_G
        float64 mean log1p(CP10K) that was aimed at.
    """

    cells: CellCounts
    is_redrawn_G: NDArray[np.bool_]
    offset_G: NDArray[np.float32]
    target_G: NDArray[np.float64]


def draw_perturbed(
    network: PerturbedNetwork,
    tokeniser: Tokeniser,
    codes: PerturbationCodes,
    control: CellCounts,
    change_G: NDArray[np.floating],
    *,
    n_cells: int,
    sampler: Sampler | None = None,
    seed: int = 0,
    redrawn: Redrawn = "changed",
    min_change: float = 0.1,
    min_mean: float = 0.02,
    guidance: float = 1.0,
    n_pilot: int = 256,
    n_rounds: int = 3,
) -> DrawnCells:
    """Draw cells of one perturbation that have a predicted mean.

    Parameters
    ----------
    network
        Fine-tuned by :class:`PerturbationDenoising`.
    tokeniser
        How cells become tokens (:func:`scdiva.models.scdiva.objectives.tokeniser_of`).
    codes
        The perturbation, one row.
    control
        Control cells of the context; drawn cells start at them in turn.
    change_G
        ``(n_genes,)`` predicted change of the mean of log1p(CP10K); NaN: unmeasured, the gene stays as it is.
    n_cells
        How many.
    sampler
        How hidden genes are drawn.
    seed
        Seed of everything: equal calls give equal cells. Cells are drawn in groups of 64 with one random stream each.
    redrawn
        "changed": genes whose mean changes by at least ``min_change`` are hidden and drawn again, the others stay.
        "all": everything is drawn.
    min_change
        Smallest change, of log1p(CP10K), of a gene that is drawn again.
    min_mean
        Smallest target of such a gene: rarer ones keep the moved counts of the control cell.
    guidance
        Weight of what was done; 1 is plain conditioning.
    n_pilot, n_rounds
        Pilot cells and rounds by which the log rates are found; 0 rounds: none.

    Raises
    ------
    ConfigError
        No control cells, an impossible number, or changes that do not fit the genes.
    """
    change = checked_change(change_G, control)
    if n_cells < 1 or n_pilot < 1 or n_rounds < 0 or seed < 0:
        raise ConfigError(
            f"n_cells={n_cells}, n_pilot={n_pilot}, n_rounds={n_rounds}, seed={seed}",
            expected="at least one cell and pilot cell; rounds and seed 0 or more",
            fix="leave out what you do not need",
        )
    if codes.what_BK.shape[0] != 1:
        raise ConfigError(
            f"codes of {codes.what_BK.shape[0]} perturbations", expected="one", fix="draw each perturbation on its own"
        )
    shift = CountShift.fit(control, change, np.random.default_rng([seed, _SHIFT]))
    is_redrawn = (np.abs(change) >= min_change) & (shift.target_G >= min_mean)
    if redrawn == "all":
        is_redrawn = shift.target_G > 0
    drawing = _Drawing(network, tokeniser, codes, sampler or Sampler(n_steps=8), guidance, is_redrawn)
    offset = np.zeros(control.n_genes, dtype=np.float32)
    scalar = 0.0
    if is_redrawn.any() and n_rounds:
        pilot = shift.apply(
            control.take(_in_turn(control.n_cells, n_pilot, np.random.default_rng([seed, _PILOT]))),
            np.random.default_rng([seed, _PILOT, 1]),
        )
        for number in range(n_rounds):
            found = drawing.draw(pilot, offset, scalar, (seed, _PILOT, 2, number))
            offset = _adjusted(offset, found, shift.target_G, is_redrawn)
            wanted, drawn = (float(cells.counts[:, is_redrawn].sum()) for cells in (pilot, found))
            scalar += float(np.log(max(wanted, 1.0) / max(drawn, 1.0)))
    rows = _in_turn(control.n_cells, n_cells, np.random.default_rng([seed, _ROWS]))
    start = shift.apply(control.take(rows), np.random.default_rng([seed, _CELLS]))
    cells = start if not is_redrawn.any() else drawing.draw(start, offset, scalar, (seed, _DRAWS))
    return DrawnCells(cells, is_redrawn, offset, shift.target_G)


def _in_turn(n_control: int, n_cells: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Every control cell as often as any other, give or take one, in random order."""
    rounds = [rng.permutation(n_control) for _ in range(-(-n_cells // n_control))]
    return np.concatenate(rounds)[:n_cells]


def _adjusted(
    offset_G: NDArray[np.float32], found: CellCounts, target_G: NDArray[np.float64], is_redrawn_G: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Return log rates that bring the mean of drawn cells nearer to the target: a Newton step for each gene.

    In a gene of which p of the cells have counts, a higher log rate makes more cells have it, p (1 - p), of mean value
    v, and more of it in each, p times the mean of y / (1 + y), y in CP10K.
    """
    counts, n_cells = found.counts, found.n_cells
    mean_G = mean_log1p(counts, found.library_size)
    value = 1e4 * counts.data / np.repeat(np.maximum(found.library_size, 1.0), np.diff(counts.indptr))
    n_G = np.bincount(counts.indices, minlength=counts.shape[1])
    level_G = np.bincount(counts.indices, weights=value / (1 + value), minlength=counts.shape[1]) / n_cells
    p_G = n_G / n_cells
    of_cell_G = mean_G / np.maximum(p_G, 1.0 / n_cells)
    slope_G = (1.0 - p_G) * mean_G + level_G * p_G
    prior_G = _PRIOR_CELLS / n_cells * np.maximum(of_cell_G, 1.0)
    step_G = np.clip((target_G - mean_G) / (slope_G + prior_G), -_STEP_LIMIT, _STEP_LIMIT)
    new_G = np.clip(offset_G + np.where(is_redrawn_G, step_G, 0.0), -_OFFSET_LIMIT, _OFFSET_LIMIT)
    return np.asarray(new_G, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class _Drawing:
    """How the genes that are drawn again are drawn."""

    network: PerturbedNetwork
    tokeniser: Tokeniser
    codes: PerturbationCodes
    sampler: Sampler
    guidance: float
    is_redrawn_G: NDArray[np.bool_]

    @torch.inference_mode()
    def draw(self, start: CellCounts, offset_G: NDArray[np.float32], scalar: float, key: tuple[int, ...]) -> CellCounts:
        """Hide the genes, and draw as many of them anew as the moved cell has."""
        parts = []
        for number, first in enumerate(range(0, start.n_cells, GROUP)):
            cells = start.take(np.arange(first, min(first + GROUP, start.n_cells)))
            parts.append(self._group(cells, offset_G, scalar, (*key, number)))
        counts = sp.csr_matrix(sp.vstack(parts, format="csr"), dtype=np.int32)
        counts.sort_indices()
        before, after = (np.asarray(x.sum(axis=1), dtype=np.float64).ravel() for x in (start.counts, counts))
        return replace(start, counts=counts, library_size=start.library_size - before + after)

    def _group(
        self, cells: CellCounts, offset_G: NDArray[np.float32], scalar: float, key: tuple[int, ...]
    ) -> sp.csr_matrix:
        device = self.network.null_latent.device
        dense = cells.counts.toarray()
        # a gene that is not measured is not drawn
        visible = np.where(self.is_redrawn_G, 0, dense)
        n_hidden = (dense > 0).sum(axis=1) - (visible > 0).sum(axis=1)
        state = SetState(
            torch.from_numpy(visible.astype(np.int32)).to(device),
            torch.from_numpy(n_hidden.astype(np.int64)).to(device),
            torch.ones(cells.n_cells, dtype=torch.float64, device=device),
        )
        entropy = np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0]
        generator = torch.Generator(device).manual_seed(int(entropy >> np.uint64(1)))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bf16("auto", device.type)):
            end = sample_sets(self._predict(cells, offset_G, scalar), state, self.sampler, generator)
        return sp.csr_matrix(end.count_BG.cpu().numpy())

    def _predict(
        self, cells: CellCounts, offset_G: NDArray[np.float32], scalar: float
    ) -> Callable[[SetState], GuidedPrediction]:
        network, device = self.network, self.network.null_latent.device
        assert network.trunk is not None
        depth = np.asarray(cells.counts.sum(axis=1)).ravel().astype(np.int64)
        packed = PackedCells.pack(cells).to(device)
        z_BZ = network.anchor.encode(network.pooled(packed)).float()
        n_fields = len(network.trunk.labels)
        condition = cells.condition if cells.condition.shape[1] else np.zeros((cells.n_cells, n_fields), np.int32)
        wish = Wish(
            depth=depth,
            library_size=cells.library_size,
            condition=condition,
            is_measured=cells.is_measured[cells.source_of_cell],
            weight=np.ones(condition.shape[1]),
            z_depth=depth.astype(np.float32),
        )
        row = torch.zeros(cells.n_cells, dtype=torch.int64)
        told = self.codes.take(row).to(device)
        allowed_G = torch.from_numpy(self.is_redrawn_G).to(device)
        rate_G = torch.from_numpy(offset_G).to(device)

        def said(masked: MaskedCells, codes: PerturbationCodes) -> DenoiserOutput:
            output = network(ToldCells.of(masked, codes), z_BZ)
            # log_total is of the rates before: the log-mean of a gene moves by its own number
            return replace(
                output,
                gene_logit_BG=output.gene_logit_BG + rate_G,
                log_rate_BG=output.log_rate_BG + rate_G + scalar,
            )

        def predict(state: SetState) -> GuidedPrediction:
            masked = visible_cells(state, self.tokeniser, wish).to(device)
            masked = replace(masked, is_admissible_BG=masked.is_admissible_BG & allowed_G)
            outputs = [said(masked, told)]
            weights = [torch.ones(cells.n_cells, device=device)]
            if self.guidance != 1.0:
                extra = (self.guidance - 1.0) * (1.0 - state.t_B.float())
                outputs.append(said(masked, untold(told, torch.zeros(cells.n_cells, dtype=torch.bool, device=device))))
                weights = [1.0 + extra, -extra]
            return GuidedPrediction.of(network, masked, tuple(outputs), torch.stack(weights))

        return predict
