"""The architectures that `architectures.py` attacks, and how each is built with fresh weights.

A name says where an architecture comes from: "resnet18" is fastadv's own, "timm:NAME" is timm's and
"robustbench:DATASET/THREAT/NAME" is an entry of RobustBench's model zoo. Nothing is ever downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from fastadv.models import create_model, model_names

ZOOS = ("ours", "timm", "robustbench")
OURS = (*model_names(), "stack:resnet18+small_cnn")

# One or two small members of each family.
TIMM = (
    "beit_base_patch16_224",
    "botnet26t_256",
    "caformer_s18",
    "cait_xxs24_224",
    "coat_tiny",
    "coatnet_0_rw_224",
    "convit_tiny",
    "convmixer_768_32",
    "convnext_tiny",
    "convnextv2_nano",
    "crossvit_tiny_240",
    "cspdarknet53",
    "davit_tiny",
    "deit3_small_patch16_224",
    "deit_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "densenet121",
    "dla34",
    "dm_nfnet_f0",
    "dpn68",
    "edgenext_small",
    "efficientformer_l1",
    "efficientnet_b0",
    "efficientnetv2_rw_t",
    "ese_vovnet19b_dw",
    "eva02_tiny_patch14_224",
    "fastvit_t8",
    "fbnetc_100",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "ghostnet_100",
    "gmlp_s16_224",
    "halonet26t",
    "hiera_tiny_224",
    "hrnet_w18_small",
    "inception_next_tiny",
    "inception_resnet_v2",
    "inception_v3",
    "lambda_resnet26t",
    "levit_128s",
    "mambaout_femto",
    "maxvit_tiny_tf_224",
    "mixer_s32_224",
    "mixnet_s",
    "mnasnet_100",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "mobilenetv4_conv_small",
    "mobileone_s0",
    "mobilevit_s",
    "mvitv2_tiny",
    "nest_tiny",
    "nf_resnet50",
    "pit_s_224",
    "poolformer_s12",
    "pvt_v2_b0",
    "regnetx_002",
    "regnety_004",
    "regnetz_b16",
    "repvgg_b0",
    "res2net50_26w_4s",
    "resmlp_12_224",
    "resnest14d",
    "resnet18",
    "resnet50",
    "resnetblur50",
    "resnetv2_50",
    "resnext50_32x4d",
    "rexnet_100",
    "selecsls42b",
    "sequencer2d_s",
    "seresnet50",
    "skresnet18",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "tf_efficientnet_b0",
    "tiny_vit_5m_224",
    "tnt_s_patch16_224",
    "tresnet_m",
    "twins_pcpvt_small",
    "vgg16",
    "vgg16_bn",
    "visformer_tiny",
    "vit_small_patch16_224",
    "volo_d1_224",
    "wide_resnet50_2",
    "xception41",
    "xcit_tiny_12_p16_224",
)

# Of these, the networks that `architecture_speed.py` times: networks that users train, in sizes that take seconds.
SPEED = (
    "resnet18",
    "preact_resnet18",
    "wrn_28_10",
    "vgg16_bn",
    "stack:resnet18+small_cnn",
    *(
        f"timm:{name}"
        for name in (
            "convmixer_768_32", "convnext_tiny", "convnextv2_nano", "cspdarknet53", "deit3_small_patch16_224",
            "deit_small_patch16_224", "densenet121", "dla34", "dm_nfnet_f0", "edgenext_small",
            "efficientformer_l1", "efficientnet_b0", "efficientnetv2_rw_t", "eva02_tiny_patch14_224",
            "ghostnet_100", "hrnet_w18_small", "inception_v3", "levit_128s", "mixer_s32_224", "mnasnet_100",
            "mobilenetv2_100", "mobilenetv3_large_100", "mobilevit_s", "pit_s_224", "poolformer_s12",
            "regnetx_002", "regnety_004", "repvgg_b0", "res2net50_26w_4s", "resnet50", "resnext50_32x4d",
            "seresnet50", "swin_tiny_patch4_window7_224", "vgg16_bn", "vit_small_patch16_224",
            "xcit_tiny_12_p16_224",
        )
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Built:
    """A model and the images it takes: [B, 3, size, size]."""

    model: nn.Module
    size: int


def zoo_of(name: str) -> str:
    """Which of `ZOOS` a name belongs to."""
    return name.partition(":")[0] if name.startswith(("timm:", "robustbench:")) else "ours"


def build(name: str) -> Built:
    """Build an architecture with the weights that its package draws.

    Raises:
        Exception: whatever the package raises.
    """
    if zoo_of(name) == "ours":
        return Built(create_model(name), 32)
    if zoo_of(name) == "timm":
        model: Any = create_model(name)
        return Built(model, model.pretrained_cfg["input_size"][-1])
    entry = _robustbench()[name]
    with untrained():
        return Built(entry.factory(), entry.size)


def robustbench_architectures() -> dict[str, list[str]]:
    """The distinct architectures of RobustBench's zoo: a name of each, and the names of its equals.

    Two entries are equal if they have the same modules, settings and forward passes; neither the number of
    classes nor the normalisation of the images counts. An entry that cannot be built without memory is
    taken to be distinct.
    """
    first: dict[str, str] = {}
    distinct: dict[str, list[str]] = {}
    for name, entry in _robustbench().items():
        try:
            with untrained(), torch.device("meta"):
                text = _text_of(entry.factory(), entry.classes)
        except Exception:  # some read numbers off their weights
            text = name
        if text in first:
            distinct[first[text]].append(name)
        else:
            first[text] = name
            distinct[name] = []
    return distinct


@dataclass(frozen=True)
class _Entry:
    factory: Callable[[], nn.Module]
    classes: int
    size: int


def _robustbench() -> dict[str, _Entry]:
    """All entries of the zoo."""
    from robustbench.model_zoo.models import model_dicts

    classes = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
    entries: dict[str, _Entry] = {}
    for dataset, threats in model_dicts.items():
        for threat, models in threats.items():
            for name, facts in models.items():
                crop = re.search(r"Crop(\d+)", facts.get("preprocessing") or "")
                size = 32 if dataset.value != "imagenet" else int(crop[1]) if crop else 224
                key = f"robustbench:{dataset.value}/{threat.value}/{name}"
                entries[key] = _Entry(facts["model"], classes[dataset.value], size)
    return entries


# Names that the zoo of RobustBench 1.1.1 asks timm for, and the names under which it registers them.
_REGISTERED = (
    (r"^debenedetti2020light_xcit_([sml])_", r"debenedetti2022light_xcit_\g<1>12_"),
    (r"^alexnet$", "alexnet_imagenet_corruptions"),
)


@contextmanager
def untrained() -> Iterator[None]:
    """Let factories that ask for trained weights get fresh ones, and for a GPU the CPU where there is no GPU."""
    import timm
    import torchvision

    create, resnet50 = timm.create_model, torchvision.models.resnet50

    def create_untrained(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        for asked, registered in _REGISTERED:
            name = re.sub(asked, registered, name)
        return create(name, pretrained=False, **options)

    def resnet50_untrained(pretrained: bool = False, **options: Any) -> nn.Module:
        return resnet50(**options)

    with ExitStack() as stack:
        stack.enter_context(patch("timm.create_model", create_untrained))
        stack.enter_context(patch("torchvision.models.resnet50", resnet50_untrained))
        stack.enter_context(patch("socket.socket.connect", _refuse))
        if not torch.cuda.is_available():
            stack.enter_context(patch.object(torch.Tensor, "cuda", lambda tensor, *_: tensor))
        yield


def _refuse(*_: object) -> None:
    raise OSError("nothing is downloaded here")


def _text_of(model: nn.Module, classes: int) -> str:
    """All that tells architectures apart."""

    def without_classes(values: object) -> object:
        if isinstance(values, tuple):
            return tuple(map(without_classes, values))
        return "classes" if type(values) is int and values == classes else values

    lines = [str(_forward_of(type(model)))]
    for name, module in model.named_modules():
        settings = sorted(
            (key, without_classes(value))
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str, tuple)) and not key.startswith("_")
        )
        # The class of the whole is often named after the paper; its forward pass, above, tells it apart.
        kind = type(module).__qualname__ if module is not model else ""
        lines.append(f"{name} {kind} {settings}")
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        lines.append(f"{name} {without_classes(tuple(value.shape))}")
    return "\n".join(lines)


def _forward_of(kind: type[nn.Module]) -> tuple[object, ...]:
    """The kind of a forward pass, whatever its class is called."""
    code: CodeType = kind.forward.__code__
    constants = [c for c in code.co_consts if not isinstance(c, CodeType)]
    return code.co_code, [n for n in code.co_names if n != kind.__name__], constants
