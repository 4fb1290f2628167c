"""The networks of timm, convolutional or of transformers, up to their last maps."""

from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

from torch import Tensor

from bcnn.models.backbones import Backbone
from bcnn.utils.errors import UserError


class Timm(Backbone):
    """A network of timm's (Wightman, "PyTorch Image Models", 2019), normalised as its weights want it.

    Args:
        model: timm's name, as resnet50.a1_in1k; the part after the dot names published weights.
        level: which of its maps, as timm counts them: -1 the last, -2 those of the stage before.

    Raises:
        UserError: timm is not installed, has no such network, or only one that takes images of one
            size.
    """

    network: Any

    def __init__(self, model: str, level: int = -1) -> None:
        super().__init__()
        self.model = model
        _refuse_unknown(model)
        self.network = _created(model)
        self.about: dict[str, Any] = self.network.pretrained_cfg
        try:
            self.levels = self.network.prune_intermediate_layers([level], prune_norm=False)
        except (AttributeError, AssertionError) as error:
            raise UserError(f"timm's {model} gives no maps of level {level}") from error
        info = self.network.feature_info
        chosen = (info if isinstance(info, list) else info.info)[self.levels[-1]]
        self.channels, self.stride = chosen["num_chs"], chosen["reduction"]
        self.min_size, self.size_divisor = 2 * self.stride, self.stride
        self.layers = tuple(dict.fromkeys(map(_layer, dict(self.network.named_parameters()))))
        with suppress(AssertionError):  # which those that cannot raise
            self.network.set_grad_checkpointing(True)
            self.supports_grad_checkpointing = True
        self.licence = self.about.get("license") or ""
        # timm evaluates by bicubic where weights say nothing; all that it publishes say one of the two.
        # "random", which draws one of them in its training, is nothing that its evaluation can do.
        bilinear = self.about.get("interpolation") == "bilinear"
        self.interpolation = "bilinear" if bilinear else "bicubic"
        self.set_normalization(self.about["mean"], self.about["std"])

    def initialise(self) -> None:
        """As timm does it, when the network is made."""

    def published(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Its state from weights with timm's names; None: from those that timm has for it."""
        options: dict[str, Any] = {}
        if tensors is not None:
            options = {"pretrained_cfg_overlay": {"state_dict": dict(tensors)}}
            heads = self.about.get("classifier")
            for head in (heads,) if isinstance(heads, str) else heads or ():
                if f"{head}.weight" in tensors:
                    options["num_classes"] = len(tensors[f"{head}.weight"])
                    options["pretrained_cfg_overlay"]["num_classes"] = options["num_classes"]
        try:
            network = _created(self.model, pretrained=True, **options)
        except Exception as error:  # of the network, the hub, or a file of another network
            where = self.about.get("hf_hub_id") or self.about.get("url")
            raise UserError(
                f"{str(error).strip().splitlines()[0]} …: these are no weights of timm's {self.model}"
                if tensors is not None
                else f"cannot get the weights of timm's {self.model} ({error}): fetch {where} by hand "
                "and give its file as model.weights, or train with model.weights=random"
            ) from error
        network.prune_intermediate_layers(self.levels, prune_norm=False)
        state = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
        return {**state, "mean": self.mean, "std": self.std}

    def unfreeze_from(self, name: str | None) -> None:
        if name not in (None, *self.layers):
            raise UserError(f"finetune.unfreeze_from={name}: {self.model} has {', '.join(self.layers)}")
        first = self.layers.index(name) if name else 0
        for parameter, tensor in self.network.named_parameters():
            tensor.requires_grad_(self.layers.index(_layer(parameter)) >= first)

    def forward_features(self, x: Tensor) -> Tensor:
        self.network.set_grad_checkpointing(self.grad_checkpointing)
        found = self.network.forward_intermediates(
            x, indices=self.levels, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        last: Tensor = found[-1]
        return last

    def train(self, mode: bool = True) -> "Timm":
        """Always in evaluation mode: batches are small, so BatchNorm keeps its statistics."""
        return super().train(False)


def _timm() -> Any:
    try:
        return import_module("timm")
    except ImportError as error:
        raise UserError("the backbone timm needs the package timm: pip install timm") from error


def _created(model: str, **options: Any) -> Any:
    """A network that takes images of any size."""
    for sizes in ({"dynamic_img_size": True}, {}):
        try:
            network = _timm().create_model(model, **sizes, **options)
        except TypeError:  # it knows no such option
            continue
        fixed = network.pretrained_cfg.get("fixed_input_size") and not sizes
        if not fixed:
            return network
        side = network.pretrained_cfg["input_size"][-1]
        raise UserError(f"timm's {model} takes images of {side} px only: choose another")
    raise UserError(f"timm cannot make {model}")


def _refuse_unknown(model: str) -> None:
    """Raises UserError for what is no name of timm's; "hf-hub:…" would fetch what a stranger says."""
    timm = _timm()
    name, _, tag = model.partition(".")
    if not timm.is_model(name):
        like = timm.list_models(f"*{name}*")[:5] or timm.list_models("*resnet50*")[:5]
        raise UserError(f"timm has no network {model}: it has {', '.join(like)} and others")
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{name}.*")]
    if tag and tag not in tags:
        raise UserError(f"timm has no weights {tag} of {name}: choose from {', '.join(tags)}")


def _layer(parameter: str) -> str:
    """The part of a network that a parameter belongs to: its first name, and the number of a block."""
    first, second, *_ = [*parameter.split("."), ""]
    return f"{first}.{second}" if second.isdigit() else first
