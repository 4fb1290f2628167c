"""The original's network, and the step of its plain loop."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from bcnn.models.third_party import CHANNELS
from benchmarks.harness import seconds_an_image, torch_device
from benchmarks.options import Options


class OriginalNet(nn.Module):
    """The original's network: float32, NCHW, a classifier on all 262,144 entries."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = make_layers(cfgs["D"], batch_norm=False)[:-1]
        self.classifiers = nn.Sequential(nn.Linear(CHANNELS**2, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))

    def classify(self, maps: Tensor) -> Tensor:
        x = maps.flatten(2)
        x = (torch.bmm(x, x.transpose(1, 2)) / x.shape[2]).flatten(1)
        return self.classifiers(F.normalize(x.sign() * (x.abs() + 1e-10).sqrt()))


def original_loop(options: Options) -> dict[str, float]:
    """Its step in both stages: `last` freezes nothing, so every layer is passed both ways."""
    net = OriginalNet(options.classes).to(torch_device(options))
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-5)

    def step(images: Tensor, labels: Tensor) -> None:
        sgd.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        sgd.step()

    return {"epoch": seconds_an_image(step, options)}
