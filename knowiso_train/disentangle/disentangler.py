"""Maps from one feature to another, split by non-linear order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from knowiso_train.disentangle._closed_form import ClosedFormMaps
from knowiso_train.disentangle._closed_form_fit import ClosedFormFitter
from knowiso_train.disentangle.config import DisentangleConfig, FitSpec, Fitter, Solver, solve_bar
from knowiso_train.disentangle.paper import PaperFitter, PaperMaps
from knowiso_train.errors import FormatError, InputTypeError, KnowisoError, OptionError, ShapeError
from knowiso_train.features.extractor import align
from knowiso_train.regression.ridge import Ridge
from knowiso_train.utils.distributed import ProcessGroup
from knowiso_train.utils.hashing import split_by_hash
from knowiso_train.utils.serialization import read_tensors, write_tensors
from knowiso_train.utils.validation import NonNegativeInt, PositiveInt, validate_fields

DISENTANGLER_FORMAT_VERSION = 1
FIT_BATCH_IMAGES = 256
DISENTANGLER_FILE = "disentangler.safetensors"


class Disentangler(nn.Module):
    """Exact split of a target feature by non-linear order: `x_B = x^(0) + … + x^(K) + residual`.

    x^(k) is reproduced from the source with k non-linear steps (arXiv 1908.01581). The default solver fits order 0 by
    ridge regression and every further order to the residual of those below. `solver="paper"` trains the published
    network.

    Args:
        order: K ≥ 0, the number of non-linear steps.
        kernel_size: Odd kernel of the maps. Default: 1, or 3 for the paper's solver on grids.
        solver: "closed_form" or "paper".
        hidden: Width of the hidden maps of orders ≥ 1 (closed form). Default: four times the target's channels, at
            most 768 for 1×1 maps, and at most 128 or the target's channels for wider ones.
        ridge: Relative ridge ρ ≥ 0, or "search" on selection images (closed form).
        max_rows: Maximum number of positions kept for orders ≥ 1, or for training the paper's network. None: 131,072
            for orders ≥ 1, all for the paper's network.
        source_channels: Number of random orthonormal directions to project the source on (closed form). Default: no
            projection.
        seed: Seed of all random numbers.
        solver_options: Fields of `NonlinearConfig` (closed form) or `PaperConfig`.

    Raises:
        OptionError: An invalid value.

    Examples:
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
        solver: Solver = "closed_form",
        hidden: int | None = None,
        ridge: Ridge = "search",
        max_rows: int | None = None,
        source_channels: int | None = None,
        seed: int = 0,
        solver_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = DisentangleConfig(
            order=order,
            kernel_size=kernel_size,
            solver=solver,
            hidden=hidden,
            ridge=ridge,
            max_rows=max_rows,
            source_channels=source_channels,
            seed=seed,
            solver_options=solver_options,
        )
        self.maps = None

    @classmethod
    def of(cls, maps: nn.Module, config: DisentangleConfig) -> Disentangler:
        """Wrap fitted maps."""
        result = cls()
        result.config = config
        result.maps = maps  # type: ignore[assignment]
        return result

    def fit(
        self, x_source: Tensor, x_target: Tensor, *, select: float | tuple[Tensor, Tensor] = 0.2, progress: bool = False
    ) -> Disentangler:
        """Fit the maps to paired features.

        Args:
            x_source: (N, C_A, H, W) or (N, C_A).
            x_target: (N, C_B, H', W') or (N, C_B), of the same N images. The source is resampled to its grid.
            select: Fraction of the images for choosing the ridge and stopping, or a (source, target) pair of other
                images. 0 uses none and needs a fixed `ridge`.
            progress: Show a progress bar.

        Returns:
            This disentangler.

        Raises:
            InputTypeError: Features that are not tensors.
            ShapeError: Different numbers of images, or features that are neither (N, C, H, W) nor (N, C).
            OptionError: `select=0` with `ridge="search"`.
            NonFiniteError: NaN or Inf in the features.
        """
        x, y = _pair(x_source, x_target)
        config = self.config.on_grid((y.shape[2], y.shape[3]))
        parts = _split(x, y, select, config.seed)
        if config.solver == "closed_form" and config.ridge == "search" and not len(parts[1][0]):
            raise OptionError(
                'ridge="search" needs selection images: use select=0.2, a (source, target) pair, or a fixed ridge '
                "such as ridge=1e-4"
            )
        fitter = make_fitter(config, x, y, len(parts[0][0]))
        for is_select, (part_x, part_y, index) in enumerate(parts):
            for start in range(0, len(index), FIT_BATCH_IMAGES):
                chunk = slice(start, start + FIT_BATCH_IMAGES)
                mask = np.full(len(index[chunk]), bool(is_select))
                fitter.update(part_x[chunk], part_y[chunk], index[chunk], mask)
        with solve_bar(fitter.work, show=progress) as bar:
            self.maps = fitter.finish(bar=bar, label="disentangler")[0]  # type: ignore[assignment]
        return self

    def forward(self, x_source: Tensor) -> Tensor:
        """Return g(x), the part of the target that the source reproduces; (N, C_B, H, W), or (N, C_B) for vectors."""
        maps = self._maps()
        return _shaped_like(maps(_to_maps(_grid(x_source), maps)), x_source)

    def components(self, x_source: Tensor) -> list[Tensor]:
        """Return x^(0), …, x^(K), which sum to g(x)."""
        maps = self._maps()
        return [_shaped_like(part, x_source) for part in maps.components(_to_maps(_grid(x_source), maps))]

    def split(self, x_source: Tensor, x_target: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return components and residual, which sum to the target up to rounding.

        Args:
            x_source: (N, C_A, H, W) or (N, C_A).
            x_target: (N, C_B, H', W') or (N, C_B).

        Returns:
            K + 1 components and the residual, each of the target's shape.

        Raises:
            ShapeError: Features that do not fit the fitted maps.
        """
        x, y = _pair(x_source, x_target)
        maps = self._maps()
        if y.shape[1] != maps.target_channels:
            raise ShapeError(f"expected a target with {maps.target_channels} channels, got {tuple(x_target.shape)}")
        parts = maps.components(_to_maps(x, maps))
        residual = y - torch.stack(parts).sum(0)
        return [_shaped_like(part, x_target) for part in parts], _shaped_like(residual, x_target)

    def save(self, folder: str | Path) -> None:
        """Write tensors and configuration into a folder, as the one file `disentangler.safetensors`."""
        maps = self._maps()
        projection = getattr(maps, "projection", None)
        sizes = MapSizes(
            kind="paper" if isinstance(maps, PaperMaps) else "closed_form",
            source_channels=maps.source_channels,
            target_channels=maps.target_channels,
            order=maps.order,
            kernel_size=maps.kernel_size,
            hidden=getattr(maps, "hidden", None),
            tied=getattr(maps, "tied", None),
            projected_channels=None if projection is None else len(projection),
            dtype=str(next(maps.parameters()).dtype).removeprefix("torch."),  # type: ignore[arg-type]
        )
        description = {
            "format_version": DISENTANGLER_FORMAT_VERSION,
            "config": self.config.to_dict(),
            "maps": asdict(sizes),
        }
        write_tensors(Path(folder) / DISENTANGLER_FILE, maps.state_dict(), description)

    @classmethod
    def load(cls, folder: str | Path) -> Disentangler:
        """Read a folder written by `save`; nothing is unpickled.

        Raises:
            FormatError: A missing or damaged file, another format version, or tensors that do not fit. The message
                names the file.
        """
        path = Path(folder) / DISENTANGLER_FILE
        tensors, description = read_tensors(path)
        version = description.get("format_version") if isinstance(description, dict) else None
        if version != DISENTANGLER_FORMAT_VERSION:
            raise FormatError(
                f"{path} has format version {version!r}; this version of knowiso_train reads "
                f"{DISENTANGLER_FORMAT_VERSION}"
            )
        try:
            sizes = MapSizes(**description["maps"])
            config = DisentangleConfig(**description["config"])
            return cls.of(_build_maps(sizes, config, tensors), config)
        except (KnowisoError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise FormatError(
                f"{path} does not hold a disentangler that this version can read: {error}. Save or copy it again"
            ) from error

    def _maps(self) -> ClosedFormMaps | PaperMaps:
        if self.maps is None:
            raise OptionError(
                "this disentangler has no maps yet; call fit(x_source, x_target) or Disentangler.load(folder) first"
            )
        return self.maps


def _shaped_like(part: Tensor, feature: Tensor) -> Tensor:
    """Return a grid of one position as vectors if the feature has vectors."""
    return part.flatten(1) if feature.ndim == 2 else part


def _to_maps(x: Tensor, maps: nn.Module) -> Tensor:
    """Return a source in the precision of the maps, which are float32 for half precision."""
    return x.to(next(maps.parameters()).dtype)


def _grid(x: Any) -> Tensor:
    """Return a feature in float32 or better, vectors as a grid of one position."""
    if not isinstance(x, Tensor):
        raise InputTypeError(f"expected a feature as a tensor, got {type(x).__name__}; torch.as_tensor converts arrays")
    if x.ndim not in (2, 4):
        raise ShapeError(
            f"expected a feature of shape (N, C, H, W) or (N, C), got {tuple(x.shape)}; "
            "knowiso_train.features.to_nchw converts other layouts"
        )
    feature: Tensor = x.to(torch.promote_types(x.dtype, torch.float32))
    return feature[:, :, None, None] if feature.ndim == 2 else feature


def _pair(x_source: Tensor, x_target: Tensor) -> tuple[Tensor, Tensor]:
    x, y = _grid(x_source), _grid(x_target)
    if len(x) != len(y):
        raise ShapeError(f"source and target must come from the same images, got {len(x)} and {len(y)}")
    return align(x, (y.shape[2], y.shape[3])), y


def _split(
    x: Tensor, y: Tensor, select: float | tuple[Tensor, Tensor], seed: int
) -> list[tuple[Tensor, Tensor, NDArray[np.int64]]]:
    """Return source, target and index of the fitting images, and those of the selection images."""
    index = np.arange(len(x), dtype=np.int64)
    if isinstance(select, tuple):
        select_x, select_y = _pair(*select)
        return [(x, y, index), (select_x, select_y, np.arange(len(x), len(x) + len(select_x), dtype=np.int64))]
    if not 0 <= select < 1:
        raise OptionError(f"select must be a fraction in [0, 1) or a (source, target) pair of features, got {select}")
    is_select = split_by_hash(index, (select, 1 - select), seed) == 0
    masks = [(mask, torch.from_numpy(mask)) for mask in (~is_select, is_select)]
    return [(x[images.to(x.device)], y[images.to(y.device)], index[mask]) for mask, images in masks]


def fitter_type(config: DisentangleConfig) -> type[Fitter]:
    """Return the fitter class of the solver."""
    return PaperFitter if config.solver == "paper" else ClosedFormFitter


def make_fitter(
    config: DisentangleConfig,
    x: Tensor,
    y: Tensor,
    expected_images: int,
    *,
    num_targets: int = 1,
    group: ProcessGroup | None = None,
) -> Fitter:
    """Return a fitter for features of these shapes.

    Args:
        config: Configuration with the kernel size decided (`DisentangleConfig.on_grid`).
        x: A source feature, (N, C_A, H, W).
        y: Its targets, (N, num_targets · C_B, H, W).
        expected_images: Approximate number of images to come.
        num_targets: Number of targets stacked along the channels of `y`.
        group: Processes that share the fit.
    """
    spec = FitSpec(
        config=config,
        source_channels=x.shape[1],
        target_channels=y.shape[1] // num_targets,
        num_targets=num_targets,
        expected_images=expected_images,
        dtype=torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32),
        device=y.device,
        group=group or ProcessGroup(),
    )
    return fitter_type(config)(spec)


@dataclass(frozen=True)
class MapSizes:
    """Sizes of saved maps.

    Attributes:
        kind: Solver of the maps.
        source_channels: C_A.
        target_channels: C_B.
        order: K.
        kernel_size: Odd kernel of every map.
        hidden: Channels of the hidden maps. None: the paper's maps.
        tied: One map per step. None: closed-form maps.
        projected_channels: Channels of the projected source. None: no projection.
        dtype: Type of all tensors.
    """

    kind: Solver
    source_channels: PositiveInt
    target_channels: PositiveInt
    order: NonNegativeInt
    kernel_size: PositiveInt
    hidden: PositiveInt | None
    tied: bool | None
    projected_channels: PositiveInt | None
    dtype: Literal["float32", "float64", "float16", "bfloat16"]

    def __post_init__(self) -> None:
        validate_fields(self)

    @property
    def num_tensors(self) -> int:
        """Number of tensors of maps of these sizes, without that of a projection."""
        if self.kind == "paper":
            return (self.order + 1) * (1 if self.tied else 2) + 1 + (0 if self.tied else self.order)
        # center, scale, weight and bias of order 0; per order k two of its hidden map and k + 2 of its readouts
        return 4 + 2 * self.order + self.order * (self.order + 5) // 2


def _build_maps(
    sizes: MapSizes, config: DisentangleConfig, tensors: Mapping[str, Tensor]
) -> ClosedFormMaps | PaperMaps:
    """Build maps of saved tensors, without memory of its own and without random numbers.

    Raises:
        FormatError: Sizes, configuration and tensors that do not fit each other.
        RuntimeError: Tensors of other names or shapes.
    """
    has_projection = sizes.projected_channels is not None
    if (sizes.kind, sizes.order, sizes.num_tensors + has_projection) != (config.solver, config.order, len(tensors)):
        raise FormatError(
            f"expected {sizes.num_tensors + has_projection} tensors of solver {config.solver!r} and order "
            f"{config.order}, got {len(tensors)} of {sizes.kind!r} and {sizes.order}"
        )
    for name, tensor in tensors.items():
        if tensor.dtype != getattr(torch, sizes.dtype) or not tensor.isfinite().all():
            raise FormatError(f"expected finite numbers of type {sizes.dtype} in {name!r}, got {tensor.dtype} or NaN")
    shape = (sizes.source_channels, sizes.target_channels, sizes.order, sizes.kernel_size)
    maps: ClosedFormMaps | PaperMaps
    # Tensors of the meta device have shapes only: wrong sizes are found before memory is allocated
    with torch.device("meta"):
        if sizes.kind == "paper":
            maps = PaperMaps(*shape, tied=sizes.tied).requires_grad_(False)
        else:
            count = sizes.projected_channels
            projection = None if count is None else torch.empty(count, sizes.source_channels)
            maps = ClosedFormMaps(*shape, sizes.hidden, projection)  # type: ignore[arg-type]
    maps.load_state_dict(tensors, assign=True)
    return maps.eval()
