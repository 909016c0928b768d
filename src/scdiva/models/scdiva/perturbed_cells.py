"""Single perturbed cells: the masked diffusion, told what was done, emits integer counts with a predicted mean.

A predictor of mean changes says how much of each gene a perturbation adds or removes on average; it says nothing of
single cells. A drawn cell starts at a control cell whose counts are moved by the predicted change
(:class:`scdiva.data.shifting.CountShift`), with a strength of response of its own. Then genes are hidden and drawn
again by the masked diffusion, which reads what was done ([PERT] tokens), z of the moved cell, and everything that stays
visible: by default a half of the genes that rise, since most of their molecules are new; what the perturbation leaves
alone stays as in the control cell. Three numbers per gene, found by a few pilot rounds (:class:`Offsets`), make drawn
cells have each gene as often, as much and as varied as moved cells, and so the predicted mean. (Our decisions.)

Shape letters: B cells, G genes, K places of perturbations, Z latent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal, Self, cast

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from scdiva.config import NativeConfig, NativeObjectiveConfig
from scdiva.data.shifting import CountShift, checked_change, mean_log1p
from scdiva.data.statistics import CP10K
from scdiva.diffusion.samplers import Sampler, SetState, hide, sample_sets
from scdiva.errors import ConfigError
from scdiva.models.scdiva.calibration import calibrate
from scdiva.models.scdiva.classifier import native_trunk
from scdiva.models.scdiva.generation import GuidedPrediction, Wish, visible_cells
from scdiva.models.scdiva.inputs import MaskedCells, PackedCells, Targets, Tokeniser
from scdiva.models.scdiva.native import PER_GENE, DenoiserOutput, NativeNetwork, SimpleModel
from scdiva.models.scdiva.objectives import DenoisedCells, HeldoutCells, NativeObjective, SplitViews
from scdiva.models.scdiva.perturbation_tokens import PerturbationCodes, PerturbationTokens
from scdiva.nn.precision import uses_bf16
from scdiva.types import CellCounts, LossOutput

if TYPE_CHECKING:
    from scdiva.models.scdiva.model import ScDiVa

OBJECTIVE = NativeObjectiveConfig(p_split=0.3, p_visible=0.2, p_whole=0.4, p_joint=0.5, p_values=0.2, p_staged=0.2)
"""Shares of the training modes: those of fine-tuning with conditions, most cells denoised as they are generated."""
DROPOUT = 0.1
"""Share of training cells that are not told what was done: guidance needs a prediction without."""
SAMPLER = Sampler(n_steps=4)
GROUP = 64
"""Cells that are drawn together, with one random stream."""
_CALIBRATION_CELLS, _CALIBRATION_BATCH = 1024, 64
_VIEW_SHARE = 0.5
_STEP_LIMIT, _OFFSET_LIMIT = 1.0, 3.0
_EXPECTED_CELLS = 2000
"""Moved cells that say how often, how much and how varied each gene is to be."""
_VARIANCE_FLOOR = 0.02
"""Added to variances of log1p(CP10K) before they are compared."""
_PRIOR_CELLS = 4.0
"""Weight, in pilot cells that have the gene, of the network's own opinion against what they show."""
_ROWS, _SHIFT, _CELLS, _PILOT, _DRAWS = 201, 202, 203, 204, 205  # tags of the random streams

GENE_EMBEDDING = "anchor.gene_embedding"

Redrawn = Literal["changed", "rising", "all"]
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
        config = told_config(model)
        # PyTorch's layers draw their first weights from the global generator, which is the caller's
        with torch.random.fork_rng(devices=[]):
            network = cls(native.n_genes, config, tuple(model.labels.sizes), n_names, seed=seed)
        if native.label_field is not None:
            network.add_label_offsets(native.label_field, native.label_confidence.numel() - 1)
        state = {name: tensor.detach().cpu() for name, tensor in native.state_dict().items()}
        # what the model has not starts as it is made: the tokens, and a dispersion head that says nothing yet
        own = {name: tensor for name, tensor in network.state_dict().items() if name not in state}
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


