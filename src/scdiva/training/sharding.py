"""Models whose parameters are spread over processes: what FSDP needs beyond Lightning's strategy.

``fully_shard`` (FSDP2) turns parameters into ``DTensor``; each process holds its share of each of them, and a block's
whole parameters exist only while the block computes. What is done here for it: which modules are sharded, scalars
(which FSDP2 refuses), parameters that only some processes use, clipping, and collecting the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from scdiva.errors import TrainingError
from scdiva.nn.transformer import Block
from scdiva.types import LossOutput


def check_shardable(objective: nn.Module) -> None:
    """Refuse an objective that holds nothing to shard.

    Raises
    ------
    TrainingError
        The objective has no blocks.
    """
    if not _blocks(objective):
        raise TrainingError(
            'training.strategy = "fsdp" for a model without transformer blocks',
            expected="a model with blocks: they are what is sharded",
            fix='set training.strategy = "ddp"',
        )


def shard(objective: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the parameters of an objective over processes, in place.

    Each :class:`~scdiva.nn.transformer.Block` is gathered when it runs, everything else when the objective is called.
    Scalar parameters stay whole on each process, and so do buffers, which are not synchronised. In each call, all
    processes must run the same blocks; other parameters may be left unused and then have a gradient of zero.

    Parameters
    ----------
    objective
        With blocks, and the same on each process.
    mesh
        The processes, one dimension.
    """
    blocks = _blocks(objective)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = [
        (module, name)
        for module in objective.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) not in inside
    ]
    scalars = {parameter for parameter in objective.parameters() if parameter.ndim == 0}
    # Before FSDP's own hook, which looks at the loss that this one returns.
    objective.register_forward_hook(_uses_all(outside))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    # Not given up after the forward pass: its backward pass begins at once.
    fully_shard(objective, mesh=mesh, reshard_after_forward=False, ignored_params=scalars)


def release(model: nn.Module) -> None:
    """Give up parameters that a forward pass without a backward pass has left whole; nothing where none are sharded."""
    if isinstance(model, FSDPModule):
        model.reshard()


def clip_gradient(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Clip the gradient of a sharded model; a collective call.

    FSDP averages the gradients of what it shards; those of the scalars are averaged here.

    Parameters
    ----------
    parameters
        All parameters of the model.
    max_norm
        Largest norm of the whole gradient; infinite: only measure it.

    Returns
    -------
    Tensor
        Norm before clipping, the same on each process; scalar.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Collect the state of a sharded model, on the CPU; empty on all but the first process. A collective call."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def _blocks(objective: nn.Module) -> list[Block]:
    return [module for module in objective.modules() if isinstance(module, Block)]


def _uses_all(owners: Sequence[tuple[nn.Module, str]]) -> Callable[[nn.Module, Any, LossOutput], LossOutput]:
    """Return a hook that lets the loss depend, by nothing, on parameters.

    FSDP sums only the gradients that exist. A parameter that one process used and another did not would be summed with
    whatever lies in its place: at best a crash, at worst a wrong gradient.
    """

    def hook(module: nn.Module, args: Any, output: LossOutput) -> LossOutput:
        if not torch.is_grad_enabled():
            return output
        nothing = [getattr(owner, name).flatten()[:0].sum() for owner, name in owners]
        return replace(output, loss=output.loss + sum(nothing))

    return hook
