"""The field's CIFAR networks, made of timm's own blocks and registered with timm.

timm's ResNets halve the image twice before the first block, which leaves nothing of 32 pixels. The networks of the
noisy-label literature start with a 3x3 convolution of stride 1 and no pooling; timm has no argument for that, so these
are variants under names of their own. A folder saved with one of them opens in timm and transformers after
`import hnml_hf.modeling.backbones`; every other timm backbone needs no import. Ordinary backbones for small images:
`output_stride=8` for ResNets, `patch_size=1` or `2` for ConvNeXt, `patch_size=4, img_size=32` for ViT.
"""

from timm.layers import BatchNormAct2d, create_conv2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.models.resnetv2 import ResNetV2
from torch import nn


def _config(**names) -> dict:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (4, 4),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        **names,
    }


default_cfgs = generate_default_cfgs(
    {
        "resnet18_cifar": _config(first_conv="conv1", classifier="fc"),
        "resnet34_cifar": _config(first_conv="conv1", classifier="fc"),
        "preact_resnet18_cifar": _config(first_conv="stem.conv", classifier="head.fc"),
    }
)


class CifarResNet(ResNet):
    """ResNet with a 3x3 stem of stride 1 and no pooling (He et al., CVPR 2016), the CIFAR form."""

    def __init__(self, *args, in_chans: int = 3, zero_init_last: bool = True, **kwargs):
        super().__init__(*args, in_chans=in_chans, zero_init_last=zero_init_last, **kwargs)
        stem = self.conv1  # type: ignore[has-type]
        self.conv1 = nn.Conv2d(
            in_chans,
            stem.out_channels,
            3,
            stride=1,
            padding=1,
            bias=False,
            device=stem.weight.device,
            dtype=stem.weight.dtype,
        )
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's ResNet does
        self.maxpool = nn.Identity()
        self.feature_info = [{**info, "reduction": max(info["reduction"] // 4, 1)} for info in self.feature_info]  # type: ignore[has-type]


class CifarPreActResNet(ResNetV2):
    """Pre-activation ResNet with a 3x3 stem of stride 1 and no pooling (He et al., ECCV 2016), the CIFAR form."""

    def __init__(self, *args, in_chans: int = 3, **kwargs):
        super().__init__(*args, in_chans=in_chans, **kwargs)
        stem = self.stem.conv  # type: ignore[has-type]
        self.stem = nn.Sequential()
        self.stem.add_module(
            "conv",
            create_conv2d(
                in_chans, stem.out_channels, 3, stride=1, device=stem.weight.device, dtype=stem.weight.dtype
            ),
        )
        nn.init.kaiming_normal_(self.stem.conv.weight, mode="fan_out", nonlinearity="relu")
        self.feature_info = [{**info, "reduction": max(info["reduction"] // 4, 1)} for info in self.feature_info]  # type: ignore[has-type]


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-18 for 32-pixel images, 11.2 million parameters at 10 classes."""
    arguments = {"block": BasicBlock, "layers": (2, 2, 2, 2), **kwargs}
    return build_model_with_cfg(CifarResNet, "resnet18_cifar", pretrained, **arguments)


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-34 for 32-pixel images, 21.3 million parameters at 10 classes; the network of the CIFAR-N leaderboard."""
    arguments = {"block": BasicBlock, "layers": (3, 4, 6, 3), **kwargs}
    return build_model_with_cfg(CifarResNet, "resnet34_cifar", pretrained, **arguments)


@register_model
def preact_resnet18_cifar(pretrained: bool = False, **kwargs) -> CifarPreActResNet:
    """PreAct-ResNet-18 for 32-pixel images, 11.2 million parameters at 10 classes; the network of DivideMix."""
    arguments = {
        "layers": (2, 2, 2, 2),
        "channels": (64, 128, 256, 512),
        "basic": True,
        "bottle_ratio": 1.0,
        "conv_layer": create_conv2d,
        "norm_layer": BatchNormAct2d,
        **kwargs,
    }
    return build_model_with_cfg(CifarPreActResNet, "preact_resnet18_cifar", pretrained, **arguments)
