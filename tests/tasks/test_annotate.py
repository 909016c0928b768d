from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch

import scdiva as sd
from scdiva.data.reader import open_counts
from scdiva.errors import (
    BundleError,
    ConfigError,
    GeneError,
    KeyNotFoundError,
    OutputError,
    ScdivaError,
    SourceError,
    TrainingError,
    UnsupportedError,
)
from scdiva.models.annotators import FEW_FOR_SELF_TRAINING
from scdiva.models.scdiva import ScDiVa
from scdiva.tasks.annotate import CellTyper, annotate, fit_annotator, fit_cell_typer
from scdiva.tasks.fine_tuned import FineTuning, loop_config, stratified_split


@pytest.fixture(scope="module")
def split(_cells) -> tuple[ad.AnnData, ad.AnnData]:
    order = np.random.default_rng(0).permutation(120)
    return _cells[order[:80]].copy(), _cells[order[80:]].copy()


@pytest.fixture(scope="module", params=["probe", "reference", "integrate", "consensus"])
def typer(request, split, tiny_model) -> CellTyper:
    return fit_cell_typer(split[0], tiny_model, "cell_type", method=request.param, query=split[1])


def test_types_are_found_and_written(split, tiny_model, typer):
    query = split[1].copy()
    sd.tl.annotate(query, tiny_model, typer)
    assert (query.obs["scdiva_cell_type"].astype(str) == query.obs["cell_type"].astype(str)).mean() > 0.9
    assert query.obs["scdiva_confidence"].between(0, 1).all()
    table = query.obsm["scdiva_cell_type_probability"]
    assert list(table.columns) == list(typer.classes)
    np.testing.assert_allclose(table.sum(axis=1), 1, atol=1e-5)
    assert (table.idxmax(axis=1) == query.obs["scdiva_cell_type"].astype(str)).all()
    assert (query.obs["scdiva_second_cell_type"].astype(str) != query.obs["scdiva_cell_type"].astype(str)).all()
    record = query.uns["scdiva"]["annotate"]
    assert record["reference"]["n_cells"] == 80
    assert record["method"] == typer.annotator.method


def test_a_file_and_a_notebook_agree(split, tiny_model, typer, tmp_path):
    split[1].write_h5ad(tmp_path / "query.h5ad")
    sd.tl.annotate_file(tmp_path / "query.h5ad", tmp_path / "out.h5ad", tiny_model, typer)
    query = split[1].copy()
    sd.tl.annotate(query, tiny_model, typer)
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    for name in query.obs:
        assert (written.obs[name].astype(str) == query.obs[name].astype(str)).all(), name
    np.testing.assert_array_equal(
        written.obsm["scdiva_cell_type_probability"], query.obsm["scdiva_cell_type_probability"]
    )


def test_a_label_may_hold_a_slash(split, tiny_model, tmp_path):
    reference, query = split[0].copy(), split[1].copy()
    reference.obs["cell_type"] = reference.obs["cell_type"].astype(str).str.replace(" ", "/")
    sd.tl.annotate(query, tiny_model, reference, "cell_type")
    query.write_h5ad(tmp_path / "out.h5ad")
    record = ad.read_h5ad(tmp_path / "out.h5ad").uns["scdiva"]["annotate"]["reference"]
    assert list(record["classes"]) == sorted(set(reference.obs["cell_type"]))
    assert list(record["cells_per_class"]) == reference.obs["cell_type"].value_counts().sort_index().tolist()


def test_other_cells_and_their_order_do_not_matter(split, tiny_model, typer):
    whole = annotate(split[1], tiny_model, typer, self_training=False)
    order = np.random.default_rng(1).permutation(40)
    part = annotate(split[1][order[:11]].copy(), tiny_model, typer, self_training=False)
    np.testing.assert_allclose(part.probability, whole.probability[order[:11]], atol=1e-4)
    np.testing.assert_allclose(part.novelty, whole.novelty[order[:11]], atol=1e-2)


def test_the_layer_that_is_named_is_read_for_fitting_too(split, tiny_model):
    query = split[1].copy()
    query.layers["counts"] = query.X.copy()
    query.X = query.X[:, np.random.default_rng(0).permutation(query.n_vars)]  # raw counts, of other genes
    sd.tl.annotate(query, tiny_model, split[0], "cell_type", layer="counts")
    plain = split[1].copy()
    sd.tl.annotate(plain, tiny_model, split[0], "cell_type")
    np.testing.assert_array_equal(query.obs["scdiva_confidence"], plain.obs["scdiva_confidence"])


