from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp

import scdiva as sd
from conftest import files_under
from scdiva.data.reader import open_counts
from scdiva.errors import ConfigError, GeneError, KeyNotFoundError, OutputError, ScaleError, ScdivaError

CLOSE = {"rtol": 0, "atol": 1e-5}  # float32 matrix products of other sizes may round otherwise


@pytest.fixture(scope="module")
def reference(_cells, tiny_model) -> np.ndarray:
    return sd.tl.embed(_cells, tiny_model, copy=True).obsm["X_scdiva"]


def embedded(data: ad.AnnData, model, **options) -> np.ndarray:
    return sd.tl.embed(data, model, copy=True, **options).obsm["X_scdiva"]


def test_a_trunk_and_labels_do_not_change_what_an_embedding_is(adata, tiny_trunk_model):
    # z is the anchor's: neither the trunk's length limit nor a label has a say in it
    z = embedded(adata, tiny_trunk_model)
    cells = open_counts(adata, tiny_trunk_model.vocabulary).read(np.arange(120))
    np.testing.assert_array_equal(z, tiny_trunk_model.embed(cells))
    assert (np.diff(cells.counts.indptr) > tiny_trunk_model.config.trunk.max_tokens).any()
    del adata.obs["cell_type"]
    np.testing.assert_array_equal(embedded(adata, tiny_trunk_model), z)
    assert z.std(axis=0).min() > 0.01


class TestTheSameCellsGiveTheSameEmbedding:
    def test_again(self, adata, tiny_model, reference):
        np.testing.assert_array_equal(embedded(adata, tiny_model), reference)
        assert reference.dtype == np.float32
        assert reference.shape == (120, 8)
        assert reference.std(axis=0).min() > 0.01

    @pytest.mark.parametrize("batch_size", [1, 7, 119, 4096, "auto"])
    def test_in_blocks_of_any_size(self, batch_size, adata, tiny_model, reference):
        np.testing.assert_allclose(embedded(adata, tiny_model, batch_size=batch_size), reference, **CLOSE)

    def test_in_any_order_of_cells(self, adata, tiny_model, reference):
        order = np.random.default_rng(0).permutation(120)
        np.testing.assert_allclose(embedded(adata[order].copy(), tiny_model), reference[order], **CLOSE)

    def test_with_and_without_other_cells(self, adata, tiny_model, reference):
        np.testing.assert_allclose(embedded(adata[40:43].copy(), tiny_model), reference[40:43], **CLOSE)

    def test_in_any_order_of_genes(self, adata, tiny_model, reference):
        order = np.random.default_rng(1).permutation(200)
        np.testing.assert_allclose(embedded(adata[:, order].copy(), tiny_model), reference, **CLOSE)

    def test_by_symbols_or_ensembl_ids(self, adata, tiny_model, reference):
        ids = adata.var["ensembl_id"].astype(str)
        del adata.var["ensembl_id"]
        np.testing.assert_allclose(embedded(adata, tiny_model), reference, **CLOSE)
        adata.var_names = list(ids)
        np.testing.assert_allclose(embedded(adata, tiny_model), reference, **CLOSE)

    @pytest.mark.parametrize(
        "form", [sp.csc_matrix, sp.csr_array, lambda x: x.toarray(), lambda x: x.astype(np.float32)]
    )
    def test_from_any_kind_of_matrix(self, form, adata, tiny_model, reference):
        adata.X = form(adata.X)
        np.testing.assert_array_equal(embedded(adata, tiny_model), reference)

    def test_from_a_layer_raw_or_log_data(self, adata, tiny_model, reference):
        counts = adata.X.copy()
        dense = counts.toarray()
        adata.X = sp.csr_matrix(np.log1p(dense * (1e4 / dense.sum(axis=1, keepdims=True))))
        np.testing.assert_array_equal(embedded(adata, tiny_model), reference)
        adata.layers["counts"] = counts
        np.testing.assert_array_equal(embedded(adata, tiny_model, layer="counts"), reference)
        adata.X = adata.X * 0.9
        adata.raw = ad.AnnData(counts, obs=adata.obs, var=adata.var)
        np.testing.assert_array_equal(embedded(adata, tiny_model, layer="raw"), reference)

    @pytest.mark.parametrize("kind_in", ["h5ad", "zarr"])
    @pytest.mark.parametrize("kind_out", ["h5ad", "zarr"])
    def test_from_file_to_file(self, kind_in, kind_out, adata, tiny_model, reference, tmp_path):
        path = tmp_path / f"in.{kind_in}"
        getattr(adata, f"write_{kind_in}")(path)
        sd.tl.embed_file(path, tmp_path / f"out.{kind_out}", tiny_model)
        found = getattr(ad, f"read_{kind_out}")(tmp_path / f"out.{kind_out}")
        np.testing.assert_array_equal(found.obsm["X_scdiva"], reference)
        np.testing.assert_array_equal(found.X.toarray(), adata.X.toarray())

    def test_by_command(self, cli, h5ad, bundle, reference, tmp_path):
        result = cli("embed", h5ad, tmp_path / "out.h5ad", "--model", bundle, "--device", "cpu", "--batch-size", 50)
        assert result.code == 0, result.err
        assert "120 cells embedded" in result.out
        np.testing.assert_allclose(ad.read_h5ad(tmp_path / "out.h5ad").obsm["X_scdiva"], reference, **CLOSE)

    def test_from_a_backed_anndata(self, h5ad, tiny_model, reference):
        backed = ad.read_h5ad(h5ad, backed="r")
        sd.tl.embed(backed, tiny_model)
        np.testing.assert_array_equal(backed.obsm["X_scdiva"], reference)


