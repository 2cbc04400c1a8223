"""Features of inner layers: named, paired, captured and brought to one layout and grid."""

from knowiso_train.features.extractor import Extractor, align
from knowiso_train.features.hooks import FeatureTaps, call_input
from knowiso_train.features.layout import FeatureSpec, Layout, describe_feature, infer_layout, to_nchw
from knowiso_train.features.modules import LayerPair, named_layers, pair_layers, resolve_layers
from knowiso_train.features.state import checked_device, device_of, on_device, preserve_state
from knowiso_train.features.substitution import Substitution
from knowiso_train.features.summary import named_stages, stage_grids
from knowiso_train.features.wrappers import unwrap_model

__all__ = [
    "Extractor",
    "FeatureSpec",
    "FeatureTaps",
    "LayerPair",
    "Layout",
    "Substitution",
    "align",
    "call_input",
    "checked_device",
    "describe_feature",
    "device_of",
    "infer_layout",
    "named_layers",
    "named_stages",
    "on_device",
    "pair_layers",
    "preserve_state",
    "resolve_layers",
    "stage_grids",
    "to_nchw",
    "unwrap_model",
]
