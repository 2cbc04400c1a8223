"""Which channels the rest already knows, and the weights that do without them. Mathematics only: no pruning library is imported here."""

from knowiso_train.pruning.collect import LayerInput, input_moments
from knowiso_train.pruning.compose import composed
from knowiso_train.pruning.consumer import Consumer, conv_columns, regression_weight
from knowiso_train.pruning.elimination import BackwardElimination, removal_costs
from knowiso_train.pruning.network import refit
from knowiso_train.pruning.optimizer import carry_optimizer, carrying
from knowiso_train.pruning.patches import mix_patches
from knowiso_train.pruning.record import recording
from knowiso_train.pruning.refit import refit_weights
from knowiso_train.pruning.rows import columns_of, input_rows
from knowiso_train.pruning.shape import attribute_changes, reshape
from knowiso_train.pruning.streams import shared_layers
from knowiso_train.pruning.tune_report import TuneReport
from knowiso_train.pruning.tuning import tune
from knowiso_train.pruning.twin import index_twin, kept_entries, kept_indices, take

__all__ = [
    "BackwardElimination",
    "Consumer",
    "LayerInput",
    "TuneReport",
    "attribute_changes",
    "carry_optimizer",
    "carrying",
    "columns_of",
    "composed",
    "conv_columns",
    "index_twin",
    "input_moments",
    "input_rows",
    "kept_entries",
    "kept_indices",
    "mix_patches",
    "recording",
    "refit",
    "refit_weights",
    "regression_weight",
    "removal_costs",
    "reshape",
    "shared_layers",
    "take",
    "tune",
]