class TestWhatIsWritten:
    def test_in_place_writes_one_slot_and_the_record(self, adata, tiny_model):
        before = adata.copy()
        assert sd.tl.embed(adata, tiny_model) is None
        assert set(adata.obsm) == {"X_scdiva"}
        assert set(adata.uns) == {"source", "scdiva"}
        assert not adata.layers
        np.testing.assert_array_equal(adata.X.toarray(), before.X.toarray())
        assert adata.obs.equals(before.obs)
        assert adata.var.equals(before.var)

    def test_a_copy_leaves_the_input_alone(self, adata, tiny_model):
        result = sd.tl.embed(adata, tiny_model, copy=True, key_added="X_other")
        assert set(result.obsm) == {"X_other"}
        assert not adata.obsm
        assert set(adata.uns) == {"source"}

    def test_a_view_becomes_an_object_of_its_own(self, adata, tiny_model, reference):
        view = adata[10:20]
        with pytest.warns(Warning, match="view"):
            sd.tl.embed(view, tiny_model)
        np.testing.assert_allclose(view.obsm["X_scdiva"], reference[10:20], **CLOSE)
        assert not adata.obsm

    def test_the_record_names_the_model_and_what_was_read_and_survives_the_file(self, adata, bundle, tmp_path):
        model = sd.ScDiVa.from_pretrained(bundle, device="cpu")
        adata.layers["umis"] = adata.X.copy()
        adata.X = adata.X * 0.5
        adata.uns["scdiva"] = {"annotate": {"kept": "yes"}}
        sd.tl.embed(adata, model)
        adata.write_h5ad(tmp_path / "a.h5ad")
        for uns in (adata.uns["scdiva"], ad.read_h5ad(tmp_path / "a.h5ad").uns["scdiva"]):
            assert uns["annotate"]["kept"] == "yes"
            record = uns["embed"]["X_scdiva"]
            assert record["model"] == "tiny"
            assert record["model_hash"] == model.bundle_hash
            assert record["vocabulary_fingerprint"] == model.vocabulary.fingerprint
            assert record["scdiva_version"] == sd.__version__
            assert record["counts_in"] == "layers['umis']: raw counts"
            assert record["n_latent"] == 8
            assert record["n_empty_cells"] == 0
            assert record["genes"]["n_source"] == 200
            assert record["genes"]["n_genes"] == 190
            total = adata.layers["umis"].sum()
            assert record["coverage"] == pytest.approx(adata.layers["umis"][:, 10:].sum() / total)

    def test_cells_without_a_count_are_embedded_and_counted(self, adata, tiny_model):
        counts = adata.X.toarray()
        counts[[3, 8]] = 0
        counts[60, 10:] = 0  # counts only in genes that the model does not have
        counts[60, 2] = 5
        adata.X = sp.csr_matrix(counts)
        sd.tl.embed(adata, tiny_model)
        z = adata.obsm["X_scdiva"]
        assert adata.uns["scdiva"]["embed"]["X_scdiva"]["n_empty_cells"] == 3
        assert np.isfinite(z).all()
        np.testing.assert_allclose(z[[8, 60]], z[[3, 3]], **CLOSE)

    def test_library_size_from_a_column(self, adata, tiny_model, reference):
        adata.obs["n_umis"] = np.asarray(adata.X.sum(axis=1)).ravel().astype(float)
        panel = adata[:, 20:].copy()
        by_column = embedded(panel, tiny_model, library_size_key="n_umis")
        assert np.abs(by_column - embedded(panel, tiny_model)).max() > 1e-3
        np.testing.assert_array_equal(embedded(adata, tiny_model, library_size_key="n_umis"), reference)


