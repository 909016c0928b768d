from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import files_under
from scdiva.data.reader import open_counts
from scdiva.errors import BundleError, GeneError, OutputError
from scdiva.genes import GeneVocabulary
from scdiva.models import bundle as bundles
from scdiva.models.scdiva import ScDiVa

ALL_FILES = [*bundles.FILES, bundles.MANIFEST]


def load(path) -> ScDiVa:
    return ScDiVa.from_pretrained(path, device="cpu")


def rewrite(path, name: str, content: bytes) -> None:
    """Change a file and make the manifest agree: what a careless or hostile author would do."""
    (path / name).write_bytes(content)
    hashes = json.loads((path / bundles.MANIFEST).read_text())
    hashes[name] = hashlib.sha256(content).hexdigest()
    (path / bundles.MANIFEST).write_text(json.dumps(hashes))


def change_weights(path, change) -> None:
    weights = load_file(path / bundles.WEIGHTS)
    change(weights)
    save_file(weights, path / "new")
    rewrite(path, bundles.WEIGHTS, (path / "new").read_bytes())
    (path / "new").unlink()


def change_config(path, change) -> None:
    config = json.loads((path / bundles.CONFIG).read_text())
    change(config)
    rewrite(path, bundles.CONFIG, json.dumps(config).encode())


def test_a_saved_model_loads_equal(tiny_model, bundle, adata):
    loaded = load(bundle)
    for name, tensor in tiny_model.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], tensor), name
    assert loaded.vocabulary == tiny_model.vocabulary
    assert loaded.vocabulary.symbol.tolist() == tiny_model.vocabulary.symbol.tolist()
    np.testing.assert_array_equal(loaded.statistics.normalised_entropy, tiny_model.statistics.normalised_entropy)
    assert loaded.labels == tiny_model.labels
    assert loaded.config == tiny_model.config
    assert loaded.name == "tiny"
    assert loaded.details["training"] == tiny_model.details["training"]
    assert loaded.details["metrics"] == tiny_model.details["metrics"]
    cells = open_counts(adata, loaded.vocabulary).read(np.arange(120))
    np.testing.assert_array_equal(loaded.embed(cells), tiny_model.embed(cells))
    assert not loaded.network.training


def test_a_model_with_trunk_and_labels_loads_equal(tiny_trunk_model, adata, tmp_path):
    tiny_trunk_model.save_pretrained(tmp_path / "trunk")
    loaded = load(tmp_path / "trunk")
    assert loaded.config == tiny_trunk_model.config
    assert loaded.labels == tiny_trunk_model.labels
    assert json.loads((tmp_path / "trunk" / "labels.json").read_text()) == {"cell_type": ["type 0", "type 1", "type 2"]}
    for name, tensor in tiny_trunk_model.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], tensor), name
    cells = open_counts(adata, loaded.vocabulary).with_conditions(loaded.labels, {}).read(np.arange(120))
    np.testing.assert_array_equal(loaded.embed(cells), tiny_trunk_model.embed(cells))
    np.testing.assert_array_equal(loaded.cell_state(cells), tiny_trunk_model.cell_state(cells))
    with torch.no_grad():
        one, other = (model.network(model.unmasked(cells)) for model in (loaded, tiny_trunk_model))
    assert torch.equal(one.gene_logit_BG, other.gene_logit_BG)


def test_labels_of_another_number_are_refused(tiny_trunk_model, tmp_path):
    tiny_trunk_model.save_pretrained(tmp_path / "trunk")
    rewrite(tmp_path / "trunk", bundles.LABELS, b'{"cell_type": ["type 0"]}')
    with pytest.raises(BundleError, match=r"trunk\.labels\.0\.weight"):
        load(tmp_path / "trunk")


def test_saving_what_was_loaded_gives_the_same_bundle(bundle, tmp_path):
    load(bundle).save_pretrained(tmp_path / "again")
    first, again = files_under(bundle), files_under(tmp_path / "again")
    assert set(first) == set(again) == set(ALL_FILES)
    for name in ("config.json", "model.safetensors", "vocabulary.tsv", "labels.json", "README.md"):
        assert first[name] == again[name], name


