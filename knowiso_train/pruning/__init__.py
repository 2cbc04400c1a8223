"""Which channels the rest already knows, and the weights that do without them. Mathematics only: no pruning library is imported here."""

from knowiso_train.pruning.collect import LayerInput, input_moments
from knowiso_train.pruning.consumer import Consumer, conv_columns, regression_weight
from knowiso_train.pruning.elimination import BackwardElimination, removal_costs
from knowiso_train.pruning.refit import refit_weights
from knowiso_train.pruning.rows import columns_of, input_rows

__all__ = [
    "BackwardElimination",
    "Consumer",
    "LayerInput",
    "columns_of",
    "conv_columns",
    "input_moments",
    "input_rows",
    "refit_weights",
    "regression_weight",
    "removal_costs",
]
