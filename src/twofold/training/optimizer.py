"""AdamW over two groups of parameters: the matrices, which decay, and the rest, which do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from twofold.training.spec import TrainingSpec

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def decaying_names(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that weight decay pulls towards 0: the weights of linear and convolutional maps.

    Norms, biases, the class token and the few learned numbers of a position scheme keep their scale by what they are for. Tables do not decay either:
    the row of a token that no batch holds has no gradient, and would be shrunk at every step all the same. That goes for a table of tokens that is
    also the head; a head of its own is a linear map like any other.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = {
        id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    }
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in matrices - tables)


def adamw(model: nn.Module, spec: TrainingSpec) -> torch.optim.AdamW:
    """AdamW in one fused pass where the device has it. Its learning rate is set at each step (see :mod:`twofold.training.schedule`)."""
    decaying = decaying_names(model)
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [parameters[name] for name in parameters if name in decaying], "weight_decay": spec.weight_decay},
        {"params": [parameters[name] for name in parameters if name not in decaying], "weight_decay": 0.0},
    ]
    devices = {parameter.device.type for parameter in parameters.values()}
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=spec.learning_rate,
        betas=spec.betas,
        fused=devices <= set(FUSED_DEVICES),
    )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as flat tensors, ``<parameter>.<entry>``: independent of the order of groups, ready for safetensors."""
    return {
        f"{name}.{entry}": value.detach().contiguous()
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give the optimiser the state that :func:`optimizer_tensors` took. Raises KeyError for a parameter that the model lacks."""
    parameters = dict(model.named_parameters())
    number = {id(parameter): index for index, parameter in enumerate(_in_groups(optimizer))}
    state: dict[int, dict[str, Any]] = {}
    for flat_name, value in tensors.items():
        name, _, entry = flat_name.rpartition(".")
        # A copy: a tensor that is a view into a file may be aligned differently, and then be summed in another order.
        state.setdefault(number[id(parameters[name])], {})[entry] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _in_groups(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Parameters in the order in which ``state_dict`` numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