def test_the_hash_names_the_very_model(bundle, tmp_path):
    loaded = load(bundle)
    assert loaded.provenance["model_hash"] == hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    with torch.no_grad():
        loaded.network.anchor.log_profile[0] += 1
    loaded.save_pretrained(tmp_path / "other")
    assert load(tmp_path / "other").provenance["model_hash"] != load(bundle).provenance["model_hash"]


def test_bfloat16_halves_the_matrices_keeps_the_vectors_and_says_nearly_the_same(tiny_trunk_model, tmp_path, adata):
    tiny_trunk_model.save_pretrained(tmp_path / "half", dtype="bfloat16")
    loaded = load(tmp_path / "half")
    own = tiny_trunk_model.network.state_dict()
    for name, tensor in load_file(tmp_path / "half" / bundles.WEIGHTS).items():
        assert tensor.dtype == (torch.bfloat16 if tensor.ndim > 1 else torch.float32), name
        if tensor.ndim < 2:  # a log-rate of -12 does not bear seven bits
            assert torch.equal(tensor, own[name]), name
    assert {p.dtype for p in loaded.network.parameters()} == {torch.float32}
    cells = open_counts(adata, loaded.vocabulary).read(np.arange(120))
    for method in ("embed", "cell_state"):
        full, half = (getattr(model, method)(cells) for model in (tiny_trunk_model, loaded))
        assert np.corrcoef(full.ravel(), half.ravel())[0, 1] > 0.999
        assert not np.array_equal(full, half)


