"""[PERT] tokens: what codes say, what is refused, and what the trunk does with further special tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import twins
from native_cells import build, dense_counts, stir
from scdiva.data.perturbations import Perturbation
from scdiva.errors import ConfigError
from scdiva.genes import GeneVocabulary
from scdiva.models.scdiva.perturbation_tokens import (
    KINDS,
    PerturbationCoder,
    PerturbationTokens,
    gene_of_symbol,
)

VOCABULARY = GeneVocabulary.default().subset(np.arange(40))
SYMBOLS = VOCABULARY.symbol.astype(str).tolist()
CODER = PerturbationCoder(VOCABULARY, ("drug", "nothing known"), 3)


def ask(*targets: str, kind="knockout", dose=None) -> Perturbation:
    return Perturbation(tuple(sorted(targets)), kind, dose)


def tokens_of(*perturbations: Perturbation, coder=CODER, seed: int = 0) -> torch.Tensor:
    width, generator = 6, torch.Generator().manual_seed(seed)
    tokens = PerturbationTokens(width, len(coder.names), generator)
    layer = torch.nn.Linear(4, width, bias=False)
    torch.nn.init.normal_(layer.weight, generator=generator)
    embedding = torch.randn(40, 4, generator=generator)
    with torch.no_grad():
        return tokens(coder.codes(perturbations), layer, embedding)


def test_codes_say_what_was_done_in_which_place():
    pair = ask(SYMBOLS[7], SYMBOLS[3])
    codes = CODER.codes([Perturbation(()), pair, ask("drug", kind="treatment", dose=2.0), ask("nothing known")])
    assert codes.what_BK.tolist() == [[1, 0, 0], [2, 2, 0], [3, 0, 0], [3, 0, 0]]
    assert codes.index_BK[1, :2].tolist() == [SYMBOLS.index(target) for target in pair.targets]
    assert codes.index_BK[2:, 0].tolist() == [0, 1]
    assert codes.kind_BK[2, 0] == KINDS.index("treatment")
    assert codes.dose_BK[2].tolist() == pytest.approx([np.log1p(2.0), 0, 0])
    assert codes.has_dose_BK.sum() == 1
    taken = codes.take(torch.tensor([2, 0]))
    assert taken.what_BK.tolist() == [[3, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("gene", [0, 17, 39])
def test_every_gene_of_the_vocabulary_can_be_perturbed(gene):
    assert CODER.is_known(ask(SYMBOLS[gene]))
    assert CODER.codes([ask(SYMBOLS[gene], kind="activation")]).index_BK[0, 0] == gene


@pytest.mark.parametrize(
    "unknown", [ask("no gene"), ask(SYMBOLS[0], kind="treatment"), ask(SYMBOLS[0], "no gene"), ask("Drug")]
)
def test_unknown_names_are_refused(unknown):
    assert not CODER.is_known(unknown)
    with pytest.raises(ConfigError, match="cannot be perturbed"):
        CODER.codes([unknown])


def test_more_targets_than_places_are_refused():
    with pytest.raises(ConfigError, match="4 targets"):
        CODER.codes([ask(*SYMBOLS[:4])])


def test_of_two_genes_of_one_symbol_the_first_counts():
    default = GeneVocabulary.default()
    found = gene_of_symbol(default)
    symbols = default.symbol.tolist()
    assert len(found) < len(symbols)  # there are such genes
    assert all(symbols.index(symbol) == found[symbol] for symbol in symbols[:200])
    twice = next(symbol for symbol in symbols if symbols.count(symbol) > 1)
    assert found[twice] == symbols.index(twice)


def test_tokens_differ_by_gene_kind_and_dose_and_not_by_the_other_rows():
    gene, other = SYMBOLS[0], SYMBOLS[1]
    asked = [
        ask(gene), ask(other), ask(gene, kind="activation"), ask("drug", kind="treatment"),
        ask("drug", kind="treatment", dose=0.0), ask("drug", kind="treatment", dose=3.0), Perturbation(()),
        ask("nothing known"),
    ]  # fmt: skip
    found = tokens_of(*asked)
    for i in range(len(asked)):
        for j in range(i):
            assert not torch.allclose(found[i, 0], found[j, 0]), (asked[i], asked[j])
    # empty places are all the same, and so is the token of a gene in every place
    assert torch.equal(found[:, 2], found[:1, 2].expand(len(asked), -1))
    pair = tokens_of(ask(gene, other))[0]
    alone = {gene: found[0, 0], other: found[1, 0]}
    for place, target in enumerate(sorted((gene, other))):
        assert torch.equal(pair[place], alone[target])
    assert torch.equal(tokens_of(asked[5])[0], found[5])


def test_tokens_are_the_gene_s_embedding_through_the_trunk_s_layer_plus_the_kind():
    generator = torch.Generator().manual_seed(0)
    tokens = PerturbationTokens(6, 0, generator)
    layer, embedding = torch.nn.Linear(4, 6, bias=False), torch.randn(40, 4, generator=generator)
    found = tokens(PerturbationCoder(VOCABULARY, (), 2).codes([ask(SYMBOLS[9], kind="activation")]), layer, embedding)
    assert torch.allclose(found[0, 0], layer(embedding[9]) + tokens.kind.weight[1])
    assert torch.allclose(found[0, 1], tokens.empty)


def test_the_start_depends_on_the_seed_alone():
    torch.manual_seed(3)
    first = PerturbationTokens(6, 2, torch.Generator().manual_seed(1)).state_dict()
    torch.manual_seed(4)
    second = PerturbationTokens(6, 2, torch.Generator().manual_seed(1)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- the trunk with further tokens ---


@pytest.fixture(scope="module")
def built():
    return stir(build(twins.cell_counts(dense_counts()), max_tokens=8))


def cells_for(built, rows):
    cells = twins.cell_counts(dense_counts()).take(np.asarray(rows))
    return built.tokeniser.unmasked(cells, np.random.default_rng(0))


@torch.no_grad()
def read(built, rows, extra=None):
    network, cells = built.network, cells_for(built, rows)
    z = network.latent(cells)
    return network.trunk(cells, z, network.anchor.gene_embedding, network.mean_log_depth, extra_BKD=extra)


def test_without_further_tokens_nothing_changes(built):
    plain, none = read(built, range(6)), read(built, range(6), torch.zeros(6, 0, 16))
    assert torch.equal(plain.lat_BD, none.lat_BD)
    assert torch.equal(plain.query_BD, none.query_BD)
    assert torch.equal(plain.token_ND, none.token_ND)
    assert plain.extra_BKD.shape == (6, 0, 16)
    lengths = [n - k for n, k in zip(plain.packing.lengths, cells_for(built, range(6)).lengths, strict=True)]
    assert len(set(lengths)) == 1


def test_places_are_beside_the_gene_tokens_and_no_cut_drops_them(built):
    extra = torch.randn(60, 3, 16, generator=torch.Generator().manual_seed(0))
    cells = cells_for(built, range(60))
    assert max(cells.lengths) == 8  # cut off
    assert min(cells.lengths) == 0
    said, plain = read(built, range(60), extra), read(built, range(60))
    assert said.extra_BKD.shape == (60, 3, 16)
    assert said.token_ND.shape == plain.token_ND.shape
    assert [n + 3 for n in plain.packing.lengths] == list(said.packing.lengths)
    assert not torch.allclose(said.lat_BD, plain.lat_BD)


def test_lat_is_first_and_query_last(built, monkeypatch):
    seen = {}
    transformer = built.network.trunk.transformer
    forward = transformer.forward

    def spy(x_TD, packing, *args, **kwargs):
        seen["x"], seen["lengths"] = x_TD, packing.lengths
        return forward(x_TD, packing, *args, **kwargs)

    monkeypatch.setattr(transformer, "forward", spy)
    read(built, [0, 1])
    plain, n_plain = seen["x"], seen["lengths"][0]
    extra = torch.full((2, 2, 16), 7.0)
    read(built, [0, 1], extra)
    x, n = seen["x"], seen["lengths"][0]
    assert n == n_plain + 2
    n_special = n_plain - cells_for(built, [0]).lengths[0]
    assert torch.equal(x[0], plain[0])
    assert torch.equal(x[n_special - 1 : n_special + 1], extra[0])
    assert torch.equal(x[n_special + 1], plain[n_special - 1])  # [QUERY]
    assert torch.equal(x[n_special + 2 : n], plain[n_special:n_plain])


def test_what_is_said_of_a_cell_does_not_depend_on_the_others(built):
    extra = torch.randn(60, 3, 16, generator=torch.Generator().manual_seed(0))
    said = read(built, range(60), extra)
    for row in (0, 7, 58, 59):
        alone = read(built, [row], extra[row : row + 1])
        assert torch.allclose(alone.lat_BD[0], said.lat_BD[row], atol=1e-6)
        assert torch.allclose(alone.extra_BKD[0], said.extra_BKD[row], atol=1e-6)
        assert torch.allclose(alone.query_BD[0], said.query_BD[row], atol=1e-6)


def test_every_further_token_reaches_lat(built):
    extra = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
    before = read(built, [0], extra).lat_BD
    for place in range(3):
        changed = extra.clone()
        changed[0, place] += 1.0
        assert not torch.allclose(read(built, [0], changed).lat_BD, before)