def test_what_is_learnt_from_the_query_is_on_record(split, tiny_model):
    typer = fit_cell_typer(split[0], tiny_model, "cell_type", query=split[1])
    plain, auto, further = (
        annotate(split[1], tiny_model, typer, self_training=choice) for choice in (False, "auto", True)
    )
    assert (plain.record["moved"], plain.record["self_training"]) == (False, False)
    assert further.record["self_training"] is True
    assert further.record["moved"] == auto.record["moved"]
    few = np.median(typer.reference["cells_per_class"]) < FEW_FOR_SELF_TRAINING
    assert auto.record["self_training"] == few
    assert auto.record["latent_size"] == typer.annotator.features.latent_size
    # what was fitted is not changed: the next query starts from it
    again = annotate(split[1], tiny_model, typer, self_training=False)
    np.testing.assert_array_equal(plain.probability, again.probability)


def test_an_annotator_of_an_older_version_is_refused(split, bundle, tmp_path):
    typer = fit_cell_typer(split[0], ScDiVa.from_pretrained(bundle, device="cpu"), "cell_type")
    typer.save(tmp_path / "typer")
    head = tmp_path / "typer" / "annotator.json"
    head.write_text(head.read_text().replace('"format": 3', '"format": 2'))
    with pytest.raises(BundleError, match="another version"):
        CellTyper.load(tmp_path / "typer")


def test_a_file_that_was_cut_off_is_named(split, bundle, cli, tmp_path):
    split[0].write_h5ad(tmp_path / "whole.h5ad")
    (tmp_path / "cut.h5ad").write_bytes((tmp_path / "whole.h5ad").read_bytes()[:5000])
    given = ("--reference", tmp_path / "whole.h5ad", "--label-key", "cell_type", "--model", bundle)
    done = cli("annotate", tmp_path / "cut.h5ad", tmp_path / "out.h5ad", *given)
    assert done.code == 2
    assert "cut.h5ad" in done.err
    assert "fix:" in done.err


@pytest.mark.parametrize("method", ["probe", "integrate", "consensus"])
def test_labels_of_the_query_are_not_looked_at(split, tiny_model, method):
    plain = split[1].copy()
    del plain.obs["cell_type"]
    found = [
        annotate(
            query, tiny_model, fit_cell_typer(split[0], tiny_model, "cell_type", method=method, query=query)
        ).probability
        for query in (split[1], plain)
    ]
    np.testing.assert_array_equal(*found)


def test_a_saved_annotator_says_the_same(split, bundle, tmp_path):
    model = ScDiVa.from_pretrained(bundle, device="cpu")
    for method in ("probe", "reference", "integrate", "consensus"):
        typer = fit_cell_typer(split[0], model, "cell_type", method=method, query=split[1])
        typer.save(tmp_path / method)
        again = CellTyper.load(tmp_path / method)
        one, two = (annotate(split[1], model, t) for t in (typer, again))
        np.testing.assert_array_equal(one.probability, two.probability)
        np.testing.assert_array_equal(one.is_unknown, two.is_unknown)
        with pytest.raises(OutputError, match="exists"):
            typer.save(tmp_path / method)
        typer.save(tmp_path / method, overwrite=True)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "paper.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"paper\.txt in it, not an annotator"):
        typer.save(tmp_path / "results", overwrite=True)
    assert (tmp_path / "results" / "paper.txt").read_text() == "mine"
    head = tmp_path / "reference" / "annotator.json"
    names = json.loads(head.read_text())
    head.write_text(json.dumps({**names, "classes": names["classes"][::-1]}))
    with pytest.raises(BundleError, match="belong together"):
        CellTyper.load(tmp_path / "reference")
    head.write_text(json.dumps({"format": names["format"], "method": "reference"}))
    with pytest.raises(BundleError, match="belong together"):
        CellTyper.load(tmp_path / "reference")
    content = bytearray((tmp_path / "probe" / "annotator.npz").read_bytes())
    content[100] ^= 1
    (tmp_path / "probe" / "annotator.npz").write_bytes(content)
    with pytest.raises(BundleError, match="belong together"):
        CellTyper.load(tmp_path / "probe")
    with pytest.raises(BundleError, match="no annotator"):
        CellTyper.load(tmp_path)


def test_an_annotator_of_another_model_is_refused(split, bundle, tiny_trunk_model, tiny_model, tmp_path):
    typer = fit_cell_typer(split[0], ScDiVa.from_pretrained(bundle, device="cpu"), "cell_type")
    with pytest.raises(BundleError, match="another model"):
        annotate(split[1], tiny_trunk_model, typer)
    with pytest.raises(BundleError, match="not saved"):
        fit_cell_typer(split[0], tiny_model, "cell_type").save(tmp_path / "a")