class TestDamage:
    @pytest.mark.parametrize("name", ALL_FILES)
    def test_a_missing_file_is_named(self, name, bundle):
        (bundle / name).unlink()
        with pytest.raises(BundleError, match=name):
            load(bundle)

    @pytest.mark.parametrize("name", bundles.FILES)
    @pytest.mark.parametrize("how", ["one bit", "cut", "empty"])
    def test_a_changed_file_is_named(self, name, how, bundle):
        content = bytearray((bundle / name).read_bytes())
        if how == "one bit":
            content[len(content) // 2] ^= 1
        (bundle / name).write_bytes({"one bit": content, "cut": content[:-3], "empty": b""}[how])
        with pytest.raises(BundleError, match=rf"{name}.*sha256"):
            load(bundle)

    @pytest.mark.parametrize("text", ["{", "[]", '"text"', "{}"])
    def test_a_broken_manifest_is_refused(self, text, bundle):
        (bundle / bundles.MANIFEST).write_text(text)
        with pytest.raises(BundleError):
            load(bundle)

    @pytest.mark.parametrize("name", [bundles.CONFIG, bundles.LABELS])
    @pytest.mark.parametrize("text", [b"{", b"[]", b"\xff\xfe"])
    def test_a_file_that_is_no_json_object_is_refused_even_with_its_hash(self, name, text, bundle):
        rewrite(bundle, name, text)
        with pytest.raises(BundleError):
            load(bundle)

    @pytest.mark.parametrize("name", [bundles.STATISTICS, bundles.WEIGHTS, bundles.VOCABULARY])
    @pytest.mark.parametrize("content", [b"", b"junk" * 100])
    def test_a_file_of_junk_is_refused_even_with_its_hash(self, name, content, bundle):
        rewrite(bundle, name, content)
        with pytest.raises(BundleError):
            load(bundle)

    def test_a_missing_tensor_is_named(self, bundle):
        change_weights(bundle, lambda w: w.pop("anchor.encoder.weight"))
        with pytest.raises(BundleError, match=r"missing: anchor\.encoder\.weight"):
            load(bundle)

    def test_a_left_over_tensor_is_named(self, bundle):
        change_weights(bundle, lambda w: w.update(trunk=torch.zeros(2)))
        with pytest.raises(BundleError, match="not in the model: trunk"):
            load(bundle)

    def test_a_renamed_tensor_is_named_on_both_sides(self, bundle):
        change_weights(bundle, lambda w: w.update({"anchor.encoder.w": w.pop("anchor.encoder.weight")}))
        words = r"missing: anchor\.encoder\.weight; not in the model: anchor\.encoder\.w"
        with pytest.raises(BundleError, match=words):
            load(bundle)

    @pytest.mark.parametrize("name", ["anchor.encoder.weight", "identity_offset", "anchor.pool_scale"])
    def test_a_tensor_of_another_shape_is_named(self, name, bundle):
        change_weights(bundle, lambda w: w.update({name: torch.zeros(3, 2)}))
        with pytest.raises(BundleError, match=rf"of another shape: {name} \(3, 2\)"):
            load(bundle)

    def test_a_refused_load_leaves_the_module_as_it_was(self, tiny_model, tmp_path):
        own = {name: tensor.clone() for name, tensor in tiny_model.network.state_dict().items()}
        wrong = {name: torch.zeros_like(tensor) for name, tensor in own.items()} | {"more": torch.zeros(1)}
        with pytest.raises(BundleError):
            bundles.load_strictly(tiny_model.network, wrong, tmp_path)
        for name, tensor in tiny_model.network.state_dict().items():
            assert torch.equal(tensor, own[name])

    def test_another_vocabulary_is_refused_even_with_its_hash(self, bundle):
        genes = GeneVocabulary.read_tsv(bundle / bundles.VOCABULARY)
        other = GeneVocabulary(genes.ensembl_id[::-1].copy(), genes.symbol[::-1].copy())
        other.write_tsv(bundle / "new")
        rewrite(bundle, bundles.VOCABULARY, (bundle / "new").read_bytes())
        with pytest.raises(BundleError, match="fingerprint"):
            load(bundle)

    def test_statistics_of_other_genes_are_refused(self, bundle):
        from scdiva.data.statistics import GeneStatistics

        GeneStatistics.empty(7).save(bundle / "new.npz")
        rewrite(bundle, bundles.STATISTICS, (bundle / "new.npz").read_bytes())
        with pytest.raises(BundleError, match="statistics of 7 genes"):
            load(bundle)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda c: c.update(format=99), "format 99"),
            (lambda c: c.update(family="scgpt"), "'scgpt'"),
            (lambda c: c.pop("family"), "family"),
            (lambda c: c.pop("model"), "model"),
            (lambda c: c.pop("vocabulary_fingerprint"), "fingerprint"),
            (lambda c: c["model"].update(n_layers=3), "n_layers"),
            (lambda c: c["model"].update(n_latent=9), "of another shape"),
        ],
    )
    def test_a_config_that_does_not_fit_is_refused(self, change, words, bundle):
        change_config(bundle, change)
        with pytest.raises(BundleError, match=words):
            load(bundle)


class TestWriting:
    def test_an_existing_folder_is_never_overwritten_silently(self, tiny_model, bundle):
        before = files_under(bundle)
        with pytest.raises(OutputError, match="exists"):
            tiny_model.save_pretrained(bundle)
        assert files_under(bundle) == before

    def test_overwrite_replaces_a_bundle_and_nothing_else(self, tiny_model, bundle, tmp_path):
        tiny_model.save_pretrained(bundle, overwrite=True)
        load(bundle)
        other = tmp_path / "thesis"
        other.mkdir()
        (other / "chapter1.txt").write_text("years of work")
        with pytest.raises(OutputError, match="is no bundle"):
            tiny_model.save_pretrained(other, overwrite=True)
        assert (other / "chapter1.txt").read_text() == "years of work"

    @pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
    @pytest.mark.parametrize("step", ["_sha256", "CARD", "save_file"])
    @pytest.mark.parametrize("exists", [False, True])
    def test_an_interrupted_write_leaves_nothing(self, error, step, exists, tiny_model, bundle, monkeypatch):
        if not exists:
            shutil.rmtree(bundle)
        before = files_under(bundle.parent)

        def fail(*args, **kwargs):
            raise error

        if step == "save_file":
            monkeypatch.setattr("safetensors.torch.save_file", fail)
        elif step == "CARD":
            monkeypatch.setattr(bundles, "CARD", "no/such/folder/README.md")
            error = FileNotFoundError()
        else:
            monkeypatch.setattr(bundles, step, fail)
        with pytest.raises(type(error)):
            tiny_model.save_pretrained(bundle, overwrite=exists)
        assert files_under(bundle.parent) == before

    def test_parts_that_do_not_fit_make_no_model(self, tiny_model):
        with pytest.raises(GeneError, match="210 gene embeddings"):
            ScDiVa(tiny_model.network, tiny_model.config, GeneVocabulary.default(), tiny_model.statistics)


