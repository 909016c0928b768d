"""Drawing z: from noise, or from noised cells, back to z, with guidance.

Shape letters: B cells, C classes, F condition fields, T times, Z latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from scdiva.errors import ConfigError
from scdiva.models.scdiffusion.published import AnyClassifier, AnyDenoiser
from scdiva.models.scdiffusion.schedule import Prediction, Schedule, alpha_bar, linear_betas, noised

Method = Literal["dpm", "ddim", "ddpm"]
DEFAULT_STEPS: dict[str, int] = {"dpm": 25, "ddim": 50, "ddpm": 1000}
_GUIDED_FROM = 0.01
"""Share of signal below which a classifier's gradient is not asked for: there it says next to nothing, and the step
from gradient to velocity divides by the square root of that share (our decision)."""
_SMALLEST_SINE = 1e-4


@dataclass(frozen=True, slots=True)
class LatentSampler:
    """How z is drawn.

    Parameters
    ----------
    method
        "dpm": DPM-Solver++ of second order, "ddim", or "ddpm" (ancestral). The schedulers are those of ``diffusers``,
        with the process the model was trained on, what its denoiser predicts, trailing time steps and no clipping.
    n_steps
        Calls of the denoiser; None: 25, 50 and all (1,000). Those of DDIM divide the times of the process.
    eta
        Share of fresh noise in DDIM; 0 is deterministic given the start.
    """

    method: Method = "dpm"
    n_steps: int | None = None
    eta: float = 0.0

    def check(self, n_times: int) -> None:
        """Refuse what cannot be.

        Raises
        ------
        ConfigError
            An unknown method, impossible numbers, or steps of DDIM that do not divide T.
        """
        problems = [
            (self.method not in DEFAULT_STEPS, f"method={self.method!r}", " or ".join(DEFAULT_STEPS)),
            (
                self.n_steps is not None and not 1 <= self.n_steps <= n_times,
                f"n_steps={self.n_steps}",
                f"1 to {n_times}, the steps of the model's process",
            ),
            (not 0 <= self.eta <= 1, f"eta={self.eta}", "0 to 1"),
            (self.eta > 0 and self.method != "ddim", f"eta={self.eta} with {self.method}", "ddim"),
        ]
        for is_wrong, found, expected in problems:
            if is_wrong:
                raise ConfigError(f"sampler: {found}", expected=expected, fix="see scdiva generate --help")
        steps = self.steps(n_times)
        if self.method == "ddim" and n_times % steps:
            # diffusers steps back by T // steps, while trailing times are T / steps apart: cells would keep noise
            usable = [n for n in range(1, n_times + 1) if n_times % n == 0]
            below, above = (max(n for n in usable if n < steps), min(n for n in usable if n > steps))
            raise ConfigError(
                f"sampler: {steps} steps of DDIM, which do not divide the {n_times} of the model's process",
                expected=f"a divisor of {n_times}, such as {below} or {above}",
                fix=f"name {below} or {above} steps, or use dpm",
            )

    def steps(self, n_times: int) -> int:
        """Return the number of steps for a process of T times."""
        return min(self.n_steps or DEFAULT_STEPS[self.method], n_times)


@dataclass(frozen=True, slots=True)
class Guide:
    """A classifier with what it pulls towards.

    Parameters
    ----------
    classifier
        Of noised z.
    weight_BC
        ``(B, C)`` weight of each class's log-probability for each cell; one class of weight s is classifier guidance of
        scale s, two classes are gradient interpolation between them.
    below
        It is asked at times below this one; None: at all.
    """

    classifier: AnyClassifier
    weight_BC: torch.Tensor
    below: int | None = None


def scheduler_of(
    sampler: LatentSampler, n_times: int, *, schedule: Schedule = "cosine", prediction: Prediction = "v"
) -> Any:
    """Return the ``diffusers`` scheduler of a sampler, with its time steps set.

    DDPM with all steps and linear betas draws with the fixed-large variance, as published (Luo et al. 2024).
    """
    # deferred: diffusers takes seconds to load
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    common: dict[str, Any] = {
        "num_train_timesteps": n_times,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction" if prediction == "v" else "epsilon",
        "timestep_spacing": "trailing",
    }
    if schedule == "linear":
        first, last = linear_betas(n_times)
        common |= {"beta_schedule": "linear", "beta_start": first, "beta_end": last}
    if sampler.method == "dpm":
        scheduler = DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++", solver_order=2)
    elif sampler.method == "ddim":
        scheduler = DDIMScheduler(**common, clip_sample=False)
    else:
        # with fewer steps the large variance would be drawn in the last one, too, and stay
        is_large = schedule == "linear" and sampler.steps(n_times) == n_times
        variance = "fixed_large" if is_large else "fixed_small"
        scheduler = DDPMScheduler(**common, clip_sample=False, variance_type=variance)
    scheduler.set_timesteps(sampler.steps(n_times))
    return scheduler


def start_index(timesteps: Sequence[int], start: float, n_times: int) -> int:
    """Return the step at which a loop begins that starts from cells noised to ``start``, in (0, 1].

    It is the first whose time is not later: the cells are then noised to exactly that step's time, so that noise level
    and loop agree (in the published code they do not).
    """
    latest = max(1, round(start * n_times)) - 1
    for index, t in enumerate(timesteps):
        if t <= latest:
            return index
    return len(timesteps) - 1


def guided_prediction(
    denoiser: AnyDenoiser,
    z_BZ: torch.Tensor,
    t: int,
    alpha_bar: float,
    depth_B: torch.Tensor,
    condition_BF: torch.Tensor,
    weight_F: Sequence[float],
    guides: Sequence[Guide],
    prediction: Prediction = "v",
) -> torch.Tensor:
    """Predict velocity or noise, with classifier-free guidance and guidance by classifiers.

    ``v = v(all fields) + sum_j (w_j - 1) (v(field j alone) - v(nothing))``: with all weights 1 plain conditioning, with
    one field the usual ``v_0 + w (v_c - v_0)`` (how several fields combine is our decision). A classifier
    moves the noise by ``- sqrt(1 - abar) grad log p``, which is the velocity moved by
    ``- sqrt(1 - abar) / sqrt(abar) grad log p``. In a step of DDPM this moves the mean by ``beta / sqrt(1 - beta) grad
    log p``; published is the variance times the gradient, which is ``beta grad log p``.

    Parameters
    ----------
    denoiser
        In eval mode.
    z_BZ, t, alpha_bar
        Noised z, its time, and the share of signal then.
    depth_B, condition_BF
        As for the denoiser.
    weight_F
        Weight of each field of the denoiser.
    guides
        Classifiers.
    prediction
        What the denoiser predicts.
    """
    t_B = torch.full((z_BZ.shape[0],), t, dtype=torch.int64, device=z_BZ.device)
    v_BZ = denoiser(z_BZ, t_B, depth_B, condition_BF)
    weighted = [f for f, weight in enumerate(weight_F) if weight != 1.0 and bool((condition_BF[:, f] > 0).any())]
    if weighted:
        nothing_BF = torch.zeros_like(condition_BF)
        unconditional_BZ = denoiser(z_BZ, t_B, depth_B, nothing_BF)
        for field in weighted:
            alone_BF = nothing_BF.clone()
            alone_BF[:, field] = condition_BF[:, field]
            v_BZ = v_BZ + (weight_F[field] - 1.0) * (denoiser(z_BZ, t_B, depth_B, alone_BF) - unconditional_BZ)
    asked = [guide for guide in guides if guide.below is None or t < guide.below]
    if asked and alpha_bar >= _GUIDED_FROM:
        with torch.enable_grad():
            at_BZ = z_BZ.detach().clone().requires_grad_(True)
            total = at_BZ.new_zeros(())
            for guide in asked:
                total = total + (guide.weight_BC * guide.classifier(at_BZ, t_B).log_softmax(dim=1)).sum()
            (gradient_BZ,) = torch.autograd.grad(total, at_BZ)
        v_BZ = v_BZ - ((1.0 - alpha_bar) / (alpha_bar if prediction == "v" else 1.0)) ** 0.5 * gradient_BZ
    return v_BZ


def slerp(a_BZ: torch.Tensor, b_BZ: torch.Tensor, position: float) -> torch.Tensor:
    """Interpolate along the great circle, ``(B, Z)``: halfway points of two noises are as long as noises are.

    Source: Shoemake (1985). Where two directions are (nearly) the same, it is linear interpolation.

    Parameters
    ----------
    a_BZ, b_BZ
        The two ends, of any lengths.
    position
        0 gives ``a_BZ``, 1 gives ``b_BZ``.
    """
    cosine_B = torch.nn.functional.cosine_similarity(a_BZ, b_BZ, dim=1).clamp(-1.0, 1.0)
    angle_B = cosine_B.acos()
    sine_B = angle_B.sin()
    is_linear_B = sine_B < _SMALLEST_SINE
    safe_B = torch.where(is_linear_B, torch.ones_like(sine_B), sine_B)
    of_a_B = torch.where(is_linear_B, torch.full_like(angle_B, 1 - position), ((1 - position) * angle_B).sin() / safe_B)
    of_b_B = torch.where(is_linear_B, torch.full_like(angle_B, position), (position * angle_B).sin() / safe_B)
    return of_a_B[:, None] * a_BZ + of_b_B[:, None] * b_BZ


def draw_latents(
    denoiser: AnyDenoiser,
    depth_B: torch.Tensor,
    condition_BF: torch.Tensor,
    *,
    n_latent: int,
    n_times: int,
    generator: torch.Generator,
    sampler: LatentSampler,
    schedule: Schedule = "cosine",
    prediction: Prediction = "v",
    weight_F: Sequence[float] | None = None,
    guides: Sequence[Guide] = (),
    start_BZ: torch.Tensor | None = None,
    start: float = 1.0,
    end_BZ: torch.Tensor | None = None,
    position: float = 0.0,
) -> torch.Tensor:
    """Draw z, ``(B, Z)`` float32, as the denoiser knows it.

    Parameters
    ----------
    denoiser
        In eval mode; its weights are the averaged ones.
    depth_B, condition_BF
        What the cells are to be; see :meth:`Denoiser.forward`.
    n_latent, n_times
        Sizes of the model.
    generator
        Of the CPU, whatever the device: equal seeds give equal noise everywhere.
    sampler
        How.
    schedule, prediction
        The process, and what the denoiser predicts.
    weight_F, guides
        See :func:`guided_prediction`.
    start_BZ
        z of cells to start from; None: noise.
    start
        How far these are noised, in (0, 1] of the process; the loop begins there.
    end_BZ, position
        z of other cells, noised by the same noise: the loop begins at the spherical interpolation of both at a position
        from 0 (``start_BZ``) to 1.
    """
    device = depth_B.device
    scheduler = scheduler_of(sampler, n_times, schedule=schedule, prediction=prediction)
    alpha_bar_T = alpha_bar(schedule, n_times)
    timesteps = [int(t) for t in scheduler.timesteps]
    weights = list(weight_F) if weight_F is not None else [1.0] * condition_BF.shape[1]
    z_BZ = torch.randn((depth_B.numel(), n_latent), generator=generator).to(device)
    begin = 0
    # DPM-Solver++ draws nothing
    options: dict[str, Any] = {} if sampler.method == "dpm" else {"generator": generator}
    if sampler.method == "ddim":
        options["eta"] = sampler.eta
    with torch.no_grad():
        if start_BZ is not None:
            begin = start_index(timesteps, start, n_times)
            alpha_bar_B = alpha_bar_T[timesteps[begin]].to(device).expand(depth_B.numel())
            noise_BZ = z_BZ
            z_BZ = noised(start_BZ, noise_BZ, alpha_bar_B)
            if end_BZ is not None:
                z_BZ = slerp(z_BZ, noised(end_BZ, noise_BZ, alpha_bar_B), position)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(begin)
        for t in timesteps[begin:]:
            found_BZ = guided_prediction(
                denoiser, z_BZ, t, float(alpha_bar_T[t]), depth_B, condition_BF, weights, guides, prediction
            )
            z_BZ = scheduler.step(found_BZ, t, z_BZ, **options).prev_sample
        return z_BZ
