"""The native scDiVa network: anchor, profile decoder, and a masked-diffusion trunk that improves on them.

Its principle: start at the strongest simple model and only get better. Every learned part is a residual, zero at the
start, on something that already works:

- *identity*: the log-odds that a gene is among the m hidden ones start at those of its detection in the corpus; added
  are a per-gene offset, a slope in log depth, a learned multiple of the profile decoder's deviation for this cell, and
  what the trunk's query says;
- *value*: the mean count of a gene starts at depth times its share in the profile decoder; the trunk multiplies it.

Cells are sets. The trunk reads [LAT], condition tokens, the visible gene tokens and one [QUERY]: all hidden genes of a
set have the same predictive distribution, so one row serves them all, attention runs over visible tokens only, and no
vocabulary-sized row exists per token. The sequence layout (hidden tokens in their places, with RoPE) remains for the
ordering ablation; a place tells something about the gene and the value in it. In the set layout nothing that is hidden
reaches the network but totals: how many genes are hidden, and how many UMIs the cell has. (Our decisions.)

Shape letters: B cells, N visible gene tokens, S hidden slots of the sequence layout, T all tokens, G genes, E gene
embedding, D width, Z latent, C condition fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from scdiva.losses import inclusion_probabilities
from scdiva.models.scdiva.inputs import MaskedCells, PackedCells
from scdiva.models.scdiva.network import AnchorNetwork
from scdiva.nn import Packing, Transformer, init_transformer

if TYPE_CHECKING:
    from scdiva.config import NativeConfig, TrunkConfig

INIT_SEED = 0
"""Seed of the weights that do not start at a statistic of the corpus: equal configurations start equally."""

PER_GENE = frozenset(
    {"anchor.gene_embedding", "anchor.log_profile", "detection_logit", "identity_offset", "identity_slope"}
    | {"value_offset", "log_theta"}
)
"""Weights of the native network that have one row per gene."""
LABEL_OFFSETS = frozenset({"label_identity", "label_value", "label_slope", "label_dispersion"})
"""Weights with one column per gene and one row per label."""
LABEL_STATE = LABEL_OFFSETS | {"label_confidence"}
"""Weights with one row per label."""


@dataclass(frozen=True, slots=True)
class TrunkStates:
    """What the trunk says about some cells.

    Parameters
    ----------
    lat_BD, query_BD
        Final states of [LAT] and [QUERY].
    token_ND
        Final states of the visible gene tokens.
    slot_SD
        Final states of the hidden slots (sequence layout; else no rows).
    packing
        What was computed.
    extra_BKD
        Final states of further special tokens, such as those of perturbations.
    """

    lat_BD: torch.Tensor
    query_BD: torch.Tensor
    token_ND: torch.Tensor
    slot_SD: torch.Tensor
    packing: Packing
    extra_BKD: torch.Tensor


@dataclass(frozen=True, slots=True)
class DenoiserOutput:
    """What the network predicts for cells at time t.

    Parameters
    ----------
    latent_BZ
        z.
    log_rate_BG
        Unnormalised log-rates of the profile decoder.
    gene_logit_BG
        Log-odds of each gene; with m hidden genes their probabilities are
        :func:`scdiva.losses.inclusion_probabilities`.
    log_total_B
        Log of the summed rates of measured genes: what turns log-rates into log shares of a cell's UMIs.
    log_depth_B
        Log of the UMIs: what turns log shares into log-mean counts.
    states
        The trunk's states; None without a trunk.
    label_B
        Code of each cell's label in the field whose labels have offsets; None where none have.
    """

    latent_BZ: torch.Tensor
    log_rate_BG: torch.Tensor
    gene_logit_BG: torch.Tensor
    log_total_B: torch.Tensor
    log_depth_B: torch.Tensor
    states: TrunkStates | None
    label_B: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class SimpleModel:
    """What is known of a gene without looking at the cell; the native model starts here, and these are its floors.

    Parameters
    ----------
    log_profile_G
        Log of the corpus's mean profile: of each gene over the cells whose file measures it.
    detection_logit_G
        Log-odds of detection, over the cells whose file measures the gene.
    log_theta_G
        Log inverse dispersion that, over the corpus's depths, gives that detection.
    mean_log_depth
        Mean over cells of log(1 + UMIs).
    mean_value_G
        Mean log1p(CP10K) over the cells in which the gene is detected.
    """

    log_profile_G: torch.Tensor
    detection_logit_G: torch.Tensor
    log_theta_G: torch.Tensor
    mean_log_depth: float
    mean_value_G: torch.Tensor


class ScalarEmbedding(nn.Module):
    """A number as a token, or a learned vector where it is not given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(1, width)
        self.down = nn.Linear(width, width)
        self.unknown = nn.Parameter(torch.zeros(width))

    def forward(self, x_B: torch.Tensor, is_given_B: torch.Tensor | None = None) -> torch.Tensor:
        """Embed ``(B,)`` numbers of order one; ``(B, D)``."""
        embedded = self.down(F.silu(self.up(x_B[:, None])))
        return embedded if is_given_B is None else torch.where(is_given_B[:, None], embedded, self.unknown)