class TestDenoise:
    @pytest.fixture(autouse=True)
    def _choose(self, adata):
        self.positions = [55, 30]
        self.genes = (adata.var_names[55], adata.var["ensembl_id"].iloc[30])  # by symbol, by id

    def test_only_the_chosen_columns_are_filled(self, adata, tiny_model):
        result = sd.tl.embed(adata, tiny_model, denoise=self.genes, copy=True)
        layer = sp.csr_matrix(result.layers["scdiva_denoised"])
        assert layer.shape == (120, 200)
        assert layer.dtype == np.float32
        assert set(layer.nonzero()[1]) == set(self.positions)
        genes = tiny_model.vocabulary.find(self.genes)
        expected = np.log1p(tiny_model.expected_profile(result.obsm["X_scdiva"], genes))
        np.testing.assert_allclose(layer[:, self.positions].toarray(), expected, rtol=1e-6)
        record = result.uns["scdiva"]["embed"]["X_scdiva"]
        assert list(record["denoised_genes"]) == list(self.genes)
        assert record["denoised_unit"] == "log1p of expected CP10K"

    def test_the_unit_is_that_of_log_normalised_counts(self, adata, tiny_model):
        result = sd.tl.embed(adata, tiny_model, denoise=self.genes, copy=True)
        values = np.expm1(result.layers["scdiva_denoised"][:, self.positions].toarray()).mean(axis=0)
        observed = adata.X.toarray()[:, 10:]
        observed = (observed * 1e4 / observed.sum(axis=1, keepdims=True)).mean(axis=0)[[p - 10 for p in self.positions]]
        np.testing.assert_allclose(values, observed, rtol=0.35)

    def test_a_gene_named_twice_is_one_gene(self, adata, tiny_model):
        once = sd.tl.embed(adata, tiny_model, denoise=self.genes[:1], copy=True).layers["scdiva_denoised"]
        alias = adata.var["ensembl_id"].iloc[55]
        twice = sd.tl.embed(adata, tiny_model, denoise=[self.genes[0], self.genes[0], alias], copy=True)
        np.testing.assert_array_equal(twice.layers["scdiva_denoised"].toarray(), once.toarray())

    def test_other_genes_in_the_list_change_nothing(self, adata, tiny_model):
        one = sd.tl.embed(adata, tiny_model, denoise=self.genes[:1], copy=True).layers["scdiva_denoised"]
        two = sd.tl.embed(adata, tiny_model, denoise=self.genes, copy=True).layers["scdiva_denoised"]
        np.testing.assert_allclose(two[:, [55]].toarray(), one[:, [55]].toarray(), rtol=1e-6)

    @pytest.mark.parametrize(("gene", "words"), [("NOSUCHGENE", "NOSUCHGENE"), ("TSPAN6", "not in this vocabulary")])
    def test_genes_that_the_model_lacks_are_refused(self, gene, words, adata, tiny_model):
        with pytest.raises(GeneError, match=words):
            sd.tl.embed(adata, tiny_model, denoise=[gene])
        assert not adata.obsm

    def test_genes_that_the_file_lacks_are_refused(self, adata, tiny_model):
        absent = str(tiny_model.vocabulary.symbol[-1])
        with pytest.raises(GeneError, match=f"{absent} to denoise"):
            sd.tl.embed(adata, tiny_model, denoise=[absent])

    def test_file_and_memory_agree(self, h5ad, adata, tiny_model, tmp_path):
        sd.tl.embed_file(h5ad, tmp_path / "out.h5ad", tiny_model, denoise=self.genes)
        sd.tl.embed(adata, tiny_model, denoise=self.genes)
        found = ad.read_h5ad(tmp_path / "out.h5ad").layers["scdiva_denoised"]
        np.testing.assert_array_equal(found.toarray(), adata.layers["scdiva_denoised"].toarray())


