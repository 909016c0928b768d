"""The published networks: their sizes, their process, and what each cell's numbers depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from scdiva.config import ScDiffusionConfig
from scdiva.data.conditions import ConditionLabels
from scdiva.data.population import CellSizes
from scdiva.data.reader import open_counts
from scdiva.data.statistics import GeneStatistics
from scdiva.errors import BundleError, ConfigError
from scdiva.genes import GeneVocabulary
from scdiva.models.prior import MixturePrior, Population
from scdiva.models.scdiffusion import PRESETS, LatentSampler, ScDiffusion
from scdiva.models.scdiffusion.model import build_networks
from scdiva.models.scdiffusion.objectives import ClassifierObjective, DenoiserObjective, LatentTable
from scdiva.models.scdiffusion.published import (
    PublishedAutoencoder,
    PublishedAutoencoderObjective,
    PublishedClassifier,
    PublishedDenoiser,
)
from scdiva.models.scdiffusion.sampling import Guide, draw_latents, guided_prediction, scheduler_of
from scdiva.models.scdiffusion.schedule import alpha_bar
from scdiva.types import CellCounts, LatentCodec

LABELS = ConditionLabels((("cell_type", ("type 0", "type 1", "type 2")), ("batch", ("batch 0", "batch 1"))))
SIZES = PRESETS["parity"].model_copy(
    update={
        "n_latent": 8, "n_hidden": 16, "width": 16, "classifier_width": 16, "n_times": 100, "guided_times": 50,
        "classified": ("cell_type",),
    }
)  # fmt: skip
STEPS = LatentSampler("ddpm", 10)


@pytest.fixture(scope="module")
def cells(_cells) -> CellCounts:
    vocabulary = GeneVocabulary.default().subset(np.arange(200))
    return open_counts(_cells, vocabulary).with_conditions(LABELS, {}).read(np.arange(120))


@pytest.fixture(scope="module")
def model(cells) -> ScDiffusion:
    networks = build_networks(200, SIZES, LABELS)
    generator = torch.Generator().manual_seed(0)
    for module in networks.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            # as after training: statistics that are not those of any minibatch
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    depth = np.asarray(cells.counts.sum(axis=1)).ravel()
    networks.set_depths(depth)
    z = np.random.default_rng(0).standard_normal((120, 8)).astype(np.float32)
    sizes = np.stack([depth, np.diff(cells.counts.indptr)], axis=1)
    population = Population(
        CellSizes.of([cells], np.random.default_rng(0)), MixturePrior.fit(z, sizes, cells.condition, 0)
    )
    return ScDiffusion(
        networks, SIZES, GeneVocabulary.default().subset(np.arange(200)), GeneStatistics.from_cells(cells),
        labels=LABELS, population=population, details={"name": "small"},
    )  # fmt: skip


def wanted(n: int, cell_type: int = 1) -> np.ndarray:
    return np.tile(np.array([cell_type, 0], dtype=np.int32), (n, 1))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def n_parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


class TestSizes:
    def test_numbers_of_parameters_are_the_published_ones(self):
        """Methods C.1, counted on the published code."""
        labels = ConditionLabels((("cell_type", tuple(f"type {i}" for i in range(12))),))
        sizes = PRESETS["parity"].model_copy(update={"classified": ("cell_type",)})
        with torch.device("meta"):
            networks = build_networks(18_996, sizes, labels)
        assert n_parameters(networks.autoencoder) == 43_397_818
        assert n_parameters(networks.denoiser) == 3_488_384
        assert n_parameters(networks.classifiers[0]) == 1_647_628

    def test_shapes_that_cannot_be(self):
        for options in ({"width": 18}, {"n_blocks": 3}, {"fields": ("cell_type",)}, {"n_times": 10}):
            with pytest.raises(ValidationError):
                ScDiffusionConfig(architecture="published", schedule="linear", **options)


class TestAutoencoder:
    def test_z_is_on_the_unit_sphere_and_of_each_cell_alone(self, model, cells):
        z = model.encode(cells)
        assert z.shape == (120, 8)
        np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(model.encode(cells.take(np.array([7]))), z[[7]], atol=1e-5)
        np.testing.assert_allclose(model.encode(cells.take(np.arange(119, -1, -1))), z[::-1], atol=1e-5)
        assert np.abs(z[1:] - z[:-1]).max() > 1e-2

    def test_in_training_mode_it_would_depend_on_the_others(self, model, cells):
        """What the published code does, so that the test above can fail."""
        autoencoder = build_networks(200, SIZES, LABELS).autoencoder
        objective = PublishedAutoencoderObjective(autoencoder)
        packed = objective.prepare(cells, np.random.default_rng(0))
        some = objective.prepare(cells.take(np.arange(20)), np.random.default_rng(0))
        with torch.no_grad():
            together, apart = autoencoder.encode(packed)[:20], autoencoder.encode(some)
        assert (together - apart).abs().max() > 1e-2

    def test_what_is_decoded_depends_on_the_direction_of_z_alone(self, model):
        z = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
        share = model.expected_share(z)
        np.testing.assert_allclose(share.sum(axis=1), 1, rtol=1e-5)
        assert share.min() == 0.0  # the ReLU
        np.testing.assert_allclose(model.expected_share(3 * z), share, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(model.expected_share(z[[2]]), share[[2]], rtol=1e-3, atol=1e-6)

    def test_nothing_decoded_is_no_counts(self):
        autoencoder = PublishedAutoencoder(5, 4, 8).eval()
        with torch.no_grad():
            for parameter in autoencoder.decoder[-1].parameters():
                parameter.zero_()
        assert autoencoder.share(torch.ones(2, 4)).tolist() == [[0.0] * 5] * 2

    def test_counts_are_poisson_draws_at_the_expected_share(self, model):
        z = np.tile(np.random.default_rng(2).standard_normal(8).astype(np.float32), (4000, 1))
        counts = model.decode(z, 800.0, np.random.default_rng(1))
        assert counts.dtype == np.int32
        mean = 800.0 * model.expected_share(z[:1])[0]
        dense = counts.toarray()
        is_there = mean > 0
        assert not dense[:, ~is_there].any()
        error = np.abs(dense.mean(axis=0) - mean)[is_there] / np.sqrt(mean[is_there] / 4000)
        assert error.max() < 5
        np.testing.assert_allclose(dense.var(axis=0)[mean > 1], mean[mean > 1], rtol=0.15)

    def test_the_loss_is_the_squared_error_of_log1p_cp10k(self, model, cells):
        objective = PublishedAutoencoderObjective(model.networks.autoencoder).eval()
        packed = objective.prepare(cells, np.random.default_rng(0))
        dense = cells.counts.toarray()
        values = np.log1p(1e4 * dense / dense.sum(axis=1, keepdims=True))
        z = torch.from_numpy(model.encode(cells))
        with torch.no_grad():
            expected = np.square(model.networks.autoencoder.decoder(z).numpy() - values).mean()
            assert float(objective(packed, seeded()).loss) == pytest.approx(expected, rel=1e-4)


class TestProcess:
    @pytest.mark.parametrize("method", ["dpm", "ddim", "ddpm"])
    def test_it_is_that_of_diffusers(self, method):
        scheduler = scheduler_of(LatentSampler(method), 1000, schedule="linear", prediction="epsilon")
        torch.testing.assert_close(scheduler.alphas_cumprod, alpha_bar("linear", 1000))
        assert float(scheduler.betas[0]) == pytest.approx(1e-4)
        assert float(scheduler.betas[-1]) == pytest.approx(0.02)
        assert scheduler.config.prediction_type == "epsilon"
        if method == "ddpm":
            assert scheduler.config.variance_type == "fixed_large"
            assert scheduler_of(LatentSampler("ddpm"), 1000).config.variance_type == "fixed_small"
            few = scheduler_of(LatentSampler("ddpm", 10), 1000, schedule="linear", prediction="epsilon")
            assert few.config.variance_type == "fixed_small"

    def test_the_signal_vanishes_for_any_number_of_times(self):
        for n_times in (50, 200, 1000):
            assert float(alpha_bar("linear", n_times)[-1]) < 1e-4

    @pytest.mark.parametrize(("method", "n_steps"), [("dpm", 25), ("ddim", 50), ("ddpm", 100), ("ddpm", 1000)])
    def test_the_true_noise_leads_to_the_cell(self, method, n_steps):
        """A denoiser that knows the only cell there is: every sampler must end there."""
        target = torch.nn.functional.normalize(torch.randn(1, 8, generator=seeded(3)), dim=1)
        levels = alpha_bar("linear", 1000)

        def denoiser(z, t, depth, condition):
            level = levels[t][:, None]
            return (z - level.sqrt() * target) / (1 - level).sqrt()

        z = draw_latents(
            denoiser, torch.zeros(5), torch.zeros((5, 0), dtype=torch.int64), n_latent=8, n_times=1000,
            generator=seeded(), sampler=LatentSampler(method, n_steps), schedule="linear", prediction="epsilon",
        )  # fmt: skip
        torch.testing.assert_close(z, target.expand(5, 8), rtol=0, atol=0.02)

    def test_times_are_not_weighted_and_the_noise_is_what_is_learnt(self, model, cells):
        table = LatentTable(model.encode(cells), np.zeros(120, dtype=np.float32))
        options = {"schedule": "linear", "prediction": "epsilon"}
        plain, weighted = (
            DenoiserObjective(model.networks.denoiser, table, 100, **options, is_weighted=is_weighted).eval()
            for is_weighted in (False, True)
        )
        inputs = plain.prepare(cells, np.random.default_rng(0))
        with torch.no_grad():
            out = plain(inputs, seeded())
        assert float(out.loss) == pytest.approx(float(out.terms["noise_mse"]))
        # hardly any signal in any time: the weight min(SNR, 5) / SNR is 1 in most, and below 1 in the others
        assert 0 < float(weighted(inputs, seeded()).loss) < float(out.loss)
        perfect = DenoiserObjective(_Oracle(inputs.z_BZ, alpha_bar("linear", 100)), table, 100, **options)
        assert float(perfect.eval()(inputs, seeded()).loss) < 1e-6

    def test_classifiers_are_trained_where_they_are_asked(self, model, cells):
        seen = []
        classifier = PublishedClassifier(8, 16, 3)
        classifier.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
        table = LatentTable(model.encode(cells), np.zeros(120, dtype=np.float32))
        ones = np.ones(3, dtype=np.float32)
        objective = ClassifierObjective(classifier, table, 0, 100, ones, schedule="linear", guided_times=50)
        objective(objective.prepare(cells, np.random.default_rng(0)), seeded())
        assert (int(seen[0].min()), int(seen[0].max())) == (0, 49)

    def test_guidance_moves_the_noise_below_time_50_only(self, model):
        denoiser, classifier = model.networks.denoiser, model.networks.classifiers[0]
        z, depth, codes = torch.randn(4, 8, generator=seeded()), torch.zeros(4), torch.zeros((4, 0), dtype=torch.int64)
        guides = (Guide(classifier, torch.tensor([[0.0, 2.0, 0.0]] * 4), SIZES.guided_times),)
        for t, is_guided in ((49, True), (50, False)):
            plain, moved = (
                guided_prediction(denoiser, z, t, 0.6, depth, codes, [], asked, "epsilon") for asked in ((), guides)
            )
            x = z.clone().requires_grad_(True)
            logits = classifier(x, torch.full((4,), t)).log_softmax(dim=1)
            (gradient,) = torch.autograd.grad(logits[:, 1].sum(), x)
            expected = -(0.4**0.5) * 2.0 * gradient if is_guided else torch.zeros_like(z)
            torch.testing.assert_close(moved - plain, expected, rtol=1e-3, atol=1e-6)

    def test_the_denoiser_uses_time_and_every_skip(self):
        denoiser = PublishedDenoiser(8, 16).eval()
        z, nothing = torch.randn(3, 8, generator=seeded()), torch.zeros((3, 0), dtype=torch.int64)
        with torch.no_grad():
            early, late = (denoiser(z, torch.full((3,), t), torch.zeros(3), nothing) for t in (1, 90))
            assert (early - late).abs().max() > 1e-3
            # with the upward blocks silent, only what skips them is left
            for block in denoiser.up:
                block.norm.weight.zero_()
                block.norm.bias.zero_()
            other = denoiser(z + 1.0, torch.full((3,), 1), torch.zeros(3), nothing)
            assert (denoiser(z, torch.full((3,), 1), torch.zeros(3), nothing) - other).abs().max() > 1e-3


class _Oracle(torch.nn.Module):
    def __init__(self, z, levels) -> None:
        super().__init__()
        self.z, self.levels = z, levels

    def forward(self, z, t, depth, condition):
        level = self.levels[t][:, None]
        return (z - level.sqrt() * self.z) / (1 - level).sqrt()


class TestModel:
    def test_defaults_are_the_published_ones(self, model):
        assert model.default_sampler == LatentSampler("ddpm")
        usual = model.sample_latents(wanted(6), 400, seeded())
        same = model.sample_latents(wanted(6), 400, seeded(), sampler=LatentSampler("ddpm", 100))
        np.testing.assert_array_equal(usual, same)
        told = model.sample_latents(wanted(6), 400, seeded(), guidance={"cell_type": 2.0})
        np.testing.assert_array_equal(usual, told)
        for other in ({"guidance": {"cell_type": 0.0}}, {"sampler": LatentSampler("dpm", 10)}):
            assert np.abs(usual - model.sample_latents(wanted(6), 400, seeded(), **other)).max() > 1e-4

    def test_conditions_come_by_classifiers_alone(self, model):
        free = model.sample_latents(wanted(6, 0), 400, seeded(), sampler=STEPS)
        ignored = model.sample_latents(wanted(6, 2), 400, seeded(), sampler=STEPS, guidance={"cell_type": 0.0})
        np.testing.assert_array_equal(free, ignored)
        with pytest.raises(ConfigError, match="was not trained with"):
            model.sample_latents(wanted(6), 400, seeded(), weight={"cell_type": 2.0})

    def test_batch_mates_do_not_matter(self, model):
        alone, mixed = wanted(20), wanted(20)
        mixed[10:, 0] = 3
        one, other = (model.sample_latents(codes, 400, seeded(), sampler=STEPS) for codes in (alone, mixed))
        np.testing.assert_allclose(one[:10], other[:10], atol=1e-5)
        assert np.abs(one[10:] - other[10:]).max() > 1e-5

    def test_saved_and_loaded_it_is_the_same(self, model, cells, tmp_path):
        assert isinstance(model, LatentCodec)
        model.save_pretrained(tmp_path / "bundle")
        again = ScDiffusion.from_pretrained(tmp_path / "bundle", device="cpu")
        assert again.config == model.config
        assert again.weights_hash() == model.weights_hash()
        np.testing.assert_array_equal(again.encode(cells), model.encode(cells))

    def test_weights_of_another_architecture_are_refused(self, model, tmp_path):
        native = ScDiffusionConfig(n_latent=8, n_hidden=16, width=16, classifier_width=16, n_times=100)
        wrong = ScDiffusion(
            model.networks, native.model_copy(update={"classified": ("cell_type",)}), model.vocabulary,
            model.statistics, labels=LABELS, population=model.population,
        )  # fmt: skip
        wrong.save_pretrained(tmp_path / "bundle")
        with pytest.raises(BundleError, match="do not fit"):
            ScDiffusion.from_pretrained(tmp_path / "bundle")