class Trunk(nn.Module):
    """Token embeddings, transformer, and the heads that correct the simple model.

    Parameters
    ----------
    config
        Sizes.
    n_embedding, n_latent
        E and Z.
    label_sizes
        Number of labels of each condition field.
    """

    def __init__(self, config: TrunkConfig, n_embedding: int, n_latent: int, label_sizes: Sequence[int]) -> None:
        super().__init__()
        width = config.width
        self.is_sequence = config.layout == "sequence"
        self.gene = nn.Linear(n_embedding, width, bias=False)
        self.value_up = nn.Linear(1, width)
        self.value_down = nn.Linear(width, 2 * width)
        self.value_mask = nn.Parameter(torch.zeros(2 * width))
        self.slot = nn.Parameter(torch.zeros(width))
        self.lat = nn.Linear(n_latent, width)
        self.query = nn.Parameter(torch.zeros(width))
        self.n_hidden = ScalarEmbedding(width)
        self.depth, self.anchor_depth, self.n_genes = (ScalarEmbedding(width) for _ in range(3))
        self.labels = nn.ModuleList(nn.Embedding(size + 1, width) for size in label_sizes)
        self.transformer = Transformer(config.n_layers, width, config.n_heads, config.n_hidden, config.dropout)
        self.query_direction = nn.Linear(width, n_embedding)
        self.value_head_up = nn.Linear(width, width)
        self.value_head_down = nn.Linear(width, n_embedding + 1)
        self.dispersion_head: nn.Linear | None = None
        if config.dispersion == "state":
            self.dispersion_head = nn.Linear(width, n_embedding + 1)

    def forward(
        self,
        cells: MaskedCells,
        z_BZ: torch.Tensor,
        gene_embedding: torch.Tensor,
        mean_log_depth: torch.Tensor,
        *,
        is_lat_read: bool = False,
        extra_BKD: torch.Tensor | None = None,
    ) -> TrunkStates:
        """Read the visible part of some cells; with ``is_lat_read`` the state of [LAT] alone is what it should be.

        ``extra_BKD`` are further special tokens, K per cell, such as those of perturbations.
        """
        tokens_ND = self._gene_tokens(cells, gene_embedding)
        special = torch.stack(self._special_tokens(cells, z_BZ, mean_log_depth), dim=1)
        if extra_BKD is not None:  # [LAT] stays first and [QUERY] last
            special = torch.cat([special[:, :-1], extra_BKD.to(special.dtype), special[:, -1:]], dim=1)
        n_extra = 0 if extra_BKD is None else extra_BKD.shape[1]
        n_cells, n_special, width = special.shape
        slots = self.slot.expand(cells.slot_position_S.numel(), width)
        device = tokens_ND.device
        cell = torch.arange(n_cells, device=device)
        length_B = torch.tensor(cells.lengths, device=device)
        slot_length_B = torch.tensor(cells.slot_lengths, device=device)
        cell_T = torch.cat(
            [cell.repeat_interleave(n_special), cell.repeat_interleave(length_B), cell.repeat_interleave(slot_length_B)]
        )
        order_T = torch.argsort(cell_T, stable=True)
        packing = Packing(tuple(n_special + a + b for a, b in zip(cells.lengths, cells.slot_lengths, strict=True)))
        x_TD = torch.cat([special.reshape(-1, width), tokens_ND, slots]).float()[order_T]
        position_T = None
        if self.is_sequence:
            specials_at_0 = torch.zeros(n_cells * n_special, dtype=torch.int64, device=device)
            position_T = torch.cat([specials_at_0, 1 + cells.position_N, 1 + cells.slot_position_S])[order_T]
        h_TD = self.transformer(x_TD, packing, position_T, is_first_read=is_lat_read)
        h_TD = torch.empty_like(h_TD).index_copy(0, order_T, h_TD)
        special_BSD, token_ND, slot_SD = h_TD.split([n_cells * n_special, tokens_ND.shape[0], slots.shape[0]])
        special_BSD = special_BSD.view(n_cells, n_special, width)
        extra = special_BSD[:, special_BSD.shape[1] - 1 - n_extra : -1]
        return TrunkStates(special_BSD[:, 0], special_BSD[:, -1], token_ND, slot_SD, packing, extra)

    def _gene_tokens(self, cells: MaskedCells, gene_embedding: torch.Tensor) -> torch.Tensor:
        """Value *times* identity: the value scales and shifts the gene's embedding, ``(N, D)``."""
        film = self.value_down(F.silu(self.value_up(cells.value_N[:, None])))
        film = torch.where(cells.is_value_masked_N[:, None], self.value_mask.to(film.dtype), film)
        scale, shift = film.chunk(2, dim=-1)
        embedded = self.gene(F.embedding(cells.gene_N, gene_embedding))
        return embedded * (1 + scale) + shift

    def _special_tokens(
        self, cells: MaskedCells, z_BZ: torch.Tensor, mean_log_depth: torch.Tensor
    ) -> list[torch.Tensor]:
        """[LAT], the conditions, [QUERY]; each ``(B, D)``."""
        n_genes = _centred(cells.n_genes_B.float(), _USUAL_LOG_N_GENES)
        code_BC = cells.condition_BC
        if code_BC.shape[1] == 0:  # read without conditions: all are unknown
            code_BC = code_BC.new_zeros((cells.n_cells, len(self.labels)))
        conditions = [embed(code_BC[:, i]) for i, embed in enumerate(self.labels)]
        return [
            self.lat(z_BZ),
            *conditions,
            self.depth(_centred(cells.depth_B, mean_log_depth), cells.is_depth_given_B),
            self.anchor_depth(_centred(cells.anchor_depth_B, mean_log_depth), ~cells.is_null_B),
            self.n_genes(n_genes, cells.is_n_genes_given_B),
            self.query + self.n_hidden(_centred(cells.n_hidden_B.float(), _USUAL_LOG_N_GENES)),
        ]

    def value_direction(self, state: torch.Tensor) -> torch.Tensor:
        """Direction in gene-embedding space, and a constant, of the correction to log-mean values; ``(..., E + 1)``.

        With a dispersion of the state ``(..., 2 E + 2)``: the same for log inverse dispersions follows.
        """
        hidden = F.silu(self.value_head_up(state))
        direction = self.value_head_down(hidden)
        if self.dispersion_head is None:
            return direction
        return torch.cat([direction, self.dispersion_head(hidden)], dim=-1)


