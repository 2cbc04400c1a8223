"""Errors of the library, each also a subclass of the builtin error that callers expect.

Messages state what was expected, what was passed, and what to do.
"""

from __future__ import annotations


class KnowisoError(Exception):
    """Base class of the errors that this library raises.

    Examples:
        >>> import knowiso_train as ki
        >>> try:
        ...     ki.FeatureTaps(torch.nn.Linear(2, 2), "nothing")
        ... except ki.KnowisoError as error:
        ...     print(type(error).__name__)
        LayerNameError
    """

    def __str__(self) -> str:
        # KeyError would print the repr of the message.
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class LayerNameError(KnowisoError, KeyError):
    """Layer name or pattern without a match, or layers that cannot be paired."""


class LayoutError(KnowisoError, ValueError):
    """Feature whose channel and position axes are unknown or contradict `layout=`."""


class ShapeError(KnowisoError, ValueError):
    """Tensors of shapes that do not fit each other or the operation."""


class OptionError(KnowisoError, ValueError):
    """Invalid value of an option, or options that exclude each other."""


class InputTypeError(KnowisoError, TypeError):
    """Batch, model or argument of an unsupported type."""


class OptionTypeError(OptionError, InputTypeError):
    """An option of another type than the one expected."""


class CaptureError(KnowisoError, RuntimeError):
    """Hooked layer that did not run, ran more than once, or whose output was overwritten."""


class ScriptError(CaptureError, AttributeError):
    """Network with hooks that `torch.jit.script` cannot compile."""


class NonFiniteError(KnowisoError, FloatingPointError):
    """NaN or Inf in features; nothing of that batch was accumulated."""


class CollapseError(KnowisoError, RuntimeError):
    """Student in distillation whose features stay without variance or of low rank at a lowered weight of the loss."""


class CapacityError(KnowisoError, MemoryError):
    """Computation that would exceed the memory, raised before it starts."""


class DataError(KnowisoError, RuntimeError):
    """Loader with too few images or labels, or with different images in another pass."""


class FormatError(KnowisoError, ValueError):
    """Saved file that this version cannot read."""


class MissingDependencyError(KnowisoError, ImportError):
    """Missing optional dependency; the message names the extra that installs it."""


class KnowisoWarning(UserWarning):
    """Warning about a result that is defined but needs attention; the message names the layer."""
