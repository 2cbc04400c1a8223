"""Which channels the rest already knows, and the weights that do without them. Mathematics only: no pruning library is imported here."""

from knowiso_train.pruning.consumer import Consumer, conv_columns, regression_weight
from knowiso_train.pruning.elimination import BackwardElimination, removal_costs
from knowiso_train.pruning.refit import refit_weights

__all__ = ["BackwardElimination", "Consumer", "conv_columns", "refit_weights", "regression_weight", "removal_costs"]
