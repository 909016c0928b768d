"""The networks of a latent diffusion: what they compute, what is drawn, what is saved."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy import stats

from scdiva.config import ScDiffusionConfig
from scdiva.data.conditions import ConditionLabels
from scdiva.data.population import CellSizes
from scdiva.data.reader import open_counts
from scdiva.data.statistics import GeneStatistics
from scdiva.errors import BundleError, ConfigError
from scdiva.genes import GeneVocabulary
from scdiva.models.prior import MixturePrior, Population
from scdiva.models.scdiffusion import LatentSampler, ScDiffusion
from scdiva.models.scdiffusion.autoencoder import SparseCells, calibrate_dispersions, negative_binomial_nll
from scdiva.models.scdiffusion.classifiers import LatentClassifier
from scdiva.models.scdiffusion.denoiser import Denoiser
from scdiva.models.scdiffusion.model import build_networks
from scdiva.models.scdiffusion.objectives import (
    LABEL_WEIGHT,
    PRIOR_PRECISION,
    AutoencoderObjective,
    ClassifierObjective,
    DenoiserObjective,
    LatentTable,
)
from scdiva.models.scdiffusion.sampling import Guide, draw_latents, guided_prediction, scheduler_of, start_index
from scdiva.models.scdiffusion.schedule import cosine_alpha_bar, noised, velocity
from scdiva.models.scdiva import ScDiVa
from scdiva.types import CellCounts, LatentCodec, LatentPrior

LABELS = ConditionLabels((("cell_type", ("type 0", "type 1", "type 2")), ("batch", ("batch 0", "batch 1"))))
SIZES = ScDiffusionConfig(
    n_latent=6, n_hidden=16, width=16, n_blocks=2, classifier_width=16, n_times=100,
    fields=("cell_type", "batch"), classified=("cell_type",),
)  # fmt: skip
STEPS = LatentSampler(n_steps=5)


@pytest.fixture(scope="module")
def cells(_cells) -> CellCounts:
    vocabulary = GeneVocabulary.default().subset(np.arange(200))
    return open_counts(_cells, vocabulary).with_conditions(LABELS, {}).read(np.arange(120))


def random_networks(n_genes: int, sizes: ScDiffusionConfig = SIZES, seed: int = 0):
    """Networks of which no part is zero any more."""
    networks = build_networks(n_genes, sizes, LABELS, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return networks.eval()


@pytest.fixture(scope="module")
def model(cells) -> ScDiffusion:
    networks = random_networks(200)
    networks.autoencoder.standardise_by(networks.autoencoder.raw_latent(SparseCells.pack(cells)).detach().numpy())
    networks.set_depths(np.asarray(cells.counts.sum(axis=1)).ravel())
    sizes = np.stack([np.asarray(cells.counts.sum(axis=1)).ravel(), np.diff(cells.counts.indptr)], axis=1)
    z = np.random.default_rng(0).standard_normal((120, 6)).astype(np.float32)
    population = Population(
        CellSizes.of([cells], np.random.default_rng(0)), MixturePrior.fit(z, sizes, cells.condition, 0)
    )
    vocabulary = GeneVocabulary.default().subset(np.arange(200))
    return ScDiffusion(
        networks, SIZES, vocabulary, GeneStatistics.from_cells(cells), labels=LABELS, population=population,
        details={"name": "small"},
    )  # fmt: skip


def wanted(n: int, cell_type: int = 1, batch: int = 0) -> np.ndarray:
    return np.tile(np.array([cell_type, batch], dtype=np.int32), (n, 1))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestAutoencoder:
    def test_encode_is_deterministic_and_of_each_cell_alone(self, model, cells):
        z = model.encode(cells)
        assert z.shape == (120, 6)
        assert z.dtype == np.float32
        np.testing.assert_array_equal(z, model.encode(cells))
        np.testing.assert_allclose(model.encode(cells.take(np.array([7]))), z[[7]], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.encode(cells.take(np.arange(119, -1, -1))), z[::-1], rtol=1e-4, atol=1e-5)

    def test_latents_of_the_cells_it_was_standardised_by_have_mean_0_and_variance_1(self, model, cells):
        z = model.encode(cells)
        np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-3)
        np.testing.assert_allclose(z.std(axis=0), 1, rtol=1e-3)
        raw = model.networks.autoencoder.raw_latent(SparseCells.pack(cells)).detach().numpy()
        assert np.abs(raw.std(axis=0) - 1).min() > 0.05  # else standardisation would have nothing to do

    def test_decoding_undoes_the_standardisation(self, model, cells):
        autoencoder = model.networks.autoencoder
        packed = SparseCells.pack(cells)
        with torch.no_grad():
            expected = autoencoder.log_share_of_raw(autoencoder.raw_latent(packed)).exp().numpy()
        np.testing.assert_allclose(model.expected_share(model.encode(cells)), expected, rtol=1e-3)
        np.testing.assert_allclose(expected.sum(axis=1), 1, rtol=1e-5)

    def test_depth_does_not_change_what_is_encoded(self, model, cells):
        double = replace(cells, counts=cells.counts * 2)
        np.testing.assert_allclose(model.encode(double), model.encode(cells), rtol=1e-3, atol=1e-3)

    def test_decode_draws_counts_of_the_wanted_mean_and_dispersion(self, model):
        z = np.zeros((4000, 6), dtype=np.float32)
        counts = model.decode(z, 800.0, np.random.default_rng(1))
        assert counts.dtype == np.int32
        assert counts.shape == (4000, 200)
        assert counts.data.min() >= 1
        mean = 800.0 * model.expected_share(z[:1])[0]
        theta = model.networks.autoencoder.log_theta_G.detach().exp().numpy()
        error = np.sqrt((mean + mean**2 / theta) / 4000)
        dense = counts.toarray()
        assert np.abs((dense.mean(axis=0) - mean) / error).max() < 5
        np.testing.assert_allclose(dense.var(axis=0), mean + mean**2 / theta, rtol=0.35)
        assert (model.decode(z, 800.0, np.random.default_rng(1)) != counts).nnz == 0
        assert (model.decode(z, 800.0, np.random.default_rng(2)) != counts).nnz > 0

    def test_the_likelihood_is_that_of_scipy(self, cells):
        rng = np.random.default_rng(0)
        log_mu, log_theta = rng.normal(-1, 1, (5, 200)), rng.normal(1, 0.5, 200)
        mu, theta = np.exp(log_mu), np.exp(log_theta)
        dense = cells.counts[:5].toarray()
        expected = -stats.nbinom.logpmf(dense, theta, theta / (theta + mu)).sum(axis=1)
        packed = SparseCells.pack(cells.take(np.arange(5)))
        found = negative_binomial_nll(torch.from_numpy(log_mu), torch.from_numpy(log_theta), packed)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)

    def test_calibration_finds_the_dispersion_that_counts_were_drawn_with(self, cells, monkeypatch):
        autoencoder = random_networks(200, seed=3).autoencoder
        true = np.where(np.arange(200) % 2, -0.5, 2.5)
        rng = np.random.default_rng(0)
        with torch.no_grad():
            raw = autoencoder.raw_latent(SparseCells.pack(cells))
            mean = 4000.0 * autoencoder.log_share_of_raw(raw).exp().numpy()
        drawn = sp.csr_matrix(rng.poisson(rng.gamma(np.exp(true), mean / np.exp(true))).astype(np.int32))
        # means are those of the z and depths that were wanted, not of the counts that were drawn
        scored = replace(SparseCells.pack(replace(cells, counts=drawn)), depth_B=torch.full((120,), 4000.0))
        monkeypatch.setattr(autoencoder, "raw_latent", lambda _: raw)
        calibrate_dispersions(autoencoder, [scored])
        found = autoencoder.log_theta_G.detach().numpy()
        is_frequent = mean.mean(axis=0) > 5
        assert is_frequent.sum() > 50
        assert np.abs(found - true)[is_frequent].mean() < 0.35
        assert np.corrcoef(found[is_frequent], true[is_frequent])[0, 1] > 0.9

    def test_no_norm_reads_the_minibatch(self, model):
        assert not any(isinstance(m, torch.nn.modules.batchnorm._NormBase) for m in model.networks.modules())


class TestAutoencoderObjective:
    @staticmethod
    def objective(n_umis: float, n_labels=(3, 2)) -> AutoencoderObjective:
        networks = random_networks(200)
        return AutoencoderObjective(networks.autoencoder, n_umis, n_labels)

    def losses(self, objective, cells, **conditions) -> tuple[float, float]:
        """In training and in evaluation, of the same views."""
        inputs = objective.prepare(replace(cells, **conditions), np.random.default_rng(0))
        return tuple(float(objective.train(mode)(inputs, seeded()).loss.detach()) for mode in (True, False))

    def test_the_prior_counts_in_training_only_and_less_the_more_molecules_there_are(self, cells):
        for n_umis in (1e4, 1e6):
            objective = self.objective(n_umis, ())
            training, evaluation = self.losses(objective, cells)
            squares = float(objective.autoencoder.gene_layers()[-1].square().sum().detach())
            expected = 0.5 * PRIOR_PRECISION * squares / (0.3 * n_umis)
            assert training - evaluation == pytest.approx(expected, rel=1e-3)

    def test_labels_count_where_they_are_known(self, cells):
        objective = self.objective(1e12)
        known = self.losses(objective, cells)
        nothing = self.losses(objective, cells, condition=np.zeros_like(cells.condition))
        assert nothing[0] == pytest.approx(nothing[1], abs=1e-5)
        assert known[1] == pytest.approx(nothing[1], abs=1e-6)  # held-out losses are of molecules alone
        # readers start at nothing: log 3 + log 2
        assert known[0] - known[1] == pytest.approx(LABEL_WEIGHT * np.log(6), rel=1e-2)

    def test_what_is_trained_slower_has_a_row_for_each_gene(self, cells):
        objective = self.objective(1e6)
        slow = objective.learning_rate_ratios()
        assert sorted(tuple(weight.shape) for weight in slow) == [(16, 200), (200, 16)]
        assert all(0 < ratio < 1 for ratio in slow.values())


class TestSchedule:
    @pytest.mark.parametrize("method", ["dpm", "ddim", "ddpm"])
    def test_it_is_that_of_diffusers_with_the_settings_of_training(self, method):
        scheduler = scheduler_of(LatentSampler(method), 1000)
        torch.testing.assert_close(scheduler.alphas_cumprod, cosine_alpha_bar(1000), rtol=1e-4, atol=1e-8)
        assert scheduler.config.prediction_type == "v_prediction"
        assert scheduler.config.timestep_spacing == "trailing"
        assert not scheduler.config.get("clip_sample", False)
        assert not scheduler.config.get("thresholding", False)
        assert int(scheduler.timesteps[0]) == 999
        assert len(scheduler.timesteps) == {"dpm": 25, "ddim": 50, "ddpm": 1000}[method]

    def test_velocity_and_noise_give_z_back(self):
        z, noise = torch.randn(2, 9, 4, generator=seeded())
        alpha_bar = torch.linspace(0.05, 0.95, 9)
        x, v = noised(z, noise, alpha_bar), velocity(z, noise, alpha_bar)
        torch.testing.assert_close(alpha_bar.sqrt()[:, None] * x - (1 - alpha_bar).sqrt()[:, None] * v, z)

    @pytest.mark.parametrize("method", ["dpm", "ddim", "ddpm"])
    @pytest.mark.parametrize("start", [0.05, 0.3, 0.6, 1.0])
    def test_the_loop_starts_at_the_noise_level_of_the_cells(self, method, start, monkeypatch):
        """Methods C.3, defect 4: cells noised to one time and a loop that begins at another."""
        from scdiva.models.scdiffusion import sampling

        seen: dict[str, list] = {"alpha_bar": [], "t": []}

        def spied(z, noise, alpha_bar):
            seen["alpha_bar"].append(float(alpha_bar[0]))
            return noised(z, noise, alpha_bar)

        def first(denoiser, z, t, *rest):
            seen["t"].append(t)
            return torch.zeros_like(z)

        monkeypatch.setattr(sampling, "noised", spied)
        monkeypatch.setattr(sampling, "guided_prediction", first)
        denoiser = Denoiser(4, 8, 1, ())
        draw_latents(
            denoiser, torch.zeros(3), torch.zeros((3, 0), dtype=torch.int64), n_latent=4, n_times=200,
            generator=seeded(), sampler=LatentSampler(method, 20), start_BZ=torch.zeros(3, 4), start=start,
        )  # fmt: skip
        assert seen["alpha_bar"] == [pytest.approx(float(cosine_alpha_bar(200)[seen["t"][0]]))]
        assert seen["t"][0] <= max(round(start * 200) - 1, 9)  # the last of 20 trailing steps is 9
        assert abs(seen["t"][0] - start * 200) <= 200 / 20 + 1
        assert seen["t"] == sorted(seen["t"], reverse=True)

    def test_start_index(self):
        steps = [99, 79, 59, 39, 19]
        assert [start_index(steps, s, 100) for s in (1.0, 0.99, 0.8, 0.6, 0.3, 0.01)] == [0, 1, 1, 2, 4, 4]


class TestGuidance:
    def test_row_0_of_every_table_is_unconditional(self, model):
        """Weight 0 of the only wanted field equals no condition, and a condition differs from it."""
        free, ignored, plain = (
            model.sample_latents(codes, 400, seeded(), sampler=STEPS, weight=weight)
            for codes, weight in ((wanted(8, 0), {}), (wanted(8, 2), {"cell_type": 0.0}), (wanted(8, 2), {}))
        )
        np.testing.assert_allclose(free, ignored, atol=1e-4)
        assert np.abs(free - plain).max() > 1e-2

    def test_weights_follow_the_formula(self, model):
        denoiser = model.networks.denoiser
        z, depth = torch.randn(5, 6, generator=seeded()), torch.zeros(5)
        codes = torch.tensor([[1, 2]] * 5)
        at = torch.full((5,), 40)

        def v(*code):
            return denoiser(z, at, depth, torch.tensor([code] * 5))

        with torch.no_grad():
            found = guided_prediction(denoiser, z, 40, 0.5, depth, codes, [3.0, 0.5], ())
            expected = v(1, 2) + 2.0 * (v(1, 0) - v(0, 0)) - 0.5 * (v(0, 2) - v(0, 0))
        torch.testing.assert_close(found, expected)

    def test_a_classifier_moves_the_noise_by_its_gradient(self, model):
        denoiser, classifier = model.networks.denoiser, model.networks.classifiers[0]
        z, depth, codes = torch.randn(4, 6, generator=seeded()), torch.zeros(4), torch.zeros((4, 2), dtype=torch.int64)
        alpha_bar, at = 0.6, torch.full((4,), 40)
        weight = torch.tensor([[0.0, 2.0, 0.0]] * 4)
        plain, moved = (
            guided_prediction(denoiser, z, 40, alpha_bar, depth, codes, [1.0, 1.0], guides)
            for guides in ((), (Guide(classifier, weight),))
        )
        x = z.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(classifier(x, at).log_softmax(dim=1)[:, 1].sum(), x)
        # noise from velocity: sqrt(abar) v + sqrt(1 - abar) x; it is to change by - sqrt(1 - abar) * 2 * gradient
        change = alpha_bar**0.5 * (moved - plain)
        torch.testing.assert_close(change, -((1 - alpha_bar) ** 0.5) * 2.0 * gradient, rtol=1e-3, atol=1e-5)

    def test_refused(self, model):
        for options, words in (
            ({"weight": {"donor": 2.0}}, "was not trained with"),
            ({"weight": {"cell_type": -1.0}}, "0 or more"),
            ({"guidance": {"batch": 1.0}}, "no classifier"),
            ({"guidance": {"cell_type": float("nan")}}, "0 or more"),
            ({"start": np.zeros((3, 6), np.float32), "start_time": 0.0}, "start_time"),
            ({"sampler": LatentSampler(n_steps=101)}, "1 to 100"),
            ({"sampler": LatentSampler("euler")}, "dpm or ddim or ddpm"),
            ({"sampler": LatentSampler("dpm", eta=0.5)}, "ddim"),
            ({"sampler": LatentSampler("ddim", 30)}, "30 steps of DDIM.* such as 25 or 50"),
        ):
            with pytest.raises(ConfigError, match=words):
                model.sample_latents(wanted(3), 400, seeded(), **options)


class TestDraws:
    @pytest.mark.parametrize("method", ["dpm", "ddim", "ddpm"])
    def test_a_seed_gives_the_same_z_and_another_others(self, method, model):
        def drawn(seed):
            return model.sample_latents(wanted(9), 400, seeded(seed), sampler=LatentSampler(method, 5))

        np.testing.assert_array_equal(drawn(3), drawn(3))
        assert np.abs(drawn(3) - drawn(4)).min() > 1e-6

    def test_conditions_of_batch_mates_do_not_matter(self, model):
        alone, mixed = wanted(20), wanted(20)
        mixed[10:] = [3, 2]
        one, other = (model.sample_latents(codes, 400, seeded(), sampler=STEPS) for codes in (alone, mixed))
        np.testing.assert_allclose(one[:10], other[:10], atol=1e-5)
        assert np.abs(one[10:] - other[10:]).max() > 1e-3

    def test_depth_is_told(self, model):
        few, many = (model.sample_latents(wanted(5), n, seeded(), sampler=STEPS) for n in (100, 4000))
        assert np.abs(few - many).max() > 1e-3

    def test_little_noise_leaves_cells_where_they_were(self, cells):
        model_free = Denoiser(6, 16, 1, ())  # predicts nothing: only noise level and loop show
        z = torch.randn(50, 6, generator=seeded(1))
        near, far = (
            draw_latents(
                model_free, torch.zeros(50), torch.zeros((50, 0), dtype=torch.int64), n_latent=6, n_times=100,
                generator=seeded(), sampler=LatentSampler("ddim", 50), start_BZ=z, start=start,
            )
            for start in (0.05, 0.9)
        )  # fmt: skip
        assert (near - z).norm() < 0.5 * (far - z).norm()

    def test_in_the_callers_inference_mode(self, model):
        with torch.inference_mode():
            inside = model.sample_latents(wanted(4), 400, seeded(), sampler=STEPS, guidance={"cell_type": 1.0})
        outside = model.sample_latents(wanted(4), 400, seeded(), sampler=STEPS, guidance={"cell_type": 1.0})
        np.testing.assert_array_equal(inside, outside)

    def test_the_callers_generators_are_not_touched(self, model):
        torch.manual_seed(1)
        expected = torch.rand(2)
        torch.manual_seed(1)
        model.sample_latents(wanted(4), 400, seeded(), sampler=LatentSampler("ddpm", 5))
        build_networks(50, SIZES, LABELS, seed=3)
        assert torch.equal(torch.rand(2), expected)

    def test_it_is_a_codec_and_a_prior(self, model):
        assert isinstance(model, LatentCodec)
        assert isinstance(model, LatentPrior)
        z = model.sample(wanted(5), np.full((5, 2), 300), np.random.default_rng(0))
        assert z.shape == (5, 6)
        assert model.view_share == 1.0


CENTRE, STD = 3.0, 0.5


@pytest.fixture(scope="module")
def trained():
    rng = np.random.default_rng(0)
    code = rng.integers(1, 3, 2000)
    z = rng.normal(0, STD, (2000, 2)).astype(np.float32)
    z[:, 0] += np.where(code == 1, CENTRE, -CENTRE)
    z /= z.std(axis=0)
    table = LatentTable(z, np.zeros(2000, dtype=np.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser, classifier = Denoiser(2, 64, 2, (2,), dropout=0.0), LatentClassifier(2, 32, 2, dropout=0.0)
    objectives = (
        DenoiserObjective(denoiser, table, 100),
        ClassifierObjective(classifier, table, 0, 100, np.ones(2, dtype=np.float32)),
    )
    for objective, n_steps in zip(objectives, (800, 200), strict=True):
        optimiser = torch.optim.Adam(objective.parameters(), lr=5e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
        generator = seeded(1)
        for _ in range(n_steps):
            rows = rng.choice(2000, 256, replace=False)
            inputs = table.of(_Codes(rows, code[rows]), rng)
            optimiser.zero_grad()
            objective(inputs, generator).loss.backward()
            optimiser.step()
            schedule.step()
    return denoiser.eval(), classifier.eval(), z, code


class TestKnownAnswer:
    """z of two classes around (3, 0) and (-3, 0), with a third of the variance across: what comes out is known."""

    def drawn(self, trained, code, n=400, weight=1.0, scale=0.0, target=None, method="dpm", **options):
        denoiser, classifier = trained[:2]
        guides = ()
        if scale:
            weights = torch.zeros(n, 2)
            weights[:, (target or code) - 1] = scale
            guides = (Guide(classifier, weights),)
        return draw_latents(
            denoiser, torch.zeros(n), torch.full((n, 1), code), n_latent=2, n_times=100, generator=seeded(2),
            sampler=LatentSampler(method, 20 if method != "ddpm" else 100), weight_F=[weight], guides=guides, **options,
        ).numpy()  # fmt: skip

    @pytest.mark.parametrize("method", ["dpm", "ddim", "ddpm"])
    def test_each_class_has_its_centre_and_spread(self, method, trained):
        z, code = trained[2:]
        for wanted_code in (1, 2):
            real, made = z[code == wanted_code], self.drawn(trained, wanted_code, method=method)
            np.testing.assert_allclose(made.mean(axis=0), real.mean(axis=0), atol=0.25)
            np.testing.assert_allclose(made.std(axis=0), real.std(axis=0), rtol=0.4, atol=0.05)

    def test_without_condition_both_classes_come(self, trained):
        share = (self.drawn(trained, 0)[:, 0] > 0).mean()
        assert 0.35 < share < 0.65

    def test_a_classifier_alone_guides_to_its_class(self, trained):
        for target, sign in ((1, 1), (2, -1)):
            made = self.drawn(trained, 0, scale=1.0, target=target)
            assert (sign * made[:, 0] > 0).mean() > 0.97

    def test_from_noised_cells_of_one_class_to_the_other(self, trained):
        z, code = trained[2:]
        start = torch.from_numpy(z[code == 1][:400])
        stay = self.drawn(trained, 0, start_BZ=start, start=0.2)
        move = self.drawn(trained, 0, start_BZ=start, start=0.9, scale=2.0, target=2)
        assert (stay[:, 0] > 0).mean() > 0.97
        assert (move[:, 0] < 0).mean() > 0.9


class _Codes:
    """Just what a LatentTable asks of cells."""

    def __init__(self, rows, code) -> None:
        self.cell_index, self.condition = rows, code[:, None]


class TestBundle:
    def test_saved_and_loaded_it_is_the_same(self, model, cells, tmp_path):
        model.save_pretrained(tmp_path / "bundle")
        loaded = ScDiffusion.from_pretrained(tmp_path / "bundle", device="cpu")
        assert (loaded.config, loaded.labels, loaded.name) == (model.config, model.labels, "small")
        assert loaded.vocabulary == model.vocabulary
        np.testing.assert_array_equal(loaded.encode(cells), model.encode(cells))
        one, other = (
            m.sample_latents(wanted(6), 400, seeded(), sampler=STEPS, guidance={"cell_type": 1.0})
            for m in (model, loaded)
        )
        np.testing.assert_array_equal(one, other)
        assert loaded.weights_hash() == model.weights_hash()
        assert sorted(p.name for p in (tmp_path / "bundle").iterdir()) == sorted([
            "config.json", "model.safetensors", "vocabulary.tsv", "gene_statistics.npz", "labels.json",
            "population.npz", "README.md", "manifest.json",
        ])  # fmt: skip
        assert "sd.ScDiffusion.from_pretrained" in (tmp_path / "bundle" / "README.md").read_text()

    def test_families_are_told_apart(self, model, bundle, tmp_path):
        model.save_pretrained(tmp_path / "bundle")
        with pytest.raises(BundleError, match="family 'scdiffusion'"):
            ScDiVa.from_pretrained(tmp_path / "bundle")
        with pytest.raises(BundleError, match="family 'scdiva'"):
            ScDiffusion.from_pretrained(bundle)

    def test_loading_is_strict(self, model, tmp_path):
        sizes = SIZES.model_copy(update={"width": 32})
        ScDiffusion(
            random_networks(200), sizes, model.vocabulary, model.statistics, labels=LABELS, population=model.population
        ).save_pretrained(tmp_path / "bundle")
        with pytest.raises(BundleError, match="of another shape"):
            ScDiffusion.from_pretrained(tmp_path / "bundle")
