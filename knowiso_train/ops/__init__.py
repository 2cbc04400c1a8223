"""Operations behind the signal. Callers import from here; which implementation runs is decided per call, by device and dtype."""

from knowiso_train.ops.fixed_map_energy import fixed_map_energy
from knowiso_train.ops.gate import gate, gate_orders
from knowiso_train.ops.moments import moments
from knowiso_train.ops.precision import full_precision
from knowiso_train.ops.reference.gate import channel_scale
from knowiso_train.ops.reference.patches import conv_weight, patch_rows
from knowiso_train.ops.residual_energy import residual_energy

__all__ = [
    "channel_scale", "conv_weight", "fixed_map_energy", "full_precision", "gate", "gate_orders", "moments", "patch_rows", "residual_energy",
]  # fmt: skip
