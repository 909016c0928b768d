"""The published quick start, on models that load or raise."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import twins
import twins_official as official_twins
from scdiva.compat import ScDiVaModel
from scdiva.config import NativeConfig
from scdiva.data.statistics import GeneStatistics
from scdiva.errors import BundleError, ConfigError, GeneError, ScaleError, UnsupportedError, UntrainedHeadError
from scdiva.genes import GeneVocabulary
from scdiva.models.scdiva import ScDiVa
from scdiva.models.scdiva.convert import convert
from scdiva.models.scdiva.model import build_network

DEFAULT = GeneVocabulary.default()
N_ROWS = DEFAULT.n_rows
KNOWN = np.arange(5, 65)  # genes of the native model
N_GENES = 30  # genes of the converted models


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> ScDiVa:
    """A saved native model of 60 genes whose every part is at work."""
    vocabulary = DEFAULT.subset(KNOWN)
    config = NativeConfig(n_latent=128, n_embedding=128, n_hidden=16)
    network = build_network(vocabulary.n_genes, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    path = tmp_path_factory.mktemp("native") / "bundle"
    ScDiVa(network, config, vocabulary, GeneStatistics.empty(60)).save_pretrained(path)
    return ScDiVa.from_pretrained(path, device="cpu")


@pytest.fixture
def quick_start(native) -> ScDiVaModel:
    return ScDiVaModel(native)


def converted(folder, weights, **options) -> ScDiVaModel:
    save_file(weights, folder / "w.safetensors")
    (folder / "genes.tsv").write_text("\n".join(DEFAULT.ensembl_id[:N_GENES][::-1]))
    convert(folder / "w.safetensors", folder / "bundle", vocabulary=folder / "genes.tsv", **options)
    return ScDiVaModel.from_pretrained(folder / "bundle")


@pytest.fixture(scope="module")
def dense_weights():
    return official_twins.random_dense_weights(N_GENES, 64, 40, 2, 128, 100, np.random.default_rng(0))


def cells_of(genes: np.ndarray, n_cells: int = 4):
    """Counts, and the same as log1p(CP10K) in the columns of the rows of the whole vocabulary."""
    counts = np.random.default_rng(1).poisson(1.0, (n_cells, genes.size))
    library_size = counts.sum(axis=1) + 20
    values = np.zeros((n_cells, N_ROWS), dtype=np.float32)
    values[:, genes + 2] = np.log1p(twins.cp10k(counts, library_size))
    return twins.cell_counts(counts, library_size), values


class TestNative:
    def test_the_latent_is_the_embedding_of_the_same_cells(self, native, quick_start):
        cells, values = cells_of(KNOWN)
        expected = native.embed(cells)
        for x in (values, torch.from_numpy(values), torch.from_numpy(values).double()):
            found = quick_start.eval().encode(x)
            assert set(found) == {"latent"}
            assert isinstance(found["latent"], torch.Tensor)
            assert found["latent"].shape == (4, 128)
            np.testing.assert_allclose(found["latent"], expected, atol=1e-5)
        assert np.abs(expected).max() > 0.1

    def test_the_order_of_the_models_genes_is_its_own(self, native):
        order = np.random.default_rng(0).permutation(60)
        vocabulary = GeneVocabulary(native.vocabulary.ensembl_id[order], native.vocabulary.symbol[order])
        shuffled = ScDiVa(native.network, native.config, vocabulary, native.statistics)
        cells, values = cells_of(KNOWN)
        moved = twins.cell_counts(cells.counts.toarray()[:, order], cells.library_size)
        np.testing.assert_allclose(ScDiVaModel(shuffled).encode(values)["latent"], shuffled.embed(moved), atol=1e-5)
        assert not np.allclose(shuffled.embed(moved), native.embed(cells), atol=1e-3)

    def test_genes_that_the_model_lacks_are_ignored_and_counted(self, quick_start):
        _, values = cells_of(KNOWN)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            expected = quick_start.encode(values)["latent"]
        more = values.copy()
        more[0, [2, 3, N_ROWS - 4]] = 1.5
        with pytest.warns(UserWarning, match=r"3 genes with values .* knows 60 of 41,813"):
            torch.testing.assert_close(quick_start.encode(more)["latent"], expected)

    def test_an_empty_cell_has_the_embedding_of_an_empty_cell(self, native, quick_start):
        _, values = cells_of(KNOWN)
        values[2] = 0
        empty = twins.cell_counts(np.zeros((1, 60)), [0])
        np.testing.assert_allclose(quick_start.encode(values)["latent"][2], native.embed(empty)[0], atol=1e-5)

    def test_there_is_no_classifier(self, quick_start):
        for task in ("annotation", "batch_integration"):
            with pytest.raises(UntrainedHeadError, match=f"no {task} head"):
                quick_start.predict(cells_of(KNOWN)[1], task=task)


class TestDense:
    @pytest.fixture
    def x(self):
        return np.pad(np.random.default_rng(2).uniform(0, 5, (2, N_GENES)), ((0, 0), (2, 3))).astype(np.float32)

    def test_latent_and_predictions_are_those_of_the_twin(self, dense_weights, tmp_path, x):
        model = converted(tmp_path, dense_weights)
        encoded = model.encode(torch.from_numpy(x))
        logits, expression = model.predict(x, task="annotation"), model.predict(x, task="batch_integration")
        assert encoded["latent"].shape == (2, 128)
        assert logits.shape == (2, 100)
        assert torch.equal(model.predict(x), logits)
        assert torch.equal(encoded["latent"], encoded["mu"])
        for cell in range(2):
            mu, logvar, expected_logits, expected = official_twins.dense_model(dense_weights, x[cell])
            np.testing.assert_allclose(encoded["latent"][cell], mu, atol=1e-5)
            np.testing.assert_allclose(encoded["logvar"][cell], logvar, atol=1e-5)
            np.testing.assert_allclose(logits[cell], expected_logits, atol=1e-5)
            np.testing.assert_allclose(expression[cell], expected, atol=1e-5)

    def test_the_latent_is_not_a_random_sample(self, dense_weights, tmp_path, x):
        model = converted(tmp_path, dense_weights)
        assert torch.equal(model.encode(x)["latent"], model.encode(x)["latent"])

    def test_an_untrained_head_raises(self, dense_weights, tmp_path, x):
        rest = {name: array for name, array in dense_weights.items() if "classifier" not in name}
        model = converted(tmp_path, rest, trunk_only=True)
        with pytest.raises(UntrainedHeadError, match="annotation head"):
            model.predict(x, task="annotation")
        assert model.predict(x, task="batch_integration").shape == (2, N_GENES + 5)
        assert model.encode(x)["latent"].shape == (2, 128)

    def test_an_unknown_task_is_refused(self, dense_weights, tmp_path, x):
        with pytest.raises(ConfigError, match=r"'perturbation'.*annotation, batch_integration"):
            converted(tmp_path, dense_weights).predict(x, task="perturbation")


class TestInput:
    @pytest.fixture
    def values(self):
        return cells_of(KNOWN)[1]

    @pytest.mark.parametrize("method", ["encode", "predict"])
    def test_the_published_random_input_is_refused_and_told_why(self, dense_weights, tmp_path, method):
        model = converted(tmp_path, dense_weights)
        x = torch.randn(2, N_GENES + 5, generator=torch.Generator().manual_seed(0))
        with pytest.raises(ScaleError, match=r"negative values.*expression cannot be negative"):
            getattr(model, method)(x)

    @pytest.mark.parametrize("shape", [(2, N_ROWS - 1), (2, 41_813), (N_ROWS,), (1, 2, N_ROWS)])
    def test_another_number_of_columns_is_refused(self, quick_start, shape):
        with pytest.raises(GeneError, match=r"\(n_cells, 41818\)"):
            quick_start.encode(np.full(shape, 0.5))

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_values_that_are_no_numbers_are_refused(self, quick_start, values, bad):
        values[1, 40] = bad
        with pytest.raises(ScaleError, match="NaN or infinite"):
            quick_start.encode(values)

    def test_raw_counts_are_refused(self, quick_start, values):
        with pytest.raises(ScaleError, match=r"whole numbers only.*raw counts"):
            quick_start.encode(np.rint(values))
        values[0, 40] = 50.5
        with pytest.raises(ScaleError, match=r"values up to 50\.5.*raw counts"):
            quick_start.encode(values)

    def test_values_above_what_cp10k_allows_are_warned_of(self, quick_start, values):
        values[0, 40] = 9.21
        quick_start.encode(values)
        values[0, 40] = 12.5
        with pytest.warns(UserWarning, match=r"12\.50.*cannot exceed 9\.21"):
            quick_start.encode(values)

    @pytest.mark.parametrize("column", [0, 1, 41_815, 41_816, 41_817])
    def test_values_in_special_columns_are_refused(self, quick_start, values, column):
        values[2, column] = 0.1
        with pytest.raises(GeneError, match=f"column {column} "):
            quick_start.encode(values)

    def test_the_input_is_not_changed(self, quick_start, values):
        before = values.copy()
        quick_start.encode(values)
        np.testing.assert_array_equal(values, before)


class TestLoading:
    def test_the_published_token_model_has_neither_latent_nor_classifier(self, tmp_path):
        weights = official_twins.random_token_weights(N_GENES, 64, 40, 2, np.random.default_rng(0))
        with pytest.raises(UnsupportedError, match="neither a 128-dimensional latent nor a classifier"):
            converted(tmp_path, weights)

    def test_a_model_that_is_not_there_is_never_made_up(self, tmp_path):
        for name in (tmp_path / "nothing", tmp_path):
            with pytest.raises(BundleError):
                ScDiVaModel.from_pretrained(name)

    def test_a_damaged_model_is_never_made_up(self, dense_weights, tmp_path):
        converted(tmp_path, dense_weights)
        (tmp_path / "bundle" / "model.safetensors").write_bytes(b"")
        with pytest.raises(BundleError, match=r"model\.safetensors"):
            ScDiVaModel.from_pretrained(tmp_path / "bundle")
