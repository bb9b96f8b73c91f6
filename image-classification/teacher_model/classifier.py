"""An image classifier, teacher or student: backbone, projector (only in SimKD students) and head.

A saved classifier loads in any process that imports this module:

    from kd.image_classification.teacher_model.classifier import ImageClassifier
    model = ImageClassifier.from_pretrained("runs/image-classification/simkd/student")
"""

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.outputs import Outputs
from kd.common.utils.devices import AUTOCAST
from kd.image_classification.teacher_model.backbones import build_backbone, new_network
from kd.image_classification.teacher_model.backbones.base import initialize
from kd.image_classification.teacher_model.backbones.network import NetworkBackbone, average_pooled

Network = TypeVar("Network", bound=nn.Module)


class Projector(nn.Module):
    """Maps (batch, in_channels, h, w) -> (batch, out_channels, h', w') (Chen et al., CVPR 2022, arXiv:2203.14001).

    1x1, 3x3 and 1x1 convolutions with batch norm and `out_channels // factor` channels in between. The convolutions
    have He's normal initialization; the authors' code keeps PyTorch's.

    Args:
        factor: f in the paper. From 256 to 256 channels, 2 adds 214,016 parameters and 8 adds 26,240.
        relu: whether to end with a ReLU, because the teacher's map is the output of one.
        max_size: size of the teacher's map in pixels; larger inputs are first averaged down to it.
    """

    def __init__(
        self, in_channels: int, out_channels: int, factor: int = 2, relu: bool = True, max_size: int | None = None
    ) -> None:
        super().__init__()
        if out_channels % factor:
            raise ValueError(f"a projector factor of {factor} does not divide the teacher's {out_channels} channels")
        middle = out_channels // factor
        self.max_size = max_size
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, middle, 1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, middle, 3, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU() if relu else nn.Identity(),
        )
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        if self.max_size is not None and x.shape[-1] > self.max_size:
            x = F.adaptive_avg_pool2d(x, self.max_size)
        return self.layers(x)


class ImageClassifierConfig(PreTrainedConfig):
    """Configuration of an ImageClassifier.

    architecture: name of a backbone (`resnet8x4`, `timm:resnet18`, `package.module:factory`).
    network: for a network that this project does not define, its `Structure` and, of transformers, its configuration.
    image_size, mean, std: inputs are square images, (pixels between 0 and 1 - `mean`) / `std`.
    projector: arguments of `Projector`, for a student that reuses its teacher's head. As in SimKD, the projector reads
        the map of the last stage, so the backbone has no last 1x1 convolution (`Backbone.last`).
    pool: the map is averaged to pool x pool parts for the head; 1 for a global average.
    bottleneck: arguments of `DiscreteKeyValueBottleneck` except width and outputs; None for a linear head.
    """

    model_type = "image_classifier"
    architecture: str = "resnet8x4"
    network: dict[str, Any] | None = None
    image_size: int = 32
    mean: list[float] | None = None
    std: list[float] | None = None
    projector: dict[str, Any] | None = None
    pool: int = 1
    bottleneck: dict[str, Any] | None = None

    @property
    def label_names(self) -> list[str]:
        """Class names by class id."""
        names: dict[Any, str] = dict(self.id2label or {})
        return [names[i] for i in sorted(names)]


