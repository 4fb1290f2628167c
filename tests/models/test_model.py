"""The network, against the original's written out plainly."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VGG16_Weights

from bcnn.data.transforms import Preprocessing
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.third_party import to_original


class OriginalNet(nn.Module):
    """The original's layers and formula, for any input size: features, 262,144-wide classifier."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
            if width:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifiers = nn.Sequential(nn.Linear(512**2, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        n = x.shape[2] * x.shape[3]
        x = x.reshape(len(x), 512, n)
        x = torch.bmm(x, x.transpose(1, 2)) / n
        x = x.reshape(len(x), -1)
        x = F.normalize(torch.sign(x) * torch.sqrt(torch.abs(x) + 1e-10))
        return self.classifiers(x)


@pytest.fixture(scope="module")
def model() -> BCNN:
    torch.manual_seed(0)
    model = BCNN(["a", "b", "c"], Preprocessing(32))
    preset = VGG16_Weights.IMAGENET1K_V1.transforms()  # the original's
    model.backbone.set_normalization(preset.mean, preset.std)
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.head.bias)
    return model.double()


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, 3, 48, 64), (2, 3, 77, 33)])
def test_logits_equal_the_original_network(model: BCNN, shape: tuple[int, ...]) -> None:
    source = OriginalNet(3).double()
    source.load_state_dict(to_original(model))  # strict: same names, same shapes
    images = torch.rand(shape, dtype=torch.float64)
    normalised = (images - model.backbone.mean) / model.backbone.std
    torch.testing.assert_close(model(images), source(normalised), rtol=1e-10, atol=1e-12)


def test_bytes_and_fractions_are_the_same_images(model: BCNN) -> None:
    images = torch.randint(0, 256, (2, 3, 40, 32), dtype=torch.uint8)
    torch.testing.assert_close(model(images), model(images.double() / 255))


@pytest.mark.parametrize("shape", [(1, 3, 31, 64), (1, 1, 64, 64), (3, 64, 64)])
def test_other_shapes_are_refused_with_those_that_work(model: BCNN, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 32 px"):
        model(torch.zeros(shape))