_USUAL_LOG_N_GENES = 7.0


def _centred(count: torch.Tensor, log_usual: torch.Tensor | float) -> torch.Tensor:
    return torch.log1p(count) - log_usual


class NativeNetwork(nn.Module):
    """The whole native network.

    Parameters
    ----------
    n_genes
        G, genes of the (sub-)vocabulary.
    config
        Sizes.
    label_sizes
        Number of labels of each condition field.
    """

    detection_logit: torch.Tensor
    mean_log_depth: torch.Tensor
    label_confidence: torch.Tensor
    label_identity: torch.Tensor
    label_value: torch.Tensor
    label_slope: torch.Tensor
    label_dispersion: torch.Tensor

    def __init__(self, n_genes: int, config: NativeConfig, label_sizes: Sequence[int] = ()) -> None:
        super().__init__()
        self.anchor = AnchorNetwork(n_genes, config)
        self.null_latent = nn.Parameter(torch.zeros(config.n_latent))
        # the simple model of identity; the corpus's detection frequencies do not change in training
        self.register_buffer("detection_logit", torch.zeros(n_genes))
        self.register_buffer("mean_log_depth", torch.zeros(()))
        self.identity_offset = nn.Parameter(torch.zeros(n_genes))
        self.identity_slope = nn.Parameter(torch.zeros(n_genes))
        self.deviation_scale = nn.Parameter(torch.zeros(()))
        self.value_offset = nn.Parameter(torch.zeros(n_genes))
        self.log_theta = nn.Parameter(torch.zeros(n_genes))
        # offsets by label, rows by code (row 0, unknown, stays 0): set by calibration, never by gradients
        self.label_field: int | None = None
        self.trunk: Trunk | None = None
        if config.trunk.n_layers:
            self.trunk = Trunk(config.trunk, config.n_embedding, config.n_latent, label_sizes)
        init_native(self)

    @property
    def n_latent(self) -> int:
        """Z, dimensions of the embedding."""
        return self.anchor.n_latent

    @property
    def n_embedding(self) -> int:
        """E, dimensions of the gene embeddings."""
        return int(self.anchor.gene_embedding.shape[1])

    @property
    def n_genes(self) -> int:
        """G, number of genes."""
        return self.identity_offset.numel()

    def add_label_offsets(self, field: int, n_labels: int) -> None:
        """Give every label of a condition field offsets of its own for every gene, 0 at first."""
        self.label_field = field
        device = self.null_latent.device
        self.register_buffer("label_confidence", torch.ones(n_labels + 1, device=device))
        for name in sorted(LABEL_OFFSETS):
            self.register_buffer(name, torch.zeros((n_labels + 1, self.n_genes), device=device))

    def _labels(self, cells: MaskedCells) -> torch.Tensor | None:
        """Codes of the cells in the field whose labels have offsets, ``(B,)``."""
        if self.label_field is None or cells.condition_BC.shape[1] == 0:
            return None
        return cells.condition_BC[:, self.label_field]

    @torch.no_grad()
    def init_simple_model(self, simple: SimpleModel) -> None:
        """Start identity and values at the corpus's statistics."""
        self.detection_logit.copy_(simple.detection_logit_G)
        self.mean_log_depth.fill_(simple.mean_log_depth)
        self.log_theta.copy_(simple.log_theta_G)

    def pooled(self, cells: PackedCells) -> torch.Tensor:
        """Return what the anchor's layers read, ``(B, E)``."""
        return self.anchor.pool(cells.gene_N, cells.value_N, cells.offset_B)

    def latent(self, cells: MaskedCells) -> torch.Tensor:
        """Z of what each cell's anchor may see, ``(B, Z)`` float32; the learned null where it may see nothing."""
        z_BZ = self.anchor.encode(self.pooled(cells.anchor)).float()
        return torch.where(cells.is_null_B[:, None], self.null_latent, z_BZ)

    def forward(
        self, cells: MaskedCells, z_BZ: torch.Tensor | None = None, extra_BKD: torch.Tensor | None = None
    ) -> DenoiserOutput:
        """Predict what is hidden.

        Parameters
        ----------
        cells
            Cells at time t.
        z_BZ
            Latent to use in place of the cells' own (generation from a prior).
        extra_BKD
            Further special tokens for the trunk to read.
        """
        z_BZ = self.latent(cells) if z_BZ is None else z_BZ
        direction_BE = self.anchor.direction(z_BZ)
        deviation_BG = F.linear(direction_BE, self.anchor.gene_embedding).float()
        log_rate_BG = deviation_BG + self.anchor.log_profile
        depth_B = torch.where(cells.is_depth_given_B, _centred(cells.depth_B, self.mean_log_depth), 0.0)
        gene_logit_BG = torch.addcmul(
            self.detection_logit + self.identity_offset, depth_B[:, None], self.identity_slope
        )
        gene_logit_BG = gene_logit_BG + self.deviation_scale * deviation_BG
        states = None
        if self.trunk is not None:
            states = self.trunk(cells, z_BZ, self.anchor.gene_embedding, self.mean_log_depth, extra_BKD=extra_BKD)
            if not self.trunk.is_sequence:
                residual_BE = self.trunk.query_direction(states.query_BD)
                gene_logit_BG = gene_logit_BG + F.linear(residual_BE, self.anchor.gene_embedding)
        label_B = self._labels(cells)
        if label_B is not None:
            gene_logit_BG = self.label_confidence[label_B][:, None] * gene_logit_BG + self.label_identity[label_B]
        log_total_B = log_rate_BG.masked_fill(~cells.is_measured_BG, float("-inf")).logsumexp(dim=1)
        return DenoiserOutput(
            latent_BZ=z_BZ,
            log_rate_BG=log_rate_BG,
            gene_logit_BG=gene_logit_BG,
            log_total_B=log_total_B,
            log_depth_B=cells.depth_B.clamp_min(1.0).log(),
            states=states,
            label_B=label_B,
        )

    def log_mean(
        self, output: DenoiserOutput, cell_X: torch.Tensor, gene_X: torch.Tensor, direction_XE: torch.Tensor | None
    ) -> torch.Tensor:
        """Log-mean count (before truncation) of some genes of some cells, ``(X,)`` float32.

        Parameters
        ----------
        output
            Of the cells.
        cell_X, gene_X
            Which.
        direction_XE
            What the trunk says of each (:meth:`Trunk.value_direction`, of the token's own state where the gene is
            visible, else of the query's or the slot's). None without a trunk.
        """
        log_share_X = output.log_rate_BG[cell_X, gene_X] - output.log_total_B[cell_X] + self.value_offset[gene_X]
        if direction_XE is not None:
            log_share_X = log_share_X + self._correction(gene_X, direction_XE[:, : self.n_embedding + 1])
        if output.label_B is not None:
            label_X = output.label_B[cell_X]
            log_share_X = log_share_X * (1.0 + self.label_slope[label_X, gene_X]) + self.label_value[label_X, gene_X]
        return log_share_X + output.log_depth_B[cell_X]

    def log_dispersion(
        self, output: DenoiserOutput, cell_X: torch.Tensor, gene_X: torch.Tensor, direction_XE: torch.Tensor | None
    ) -> torch.Tensor:
        """Log inverse dispersion of some genes of some cells, ``(X,)`` float32; arguments as for :meth:`log_mean`."""
        log_theta_X = self.log_theta[gene_X]
        if output.label_B is not None:
            log_theta_X = log_theta_X + self.label_dispersion[output.label_B[cell_X], gene_X]
        if direction_XE is None or self.trunk is None or self.trunk.dispersion_head is None:
            return log_theta_X
        return log_theta_X + self._correction(gene_X, direction_XE[:, self.n_embedding + 1 :])

    def _correction(self, gene_X: torch.Tensor, direction_XE: torch.Tensor) -> torch.Tensor:
        embedded_XE = F.embedding(gene_X, self.anchor.gene_embedding)
        return (direction_XE[:, :-1].float() * embedded_XE).sum(dim=1) + direction_XE[:, -1].float()

    def gene_probabilities(self, cells: MaskedCells, output: DenoiserOutput) -> torch.Tensor:
        """Probability of each gene to be among the m hidden ones, ``(B, G)``; rows sum to m (set layout)."""
        return inclusion_probabilities(output.gene_logit_BG, cells.is_admissible_BG, cells.n_hidden_B)

    def cell_state(self, cells: MaskedCells) -> torch.Tensor:
        """LayerNorm([z; h_LAT]) of unmasked cells, ``(B, Z + D)``: what supervised heads read.

        Without a trunk LayerNorm(z).
        """
        z_BZ = self.latent(cells)
        if self.trunk is None:
            return F.layer_norm(z_BZ, z_BZ.shape[1:])
        states = self.trunk(cells, z_BZ, self.anchor.gene_embedding, self.mean_log_depth, is_lat_read=True)
        joined = torch.cat([z_BZ, states.lat_BD.float()], dim=1)
        return F.layer_norm(joined, joined.shape[1:])

    def flops(self, output: DenoiserOutput) -> int:
        """Floating-point operations of the trunk's matrix products in this forward pass."""
        if self.trunk is None or output.states is None:
            return 0
        return self.trunk.transformer.flops(output.states.packing)