class TestFinding:
    def test_a_hub_id_is_downloaded_and_only_the_files_of_a_bundle(self, bundle, monkeypatch):
        asked = []

        def snapshot_download(repo_id, **options):
            asked.append((repo_id, options))
            return str(bundle)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        assert load("someone/scdiva-lung").name == "tiny"
        assert asked[0][0] == "someone/scdiva-lung"
        names = {*ALL_FILES, "population.npz"}
        assert set(asked[0][1]["allow_patterns"]) == names | {f"codec/{name}" for name in names}

    def test_a_hub_id_may_have_a_version_number(self, bundle, monkeypatch):
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo_id, **options: str(bundle))
        assert load("someone/scdiva-v1.5").name == "tiny"

    def test_a_silent_hub_is_one_clear_error(self, monkeypatch):
        def snapshot_download(repo_id, **options):
            raise ConnectionError("no route to host")

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        with pytest.raises(BundleError, match=r"someone/nothing.*ConnectionError"):
            load("someone/nothing")

    @pytest.mark.parametrize("name", ["nonsense", "./no/where", "/no/where", "a/b/c", "model.h5ad", ""])
    def test_what_is_no_model_never_reaches_the_network(self, name, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the network"))
        with pytest.raises(BundleError):
            load(name)

    def test_a_folder_that_is_no_bundle_says_what_a_bundle_is(self, tmp_path):
        with pytest.raises(BundleError, match=r"manifest\.json"):
            load(tmp_path)

    def test_an_unknown_bundled_name_lists_those_there_are(self):
        with pytest.raises(BundleError, match="scdiva-blood-tiny"):
            bundles.bundled_path("scdiva-brain")

    @pytest.mark.parametrize("device", ["banana", "cuda"])
    def test_a_device_that_is_not_there_is_one_clear_error(self, device, bundle):
        from scdiva.errors import ScdivaError

        if device == "cuda" and torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        with pytest.raises(ScdivaError, match=device):
            ScDiVa.from_pretrained(bundle, device=device)


class TestCard:
    def test_the_card_tells_sources_licence_and_measurements(self, bundle):
        card = (bundle / "README.md").read_text()
        expected = ["# tiny", "license: cc0-1.0", "synthetic", "made up here", "95.0%", "heldout_profile_nll", "4.2500"]
        for words in [*expected, "anchor", "Human raw counts only", "120 cells"]:
            assert words in card, words

    def test_the_card_of_an_unnamed_model_says_so(self, tiny_model, tmp_path):
        bare = ScDiVa(tiny_model.network, tiny_model.config, tiny_model.vocabulary, tiny_model.statistics)
        bare.save_pretrained(tmp_path / "bare")
        card = (tmp_path / "bare" / "README.md").read_text()
        assert "license: unknown" in card
        assert "Trained parts: none" in card


def test_the_bundled_model_loads_and_says_what_it_is(bundled_model, adata):
    assert bundled_model.name == "scdiva-blood-tiny"
    assert bundled_model.details["license"]
    assert bundled_model.details["trained_heads"]
    metrics = bundled_model.details["metrics"]
    assert metrics["heldout_profile_nll"] < metrics["heldout_profile_nll_floor"]
    held_back = {"pbmc3k", "zheng_sorted7_3500", "frozen_pbmc_donorA", "pbmc68k_reduced_700", "pbmc4k_sub"}
    assert held_back.isdisjoint(source["name"] for source in bundled_model.details["training"]["sources"])
