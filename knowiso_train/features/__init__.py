"""Features of inner layers: named, paired, tapped, brought to one layout and one grid."""

from knowiso_train.features.alignment import align
from knowiso_train.features.batches import batch_size, check_loader, for_one, image_size, inputs_of, select, to_device, with_inputs
from knowiso_train.features.called import called_on
from knowiso_train.features.extractor import Extractor
from knowiso_train.features.layout import FeatureSpec, Layout, describe, infer_layout, to_nchw
from knowiso_train.features.names import bare, named_layers, resolve
from knowiso_train.features.pairing import LayerPair, pair_layers
from knowiso_train.features.placement import device_of, on_device
from knowiso_train.features.stages import named_stages, stage_grids
from knowiso_train.features.state import undisturbed
from knowiso_train.features.taps import FeatureTaps

__all__ = [
    "Extractor",
    "FeatureSpec",
    "FeatureTaps",
    "LayerPair",
    "Layout",
    "align",
    "bare",
    "batch_size",
    "called_on",
    "check_loader",
    "describe",
    "device_of",
    "for_one",
    "image_size",
    "infer_layout",
    "inputs_of",
    "named_layers",
    "named_stages",
    "on_device",
    "pair_layers",
    "resolve",
    "select",
    "stage_grids",
    "to_device",
    "to_nchw",
    "undisturbed",
    "with_inputs",
]
