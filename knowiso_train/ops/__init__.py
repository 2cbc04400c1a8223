"""Tensor operations: plain references, chunked CPU forms and Triton kernels, chosen per call by device and dtype."""

from knowiso_train.ops.gate import gate, gate_orders
from knowiso_train.ops.im2col import conv_weight, patch_rows
from knowiso_train.ops.linalg import full_precision
from knowiso_train.ops.moments import moments
from knowiso_train.ops.reference import channel_scale
from knowiso_train.ops.residual_energy import gram_residual_energy, residual_energy

__all__ = [
    "channel_scale",
    "conv_weight",
    "full_precision",
    "gate",
    "gate_orders",
    "gram_residual_energy",
    "moments",
    "patch_rows",
    "residual_energy",
]
