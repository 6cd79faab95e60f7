"""Models for small images, all of them cut before their global pooling (`forward_features`)."""

from __future__ import annotations

from fastadv.models.forms import (
    check_form_named,
    copy_weights,
    form_of,
    forms_of,
    in_form,
    usual_form,
)
from fastadv.models.imagenet_resnet import ImageNetResNet, resnet18_imagenet, resnet50
from fastadv.models.preact_resnet import PreActResNet, preact_resnet18
from fastadv.models.published import LoadReport, load_published_state_dict
from fastadv.models.registry import create_model, model_names, names_code
from fastadv.models.resnet import ResNet, resnet18
from fastadv.models.small_cnn import SmallCNN, small_cnn
from fastadv.models.split import FeatureSplit, Normalized, SplitModel, check_feature_split
from fastadv.models.stack import Stack, importance_ratios
from fastadv.models.stages import (
    MissingLayerError,
    check_layer,
    layer_and_logits,
    layer_names,
    layer_output,
)
from fastadv.models.state_files import StateFileError, read_state_file
from fastadv.models.vgg import VGG, vgg16_bn
from fastadv.models.wide_resnet import WideResNet, wrn_28_10, wrn_34_10

__all__ = [
    "VGG",
    "FeatureSplit",
    "ImageNetResNet",
    "LoadReport",
    "MissingLayerError",
    "Normalized",
    "PreActResNet",
    "ResNet",
    "SmallCNN",
    "SplitModel",
    "Stack",
    "StateFileError",
    "WideResNet",
    "check_feature_split",
    "check_form_named",
    "check_layer",
    "copy_weights",
    "create_model",
    "form_of",
    "forms_of",
    "importance_ratios",
    "in_form",
    "layer_and_logits",
    "layer_names",
    "layer_output",
    "load_published_state_dict",
    "model_names",
    "names_code",
    "preact_resnet18",
    "read_state_file",
    "resnet18",
    "resnet18_imagenet",
    "resnet50",
    "small_cnn",
    "usual_form",
    "vgg16_bn",
    "wrn_28_10",
    "wrn_34_10",
]