def test_two_references_in_one_index(split, tiny_model):
    one, two = (
        fit_cell_typer(split[0][rows].copy(), tiny_model, "cell_type", method="reference")
        for rows in (np.arange(40), np.arange(40, 80))
    )
    both, whole = one.extended(two), fit_cell_typer(split[0], tiny_model, "cell_type", method="reference")
    np.testing.assert_allclose(
        annotate(split[1], tiny_model, both).probability,
        annotate(split[1], tiny_model, whole).probability,
        atol=1e-4,
    )
    with pytest.raises(ConfigError, match="indices"):
        one.extended(fit_cell_typer(split[0], tiny_model, "cell_type", method="probe"))


def test_an_index_is_extended_over_its_own_genes(split, tiny_model):
    first, second = split[0][:40, :150].copy(), split[0][40:].copy()
    one = fit_cell_typer(first, tiny_model, "cell_type", method="reference")
    both = fit_cell_typer(second, tiny_model, "cell_type", method="reference", extend=one)
    assert both.reference["n_cells"] == 80
    assert both.reference["n_genes"] == one.reference["n_genes"] < 170
    assert sum(both.reference["cells_per_class"]) == 80
    assert both.reference["held_out"]["n_cells"] == 80
    whole = fit_cell_typer(split[0][:, :150].copy(), tiny_model, "cell_type", method="reference")
    np.testing.assert_allclose(
        annotate(split[1], tiny_model, both).probability, annotate(split[1], tiny_model, whole).probability, atol=1e-4
    )
    # a reference without some of these genes cannot join
    with pytest.raises(GeneError, match=r"does not measure \d+ of the \d+ genes of the index"):
        fit_cell_typer(split[0][40:, 20:].copy(), tiny_model, "cell_type", method="reference", extend=one)
    with pytest.raises(ConfigError, match="extend with method 'probe'"):
        fit_cell_typer(second, tiny_model, "cell_type", extend=one)


def test_scores_on_the_reference_are_of_cells_that_had_no_part(split, tiny_model, typer):
    found = typer.reference["held_out"]
    assert found["n_cells"] == 80
    assert 0.8 < found["macro_f1"] <= 1
    assert 0 <= found["calibration_error"] < 0.2
    # of labels that say nothing they are no better than chance
    rng = np.random.default_rng(0)
    reference = split[0].copy()
    reference.obs["cell_type"] = rng.permutation(reference.obs["cell_type"].astype(str).to_numpy())
    again = fit_cell_typer(reference, tiny_model, "cell_type", method=typer.annotator.method, query=split[1])
    assert again.reference["held_out"]["accuracy"] < 0.6


def test_cells_without_a_label_are_left_out(split, tiny_model, caplog):
    reference = split[0].copy()
    labels = reference.obs["cell_type"].astype(object).to_numpy()
    labels[:7], labels[7:9] = np.nan, "unassigned"
    reference.obs["cell_type"] = labels
    typer = fit_cell_typer(reference, tiny_model, "cell_type")
    assert typer.reference["n_cells"] == 71
    assert typer.reference["n_left_out"] == 9
    assert "9 cells without a label" in caplog.text


def test_cells_without_counts_are_left_out_of_the_reference(split, tiny_model, caplog):
    reference = split[0].copy()
    reference.X = sp.diags_array((np.arange(80) >= 3).astype(np.int32)).dot(reference.X)
    typer = fit_cell_typer(reference, tiny_model, "cell_type")
    assert (typer.reference["n_cells"], typer.reference["n_left_out"]) == (77, 3)
    assert "3 cells without a count" in caplog.text


def test_a_consensus_says_who_was_believed(split, tiny_model):
    typer = fit_cell_typer(split[0], tiny_model, "cell_type", method="consensus", query=split[1])
    found = annotate(split[1], tiny_model, typer).record
    assert found["members"] == ["probe", "probe_self_trained", "reference", "integrate"]
    assert sum(found["member_weights"]) == pytest.approx(1)
    order = np.argsort(found["member_agreement"])
    assert (np.diff(np.array(found["member_weights"])[order]) >= 0).all()
    assert min(found["member_agreement"]) > 0.8
    # without a look at the query all count alike
    plain = annotate(split[1], tiny_model, typer, self_training=False).record
    assert plain["member_weights"] == [0.25] * 4
    assert plain["member_agreement"] == []


