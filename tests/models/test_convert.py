"""Published files into bundles: strict, nothing guessed, nothing half-written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import twins_official as official_twins
from conftest import files_under
from scdiva.data.statistics import GeneStatistics
from scdiva.errors import BundleError, GeneError, OutputError, UntrainedHeadError
from scdiva.genes import GeneVocabulary
from scdiva.models.bundle import read_bundle, read_weights, write_bundle
from scdiva.models.scdiva import ScDiVa
from scdiva.models.scdiva.convert import convert
from scdiva.models.scdiva.dense import DenseNetwork
from scdiva.models.scdiva.row_vocabulary import read_row_vocabulary

N_GENES, WIDTH, N_HIDDEN, N_LAYERS, N_LATENT, N_CLASSES = 30, 64, 40, 2, 8, 5
DEFAULT = GeneVocabulary.default()
# not the order of our own vocabulary
GENES = np.random.default_rng(0).permutation(N_GENES)
IDS, SYMBOLS = DEFAULT.ensembl_id[GENES].tolist(), DEFAULT.symbol[GENES].tolist()
SPECIAL_BEFORE, SPECIAL_AFTER = ["<pad>", "<mask>"], ["<pad-fill>", "<bos>", "<eos>"]


def as_tensors(weights: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in weights.items()}


@pytest.fixture(scope="module")
def token_weights() -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    return as_tensors(official_twins.random_token_weights(N_GENES, WIDTH, N_HIDDEN, N_LAYERS, rng))


@pytest.fixture(scope="module")
def dense_weights() -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(1)
    sizes = (N_GENES, WIDTH, N_HIDDEN, N_LAYERS, N_LATENT, N_CLASSES)
    return as_tensors(official_twins.random_dense_weights(*sizes, rng))


@pytest.fixture
def genes(tmp_path):
    (tmp_path / "genes.tsv").write_text("\n".join(IDS))
    return tmp_path / "genes.tsv"


@pytest.fixture
def run(tmp_path, genes):
    """Convert tensors that lie in a file; ``.out`` is where the bundle goes."""

    def convert_tensors(weights, suffix=".safetensors", **options):
        path = tmp_path / f"weights{suffix}"
        if suffix == ".safetensors":
            save_file({name: tensor.clone() for name, tensor in weights.items()}, path)
        else:
            torch.save(weights, path)
        return convert(path, tmp_path / "out", **({"vocabulary": genes} | options))

    return convert_tensors


@pytest.fixture
def refused(run, tmp_path):
    """Convert tensors that must be refused; return the message. Nothing may be left behind."""

    def message(weights, error=BundleError, **options):
        with pytest.raises(error) as caught:
            run(weights, **options)
        assert {path.name for path in tmp_path.iterdir()} <= {"genes.tsv", "weights.safetensors", "weights.pt"}
        return str(caught.value)

    return message


class TestTokenModel:
    def test_the_bundle_says_what_it_is(self, run, token_weights, tmp_path):
        done = run(token_weights, name="mine")
        n_parameters = sum(tensor.numel() for tensor in token_weights.values())
        assert (done.architecture, done.n_parameters, done.n_genes) == ("official", n_parameters, N_GENES)
        assert (done.prefix, done.ignored, done.untrained_heads, done.unknown_ids) == ("", (), (), ())
        content = read_bundle(tmp_path / "out")
        assert content.vocabulary.ensembl_id.tolist() == IDS
        assert content.vocabulary.symbol.tolist() == SYMBOLS
        model = content.config["model"]
        assert (model["n_layers"], model["width"], model["n_heads"], model["n_hidden"]) == (2, 64, 1, 40)
        assert content.config["trained_heads"] == ["gene", "value"]
        assert content.config["n_parameters"] == n_parameters
        assert "expression" in content.config["conversion"]["statistics"]
        assert (content.statistics.normalised_entropy == 1).all()
        card = (tmp_path / "out" / "README.md").read_text()
        for words in ("# mine", "weights.safetensors", f"{n_parameters:,}", "Gene statistics: none", "clean tokens"):
            assert words in card, words
        loaded = ScDiVa.from_pretrained(tmp_path / "out", device="cpu")
        assert (loaded.name, loaded.n_latent, loaded.n_parameters) == ("mine", WIDTH, n_parameters)

    @pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.module."])
    @pytest.mark.parametrize(("suffix", "is_wrapped"), [(".safetensors", False), (".pt", False), (".bin", True)])
    def test_every_kind_of_file_gives_the_same_weights(self, run, token_weights, tmp_path, prefix, suffix, is_wrapped):
        run(token_weights)
        expected = read_weights(tmp_path / "out")
        renamed = {prefix + name: tensor for name, tensor in token_weights.items()}
        wrapped = {"state_dict": renamed, "epoch": 3} if is_wrapped else renamed
        assert run(wrapped, suffix, overwrite=True).prefix == prefix
        found = read_weights(tmp_path / "out")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_half_precision_is_widened_and_shared_memory_is_no_obstacle(self, run, token_weights, tmp_path):
        shared = {name: tensor.bfloat16() for name, tensor in token_weights.items()}
        shared["gene_head.weight"] = shared["gene_embedding.weight"]
        run(shared, ".pt")
        found = read_weights(tmp_path / "out")
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        assert torch.equal(found["gene_head.weight"], shared["gene_embedding.weight"].float())


class TestDenseModel:
    def test_converted_weights_give_what_the_twin_computes(self, run, dense_weights, tmp_path):
        done = run(dense_weights)
        assert done.architecture == "official-dense"
        assert done.n_parameters == sum(tensor.numel() for tensor in dense_weights.values())
        network = ScDiVa.from_pretrained(tmp_path / "out", device="cpu").network
        x = np.abs(np.random.default_rng(0).normal(size=(3, N_GENES + 5))).astype(np.float32)
        with torch.no_grad():
            mu, logvar = network(torch.from_numpy(x))
            found = [mu, logvar, network.annotation_logits(mu), network.reconstruct(mu)]
        assert [tuple(part.shape) for part in found] == [(3, 8), (3, 8), (3, 5), (3, N_GENES + 5)]
        weights = {name: tensor.numpy() for name, tensor in dense_weights.items()}
        for cell in range(3):
            for part, expected in zip(found, official_twins.dense_model(weights, x[cell]), strict=True):
                np.testing.assert_allclose(part[cell], expected, atol=1e-5)

    def test_counts_are_embedded_in_the_columns_of_their_rows(self, run, dense_weights, tmp_path, monkeypatch):
        import twins
        from scdiva.models.scdiva import dense as dense_module

        run(dense_weights)
        network = ScDiVa.from_pretrained(tmp_path / "out", device="cpu").network
        counts = np.random.default_rng(0).poisson(1.0, (7, N_GENES))
        counts[2] = 0
        cells = twins.cell_counts(counts, counts.sum(axis=1) + 9)
        monkeypatch.setattr(dense_module, "_CELLS", 3)
        found = network.embed(cells, GeneStatistics.empty(N_GENES))
        weights = {name: tensor.numpy() for name, tensor in dense_weights.items()}
        values = np.pad(np.log1p(twins.cp10k(counts, cells.library_size)), ((0, 0), (2, 3)))
        expected = [official_twins.dense_model(weights, row)[0] for row in values]
        np.testing.assert_allclose(found, expected, atol=1e-4)

    def test_the_card_does_not_promise_tokens(self, run, dense_weights, tmp_path):
        run(dense_weights)
        assert "one token" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["token", "dense"])
class TestStrictness:
    @pytest.fixture
    def weights(self, kind, token_weights, dense_weights):
        return dict(token_weights if kind == "token" else dense_weights)

    @pytest.fixture
    def marker(self, kind):
        return "gene_embedding.weight" if kind == "token" else "gene_embedding.gene_projection.weight"

    def test_each_missing_tensor_is_named(self, weights, marker, refused):
        for name in weights:
            rest = {other: tensor for other, tensor in weights.items() if other != name}
            assert name in refused(rest), name

    def test_a_surplus_tensor_is_named(self, weights, marker, refused):
        message = refused({**weights, "pert_head.weight": torch.zeros(3)})
        assert "not in the model: pert_head.weight" in message
        assert "--trunk-only" in message

    def test_each_tensor_of_another_shape_is_named(self, weights, marker, refused):
        for name, tensor in weights.items():
            if name != marker:
                message = refused({**weights, name: torch.zeros(*tensor.shape, 2)})
                assert f"{name} {(*tensor.shape, 2)} instead of {tuple(tensor.shape)}" in message

    def test_all_of_up_to_twenty_are_named(self, weights, marker, refused):
        gone = [name for name in weights if "layers.1." in name or "norm" in name]
        message = refused({name: tensor for name, tensor in weights.items() if name not in gone})
        assert all(name in message for name in gone if "layers.1." not in name)
        many = {f"x{i:02}": torch.zeros(1) for i in range(23)}
        assert "x19 and 3 more" in refused({**weights, **many})

    def test_numbers_that_are_not_finite_or_not_floating_are_refused(self, weights, marker, refused):
        bad = weights[marker].clone()
        bad[3, 3] = float("nan")
        assert f"not finite numbers: {marker}" in refused({**weights, marker: bad})
        assert f"not finite numbers: {marker}" in refused({**weights, marker: weights[marker].int()})

    @pytest.mark.parametrize("shape", [(7,), (69, 100), (5, 64), (0, 0), (9, 0), (3, 4, 5)])
    def test_a_table_of_impossible_shape_is_refused(self, weights, marker, refused, kind, shape):
        shape = shape if kind == "token" else shape[::-1]
        assert f"{marker} of weights.safetensors has shape {shape}" in refused({**weights, marker: torch.zeros(shape)})

    def test_an_absurd_layer_number_is_only_a_wrong_name(self, weights, marker, refused, kind):
        name = f"{'encoder.' if kind == 'dense' else ''}layers.99999999999.norm1.weight"
        assert name in refused({**weights, name: torch.zeros(WIDTH)})

    def test_two_models_in_one_file_are_refused(self, weights, marker, refused):
        assert "2 times" in refused({**weights, **{f"ema.{name}": tensor for name, tensor in weights.items()}})
        prefixed = {f"model.{name}": tensor for name, tensor in weights.items()}
        other = "final_norm.weight" if marker == "gene_embedding.weight" else "gene_embedding.layer_norm.weight"
        assert "with and without model." in refused({**prefixed, other: weights[other]})

    def test_an_existing_bundle_is_replaced_only_on_request(self, weights, marker, run, tmp_path):
        run(weights)
        before = files_under(tmp_path / "out")
        with pytest.raises(OutputError):
            run(weights, name="other")
        assert files_under(tmp_path / "out") == before
        run(weights, name="other", overwrite=True)
        assert files_under(tmp_path / "out") != before


class TestTrunkOnly:
    def test_heads_of_the_file_are_kept_and_all_else_is_listed(self, run, token_weights, tmp_path):
        extra = {"model.pert_token": torch.zeros(WIDTH), "classifier.weight": torch.zeros(3, WIDTH)}
        renamed = {f"model.{name}": tensor for name, tensor in token_weights.items()}
        done = run({**renamed, **extra}, trunk_only=True)
        assert sorted(done.ignored) == sorted(extra)
        assert done.untrained_heads == ()
        conversion = read_bundle(tmp_path / "out").config["conversion"]
        assert sorted(conversion["ignored_tensors"]) == sorted(extra)
        assert conversion["trunk_only"]
        card = (tmp_path / "out" / "README.md").read_text()
        assert "model.pert_token" in card
        run(token_weights, overwrite=True)
        plain = read_weights(tmp_path / "out")
        run({**renamed, **extra}, trunk_only=True, overwrite=True)
        found = read_weights(tmp_path / "out")
        assert all(torch.equal(found[name], plain[name]) for name in plain)

    def test_a_head_that_is_not_there_is_untrained_and_cannot_be_used(self, run, token_weights, tmp_path):
        # a head of which one tensor is missing, and one of another shape
        weights = {name: tensor for name, tensor in token_weights.items() if name != "value_head.2.bias"}
        weights["gene_head.weight"] = torch.zeros(7, WIDTH)
        done = run(weights, trunk_only=True)
        assert done.untrained_heads == ("gene", "value")
        assert set(done.ignored) == {n for n in weights if n.startswith(("gene_head.", "value_head."))}
        content = read_bundle(tmp_path / "out")
        assert content.config["trained_heads"] == []
        assert "refused: gene, value" in (tmp_path / "out" / "README.md").read_text()
        model = ScDiVa.from_pretrained(tmp_path / "out", device="cpu")
        model.network.mark_trained(content.config["trained_heads"])
        with pytest.raises(UntrainedHeadError):
            model.network.values(torch.zeros(1, WIDTH))
        for name, tensor in read_weights(tmp_path / "out").items():
            assert tensor.isfinite().all(), name

    def test_a_classifier_of_other_classes_comes_along(self, run, dense_weights, tmp_path):
        weights = {name: tensor for name, tensor in dense_weights.items() if not name.startswith("batch_integration")}
        weights["annotation_head.classifier.weight"] = torch.ones(9, WIDTH)
        weights["annotation_head.classifier.bias"] = torch.ones(9)
        done = run(weights, trunk_only=True)
        assert (done.untrained_heads, done.ignored) == (("batch_integration",), ())
        assert read_bundle(tmp_path / "out").config["model"]["n_classes"] == 9
        assert read_bundle(tmp_path / "out").config["trained_heads"] == ["annotation"]

    def test_a_missing_tensor_of_the_trunk_is_still_an_error(self, refused, token_weights):
        heads = ("gene_head.", "value_head.")
        for name, tensor in token_weights.items():
            if name.startswith((*heads, "gene_embedding.")):
                continue
            rest = {other: t for other, t in token_weights.items() if other != name}
            assert f"missing: {name}" in refused(rest, trunk_only=True)
            shape = (*tensor.shape, 2)
            assert f"{name} {shape}" in refused({**token_weights, name: torch.zeros(shape)}, trunk_only=True)


class TestFile:
    def test_without_a_vocabulary_file_it_refuses_and_says_why(self, refused, token_weights):
        message = refused(token_weights, vocabulary=None)
        assert "--vocabulary" in message
        assert "come without one" in message

    def test_a_file_of_something_else_is_refused(self, refused):
        assert "encoder.weight" in refused({"encoder.weight": torch.zeros(3)})
        assert "are no tensors" in refused({"state_dict": {"a": 3}}, suffix=".pt")
        assert "holds a list" in refused([torch.zeros(3)], suffix=".pt")

    def test_python_objects_are_never_unpacked(self, refused, tmp_path):
        class Payload:
            def __reduce__(self):
                return (tmp_path.joinpath("ran").touch, ())

        assert "could run code" in refused({"gene_embedding.weight": Payload()}, suffix=".pt")

    @pytest.mark.parametrize("content", [b"", b"nonsense" * 40])
    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    def test_a_damaged_file_is_refused(self, tmp_path, genes, content, suffix):
        (tmp_path / f"w{suffix}").write_bytes(content)
        with pytest.raises(BundleError, match=r"cannot be read"):
            convert(tmp_path / f"w{suffix}", tmp_path / "out", vocabulary=genes)

    @pytest.mark.parametrize("name", ["absent.pt", "genes.tsv", "."])
    def test_a_path_that_is_no_file_of_weights_is_refused(self, tmp_path, genes, name):
        with pytest.raises(BundleError, match=r"a file ending in \.safetensors"):
            convert(tmp_path / name, tmp_path / "out", vocabulary=genes)


class TestStatistics:
    def test_those_of_another_bundle_are_brought_into_the_order_of_the_rows(self, run, token_weights, tmp_path):
        other = DEFAULT.subset(np.arange(20, 50))
        rng = np.random.default_rng(0)
        counts = rng.integers(1, 9, 30)
        own = GeneStatistics(40, rng.random(30) * 99 + 1, rng.random(30), counts, counts * 3)
        config = {"family": "scdiva", "model": {}, "name": "other"}
        write_bundle(
            tmp_path / "other", config=config, weights={}, vocabulary=other, statistics=own, labels={}, card=""
        )
        done = run(token_weights, statistics=tmp_path / "other")
        assert done.statistics == "other: 40 cells, 10 of 30 genes"
        found = read_bundle(tmp_path / "out").statistics
        assert found.n_cells == 40
        for gene, ensembl_id in enumerate(IDS):
            at = np.flatnonzero(other.ensembl_id == ensembl_id)
            assert found.n_detected[gene] == (counts[at[0]] if at.size else 0)
            assert found.sum_cp10k[gene] == (own.sum_cp10k[at[0]] if at.size else 0)

    def test_those_of_other_genes_are_refused(self, refused, token_weights, tmp_path):
        vocabulary = DEFAULT.subset(np.arange(100, 110))
        folder = tmp_path.parent / f"{tmp_path.name}-other"
        write_bundle(
            folder,
            config={"family": "scdiva", "model": {}},
            weights={},
            vocabulary=vocabulary,
            statistics=GeneStatistics.empty(10),
            labels={},
            card="",
        )
        assert "shares no gene" in refused(token_weights, statistics=folder)


class TestVocabularyFile:
    @pytest.fixture
    def read(self, tmp_path):
        def read_lines(lines, n_genes=N_GENES):
            (tmp_path / "v.tsv").write_text("\n".join(lines) + "\n")
            return read_row_vocabulary(tmp_path / "v.tsv", n_genes)

        return read_lines

    @pytest.mark.parametrize("has_header", [False, True])
    @pytest.mark.parametrize("has_special", [False, True])
    @pytest.mark.parametrize("columns", ["id", "symbol", "id+symbol", "symbol+id", "row+id+symbol", "row+symbol"])
    def test_every_layout_gives_the_same_genes(self, read, has_header, has_special, columns):
        cells = {"id": [f"{i}.3" for i in IDS], "symbol": list(SYMBOLS), "row": [str(i) for i in range(2, 32)]}
        if has_special:
            for name in ("id", "symbol"):
                cells[name] = [*SPECIAL_BEFORE, *cells[name], *SPECIAL_AFTER]
            cells["row"] = [str(i) for i in range(N_GENES + 5)]
        words = {"id": "ensembl_id", "symbol": "gene_symbol", "row": "row"}
        names = columns.split("+")
        lines = ["\t".join(row) for row in zip(*(cells[name] for name in names), strict=True)]
        if has_header:
            lines.insert(0, "\t".join(words[name] for name in names))
        found = read(lines)
        assert found.vocabulary.ensembl_id.tolist() == IDS
        assert found.vocabulary.symbol.tolist() == SYMBOLS
        assert found.unknown_ids == ()

    def test_what_a_vocabulary_writes_is_read(self, tmp_path):
        vocabulary = GeneVocabulary(np.array(IDS), np.array(SYMBOLS))
        vocabulary.write_tsv(tmp_path / "v.tsv")
        assert read_row_vocabulary(tmp_path / "v.tsv", N_GENES).vocabulary == vocabulary

    def test_our_whole_vocabulary_is_read_as_it_is(self, tmp_path):
        DEFAULT.write_tsv(tmp_path / "v.tsv")
        found = read_row_vocabulary(tmp_path / "v.tsv", DEFAULT.n_genes)
        assert found.vocabulary == DEFAULT
        assert found.vocabulary.symbol.tolist() == DEFAULT.symbol.tolist()
        assert found.unknown_ids == ()

    @pytest.mark.parametrize("n_lines", [0, 1, 29, 31, 34, 36])
    def test_another_number_of_rows_is_refused(self, read, n_lines):
        with pytest.raises(BundleError, match=rf"lists {n_lines} rows .*30 genes, or all 35 rows"):
            read(DEFAULT.ensembl_id[:n_lines].tolist())

    def test_unknown_genes_are_refused_and_named_with_their_lines(self, read):
        lines = ["gene", *IDS]
        lines[4], lines[9] = "NOSUCHGENE", "ENSMUSG00000000001"
        with pytest.raises(GeneError, match=r"2 lines.*line 5 'NOSUCHGENE' \(unknown\), line 10 'ENSMUSG00000000001'"):
            read(lines)

    def test_ambiguous_symbols_are_refused(self, read):
        lines = list(IDS)
        lines[4] = "NKX6.1x"
        with pytest.raises(GeneError, match="unknown"):
            read(lines)
        from scdiva.genes import GeneStatus, align_genes
        from scdiva.genes.tables_io import old_names

        several = [alias for alias, symbols in old_names().symbols_of_alias.items() if "|" in symbols]
        alias = next(a for a in several if align_genes([a], DEFAULT).status[0] == GeneStatus.AMBIGUOUS)
        lines[4] = alias
        with pytest.raises(GeneError, match="ambiguous"):
            read(lines)

    def test_a_gene_that_is_there_twice_is_refused_under_both_names(self, read):
        lines = [*IDS[:-1], SYMBOLS[3]]
        with pytest.raises(GeneError, match=rf"{IDS[3]} in line 4 \({IDS[3]}\) and line 30 \({SYMBOLS[3]}\)"):
            read(lines)
        with pytest.raises(GeneError, match=r"line 4 .* and line 30 "):
            read([*IDS[:-1], IDS[3]])

    def test_an_id_that_our_tables_do_not_know_is_kept_and_reported(self, read):
        lines = [*IDS[:-1], "ENSG09999999999"]
        found = read(lines)
        assert found.vocabulary.ensembl_id[-1] == "ENSG09999999999"
        assert found.unknown_ids == ("ENSG09999999999",)

    def test_genes_outside_our_own_vocabulary_are_known(self, read):
        from scdiva.genes.tables_io import human_genes

        own = set(DEFAULT.ensembl_id.tolist())
        outside = next(ensembl_id for ensembl_id in human_genes().ensembl_id if ensembl_id not in own)
        found = read([*IDS[:-1], outside])
        assert found.vocabulary.ensembl_id[-1] == outside
        assert found.unknown_ids == ()

    def test_a_name_of_several_genes_means_the_one_in_our_own_vocabulary(self, read):
        assert read([*IDS[:-1], "FAM153B"]).vocabulary.ensembl_id[-1] == "ENSG00000289731"

    def test_a_retired_id_becomes_its_successor_unless_that_has_a_row(self, read):
        from scdiva.genes.tables_io import human_genes, old_names

        known = human_genes()
        old, moves = next(
            (old, moves)
            for old, moves in old_names().moves.items()
            if len(moves) == 1 and old not in known.index_of_id and known.ensembl_id[moves[0][1]] not in IDS
        )
        new = known.ensembl_id[moves[0][1]]
        assert read([*IDS[:-1], old]).vocabulary.ensembl_id[-1] == new
        both = read([*IDS[:-2], old, new])
        assert both.vocabulary.ensembl_id[-2:].tolist() == [old, new]
        assert both.unknown_ids == (old,)

    def test_genes_where_special_rows_must_be_are_refused(self, read):
        with pytest.raises(BundleError, match=rf"genes in special rows: {IDS[0]}"):
            read([IDS[0], "<mask>", *DEFAULT.ensembl_id[100:130], *SPECIAL_AFTER])
        with pytest.raises(BundleError, match="genes in special rows: CD3D"):
            read([*SPECIAL_BEFORE, *IDS, "<eos>", "<bos>", "CD3D"])

    @pytest.mark.parametrize("start", [1, 7])
    def test_row_numbers_must_count_up(self, read, start):
        with pytest.raises(BundleError, match="do not count up"):
            read([f"{start + i}\t{name}" for i, name in enumerate(IDS)])
        with pytest.raises(BundleError, match="do not count up"):
            read([f"{i}\t{name}" for i, name in zip([0, 2, 1, *range(3, 30)], IDS, strict=True)])

    @pytest.mark.parametrize("line", ["", "CD3D\tCD4", "ENSG00000167286\tENSG00000010610", "CD3D\tx\tprotein_coding"])
    def test_a_line_that_is_not_one_gene_is_refused(self, read, line):
        with pytest.raises(BundleError, match="line 3 of"):
            read([*IDS[:2], line, *IDS[3:]])

    def test_a_file_that_cannot_be_read_is_refused(self, tmp_path):
        with pytest.raises(BundleError, match="cannot be read"):
            read_row_vocabulary(tmp_path / "absent.tsv", 3)
        (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(BundleError, match="cannot be read"):
            read_row_vocabulary(tmp_path / "bytes", 3)


class TestCommand:
    def test_it_converts_and_tells_what_it_did(self, cli, token_weights, tmp_path, genes):
        save_file(
            {f"model.{k}": v for k, v in token_weights.items() if "value_head" not in k}, tmp_path / "w.safetensors"
        )
        done = cli("convert", tmp_path / "w.safetensors", tmp_path / "out", "--vocabulary", genes, "--trunk-only")
        assert (done.code, done.err) == (0, "")
        for words in ("official model", "30 genes", "model.", "untrained heads", "value", "ordered by expression"):
            assert words in done.out, words
        assert json.loads((tmp_path / "out" / "config.json").read_text())["trained_heads"] == ["gene"]

    def test_without_vocabulary_it_refuses_in_one_line(self, cli, token_weights, tmp_path):
        save_file(token_weights, tmp_path / "w.safetensors")
        done = cli("convert", tmp_path / "w.safetensors", tmp_path / "out")
        assert done.code == 2
        assert done.err.startswith("error: no vocabulary file")
        assert len(done.err.splitlines()) == 1
        assert not (tmp_path / "out").exists()

    def test_ignored_tensors_are_printed(self, cli, token_weights, tmp_path, genes):
        save_file({**token_weights, "pert": torch.zeros(3)}, tmp_path / "w.safetensors")
        arguments = ("convert", tmp_path / "w.safetensors", tmp_path / "out", "--vocabulary", genes)
        assert "pert" in cli(*arguments).err
        assert "1 tensors of the file left behind:\n  pert" in cli(*arguments, "--trunk-only", "--name", "x").out
        assert (
            "--overwrite" in cli(*arguments, "--trunk-only").err or "overwrite" in cli(*arguments, "--trunk-only").err
        )


def test_one_token_attends_to_itself_as_the_whole_layer_would():
    from scdiva.config import DenseConfig
    from scdiva.nn import Packing

    config = DenseConfig(architecture="official-dense", n_layers=2, width=16, n_heads=2, n_hidden=24, n_latent=4)
    network = DenseNetwork(6, config)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    from scdiva.models.scdiva.dense import _attend_to_itself

    layer = network.layers[0]
    with torch.no_grad():
        whole = layer.attention(x, Packing((1,) * 5), None)
        torch.testing.assert_close(_attend_to_itself(layer.attention, x), whole)
        assert whole.abs().max() > 0