class ImageClassifier(PreTrainedModel):
    """Images (batch, 3, h, w) -> backbone -> [projector] -> average -> head -> logits (batch, labels).

    Features: `map`, the last map, and `pooled`, its average, which is the head's input. The trained module is the one
    that is evaluated, saved and exported.
    """

    config_class = ImageClassifierConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"

    def __init__(self, config: ImageClassifierConfig) -> None:
        super().__init__(config)
        classes = len(config.id2label or {})
        self.backbone = build_backbone(config.architecture, config.network, config.image_size, classes)
        if config.projector:
            self.backbone.remove_last()
        width = self.backbone.num_features
        self.projector = None
        if config.projector:
            self.projector = Projector(width, **config.projector)
            width = config.projector["out_channels"]
        width *= config.pool**2
        self.head: nn.Module
        if config.bottleneck:
            self.head = DiscreteKeyValueBottleneck(width, classes, **config.bottleneck)
        elif config.network and not config.network["heads"] and not config.projector:
            self.head = nn.Identity()  # the features are the network's logits
        else:
            self.head = nn.Linear(width, classes)
            self.backbone.initialize_head(self.head)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: constructors initialize all parts, and every checkpoint is complete."""

    def forward(
        self, pixel_values: Tensor | None = None, codes: Tensor | None = None, return_dict: bool | None = None
    ) -> Outputs:
        """Logits and features of images, or logits of a bottleneck's codes (batch, codebooks)."""
        if codes is not None:
            return Outputs(logits=self.bottleneck.decode(codes), features={})
        if pixel_values is None:
            raise ValueError("ImageClassifier needs pixel_values, or codes for its bottleneck")
        features = self.last_map(pixel_values)
        pooled = average_pooled(features, self.config.pool)  # (batch, channels * pool²)
        return Outputs(logits=self.head(pooled), features={"map": features, "pooled": pooled})

    @property
    def bottleneck(self) -> DiscreteKeyValueBottleneck:
        """The head, which must be a bottleneck."""
        assert isinstance(self.head, DiscreteKeyValueBottleneck), "the head is linear"
        return self.head

    @torch.no_grad()
    def embed(self, pixel_values: Tensor) -> Tensor:
        """Pooled features (batch, channels * pool²), the input of the head, in fp32."""
        return average_pooled(self.last_map(pixel_values), self.config.pool).float()

    def last_map(self, pixel_values: Tensor) -> Tensor:
        """The map (batch, channels, h', w') whose average is the head's input."""
        # Always channels_last, because the kernels of the two memory formats round differently.
        features = self.backbone(pixel_values.contiguous(memory_format=torch.channels_last))
        return features if self.projector is None else self.projector(features)


def new_classifier(architecture: str, data_config: dict[str, Any], **parts: Any) -> ImageClassifier:
    """A classifier with random weights. `data_config`: `ImageData.config` of the training images."""
    size, classes = data_config.get("image_size", ImageClassifierConfig.image_size), data_config.get("id2label", {})
    network = new_network(architecture, size, len(classes))
    if network is not None:
        parts = {"network": network, "pool": network["pool"]} | parts
    return ImageClassifier(ImageClassifierConfig(architecture=architecture, **data_config, **parts))


AutoConfig.register(ImageClassifierConfig.model_type, ImageClassifierConfig)
AutoModelForImageClassification.register(ImageClassifierConfig, ImageClassifier)


# ---- inference ----


def frozen(teacher: Network, precision: str) -> Network:
    """A frozen copy for fast inference: channels_last, bf16 or fp16 if that is the precision, and batch norms folded
    into the convolutions before them.
    """
    teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
    dtype = AUTOCAST.get(precision, torch.float32)
    for model in [module for module in teacher.modules() if isinstance(module, ImageClassifier)]:
        for part in filter(None, (model.backbone, model.projector)):
            is_foreign = isinstance(part, NetworkBackbone)
            _fold_batch_norms(part.network if isinstance(part, NetworkBackbone) else part)
            # Networks of other projects may compute in types that bf16 weights do not fit; autocast casts these.
            part.to(dtype=torch.float32 if is_foreign else dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return teacher


def _fold_batch_norms(model: nn.Module) -> None:
    """Folds batch norms into the convolutions that they follow: the same function with half the layers.

    Submodules keep their paths. A model that cannot be traced is left unchanged.
    """
    for conv_path, norm_path in _conv_norm_paths(model):
        conv, norm = model.get_submodule(conv_path), model.get_submodule(norm_path)
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        model.set_submodule(conv_path, fuse_conv_bn_eval(conv, norm))
        model.set_submodule(norm_path, nn.Identity())


def _conv_norm_paths(model: nn.Module) -> list[tuple[str, str]]:
    """Pairs of a convolution and the batch norm that is the only reader of its output, from the traced graph."""
    try:
        graph = fx.symbolic_trace(model).graph
    except (fx.proxy.TraceError, TypeError, RuntimeError, AttributeError, NotImplementedError):
        return []
    modules = dict(model.named_modules())
    paths = []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if (
            isinstance(before, fx.Node)
            and before.op == "call_module"
            and len(before.users) == 1
            and type(modules[str(node.target)]) is nn.BatchNorm2d
            and type(modules[str(before.target)]) is nn.Conv2d
        ):
            paths.append((str(before.target), str(node.target)))
    return paths
