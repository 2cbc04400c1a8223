"""Maps from one feature to another, split by non-linear order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from knowiso_train.disentangle.closed_form import ClosedFormMaps
from knowiso_train.disentangle.closed_form_fit import ClosedFormFitter
from knowiso_train.disentangle.config import DisentangleConfig
from knowiso_train.disentangle.fitter import FitSpec, Fitter
from knowiso_train.disentangle.paper import PaperFitter, PaperMaps
from knowiso_train.errors import FormatError, KnowisoError, OptionError, ShapeError
from knowiso_train.features.extractor import align
from knowiso_train.regression.ridge import Ridge
from knowiso_train.utils.distributed import ProcessGroup
from knowiso_train.utils.hashing import split_by_hash
from knowiso_train.utils.serialization import dump_json, parse_json, replace_file, write_file

DISENTANGLER_FORMAT_VERSION = 1
CONFIG_FILE, TENSORS_FILE = "disentangler.json", "disentangler.safetensors"


class Disentangler(nn.Module):
    """Splits a target feature exactly: `x_B = x^(0) + … + x^(K) + residual`, where x^(k) is reproduced from the source with k non-linear steps.

    Source: arXiv 1908.01581. The default solver is closed-form (order 0 by ridge regression, higher orders by stages
        fitted to what is left);
    `solver="paper"` is the published network and recipe.

    Args:
        order: K ≥ 0.
        kernel_size: odd; None is 1, or 3 for the paper's solver on grids.
        solver: "closed_form" or "paper".
        hidden: width of the hidden maps of orders ≥ 1 (closed form); None is twice the target's channels, 512 at most.
        ridge: relative ridge ρ ≥ 0, or "search" on selection images (closed form).
        max_rows: most positions kept for orders ≥ 1, or for training the paper's network.
        source_channels: project the source on this many random orthonormal directions first (closed form).
        seed: of everything random.
        solver_options: fields of `StageRecipe` (closed form) or `PaperRecipe`.

    Raises:
        OptionError: a value without meaning.

    Example:
        >>> x = torch.randn(64, 4, 6, 6)
        >>> y = torch.einsum("dc,nchw->ndhw", torch.randn(3, 4), x)
        >>> maps = Disentangler(order=0).fit(x, y)
        >>> components, residual = maps.split(x, y)
        >>> len(components), bool(residual.var() < 1e-6 * y.var())
        (1, True)
    """

    maps: ClosedFormMaps | PaperMaps | None

    def __init__(
        self,
        *,
        order: int = 2,
        kernel_size: int | None = None,
        solver: str = "closed_form",
        hidden: int | None = None,
        ridge: Ridge = "search",
        max_rows: int = 131_072,
        source_channels: int | None = None,
        seed: int = 0,
        solver_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.settings = DisentangleConfig(
            order, kernel_size, solver, hidden, ridge, max_rows, None, source_channels, seed, solver_options
        )
        self.maps = None

    @classmethod
    def of(cls, maps: nn.Module, settings: DisentangleConfig) -> Disentangler:
        """Wrap maps that are already fitted."""
        result = cls()
        result.settings = settings
        result.maps = maps  # type: ignore[assignment]
        return result

    def fit(
        self, x_source: Tensor, x_target: Tensor, *, select: float | tuple[Tensor, Tensor] = 0.2, progress: bool = False
    ) -> Disentangler:
        """Fit the maps to paired features.

        Args:
            x_source: (N, C_A, H, W) or (N, C_A).
            x_target: (N, C_B, H', W') or (N, C_B), of the same N images; the source is resampled to its grid.
            select: fraction of the images held out to choose ridge and stopping on, or a (source, target) pair of other
                images;
                0 selects on none and needs a fixed `ridge`.
            progress: show a progress bar.

        Returns:
            This disentangler.

        Raises:
            ShapeError: other numbers of images, or features that are neither (N, C, H, W) nor (N, C).
            OptionError: `select=0` with `ridge="search"`.
            NonFiniteError: NaN or Inf in the features.
        """
        x, y = _pair(x_source, x_target)
        settings = self.settings.on_grid((y.shape[2], y.shape[3]))
        index = np.arange(len(x), dtype=np.int64)
        if isinstance(select, tuple):
            others = _pair(*select)
            parts = [(x, y, index, False), (*others, np.arange(len(x), len(x) + len(others[0]), dtype=np.int64), True)]
        else:
            if not 0 <= select < 1:
                raise OptionError(
                    f"select must be a fraction in [0, 1) or a (source, target) pair of features, got {select}"
                )
            held = split_by_hash(index, (select, 1 - select), settings.seed) == 0
            parts = [
                (x[torch.from_numpy(m).to(x.device)], y[torch.from_numpy(m).to(y.device)], index[m], flag)
                for m, flag in ((~held, False), (held, True))
            ]
        if settings.solver == "closed_form" and settings.ridge == "search" and not len(parts[1][0]):
            raise OptionError(
                'ridge="search" needs selection images: use select=0.2, a (source, target) pair, or a fixed ridge such as ridge=1e-4'
            )
        fitter = make_fitter(settings, x, y, len(parts[0][0]))
        for xs, ys, ids, flag in parts:
            for start in range(0, len(ids), 256):
                chunk = slice(start, start + 256)
                fitter.update(xs[chunk], ys[chunk], ids[chunk], np.full(len(ids[chunk]), flag))
        self.maps = fitter.finish(progress=progress, label="disentangler")[0]  # type: ignore[assignment]
        return self

    def forward(self, x_source: Tensor) -> Tensor:
        """g(x): everything of the target that the source reproduces; (N, C_B, H, W), or (N, C_B) for vectors."""
        return self._shaped(self._maps()(_grid(x_source)), x_source)

    def components(self, x_source: Tensor) -> list[Tensor]:
        """x^(0), …, x^(K), which sum to g(x)."""
        return [self._shaped(part, x_source) for part in self._maps().components(_grid(x_source))]

    def split(self, x_source: Tensor, x_target: Tensor) -> tuple[list[Tensor], Tensor]:
        """Components and residual, which sum exactly to the target (to rounding).

        Args:
            x_source: (N, C_A, H, W) or (N, C_A).
            x_target: (N, C_B, H', W') or (N, C_B).

        Returns:
            K + 1 components and the residual, each of the target's shape.

        Raises:
            ShapeError: features that do not fit the fitted maps.
        """
        x, y = _pair(x_source, x_target)
        maps = self._maps()
        if y.shape[1] != maps.target_channels:
            raise ShapeError(f"expected a target with {maps.target_channels} channels, got {tuple(x_target.shape)}")
        parts = maps.components(x)
        residual = y - torch.stack(parts).sum(0)
        return [self._shaped(part, x_target) for part in parts], self._shaped(residual, x_target)

    def save(self, folder: str | Path) -> None:
        """Write tensors (safetensors) and settings (JSON) into a folder."""
        maps = self._maps()
        projected = getattr(maps, "projection", None)
        config = {
            "settings": self.settings.to_dict(),
            "maps": {
                "kind": "paper" if isinstance(maps, PaperMaps) else "closed_form",
                "source_channels": maps.source_channels,
                "target_channels": maps.target_channels,
                "order": maps.order,
                "kernel_size": maps.kernel_size,
                "hidden": getattr(maps, "hidden", None),
                "tied": getattr(maps, "tied", None),
                "projected_channels": None if projected is None else len(projected),
                "dtype": str(next(maps.parameters()).dtype).removeprefix("torch."),
            },
        }
        _write_files(folder, config, maps.state_dict())

    @classmethod
    def load(cls, folder: str | Path) -> Disentangler:
        """Read what `save` wrote; nothing is unpickled.

        Raises:
            FormatError: missing files, another format version, or tensors that do not fit.
        """
        config, tensors = _read_files(folder)
        try:
            kind = config["maps"]
            shape = (kind["source_channels"], kind["target_channels"], kind["order"], kind["kernel_size"])
            maps: ClosedFormMaps | PaperMaps
            if kind["kind"] == "paper":
                maps = PaperMaps(*shape, tied=kind["tied"]).requires_grad_(False)
            else:
                count = kind["projected_channels"]
                maps = ClosedFormMaps(
                    *shape, kind["hidden"], None if count is None else torch.zeros(count, kind["source_channels"])
                )
            maps.to(getattr(torch, kind["dtype"])).load_state_dict(tensors)
            return cls.of(maps.eval(), DisentangleConfig(**config["settings"]))
        except KnowisoError:
            raise
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise FormatError(f"{folder} does not hold a disentangler that this version can read: {error}") from error

    def _maps(self) -> ClosedFormMaps | PaperMaps:
        if self.maps is None:
            raise OptionError(
                "this disentangler has no maps yet; call fit(x_source, x_target) or Disentangler.load(folder) first"
            )
        return self.maps

    @staticmethod
    def _shaped(part: Tensor, like: Tensor) -> Tensor:
        return part.flatten(1) if like.ndim == 2 else part


def _grid(x: Tensor) -> Tensor:
    if x.ndim not in (2, 4):
        raise ShapeError(
            f"expected a feature of shape (N, C, H, W) or (N, C), got {tuple(x.shape)}; knowiso_train.features.to_nchw converts other layouts"
        )
    return x[:, :, None, None] if x.ndim == 2 else x


def _pair(x_source: Tensor, x_target: Tensor) -> tuple[Tensor, Tensor]:
    x, y = _grid(x_source), _grid(x_target)
    if len(x) != len(y):
        raise ShapeError(f"source and target must come from the same images, got {len(x)} and {len(y)}")
    return align(x, (y.shape[2], y.shape[3])), y


def fitter_type(settings: DisentangleConfig) -> type[Fitter]:
    """Return the fitter class of the solver."""
    return PaperFitter if settings.solver == "paper" else ClosedFormFitter


def make_fitter(
    settings: DisentangleConfig,
    x: Tensor,
    y: Tensor,
    expected: int,
    *,
    targets: int = 1,
    group: ProcessGroup | None = None,
) -> Fitter:
    """A fitter for features like these.

    Args:
        settings: kernel decided (`Settings.on_grid`).
        x: a source feature, (N, C_A, H, W).
        y: its target, (N, targets · C_B, H, W).
        expected: images that will come, as far as is known.
        targets: number of targets stacked along the channels of `y`.
        group: the processes that share the fit.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    task = FitSpec(
        settings, x.shape[1], y.shape[1] // targets, targets, expected, dtype, y.device, group or ProcessGroup()
    )
    return fitter_type(settings)(task)


def _write_files(folder: str | Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write `disentangler.json` and `disentangler.safetensors` into a folder, made if it is not there."""
    folder = Path(folder)
    text = dump_json({"format_version": DISENTANGLER_FORMAT_VERSION, **config}) + "\n"
    with replace_file(folder / TENSORS_FILE) as partial:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
    write_file(folder / CONFIG_FILE, text)


def _read_files(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `_write_files` wrote.

    Raises:
        FormatError: no such files, or a format that this version does not read.
    """
    folder = Path(folder)
    try:
        config: dict[str, Any] = parse_json((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS_FILE)
    except FileNotFoundError as error:
        raise FormatError(
            f"expected a folder with {CONFIG_FILE} and {TENSORS_FILE}; {error.filename or folder} is not there"
        ) from error
    except ValueError as error:
        raise FormatError(f"{folder} does not hold a saved disentangler: {error}") from error
    if config.get("format_version") != DISENTANGLER_FORMAT_VERSION:
        raise FormatError(
            f"{folder} has format version {config.get('format_version')!r}; this version of knowiso_train reads {DISENTANGLER_FORMAT_VERSION}"
        )
    return config, tensors
