"""The one family of errors. Each also inherits the builtin that a caller would expect, and says what was expected, what arrived and what to do."""

from __future__ import annotations


class KnowisoError(Exception):
    """Base of every error that this library raises on purpose.

    Example:
        >>> import knowiso_train as ki
        >>> try:
        ...     ki.FeatureTaps(torch.nn.Linear(2, 2), "nothing")
        ... except ki.KnowisoError as error:
        ...     print(type(error).__name__)
        LayerNameError
    """

    def __str__(self) -> str:
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()  # KeyError would print the repr


class LayerNameError(KnowisoError, KeyError):
    """A layer name or pattern that matches nothing, or pairs that cannot be formed."""


class LayoutError(KnowisoError, ValueError):
    """A feature whose layout (which axis is channels, which are positions) is unknown or contradicts `layout=`."""


class ShapeError(KnowisoError, ValueError):
    """Tensors whose shapes do not fit each other or the operation."""


class OptionError(KnowisoError, ValueError):
    """An option with a value that has no meaning, or options that exclude each other."""


class InputTypeError(KnowisoError, TypeError):
    """A batch, model or argument of a type that cannot be used."""


class OptionTypeError(OptionError, InputTypeError):
    """An option of another type than the one expected."""


class CaptureError(KnowisoError, RuntimeError):
    """A tapped layer that never fired, fired more than once, or whose output cannot be trusted."""


class NonFiniteError(KnowisoError, FloatingPointError):
    """NaN or Inf in features; nothing was accumulated from that batch."""


class CapacityError(KnowisoError, MemoryError):
    """The job would not fit in memory; raised before the memory is gone."""


class DataError(KnowisoError, RuntimeError):
    """A loader that gives too few images, or different images when it is read again."""


class FormatError(KnowisoError, ValueError):
    """A saved file that is not what this version reads."""


class MissingDependencyError(KnowisoError, ImportError):
    """An optional dependency is needed; the message names the extra that brings it."""


class KnowisoWarning(UserWarning):
    """A result that is defined but deserves a second look; the message names the layer."""
