"""A SCimilarity model folder as the start of the published autoencoder."""

from __future__ import annotations

import json
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn

from conftest import files_under
from scdiva.errors import BundleError
from scdiva.genes import GeneStatus, GeneVocabulary, align_genes
from scdiva.models.scdiffusion.published import PublishedAutoencoder
from scdiva.models.scdiffusion.scimilarity import load_scimilarity

# the order is not the vocabulary's; MS4A1 stands under an alias and one name is of no gene
NAMES = ["LYZ", "NOT-A-GENE", "CD3E", "Bp35", "NKG7"]
OURS = ["CD3E", "GNLY", "LYZ", "MS4A1"]
WIDTH, N_LATENT = 6, 4


def layers(sizes: list[int], n_out: int, *, has_input_dropout: bool) -> nn.ModuleList:
    """Modules in the places that SCimilarity gives them."""
    network = nn.ModuleList()
    for i, (n_in, n_hidden) in enumerate(pairwise(sizes)):
        dropout = [nn.Dropout(0.1)] if i or has_input_dropout else []
        network.append(nn.Sequential(*dropout, nn.Linear(n_in, n_hidden), nn.BatchNorm1d(n_hidden), nn.PReLU()))
    network.append(nn.Linear(sizes[-1], n_out))
    return network


def random_state(network: nn.ModuleList, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    holder = nn.Module()
    holder.network = network
    return {
        name: torch.randn(tensor.shape, generator=generator).abs() if tensor.is_floating_point() else tensor + 7
        for name, tensor in holder.state_dict().items()
    }


@pytest.fixture
def states() -> dict[str, dict[str, torch.Tensor]]:
    hidden = [WIDTH] * 3
    return {
        "encoder": random_state(layers([len(NAMES), *hidden], N_LATENT, has_input_dropout=True), 1),
        "decoder": random_state(layers([N_LATENT, *hidden], len(NAMES), has_input_dropout=False), 2),
    }


@pytest.fixture
def vocabulary() -> GeneVocabulary:
    default = GeneVocabulary.default()
    subset = default.subset(default.find(OURS))
    assert sorted(subset.symbol) == sorted(OURS)
    return subset


@pytest.fixture
def folder(states, tmp_path):
    def write(**changed):
        path = tmp_path / "model"
        path.mkdir(exist_ok=True)
        for part, state in {**states, **changed}.items():
            torch.save({"state_dict": state}, path / f"{part}.ckpt")
        (path / "gene_order.tsv").write_text("\n".join(NAMES) + "\n")
        sizes = {name: list(tensor.shape) for name, tensor in states["encoder"].items()}
        (path / "layer_sizes.json").write_text(json.dumps(sizes))
        (path / "hyperparameters.json").write_text(json.dumps({"n_genes": len(NAMES), "latent_dim": N_LATENT}))
        return path

    return write


def start() -> PublishedAutoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PublishedAutoencoder(len(OURS), N_LATENT, WIDTH)


def test_all_tensors_are_taken_over_and_genes_by_name(folder, states, vocabulary):
    autoencoder, before = start(), start().state_dict()
    report = load_scimilarity(autoencoder, vocabulary, folder())
    assert not report.skipped
    assert len(report.loaded) == sum(map(len, states.values())) == len(before)
    assert (report.n_genes_loaded, report.n_genes) == (3, 4)
    after = autoencoder.state_dict()
    symbol = vocabulary.symbol.tolist()
    for ours, theirs in (("CD3E", "CD3E"), ("LYZ", "LYZ"), ("MS4A1", "Bp35")):
        g, i = symbol.index(ours), NAMES.index(theirs)
        assert torch.equal(after["encoder.0.0.weight"][:, g], states["encoder"]["network.0.1.weight"][:, i])
        assert torch.equal(after["decoder.3.weight"][g], states["decoder"]["network.3.weight"][i])
        assert torch.equal(after["decoder.3.bias"][g], states["decoder"]["network.3.bias"][i])
    g = symbol.index("GNLY")
    assert torch.equal(after["encoder.0.0.weight"][:, g], before["encoder.0.0.weight"][:, g])
    assert torch.equal(after["decoder.3.weight"][g], before["decoder.3.weight"][g])
    assert torch.equal(after["encoder.1.0.weight"], states["encoder"]["network.1.1.weight"])
    assert torch.equal(after["encoder.2.1.running_var"], states["encoder"]["network.2.2.running_var"])
    assert torch.equal(after["encoder.0.2.weight"], states["encoder"]["network.0.3.weight"])
    assert torch.equal(after["decoder.0.0.weight"], states["decoder"]["network.0.0.weight"])
    assert torch.equal(after["decoder.1.2.weight"], states["decoder"]["network.1.3.weight"])


def test_the_encoder_then_computes_what_theirs_does(states, folder):
    """On all the genes that SCimilarity knows, in its own order of modules."""
    names = [name for name in NAMES if name != "NOT-A-GENE"]
    default = GeneVocabulary.default()
    vocabulary = default.subset(default.find(names))
    autoencoder = PublishedAutoencoder(len(names), N_LATENT, WIDTH).eval()
    load_scimilarity(autoencoder, vocabulary, folder())
    theirs = layers([len(NAMES), *[WIDTH] * 3], N_LATENT, has_input_dropout=True).eval()
    theirs.load_state_dict({name.removeprefix("network."): tensor for name, tensor in states["encoder"].items()})
    values = torch.rand(3, len(names), generator=torch.Generator().manual_seed(5))
    placed = torch.zeros(3, len(NAMES))
    for i, gene in enumerate(align_genes(NAMES, vocabulary).gene_of_source.tolist()):
        if gene >= 0:
            placed[:, i] = values[:, gene]
    with torch.no_grad():
        for layer in theirs:
            placed = layer(placed)
        expected = nn.functional.normalize(placed, dim=1)
        torch.testing.assert_close(autoencoder.encode_values(values), expected)


def test_the_alias_is_one():
    alignment = align_genes(["Bp35"], GeneVocabulary.default())
    assert GeneStatus(int(alignment.status[0])) in (GeneStatus.BY_ALIAS, GeneStatus.BY_HISTORY)


def test_what_does_not_fit_is_reported_and_left_as_it_was(folder, states, vocabulary, caplog):
    encoder = dict(states["encoder"])
    encoder["network.1.1.weight"] = torch.zeros(WIDTH, WIDTH + 1)
    encoder["network.0.1.weight"] = torch.zeros(WIDTH, len(NAMES) + 2)  # not the genes of gene_order.tsv
    encoder["classifier.weight"] = torch.zeros(2)
    del encoder["network.2.3.weight"]
    autoencoder, before = start(), start().state_dict()
    report = load_scimilarity(autoencoder, vocabulary, folder(encoder=encoder))
    assert dict(report.skipped) == {
        "encoder.network.1.1.weight": "shape (6, 7) instead of (6, 6)",
        "encoder.network.0.1.weight": "shape (6, 7) instead of (6, 5)",
        "encoder.classifier.weight": "not in the network",
        "encoder.network.2.3.weight": "not in encoder.ckpt",
    }
    for name in ("encoder.1.0.weight", "encoder.0.0.weight", "encoder.2.2.weight"):
        assert torch.equal(autoencoder.state_dict()[name], before[name])
    assert report.n_genes_loaded == 3  # the decoder's
    for name in report.skipped:
        assert name in caplog.text


@pytest.mark.parametrize("name", ["encoder.ckpt", "decoder.ckpt", "gene_order.tsv"])
def test_a_missing_file(name, folder, vocabulary):
    path = folder()
    (path / name).unlink()
    with pytest.raises(BundleError, match=f"lacks {name}"):
        load_scimilarity(start(), vocabulary, path)


class _Code:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda path: torch.save({"state_dict": {"network.0.1.weight": _Code()}}, path), "without running code"),
        (lambda path: path.write_bytes(pickle.dumps({"state_dict": 1})), "decoder.ckpt"),
        (lambda path: path.write_bytes(b"nothing"), "without running code"),
        (lambda path: path.write_bytes(b""), "without running code"),
        (lambda path: torch.save({"weights": {}}, path), "no named tensors"),
        (lambda path: torch.save([torch.zeros(2)], path), "no named tensors"),
        (lambda path: torch.save({"state_dict": {"network.0.1.weight": 3}}, path), "no named tensors"),
    ],
)
def test_files_of_something_else(content, words, folder, vocabulary, capsys):
    path = folder()
    content(path / "decoder.ckpt")
    autoencoder, before, files = start(), start().state_dict(), files_under(path)
    with pytest.raises(BundleError, match=words):
        load_scimilarity(autoencoder, vocabulary, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in autoencoder.state_dict().items())
    assert files_under(path) == files
    assert "run" not in capsys.readouterr().out