class TestFilesAreWholeOrNotThere:
    @pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
    def test_an_interruption_while_reading_leaves_nothing(self, error, h5ad, tiny_model, tmp_path):
        before = files_under(tmp_path)

        def stop(done):
            if done >= 60:
                raise error

        with pytest.raises(type(error)):
            sd.tl.embed_file(h5ad, tmp_path / "out.h5ad", tiny_model, batch_size=30, on_block=stop)
        assert files_under(tmp_path) == before

    @pytest.mark.parametrize("kind", ["h5ad", "zarr"])
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_failure_while_writing_leaves_nothing_and_keeps_the_old(
        self, kind, overwrite, h5ad, tiny_model, tmp_path, monkeypatch
    ):
        target = tmp_path / f"out.{kind}"
        if overwrite:
            target.mkdir() if kind == "zarr" else target.write_text("old result")
            if kind == "zarr":
                (target / "zarr.json").write_text("old result")
        before = files_under(tmp_path)

        def fail(*args, **kwargs):
            raise OSError("no space left on device")

        monkeypatch.setattr("anndata.io.write_elem", fail)
        with pytest.raises(OSError, match="no space"):
            sd.tl.embed_file(h5ad, target, tiny_model, overwrite=overwrite)
        assert files_under(tmp_path) == before

    def test_progress_counts_the_cells(self, h5ad, tiny_model, tmp_path):
        seen = []
        sd.tl.embed_file(h5ad, tmp_path / "out.h5ad", tiny_model, batch_size=50, on_block=seen.append)
        assert seen == [50, 100, 120]

    def test_an_existing_output_stays_unless_told(self, h5ad, tiny_model, tmp_path):
        (tmp_path / "out.h5ad").write_text("old")
        with pytest.raises(OutputError, match="exists"):
            sd.tl.embed_file(h5ad, tmp_path / "out.h5ad", tiny_model)
        assert (tmp_path / "out.h5ad").read_text() == "old"
        sd.tl.embed_file(h5ad, tmp_path / "out.h5ad", tiny_model, overwrite=True)
        assert "X_scdiva" in ad.read_h5ad(tmp_path / "out.h5ad").obsm

    def test_a_file_can_be_embedded_in_place_and_again(self, h5ad, tiny_model, reference):
        for key in ("X_scdiva", "X_again"):
            sd.tl.embed_file(h5ad, h5ad, tiny_model, key_added=key, overwrite=True)
        found = ad.read_h5ad(h5ad)
        np.testing.assert_array_equal(found.obsm["X_scdiva"], reference)
        np.testing.assert_array_equal(found.obsm["X_again"], reference)

    def test_denoised_genes_of_raw_have_no_layer_to_go_to(self, adata, tiny_model, tmp_path):
        adata.raw = adata.copy()
        small = adata[:, 30:60].copy()
        small.X = small.X * -1.5
        small.write_h5ad(tmp_path / "a.h5ad")
        before = files_under(tmp_path)
        with pytest.raises(OutputError, match="raw"):
            sd.tl.embed_file(tmp_path / "a.h5ad", tmp_path / "b.h5ad", tiny_model, denoise=[adata.var_names[30]])
        with pytest.raises(OutputError, match="raw"):
            sd.tl.embed(small, tiny_model, denoise=[adata.var_names[30]])
        assert not small.obsm
        assert files_under(tmp_path) == before