@pytest.mark.parametrize("method", ["probe", "reference", "integrate", "consensus"])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_one_cell_of_each_type_is_enough(split, tiny_model, method, n_classes):
    names = sorted(set(split[0].obs["cell_type"].astype(str)))[:n_classes]
    first = [int(np.flatnonzero(split[0].obs["cell_type"].astype(str) == name)[0]) for name in names]
    query = split[1][split[1].obs["cell_type"].astype(str).isin(names).to_numpy()].copy()
    typer = fit_cell_typer(split[0][first].copy(), tiny_model, "cell_type", method=method, query=query)
    found = annotate(query, tiny_model, typer, self_training=False)
    assert (found.label == query.obs["cell_type"].astype(str).to_numpy()).mean() > 1 / n_classes + 0.15
    # nobody could be held out: nothing is calibrated, nothing is unknown, and no score is made up
    assert typer.annotator.calibration.temperature == 1
    assert not found.is_unknown.any()
    assert "held_out" not in typer.reference


def test_cells_of_other_types_move_nothing(split, tiny_model):
    typer = fit_cell_typer(split[0], tiny_model, "cell_type", query=split[1])
    strange = split[1].copy()
    strange.X = strange.X[:, np.random.default_rng(0).permutation(strange.n_vars)]
    plain, further = (annotate(strange, tiny_model, typer, self_training=how).record for how in ("auto", True))
    assert plain["moved"] is False
    # self-training alone is no move
    assert further["moved"] is False


class TestWhatCannotBe:
    def refused(self, error: type[ScdivaError], text: str, *arguments, **options) -> None:
        with pytest.raises(error, match=text):
            fit_cell_typer(*arguments, **options)

    def test_no_such_column(self, split, tiny_model):
        self.refused(KeyNotFoundError, "celltype", split[0], tiny_model, "celltype")

    def test_one_class(self, split, tiny_model):
        one = split[0].copy()
        one.obs["cell_type"] = "T"
        self.refused(SourceError, r"1 label \(T\)", one, tiny_model, "cell_type")

    def test_no_label_at_all(self, split, tiny_model):
        none = split[0].copy()
        none.obs["cell_type"] = np.nan
        self.refused(SourceError, "0 labels", none, tiny_model, "cell_type")

    def test_an_unknown_method(self, split, tiny_model):
        self.refused(ConfigError, "method='magic'", split[0], tiny_model, "cell_type", method="magic")

    @pytest.mark.parametrize("method", ["integrate", "consensus"])
    def test_integration_without_a_query(self, split, tiny_model, method):
        self.refused(ConfigError, "without a query", split[0], tiny_model, "cell_type", method=method)

    @pytest.mark.parametrize("method", ["integrate", "reference"])
    def test_neighbours_have_no_weights(self, split, tiny_model, method):
        options = {"method": method, "query": split[1], "is_balanced": True}
        self.refused(ConfigError, "is_balanced", split[0], tiny_model, "cell_type", **options)

    def test_neighbours_do_not_learn_from_a_query(self, split, tiny_model):
        typer = fit_cell_typer(split[0], tiny_model, "cell_type", method="reference")
        with pytest.raises(ConfigError, match="self_training with method 'reference'"):
            annotate(split[1], tiny_model, typer, self_training=True)

    def test_words_of_the_command_line_in_python(self, split, tiny_model, typer):
        with pytest.raises(ConfigError, match="self_training='no'"):
            annotate(split[1], tiny_model, typer, self_training="no")

    def test_a_method_beside_an_annotator(self, split, tiny_model, typer):
        with pytest.raises(ConfigError, match="method with an annotator"):
            sd.tl.annotate(split[1].copy(), tiny_model, typer, method="reference")

    def test_in_memory_methods_do_not_train_the_network(self, split, tiny_model):
        cells = open_counts(split[0], tiny_model.vocabulary).read(np.arange(20))
        z, code = tiny_model.embed(cells), np.arange(20) % 2
        for method, text in (("lora", "trains the network"), ("integrate", "nothing to integrate")):
            with pytest.raises(ConfigError, match=text):
                fit_annotator(method, cells, z, code, 2, tiny_model, unlabelled=None, seed=0)

    def test_one_class_is_left_when_empty_cells_are_gone(self, split, tiny_model):
        reference = split[0].copy()
        kept = str(reference.obs["cell_type"].iloc[0])
        is_kept = (reference.obs["cell_type"].astype(str) == kept).to_numpy()
        reference.X = sp.diags_array(is_kept.astype(np.int32)).dot(reference.X)
        self.refused(SourceError, "1 label", reference, tiny_model, "cell_type")

    def test_genes_that_do_not_overlap(self, split, tiny_model):
        one, two = split[0][:, :110].copy(), split[1][:, 90:].copy()
        self.refused(GeneError, "share", one, tiny_model, "cell_type", query=two)

    def test_a_term_that_does_not_exist(self, split, tiny_model):
        label = str(split[0].obs["cell_type"].iloc[0])
        self.refused(ScdivaError, "CL:9999999", split[0], tiny_model, "cell_type", ontology={label: "CL:9999999"})

    def test_nothing_is_written_after_a_failure(self, split, tiny_model):
        query = split[1].copy()
        with pytest.raises(ConfigError):
            sd.tl.annotate(query, tiny_model, split[0])
        assert "scdiva_cell_type" not in query.obs


