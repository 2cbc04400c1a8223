"""From paired features to maps that split one into what the other reproduces, by non-linear order."""

from knowiso_train.disentangle.disentangler import Disentangler
from knowiso_train.disentangle.fitting import make_fitter
from knowiso_train.disentangle.paper_fit import PaperRecipe
from knowiso_train.disentangle.settings import Settings
from knowiso_train.disentangle.stage_fit import StageRecipe

__all__ = ["Disentangler", "PaperRecipe", "Settings", "StageRecipe", "make_fitter"]