@torch.no_grad()
def init_native(network: NativeNetwork) -> None:
    """Start the weights of everything but the anchor, which starts itself (``AnchorNetwork``).

    ======================================  =====================================================================
    anchor, profile decoder                 identity on the SVD components; everything learned on top zero
    identity and value offsets, slopes      zero
    deviation scale                         zero
    null z                                  zero, the decoder's mean profile
    transformer                             GPT-2's scheme (``init_transformer``)
    gene tokens                             orthonormal-like: normal, unit variance per unit embedding
    value, scalar and label embeddings      PyTorch's uniform for the first layer, small normal for the last
    heads that write a prediction           zero: at step 0 the network is the simple model, exactly
    ======================================  =====================================================================

    Drawn from :data:`INIT_SEED` alone. Statistics of the corpus come with ``init_simple_model`` and
    ``AnchorNetwork.init_from_corpus``.
    """
    trunk = network.trunk
    if trunk is None:
        return
    generator = torch.Generator().manual_seed(INIT_SEED)
    init_transformer(trunk.transformer, generator)

    def uniform(linear: nn.Linear) -> None:
        bound = linear.in_features**-0.5
        nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
        if linear.bias is not None:
            nn.init.uniform_(linear.bias, -bound, bound, generator=generator)

    # gene embeddings have about unit norm, so that unit-variance weights give tokens of order one
    nn.init.normal_(trunk.gene.weight, std=1.0, generator=generator)
    for first in (trunk.value_up, trunk.lat, trunk.value_head_up):
        uniform(first)
    nn.init.normal_(trunk.value_down.weight, std=0.02, generator=generator)
    nn.init.zeros_(trunk.value_down.bias)
    for scalar in (trunk.n_hidden, trunk.depth, trunk.anchor_depth, trunk.n_genes):
        uniform(scalar.up)
        nn.init.normal_(scalar.down.weight, std=0.02, generator=generator)
        nn.init.zeros_(scalar.down.bias)
        nn.init.normal_(scalar.unknown, std=0.02, generator=generator)
    for embedding in trunk.labels:
        assert isinstance(embedding, nn.Embedding)
        nn.init.normal_(embedding.weight, std=0.02, generator=generator)
    for vector in (trunk.value_mask, trunk.slot, trunk.query):
        nn.init.normal_(vector, std=0.02, generator=generator)
    for head in (trunk.query_direction, trunk.value_head_down, trunk.dispersion_head):
        if head is None:
            continue
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
