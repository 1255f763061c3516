"""An untrained detector of torchvision, for tests."""

from typing import Any

import torch
from torch import nn
from torchvision.models import detection

SSDLITE = "ssdlite320_mobilenet_v3_large"


def detector(name: str = SSDLITE, num_classes: int = 4, **options: Any) -> Any:
    torch.manual_seed(0)
    options |= {"weights": None, "weights_backbone": None, "score_thresh": 0.0}
    network = getattr(detection, name)(num_classes=num_classes, **options)
    if name == SSDLITE:  # without batch statistics, untrained weights give each place the same score
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        network.head(list(network.backbone(torch.randn(4, 3, 320, 320)).values()))
    return network.eval()