def told_config(model: ScDiVa) -> NativeConfig:
    """Return the sizes of a :class:`PerturbedNetwork`: the model's, with dispersions that depend on the state.

    A gene that responds varies much over all cells, and little among those of which is told what was done to them.
    """
    assert isinstance(model.config, NativeConfig)
    trunk = model.config.trunk.model_copy(update={"dispersion": "state"})
    return model.config.model_copy(update={"trunk": trunk})


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
        floors = SimpleModel(
            network.anchor.log_profile,
            network.detection_logit,
            network.log_theta,
            float(network.mean_log_depth),
            torch.zeros(network.n_genes),
        )
        super().__init__(network, config, told_config(model), model.statistics, floors)
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
    offsets
        What made the mean the predicted one; 0 of genes that were not drawn.
    target_G
        float64 mean log1p(CP10K) that was aimed at.
    """

    cells: CellCounts
    is_redrawn_G: NDArray[np.bool_]
    offsets: Offsets
    target_G: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class CellDrawer:
    """What draws single cells of a perturbation model.

    Parameters
    ----------
    network
        Fine-tuned by :class:`PerturbationDenoising`.
    tokeniser
        How cells become tokens.
    spread, depth_ratio
        Of :func:`draw_perturbed`, as seen in the training cells.
    """

    network: PerturbedNetwork
    tokeniser: Tokeniser
    spread: float
    depth_ratio: float

    def draw(
        self, codes: PerturbationCodes, control: CellCounts, change_G: NDArray[np.floating], n_cells: int, seed: int
    ) -> DrawnCells:
        """Draw cells of one perturbation; see :func:`draw_perturbed`."""
        return draw_perturbed(
            self.network,
            self.tokeniser,
            codes.to(self.network.null_latent.device),
            control,
            change_G,
            n_cells=n_cells,
            seed=seed,
            spread=self.spread,
            depth_ratio=self.depth_ratio,
        )

    def state(self) -> dict[str, torch.Tensor]:
        """Return the weights by name, without the gene embeddings, which are the base model's."""
        return {
            name: tensor.detach().float().cpu()
            for name, tensor in self.network.state_dict().items()
            if name != GENE_EMBEDDING
        }

    @classmethod
    def rebuilt(
        cls,
        model: ScDiVa,
        n_names: int,
        state: Mapping[str, torch.Tensor],
        tokeniser: Tokeniser,
        spread: float,
        depth_ratio: float,
    ) -> Self:
        """Build it from what :meth:`state` returned; RuntimeError where that does not fit."""
        network = PerturbedNetwork.of(model, n_names)
        whole = {GENE_EMBEDDING: network.state_dict()[GENE_EMBEDDING], **state}
        network.load_state_dict(whole, strict=True)
        return cls(network.eval(), tokeniser, spread, depth_ratio)


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
    spread: float = 0.0,
    depth_ratio: float = 1.0,
    redrawn: Redrawn = "rising",
    min_change: float = 0.1,
    min_mean: float = 0.02,
    hidden_share: float = 0.5,
    guidance: float = 1.0,
    n_pilot: int = 128,
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
    spread
        Standard deviation over cells of the log strength of response
        (:func:`scdiva.data.shifting.response_spread`, of seen perturbed cells); 0: all cells respond alike.
    depth_ratio
        Library size that a perturbed cell is to have, over that of its control cell.
    redrawn
        Which genes may be hidden and drawn again. "rising": those that gain more than half of their target mean, since
        most of their molecules are new; "changed": all whose mean changes; "all". Others keep the moved counts.
    min_change
        Smallest change, of log1p(CP10K), of a gene that is drawn again.
    min_mean
        Smallest target of such a gene: rarer ones keep the moved counts of the control cell.
    hidden_share
        Share of each cell's detected genes among them that is hidden. What stays visible is the moved control cell's,
        and tells how strongly the cell responds.
    guidance
        Weight of what was done; 1 is plain conditioning.
    n_pilot, n_rounds
        Pilot cells and rounds by which :class:`Offsets` are found; 0 rounds: none.

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
    if not 0 <= hidden_share <= 1 or not 0 <= spread < np.inf or not 0 < depth_ratio < np.inf:
        raise ConfigError(
            f"hidden_share={hidden_share}, spread={spread}, depth_ratio={depth_ratio}",
            expected="a share from 0 to 1, a spread of 0 or more, a ratio above 0",
            fix="0.3 is a usual spread, 1 a usual ratio",
        )
    if codes.what_BK.shape[0] != 1:
        raise ConfigError(
            f"codes of {codes.what_BK.shape[0]} perturbations", expected="one", fix="draw each perturbation on its own"
        )
    shift = CountShift.fit(
        control, change, np.random.default_rng([seed, _SHIFT]), spread=spread, depth_ratio=depth_ratio
    )
    is_redrawn = (np.abs(change) >= min_change) & (shift.target_G >= min_mean)
    if redrawn == "rising":
        is_redrawn &= change > 0.5 * shift.target_G
    elif redrawn == "all":
        is_redrawn = shift.target_G > 0
    drawing = _Drawing(network, tokeniser, codes, sampler or SAMPLER, guidance, hidden_share, is_redrawn)
    zero = np.zeros(control.n_genes, dtype=np.float32)
    offsets = Offsets(zero, zero, zero)
    if is_redrawn.any() and n_rounds:
        pilot = shift.apply(
            control.take(_in_turn(control.n_cells, n_pilot, np.random.default_rng([seed, _PILOT]))),
            np.random.default_rng([seed, _PILOT, 1]),
        )
        wanted = replace(_expected(control, shift, seed), mean_G=shift.target_G)
        for number in range(n_rounds):
            found = drawing.draw(pilot, offsets, (seed, _PILOT, 2, number))
            offsets = offsets.adjusted(found, wanted, is_redrawn)
    rows = _in_turn(control.n_cells, n_cells, np.random.default_rng([seed, _ROWS]))
    groups = [rows[first : first + GROUP] for first in range(0, n_cells, GROUP)]
    moved = [shift.apply(control.take(g), np.random.default_rng([seed, _CELLS, i])) for i, g in enumerate(groups)]
    start = _stacked(moved)
    cells = start if not is_redrawn.any() else drawing.draw(start, offsets, (seed, _DRAWS))
    return DrawnCells(cells, is_redrawn, offsets, shift.target_G)