class TestRefusals:
    def test_nothing_is_written_into_data_that_are_refused(self, adata, tiny_model):
        adata.X = adata.X.astype(float) * 0.7 + 0.0
        adata.X.data[::2] += 0.123
        with pytest.raises(ScaleError):
            sd.tl.embed(adata, tiny_model)
        assert not adata.obsm
        assert "scdiva" not in adata.uns

    def test_unknown_layers_and_low_coverage_are_refused(self, adata, tiny_model):
        with pytest.raises(KeyNotFoundError, match="'counts'"):
            sd.tl.embed(adata, tiny_model, layer="counts")
        with pytest.raises(GeneError, match="UMIs"):
            sd.tl.embed(adata, tiny_model, min_coverage=1.0)

    def test_cells_of_another_vocabulary_are_refused(self, adata, tiny_model):
        from scdiva.data.reader import open_counts
        from scdiva.genes import GeneVocabulary
        from scdiva.tasks.embed import embed

        with pytest.raises(GeneError, match="another vocabulary"):
            embed(open_counts(adata, GeneVocabulary.default()), tiny_model)

    def test_a_model_without_decoder_cannot_denoise(self, adata, tiny_model):
        class EmbedsOnly:
            vocabulary, statistics, n_latent = tiny_model.vocabulary, tiny_model.statistics, 8
            provenance = tiny_model.provenance
            embed = staticmethod(tiny_model.embed)

        with pytest.raises(GeneError, match="cannot denoise"):
            sd.tl.embed(adata, EmbedsOnly(), denoise=[adata.var_names[30]])
        sd.tl.embed(adata, EmbedsOnly())


@pytest.fixture(scope="module")
def blood_start():
    """A model at its start, from the bundled blood cells: 16 principal components."""
    from scdiva.config import NativeConfig
    from scdiva.data.reader import open_counts
    from scdiva.data.statistics import GeneStatistics
    from scdiva.genes import GeneVocabulary
    from scdiva.models.scdiva.init import init_network, simple_model
    from scdiva.models.scdiva.native import NativeNetwork

    cells = open_counts(sd.datasets.pbmc3k()[:1000].copy(), GeneVocabulary.default()).read(np.arange(1000))
    vocabulary = GeneVocabulary.default()
    statistics = GeneStatistics.from_cells(cells)
    simple = simple_model(statistics, 1000 * cells.is_measured[0], np.asarray(cells.counts.sum(axis=1)).ravel())
    config = NativeConfig(n_latent=16, n_embedding=16, n_hidden=8)
    network = NativeNetwork(vocabulary.n_genes, config)
    init_network(network, statistics, simple, [cells], 16, seed=0)
    return sd.ScDiVa(network, config, vocabulary, statistics)


