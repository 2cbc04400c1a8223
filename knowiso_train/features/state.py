"""Networks and random numbers, left as they were found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from knowiso_train.errors import InputTypeError


@contextmanager
def undisturbed(*models: nn.Module, eval_mode: bool = True) -> Iterator[None]:
    """Within the context networks are in eval mode; afterwards, also after an error, everything is as it was.

    Restored are each submodule's own `training` flag, each parameter's `requires_grad`, and the random state of python, numpy, torch and, if it was
    initialised when the context began, CUDA (which is never initialised here).

    Args:
        models: wrapped or not; one that is given twice counts once.
        eval_mode: False leaves the modes as they are within the context.

    Raises:
        InputTypeError: not a module.

    Example:
        >>> model = nn.Dropout()
        >>> with undisturbed(model):
        ...     inside = model.training
        >>> inside, model.training
        (False, True)
    """
    for model in models:
        if not isinstance(model, nn.Module):
            raise InputTypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    modules = {id(module): module for model in models for module in model.modules()}.values()
    modes = [(module, module.training) for module in modules]
    gradients = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters(recurse=False)]
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  # what others draw from
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        if eval_mode:
            for module in modules:  # flags, not .eval(): modules may override train() with work that cannot be undone
                module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, needed in gradients:
            parameter.requires_grad_(needed)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