def _expected(control: CellCounts, shift: CountShift, seed: int) -> _Levels:
    """Levels of moved control cells, each moved often enough that 2,000 are counted."""
    n_times = max(1, -(-_EXPECTED_CELLS // control.n_cells))
    rows = np.tile(np.arange(control.n_cells), n_times)
    return _Levels.of(shift.apply(control.take(rows), np.random.default_rng([seed, _PILOT, 3])))


def _stacked(parts: Sequence[CellCounts]) -> CellCounts:
    return CellCounts(
        counts=sp.csr_matrix(sp.vstack([part.counts for part in parts], format="csr")),
        library_size=np.concatenate([part.library_size for part in parts]),
        cell_index=np.concatenate([part.cell_index for part in parts]),
        source_of_cell=np.concatenate([part.source_of_cell for part in parts]),
        is_measured=parts[0].is_measured,
        condition=np.concatenate([part.condition for part in parts]),
    )


def _in_turn(n_control: int, n_cells: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Every control cell as often as any other, give or take one, in random order."""
    rounds = [rng.permutation(n_control) for _ in range(-(-n_cells // n_control))]
    return np.concatenate(rounds)[:n_cells]


@dataclass(frozen=True, slots=True)
class _Levels:
    """How many cells have each gene, and how much of it those that do.

    Parameters
    ----------
    detected_G
        Share of cells with counts.
    mean_G
        Mean log1p(CP10K) over all cells.
    slope_G
        Mean over the cells with counts of y / (1 + y), y in CP10K: how fast their log1p(CP10K) grows with a log rate.
    variance_G
        Variance of log1p(CP10K) over the cells with counts.
    """

    detected_G: NDArray[np.float64]
    mean_G: NDArray[np.float64]
    slope_G: NDArray[np.float64]
    variance_G: NDArray[np.float64]

    @classmethod
    def of(cls, cells: CellCounts) -> Self:
        """Measure them."""
        counts = cells.counts
        value = CP10K * counts.data / np.repeat(np.maximum(cells.library_size, 1.0), np.diff(counts.indptr))
        n_G = np.bincount(counts.indices, minlength=counts.shape[1])
        at_least_1_G = np.maximum(n_G, 1)

        def total(x: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.asarray(np.bincount(counts.indices, weights=x, minlength=counts.shape[1]), dtype=np.float64)

        log_value, mean_G = np.log1p(value), mean_log1p(counts, cells.library_size)
        own_G = mean_G * cells.n_cells / at_least_1_G
        variance_G = np.maximum(total(log_value**2) / at_least_1_G - own_G**2, 0.0)
        return cls(n_G / cells.n_cells, mean_G, total(value / (1 + value)) / at_least_1_G, variance_G)


@dataclass(frozen=True, slots=True)
class Offsets:
    """Numbers of single genes that make levels over drawn cells those of moved control cells.

    Parameters
    ----------
    identity_G
        float32, added to log-odds.
    value_G
        float32, added to log-mean counts.
    dispersion_G
        float32, added to log inverse dispersions.
    """

    identity_G: NDArray[np.float32]
    value_G: NDArray[np.float32]
    dispersion_G: NDArray[np.float32]

    def adjusted(self, found: CellCounts, wanted: _Levels, is_redrawn_G: NDArray[np.bool_]) -> Offsets:
        """Return offsets that bring drawn cells nearer to what is wanted: a Newton step for each gene.

        A gene that few pilot cells have, or ought to have, moves little.
        """
        levels, prior = _Levels.of(found), _PRIOR_CELLS / found.n_cells
        p, q = levels.detected_G, wanted.detected_G
        # Newton's step on the log-odds, at the middle: far from the target its slope at the ends misleads
        middle = 0.5 * (p + q)
        identity = (q - p) / (middle * (1.0 - middle) + prior)
        aim, is_aim = np.divide(wanted.mean_G, q, out=np.zeros_like(q), where=q > 0), (p > 0) & (q > 0)
        own = np.divide(levels.mean_G, p, out=np.zeros_like(p), where=p > 0)
        weight = p / (p + prior)
        value = np.where(is_aim, weight * (aim - own) / np.maximum(levels.slope_G, 0.1), 0.0)
        # of logs of counts the variance is about 1 / mean + 1 / inverse dispersion: a first step, damped
        ratio = np.log((levels.variance_G + _VARIANCE_FLOOR) / (wanted.variance_G + _VARIANCE_FLOOR))
        steps = (identity, value, np.where(is_aim, weight * ratio, 0.0))
        before = (self.identity_G, self.value_G, self.dispersion_G)
        return Offsets(*(_moved(x, step, is_redrawn_G) for x, step in zip(before, steps, strict=True)))


def _moved(
    before_G: NDArray[np.float32], step_G: NDArray[np.float64], is_redrawn_G: NDArray[np.bool_]
) -> NDArray[np.float32]:
    step = np.where(is_redrawn_G, np.clip(step_G, -_STEP_LIMIT, _STEP_LIMIT), 0.0)
    return np.asarray(np.clip(before_G + step, -_OFFSET_LIMIT, _OFFSET_LIMIT), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class _Dispersed:
    """What :meth:`GuidedPrediction.draw_counts` asks of a network, with other dispersions."""

    network: NativeNetwork
    dispersion_G: torch.Tensor

    def log_mean(
        self, output: DenoiserOutput, cell_X: torch.Tensor, gene_X: torch.Tensor, direction_XE: torch.Tensor | None
    ) -> torch.Tensor:
        return self.network.log_mean(output, cell_X, gene_X, direction_XE)

    def log_dispersion(
        self, output: DenoiserOutput, cell_X: torch.Tensor, gene_X: torch.Tensor, direction_XE: torch.Tensor | None
    ) -> torch.Tensor:
        return self.network.log_dispersion(output, cell_X, gene_X, direction_XE) + self.dispersion_G[gene_X]


@dataclass(frozen=True, slots=True)
class _Drawing:
    """How the genes that are drawn again are drawn."""

    network: PerturbedNetwork
    tokeniser: Tokeniser
    codes: PerturbationCodes
    sampler: Sampler
    guidance: float
    hidden_share: float
    is_redrawn_G: NDArray[np.bool_]

    @torch.inference_mode()
    def draw(self, start: CellCounts, offsets: Offsets, key: tuple[int, ...]) -> CellCounts:
        """Hide the genes, and draw as many of them anew as the moved cell has."""
        parts = []
        for number, first in enumerate(range(0, start.n_cells, GROUP)):
            cells = start.take(np.arange(first, min(first + GROUP, start.n_cells)))
            parts.append(self._group(cells, offsets, (*key, number)))
        counts = sp.csr_matrix(sp.vstack(parts, format="csr"), dtype=np.int32)
        counts.sort_indices()
        before, after = (np.asarray(x.sum(axis=1), dtype=np.float64).ravel() for x in (start.counts, counts))
        return replace(start, counts=counts, library_size=start.library_size - before + after)

    def _group(self, cells: CellCounts, offsets: Offsets, key: tuple[int, ...]) -> sp.csr_matrix:
        device = self.network.null_latent.device
        entropy = np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0]
        generator = torch.Generator(device).manual_seed(int(entropy >> np.uint64(1)))
        count_BG = torch.from_numpy(cells.counts.toarray()).to(device)
        nothing_B = torch.zeros(cells.n_cells, dtype=torch.int64, device=device)
        whole = SetState(count_BG, nothing_B, torch.ones(cells.n_cells, dtype=torch.float64, device=device))
        among_BG = (count_BG > 0) & torch.from_numpy(self.is_redrawn_G).to(device)
        n_hidden_B = torch.round(self.hidden_share * among_BG.sum(dim=1)).to(torch.int64)
        state = hide(whole, n_hidden_B, generator, among_BG=among_BG)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bf16("auto", device.type)):
            end = sample_sets(self._predict(cells, offsets), state, self.sampler, generator)
        return sp.csr_matrix(end.count_BG.cpu().numpy())

    def _predict(self, cells: CellCounts, offsets: Offsets) -> Callable[[SetState], GuidedPrediction]:
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
        identity_G, value_G, dispersion_G = (
            torch.from_numpy(x).to(device) for x in (offsets.identity_G, offsets.value_G, offsets.dispersion_G)
        )

        def said(masked: MaskedCells, codes: PerturbationCodes) -> DenoiserOutput:
            output = network(ToldCells.of(masked, codes), z_BZ)
            # log_total is of the rates before: the log-mean of a gene moves by its own number
            return replace(
                output,
                gene_logit_BG=output.gene_logit_BG + identity_G,
                log_rate_BG=output.log_rate_BG + value_G,
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
            said_of = GuidedPrediction.of(network, masked, tuple(outputs), torch.stack(weights))
            return replace(said_of, network=cast(NativeNetwork, _Dispersed(network, dispersion_G)))

        return predict
