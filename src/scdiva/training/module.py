"""The LightningModule around an objective: optimiser, schedule, clipping, average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scdiva.config import OptimConfig
from scdiva.data.loader import Minibatch
from scdiva.training.sharding import clip_gradient, release, shard
from scdiva.types import LossOutput, Objective

# Tags of the random streams of the loop; training and evaluation must not share numbers.
TRAIN_STREAM, EVALUATION_STREAM = 16, 17

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True, slots=True)
class StepPart:
    """What is known of one of the minibatches that an optimiser step is made of.

    Parameters
    ----------
    output
        What the objective returned, detached.
    cell_index, number
        As in :class:`~scdiva.data.loader.Minibatch`.
    """

    output: LossOutput
    cell_index: NDArray[np.int64]
    number: int


class TrainingModule(pl.LightningModule):
    """Thin wrapper that lets Lightning train an :class:`~scdiva.types.Objective`.

    Parameters
    ----------
    objective
        The loss with its model; an ``nn.Module``.
    config
        Optimiser, schedule, clipping, average of the weights.
    max_steps
        Where the cosine ends.
    seed
        Seed of the objective's randomness. Each minibatch has its own generator, made from (seed, number of the
        minibatch): a run that resumes needs no stored generator state.
    accumulate
        Minibatches per optimiser step; the trainer must agree.
    check
        Called with (parts of the step, norm of the gradient before clipping) before the weights are touched; may raise
        to stop the run.

    Attributes
    ----------
    parts
        The minibatches of this optimiser step so far, or all of the last step.
    grad_norm
        Norm of the last gradient before clipping, scalar tensor.
    """

    grad_norm: Tensor

    def __init__(
        self,
        objective: Objective,
        config: OptimConfig,
        *,
        max_steps: int,
        seed: int,
        accumulate: int = 1,
        check: Callable[[Sequence[StepPart], Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.objective = cast(nn.Module, objective)
        self.optim_config = config
        self.max_steps = max_steps
        self.seed = seed
        self.accumulate = accumulate
        self.check = check
        self.parts: list[StepPart] = []
        # A submodule, so that checkpoints hold the average and devices move it.
        self.ema = averaged(self.objective, config.ema_decay) if config.ema_decay > 0 else None

    def configure_model(self) -> None:
        """Shard the objective and its average alike, where Lightning's strategy has made a mesh of processes."""
        if self.device_mesh is not None:
            for model in (self.objective,) if self.ema is None else (self.objective, self.ema.module):
                shard(model, self.device_mesh["data_parallel"])

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a share of the parameters only."""
        return self.device_mesh is not None

    @property
    def is_step_done(self) -> bool:
        """Whether the last minibatch was the last one of an optimiser step."""
        return len(self.parts) == self.accumulate

    @property
    def evaluated(self) -> nn.Module:
        """The objective that is evaluated and kept: with averaged weights where there is an average."""
        return self.objective if self.ema is None else self.ema.module

    def transfer_batch_to_device(self, batch: Minibatch, device: torch.device, dataloader_idx: int) -> Minibatch:
        """Move a minibatch; Lightning does not look into our dataclasses."""
        return batch.to(device)

    def training_step(self, batch: Minibatch, batch_idx: int) -> Tensor:
        """Return the loss of one minibatch, mean over its cells."""
        output = self._call(self.objective, batch, TRAIN_STREAM)
        if self.is_step_done:
            self.parts = []
        detached = replace(output, loss=output.loss.detach())
        self.parts.append(StepPart(detached, batch.cell_index, batch.number))
        return output.loss

    @torch.no_grad()
    def validation_step(self, batch: Minibatch) -> LossOutput:
        """Return the loss of one held-out minibatch, with the averaged weights in eval mode."""
        model = self.evaluated
        was_training = model.training
        model.eval()
        try:
            return self._call(model, batch, EVALUATION_STREAM)
        finally:
            release(model)
            model.train(was_training)

    def _call(self, objective: nn.Module, batch: Minibatch, stream: int) -> LossOutput:
        state = np.random.SeedSequence([self.seed, stream, batch.number]).generate_state(2, np.uint64)
        generator = torch.Generator(self.device).manual_seed(int(state[0]))
        # Dropout layers know only the global generator: it is seeded inside the fork and given back unchanged.
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            # Not torch.manual_seed: without a GPU it formats a traceback per call, which costs milliseconds.
            torch.default_generator.manual_seed(int(state[1]))
            if devices:
                torch.cuda.manual_seed(int(state[1]))
            return objective(batch.inputs, generator)

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule (stepwise)."""
        config = self.optim_config
        optimizer = torch.optim.AdamW(
            parameter_groups(
                self.objective,
                config.weight_decay,
                gene_lr=None if config.gene_lr_ratio == 1 else config.lr * config.gene_lr_ratio,
                lr=config.lr,
            ),
            lr=config.lr,
            betas=config.betas,
            fused=self.device.type in ("cpu", "cuda"),
        )
        factor = partial(learning_rate_factor, config=config, max_steps=self.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Clip the accumulated gradient to the configured norm and keep the norm for the log."""
        clip = clip_gradient if self.is_sharded else nn.utils.clip_grad_norm_
        self.grad_norm = clip(self.objective.parameters(), self.optim_config.clip_norm or math.inf)
        if self.check is not None:
            self.check(self.parts, self.grad_norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take a step, then average; here rather than in a hook, so that every callback sees the new average."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update_parameters(self.objective)


def learning_rate_factor(step: int, *, config: OptimConfig, max_steps: int) -> float:
    """Return the share of ``config.lr`` that the update after ``step`` finished steps uses.

    Linear warm-up, then constant, or a line or a cosine (Loshchilov and Hutter, arXiv:1608.03983) from 1 to
    ``final_lr_ratio``.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    left = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.final_lr_ratio + (1.0 - config.final_lr_ratio) * left


def parameter_groups(
    model: nn.Module, weight_decay: float, *, gene_lr: float | None = None, lr: float | None = None
) -> list[dict[str, Any]]:
    """Split the trainable parameters into those with and those without weight decay, and numbers of single genes.

    Without weight decay are: everything with fewer than two dimensions (biases, gains, scalars), the parameters of
    norms and of ``nn.Embedding``, and parameters with "embed" in their own name. A model may name, in
    ``gene_vectors()``, parameters that hold one number per gene: they get the learning rate ``gene_lr``. It may also
    give, in ``learning_rate_ratios()``, a multiple of ``lr`` for some parameters (a trained trunk below a new head).
    """
    decayed: dict[int, Tensor] = {}
    free: dict[int, Tensor] = {}
    of_genes: dict[int, Tensor] = {}
    if gene_lr is not None and callable(named := getattr(model, "gene_vectors", None)):
        of_genes = {id(parameter): parameter for parameter in named() if parameter.requires_grad}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in of_genes:
                continue
            is_free = (
                parameter.ndim < 2 or isinstance(module, (nn.Embedding, nn.EmbeddingBag, *_NORMS)) or "embed" in name
            )
            (free if is_free else decayed)[id(parameter)] = parameter
    # A tied weight that is an embedding anywhere is an embedding.
    with_decay = [parameter for key, parameter in decayed.items() if key not in free]
    groups = [
        {"params": with_decay, "weight_decay": weight_decay},
        {"params": list(free.values()), "weight_decay": 0.0},
        {"params": list(of_genes.values()), "weight_decay": 0.0, "lr": gene_lr},
    ]
    groups = [group for group in groups if group["params"]]
    if lr is None or not callable(ratios := getattr(model, "learning_rate_ratios", None)):
        return groups
    ratio_of = ratios()
    return [part for group in groups for part in _by_ratio(group, ratio_of, lr)]


def _by_ratio(group: dict[str, Any], ratio_of: Mapping[nn.Parameter, float], lr: float) -> list[dict[str, Any]]:
    """Split a group by the learning rates of its parameters."""
    parts: dict[float, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        parts.setdefault(ratio_of.get(parameter, 1.0), []).append(parameter)
    rate = group.get("lr", lr)
    return [{**group, "params": found, "lr": ratio * rate} for ratio, found in parts.items()]


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Return the exponential moving average of a model: parameters averaged, buffers copied.

    The decay after n updates is ``min(decay, (1 + n) / (10 + n))``, so that the first weights are soon forgotten (the
    warm-up of TensorFlow's ``ExponentialMovingAverage``).
    """
    ema = AveragedModel(model, multi_avg_fn=partial(_average, decay=decay))
    ema.requires_grad_(False)
    # AveragedModel copies at its first update; the copy made here already counts as the first.
    ema.n_averaged.fill_(1)
    return ema


def _average(averages: Sequence[Tensor], current: Sequence[Tensor], n_averaged: Tensor | int, decay: float) -> None:
    n_updates = int(n_averaged) - 1
    get_ema_multi_avg_fn(min(decay, (1 + n_updates) / (10 + n_updates)))(averages, current, n_averaged)
