"""Named configurations of a latent diffusion."""

from __future__ import annotations

from scdiva.config import ScDiffusionConfig

PRESETS: dict[str, ScDiffusionConfig] = {
    "native": ScDiffusionConfig(),
    "parity": ScDiffusionConfig(
        architecture="published",
        n_latent=128,
        n_hidden=1024,
        width=512,
        classifier_width=512,
        n_times=1000,
        prediction="epsilon",
        schedule="linear",
        guided_times=500,
        guidance=2.0,
    ),
}
"""``parity``: networks and process as published (Luo et al. 2024); ``native``: ours."""