@pytest.mark.shared
@pytest.mark.parametrize(
    "name", ["pbmc4k_sub", "pancreas_baron_h1", "breast_immune_spectra_1k", "breast_scdeconr_small"]
)
def test_cell_types_of_real_files_stand_apart(name, shared_data, blood_start, tmp_path):
    from scdiva.metrics import knn_scores

    path = shared_data / f"{name}.h5ad"
    before = path.stat().st_mtime_ns, path.stat().st_size
    report = sd.pp.check(path)
    assert report.is_usable
    assert report.counts_in == "X: raw counts"
    assert report.coverage > 0.7
    sd.tl.embed_file(path, tmp_path / "out.h5ad", blood_start)
    assert (path.stat().st_mtime_ns, path.stat().st_size) == before
    adata = ad.read_h5ad(tmp_path / "out.h5ad")
    assert adata.uns["scdiva"]["embed"]["X_scdiva"]["coverage"] == pytest.approx(report.coverage)
    labels = adata.obs["cell_type"].astype(str)
    chosen = ((labels != "unassigned") & (labels.map(labels.value_counts()) >= 20)).to_numpy()
    z, truth = adata.obsm["X_scdiva"][chosen], labels[chosen].to_numpy()
    shuffled = knn_scores(z, np.random.default_rng(0).permutation(truth), seed=0)
    assert knn_scores(z, truth, seed=0).accuracy > shuffled.accuracy + 0.15


def test_the_bundled_model_separates_the_bundled_cells(bundled_model):
    from scdiva.metrics import knn_scores

    adata = sd.datasets.zheng_sorted7_3500()[::7].copy()
    sd.tl.embed(adata, bundled_model)
    assert knn_scores(adata.obsm["X_scdiva"], adata.obs["cell_type"], seed=0).accuracy > 0.75


class TestWhatIsRefusedBeforeAnyWork:
    @pytest.mark.parametrize("batch_size", [0, -3])
    def test_batch_sizes_that_are_not_positive(self, adata, tiny_model, batch_size):
        with pytest.raises(ConfigError, match="batch_size"):
            sd.tl.embed(adata, tiny_model, batch_size=batch_size)
        assert "X_scdiva" not in adata.obsm

    def test_a_record_of_somebody_else(self, adata, tiny_model, tmp_path):
        adata.uns["scdiva"] = "mine"
        with pytest.raises(OutputError, match="uns"):
            sd.tl.embed(adata, tiny_model)
        assert "X_scdiva" not in adata.obsm
        adata.write_h5ad(tmp_path / "a.h5ad")
        with pytest.raises(OutputError, match="uns"):
            sd.tl.embed_file(tmp_path / "a.h5ad", tmp_path / "o.h5ad", tiny_model)

    def test_things_that_are_no_model_or_no_anndata(self, adata, tiny_model, h5ad):
        with pytest.raises(ScdivaError, match="from_pretrained"):
            sd.tl.embed(adata, "scdiva-blood-tiny")
        with pytest.raises(ScdivaError, match="embed_file"):
            sd.tl.embed(h5ad, tiny_model)

    def test_a_library_size_below_the_sum_of_the_counts(self, adata, tiny_model):
        adata.obs["bad"] = 5.0
        with pytest.raises(ScdivaError, match="smaller than the sum"):
            sd.tl.embed(adata, tiny_model, library_size_key="bad")


def test_two_embeddings_keep_their_own_records(adata, tiny_model):
    sd.tl.embed(adata, tiny_model, key_added="X_a")
    sd.tl.embed(adata, tiny_model, key_added="X_b", denoise=str(adata.var_names[20]))
    records = adata.uns["scdiva"]["embed"]
    assert sorted(records) == ["X_a", "X_b"]
    assert records["X_b"]["denoised_genes"] == [adata.var_names[20]]


def test_genes_dropped_after_normalisation_are_noticed(adata, tiny_model, caplog):
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sd.tl.embed(adata, tiny_model)
    assert "do not add up" not in caplog.text
    sd.tl.embed(adata[:, ::2].copy(), tiny_model)
    assert "do not add up" in caplog.text


def test_cells_and_genes_that_are_swapped_are_named_as_such(adata):
    report = sd.pp.check(adata.T)
    assert not report.is_usable
    assert "adata.T" in report.problem["fix"]