def test_nothing_that_fits(folder, states, vocabulary):
    other = {part: {name: torch.zeros(9, 9, 9) for name in state} for part, state in states.items()}
    with pytest.raises(BundleError, match="no tensor"):
        load_scimilarity(start(), vocabulary, folder(**other))


def test_no_genes_in_common(folder):
    default = GeneVocabulary.default()
    report = load_scimilarity(start(), default.subset(default.find(["GNLY", "CD14", "PPBP", "CST3"])), folder())
    assert report.n_genes_loaded == 0
    assert set(report.skipped.values()) == {"no gene in common"}
    assert len(report.skipped) == 3


def test_a_gene_that_stands_there_twice_is_taken_from_its_symbol(folder, states, vocabulary):
    path = folder()
    names = ["LYZ", "NOT-A-GENE", "CD3E", "Bp35", "MS4A1"]
    (path / "gene_order.tsv").write_text("\n".join(names) + "\n")
    autoencoder = start()
    load_scimilarity(autoencoder, vocabulary, path)
    g = vocabulary.symbol.tolist().index("MS4A1")
    weight = autoencoder.state_dict()["encoder.0.0.weight"][:, g]
    assert torch.equal(weight, states["encoder"]["network.0.1.weight"][:, 4])


def test_the_hash_is_that_of_the_content(folder, states, vocabulary):
    one = load_scimilarity(start(), vocabulary, folder()).content_hash
    states["encoder"]["network.1.1.bias"] += 1
    assert load_scimilarity(start(), vocabulary, folder()).content_hash != one
