"""A feature network of random filters, for tests that need one but not ImageNet's."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from trainer.backbone import Backbone


class Tiny(nn.Module):
    """Maps of stride 8 and 16, 12 channels each."""

    def __init__(self):
        super().__init__()
        widths = (3, 8, 8, 12, 12)
        self.layers = nn.ModuleList(nn.Conv2d(*pair, 3, 2, 1) for pair in pairwise(widths))

    def forward(self, image):
        maps = [image]
        for layer in self.layers:
            maps.append(torch.relu(layer(maps[-1])))
        return maps[3:]


def tiny_backbone(mean=(127.5,) * 3, std=(127.5,) * 3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = Tiny()
        for layer in network.layers:
            nn.init.kaiming_normal_(layer.weight)
    return Backbone("tiny", network.eval().requires_grad_(False), mean, std)
