"""Any convolutional network of timm as a backbone, with or without its pretrained weights."""

import timm
from torch import Tensor, nn

from common.utils.errors import UserError


class TimmBackbone(nn.Module):
    """timm's network without pooling and classifier: (batch, 3, h, w) -> last map (batch, num_features, h', w').

    Raises UserError for a name that timm does not know, or a network whose last features are no map.
    """

    def __init__(self, name: str, pretrained: bool = False) -> None:
        super().__init__()
        if not timm.is_model(name):
            close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
            raise UserError(f"timm knows no model {name!r}" + (f"; it knows {close}, ..." if close else ""))
        self.model = timm.create_model(name, pretrained=pretrained, num_classes=0, global_pool="")
        self.num_features: int = self.model.num_features
        info = getattr(self.model, "feature_info", None) or []
        self.stages = [f"model.{entry['module']}" for entry in info if entry["reduction"] > 2]

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)