def test_terms_of_the_cell_ontology(split, tiny_model):
    names = dict(zip(sorted(set(split[0].obs["cell_type"])), ("B cell", "CD4+ T", "CD8+ T"), strict=True))
    reference, query = split[0].copy(), split[1].copy()
    reference.obs["cell_type"] = reference.obs["cell_type"].map(names).astype(str)
    sd.tl.annotate(query, tiny_model, reference, "cell_type", confidence=0.999999)
    # CL:0000791, mature alpha-beta T cell: what CD4 and CD8 T cells have in common
    assert set(query.obs["scdiva_ontology_id"]) <= {"CL:0000236", "CL:0000624", "CL:0000625", "CL:0000791", ""}
    sure = query.copy()
    sd.tl.annotate(sure, tiny_model, reference, "cell_type", confidence=0.3)
    known = ~sure.obs["scdiva_unknown"]
    assert (sure.obs["scdiva_ontology_id"][known].astype(str) != "").mean() > 0.9
    assert (sure.obs["scdiva_ontology_id"][~known].astype(str) == "").all()


def test_the_command(split, bundle, cli, tmp_path):
    split[0].write_h5ad(tmp_path / "reference.h5ad")
    split[1].write_h5ad(tmp_path / "query.h5ad")
    query, out = tmp_path / "query.h5ad", tmp_path / "out.h5ad"
    given = ("--reference", tmp_path / "reference.h5ad", "--label-key", "cell_type")
    done = cli("annotate", query, out, *given, "--model", bundle, "--save", tmp_path / "typer")
    assert done.code == 0, done.err
    assert "40 cells annotated with 3 types" in done.out
    again = cli("annotate", query, tmp_path / "again.h5ad", "--annotator", tmp_path / "typer", "--model", bundle)
    assert again.code == 0, again.err
    one, two = (ad.read_h5ad(path) for path in (out, tmp_path / "again.h5ad"))
    assert (one.obs["scdiva_cell_type"] == two.obs["scdiva_cell_type"]).all()
    assert cli("annotate", query, out, "--annotator", tmp_path / "typer", "--model", bundle).code == 2
    assert cli("annotate", query, tmp_path / "x.h5ad", "--model", bundle).code == 2
    assert not (tmp_path / "x.h5ad").exists()


def test_the_command_with_another_method(split, bundle, cli, tmp_path):
    split[0].write_h5ad(tmp_path / "reference.h5ad")
    split[1].write_h5ad(tmp_path / "query.h5ad")
    query, out = tmp_path / "query.h5ad", tmp_path / "out.h5ad"
    given = ("--reference", tmp_path / "reference.h5ad", "--label-key", "cell_type", "--model", bundle)
    done = cli("annotate", query, out, *given, "--method", "consensus", "--save", tmp_path / "typer")
    assert done.code == 0, done.err
    assert "by consensus (probe " in done.out
    again = cli("annotate", query, tmp_path / "again.h5ad", "--annotator", tmp_path / "typer", "--model", bundle)
    assert again.code == 0, again.err
    one, two = (ad.read_h5ad(path) for path in (out, tmp_path / "again.h5ad"))
    np.testing.assert_array_equal(one.obs["scdiva_confidence"], two.obs["scdiva_confidence"])
    # what would be ignored is refused
    for wrong in (
        (*given, "--method", "reference", "--self-training", "yes"),
        ("--annotator", tmp_path / "typer", "--model", bundle, "--seed", "3"),
        (*given, "--method", "integrate", "--balanced"),
        (*given, "--extend", tmp_path / "typer"),
    ):
        refused = cli("annotate", query, tmp_path / "x.h5ad", *wrong)
        assert refused.code == 2, refused.out
    assert not (tmp_path / "x.h5ad").exists()


