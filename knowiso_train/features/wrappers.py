"""Wrappers of networks: DDP, FSDP, torch.compile and accelerate."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from knowiso_train.errors import InputTypeError, OptionError

# Attribute of the wrapper FSDP1, whose forward gathers the weights
_FSDP1_ATTRIBUTE = "_fsdp_wrapped_module"
# (module, class, attribute of the wrapped network). The class is looked up only in modules that are imported already:
# without its module no instance can exist, and importing FSDP or deepspeed is slow.
_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", _FSDP1_ATTRIBUTE),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper", "_checkpoint_wrapped_module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine", "module"),
)


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the network inside wrappers, in any nesting.

    Wrappers are DDP, DataParallel, FSDP, `torch.compile`, DeepSpeed and activation checkpointing; `accelerator.prepare`
    returns one of these or the network itself.

    Raises:
        InputTypeError: Not a module.

    Examples:
        >>> inner = nn.Linear(2, 2)
        >>> unwrap_model(nn.DataParallel(torch.compile(inner))) is inner
        True
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    while attribute := wrapped_attribute(model):
        model = getattr(model, attribute)
    return model


def unwrap_models(**models: Any) -> tuple[nn.Module, ...]:
    """Return the networks inside wrappers, in the given order.

    Args:
        **models: Networks by their role, which the error names.

    Raises:
        InputTypeError: Not a module.

    Examples:
        >>> inner = nn.Linear(2, 2)
        >>> pruned, original = unwrap_models(pruned=torch.compile(inner), original=nn.Linear(3, 2))
        >>> pruned is inner
        True
    """
    for role, model in models.items():
        if not isinstance(model, nn.Module):
            raise InputTypeError(f"{role}: expected a torch.nn.Module, got {type(model).__name__}")
    return tuple(unwrap_model(model) for model in models.values())


def runnable_model(model: nn.Module) -> nn.Module:
    """Return the network inside wrappers, except for FSDP, without which it has no weights to run with.

    Raises:
        OptionError: A module inside a network that FSDP shards.

    Examples:
        >>> inner = nn.Linear(2, 2)
        >>> runnable_model(nn.DataParallel(torch.compile(inner))) is inner
        True
    """
    while (attribute := wrapped_attribute(model)) and attribute != _FSDP1_ATTRIBUTE:
        model = getattr(model, attribute)
    # FSDP1 and FSDP2 mark all modules inside
    inside = getattr(model, "_is_fsdp_managed_module", False) and attribute is None
    if inside and not isinstance(model, sharded_classes()):
        raise OptionError(
            f"{type(model).__name__} is inside a network that FSDP shards, so it cannot be run alone. Pass the sharded "
            "network, after FSDP or fully_shard was applied to it"
        )
    return model


def sharded_classes() -> tuple[type[Any], ...]:
    """Return the class of the modules of FSDP2, if it is imported."""
    return _imported_classes(("torch.distributed.fsdp", "FSDPModule"))


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, which FSDP2 replaces by a subclass.

    Examples:
        >>> plain_class(nn.Linear(2, 2)).__name__
        'Linear'
    """
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, sharded_classes()))


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP shards the weights of the network or of a part of it.

    Examples:
        >>> is_sharded(nn.Linear(2, 2))
        False
    """
    classes = (*_imported_classes(("torch.distributed.fsdp", "FullyShardedDataParallel")), *sharded_classes())
    return any(isinstance(module, classes) for module in model.modules())


def has_collective_forward(model: nn.Module) -> bool:
    """Return whether a forward of the network waits for the other processes, as that of DDP and FSDP.

    Examples:
        >>> has_collective_forward(nn.Linear(2, 2))
        False
    """
    ddp = _imported_classes(("torch.nn.parallel.distributed", "DistributedDataParallel"))
    return is_sharded(model) or any(isinstance(module, ddp) for module in model.modules())


def _imported_classes(*names: tuple[str, str]) -> tuple[type[Any], ...]:
    """Return classes by module and name, without those whose module is not imported and that have no instances."""
    classes = (getattr(sys.modules.get(home), name, None) for home, name in names)
    return tuple(cls for cls in classes if cls is not None)


def wrapped_attribute(model: nn.Module) -> str | None:
    """Return the attribute that holds the wrapped network; None for other modules."""
    for home, name, attribute in _WRAPPERS:
        wrapper = getattr(sys.modules.get(home), name, None)
        if wrapper is not None and isinstance(model, wrapper):
            return attribute
    return None