def test_an_index_is_saved_and_extended_by_command(split, bundle, cli, tmp_path):
    for name, cells in (("one", split[0][:40]), ("two", split[0][40:]), ("query", split[1])):
        cells.copy().write_h5ad(tmp_path / f"{name}.h5ad")
    given = ("--label-key", "cell_type", "--model", bundle, "--method", "reference")
    query, index = tmp_path / "query.h5ad", tmp_path / "index"
    first = cli("annotate", query, tmp_path / "a.h5ad", "--reference", tmp_path / "one.h5ad", *given, "--save", index)
    assert first.code == 0, first.err
    more = ("--reference", tmp_path / "two.h5ad", "--extend", index, "--save", tmp_path / "both")
    second = cli("annotate", query, tmp_path / "b.h5ad", *more, *given)
    assert second.code == 0, second.err
    assert "80 cells" in second.out
    assert "calibration error" in second.out
    assert CellTyper.load(tmp_path / "both").reference["n_cells"] == 80


QUICK = FineTuning(epochs=2, batch_size=16)


@pytest.fixture(scope="module")
def trunk_bundle(tiny_trunk_model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trunk") / "tiny"
    tiny_trunk_model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def trunk_model(trunk_bundle) -> ScDiVa:
    return ScDiVa.from_pretrained(trunk_bundle, device="cpu")


@pytest.fixture(scope="module", params=["finetune", "lora"])
def tuned(request, split, trunk_model) -> CellTyper:
    return fit_cell_typer(split[0], trunk_model, "cell_type", method=request.param, query=split[1], fine_tuning=QUICK)


class TestFineTuning:
    """The two methods that train the network."""

    def test_within_inference_mode(self, split, trunk_model, tuned):
        with torch.inference_mode():
            again = fit_cell_typer(
                split[0], trunk_model, "cell_type", method=tuned.annotator.method, query=split[1], fine_tuning=QUICK
            )
        one, two = (annotate(split[1], trunk_model, typer).probability for typer in (tuned, again))
        np.testing.assert_array_equal(one, two)

    def test_types_are_found_and_the_training_is_on_record(self, split, trunk_model, tuned, tmp_path):
        query = split[1].copy()
        sd.tl.annotate(query, trunk_model, tuned)
        assert (query.obs["scdiva_cell_type"].astype(str) == query.obs["cell_type"].astype(str)).mean() > 0.9
        assert query.obs["scdiva_unknown"].mean() < 0.5
        query.write_h5ad(tmp_path / "out.h5ad")
        record = ad.read_h5ad(tmp_path / "out.h5ad").uns["scdiva"]["annotate"]
        assert record["method"] == tuned.annotator.method
        training = record["reference"]["training"]
        assert training["n_train"] + training["n_validation"] == 80
        assert training["n_steps"] <= 2 * (training["n_train"] // 8)
        assert 0 <= training["best_step"] <= training["n_steps"]
        assert 0 <= training["validation_calibration_error"] <= 1
        assert training["validation_macro_f1"] > 0.8
        assert training["cells_per_s"] > 0 < training["minutes"]
        assert (training["rank"] > 0) == (tuned.annotator.method == "lora")

    def test_the_model_is_not_changed(self, trunk_model, tuned, trunk_bundle):
        before = ScDiVa.from_pretrained(trunk_bundle, device="cpu").network.state_dict()
        after = trunk_model.network.state_dict()
        assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
        assert not any("anchor" in name for name in tuned.annotator.weights)

    def test_a_saved_one_says_the_same_bit_for_bit(self, split, trunk_model, tuned, tmp_path, trunk_bundle):
        tuned.save(tmp_path / "typer")
        again, model = CellTyper.load(tmp_path / "typer"), ScDiVa.from_pretrained(trunk_bundle, device="cpu")
        one, two = annotate(split[1], trunk_model, tuned), annotate(split[1], model, again)
        np.testing.assert_array_equal(one.probability, two.probability)
        np.testing.assert_array_equal(one.novelty, two.novelty)
        assert one.threshold == two.threshold
        assert again.reference["training"] == tuned.reference["training"]
        # what was trained, and no copy of the model
        with np.load(tmp_path / "typer" / "annotator.npz", allow_pickle=False) as archive:
            names = {name for name in archive.files if name.startswith("weight:")}
        assert names == {f"weight:{name}" for name in tuned.annotator.weights}
        assert not any("gene" in name for name in names)

    def test_of_another_model_it_is_refused(self, split, tiny_trunk_model, tuned):
        with pytest.raises(BundleError, match="another model"):
            annotate(split[1], tiny_trunk_model, tuned)

    def test_other_cells_and_their_order_do_not_matter(self, split, trunk_model, tuned):
        whole = annotate(split[1], trunk_model, tuned)
        order = np.random.default_rng(1).permutation(40)
        part = annotate(split[1][order[:11]].copy(), trunk_model, tuned)
        np.testing.assert_allclose(part.probability, whole.probability[order[:11]], atol=1e-4)
        np.testing.assert_allclose(part.novelty, whole.novelty[order[:11]], atol=1e-2)

    def test_the_seed_decides(self, split, trunk_model, tuned):
        method = tuned.annotator.method
        same, other = (
            fit_cell_typer(
                split[0], trunk_model, "cell_type", method=method, query=split[1], fine_tuning=QUICK, seed=seed
            ).annotator.weights
            for seed in (0, 1)
        )
        first = tuned.annotator.weights
        assert all(np.array_equal(first[name], same[name]) for name in first)
        assert any(not np.array_equal(first[name], other[name]) for name in first)

    def test_a_run_in_a_folder_is_resumed_and_only_by_the_same_call(self, split, trunk_model, tmp_path):
        settings = replace(QUICK, out_dir=tmp_path / "run")
        given = {"method": "finetune", "fine_tuning": settings}
        one = fit_cell_typer(split[0], trunk_model, "cell_type", **given)
        written = (tmp_path / "run" / "result.json").stat().st_mtime_ns
        two = fit_cell_typer(split[0], trunk_model, "cell_type", **given)
        assert (tmp_path / "run" / "result.json").stat().st_mtime_ns == written
        assert all(np.array_equal(one.annotator.weights[n], two.annotator.weights[n]) for n in one.annotator.weights)
        other = split[0].copy()
        other.X[0, 50] += 1
        with pytest.raises(TrainingError, match="cells labels and start"):
            fit_cell_typer(other, trunk_model, "cell_type", **given)

    def test_no_folder_is_left_behind(self, split, trunk_model, tmp_path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        fit_cell_typer(split[0], trunk_model, "cell_type", method="finetune", fine_tuning=replace(QUICK, epochs=1))
        assert list(tmp_path.iterdir()) == []

    def test_one_cell_of_each_type(self, split, trunk_model):
        labels = split[0].obs["cell_type"].astype(str).to_numpy()
        rows = np.array([np.flatnonzero(labels == name)[0] for name in np.unique(labels)])
        typer = fit_cell_typer(
            split[0][rows].copy(), trunk_model, "cell_type", method="finetune", fine_tuning=QUICK, is_balanced=True
        )
        found = annotate(split[1], trunk_model, typer)
        assert np.isfinite(found.probability).all()
        assert not found.is_unknown.any()
        assert typer.reference["training"]["n_validation"] == 0
        assert "validation_macro_f1" not in typer.reference["training"]

    def test_genes_of_the_query_alone_are_used(self, split, trunk_model):
        query = split[1][:, :150].copy()
        given = {"method": "finetune", "query": query, "fine_tuning": replace(QUICK, epochs=1)}
        whole = fit_cell_typer(split[0], trunk_model, "cell_type", **given)
        part = fit_cell_typer(split[0][:, :150].copy(), trunk_model, "cell_type", **given)
        assert all(
            np.array_equal(value, part.annotator.weights[name]) for name, value in whole.annotator.weights.items()
        )

    @pytest.mark.parametrize(
        ("method", "settings", "error", "words"),
        [
            ("lora", FineTuning(n_trained_layers=1), ConfigError, "n_trained_layers=1 with method 'lora'"),
            ("finetune", FineTuning(rank=4), ConfigError, "rank=4 with method 'finetune'"),
            ("lora", FineTuning(rank=0), ConfigError, "rank=0"),
            ("finetune", FineTuning(n_trained_layers=9), ConfigError, "9 layers"),
            ("finetune", FineTuning(epochs=0), ConfigError, "epochs=0"),
            ("finetune", FineTuning(validation_fraction=1.0), ConfigError, "validation_fraction"),
            ("finetune", FineTuning(trunk_lr=0.0), ConfigError, "trunk_lr"),
            ("probe", FineTuning(), ConfigError, "fine_tuning with method 'probe'"),
        ],
        ids=str,
    )
    def test_what_cannot_be(self, method, settings, error, words, split, trunk_model):
        with pytest.raises(error, match=words):
            fit_cell_typer(split[0], trunk_model, "cell_type", method=method, fine_tuning=settings)

    def test_a_model_without_a_trunk(self, split, tiny_model):
        with pytest.raises(UnsupportedError, match="no trunk"):
            fit_cell_typer(split[0], tiny_model, "cell_type", method="lora")

    def test_a_model_of_another_kind(self, split):
        class Other:
            pass

        with pytest.raises(UnsupportedError, match="Other"):
            fit_cell_typer(split[0], Other(), "cell_type", method="finetune")

    def test_components_decide_where_the_held_out_cells_gain(self, split, trunk_model, monkeypatch):
        given = {"method": "finetune", "query": split[1]}
        quick = replace(QUICK, epochs=1)
        nll = iter([0.1, 0.2])  # with components, without
        monkeypatch.setattr("scdiva.tasks.fine_tuned._nll", lambda log_probability, code: next(nll))
        both = fit_cell_typer(split[0], trunk_model, "cell_type", fine_tuning=quick, **given)
        alone = fit_cell_typer(
            split[0], trunk_model, "cell_type", fine_tuning=replace(quick, with_components=False), **given
        )
        nll = iter([0.2, 0.1])
        chosen = fit_cell_typer(split[0], trunk_model, "cell_type", fine_tuning=quick, **given)
        assert [typer.reference["training"]["with_components"] for typer in (both, alone, chosen)] == [
            True, False, False,
        ]  # fmt: skip
        found = [annotate(split[1], trunk_model, typer).probability for typer in (both, alone, chosen)]
        np.testing.assert_array_equal(found[1], found[2])
        assert not np.array_equal(found[0], found[1])

    def test_the_split_keeps_a_cell_of_each_type_to_train_on(self):
        code = np.repeat([0, 1, 2, 3], [100, 7, 2, 1])
        train, heldout = stratified_split(code, 0.15, np.random.default_rng(0))
        assert np.bincount(code[heldout], minlength=4).tolist() == [15, 1, 1, 0]
        assert np.array_equal(np.sort(np.concatenate([train, heldout])), np.arange(110))

    @pytest.mark.parametrize("n_train", [1, 3, 40, 1_000, 100_000])
    def test_every_size_has_a_possible_run(self, n_train):
        config = loop_config(FineTuning(), n_train, 10, seed=0, device="cpu").training
        assert 1 <= config.batch_size <= min(64, n_train)
        assert config.validate_every <= config.max_steps
        assert config.max_steps * config.batch_size <= 8 * n_train

    def test_the_command(self, split, trunk_bundle, cli, tmp_path):
        split[0].write_h5ad(tmp_path / "reference.h5ad")
        split[1].write_h5ad(tmp_path / "query.h5ad")
        query, model = tmp_path / "query.h5ad", ("--model", trunk_bundle)
        given = ("--reference", tmp_path / "reference.h5ad", "--label-key", "cell_type")
        lora = ("--method", "lora", "--rank", "2", "--epochs", "1")
        done = cli("annotate", query, tmp_path / "o.h5ad", *given, *model, *lora, "--save", tmp_path / "typer")
        assert done.code == 0, done.err
        assert "by lora (adapters of rank 2 on 2 layers, and a head" in done.out
        assert "cells/s" in done.out
        assert "calibration error" in done.out
        again = cli("annotate", query, tmp_path / "again.h5ad", "--annotator", tmp_path / "typer", *model)
        assert again.code == 0, again.err
        one, two = (ad.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("o", "again"))
        np.testing.assert_array_equal(
            one.obsm["scdiva_cell_type_probability"], two.obsm["scdiva_cell_type_probability"]
        )
        notebook = split[1].copy()
        sd.tl.annotate(
            notebook,
            ScDiVa.from_pretrained(trunk_bundle, device="cpu"),
            split[0],
            "cell_type",
            method="lora",
            fine_tuning=sd.tl.FineTuning(rank=2, epochs=1),
        )
        np.testing.assert_array_equal(
            one.obsm["scdiva_cell_type_probability"], notebook.obsm["scdiva_cell_type_probability"]
        )
        for wrong in (("--rank", "2"), ("--method", "lora", "--trained-layers", "1"), ("--epochs", "2")):
            refused = cli("annotate", query, tmp_path / "x.h5ad", *given, *model, *wrong)
            assert refused.code == 2
            assert "belongs to" in refused.err
        assert not (tmp_path / "x.h5ad").exists()
