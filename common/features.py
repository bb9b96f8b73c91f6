"""Named features of any model, by forward hooks."""

from typing import Any

from torch import Tensor, nn


class FeatureHooks:
    """Records the outputs of submodules by name: `FeatureHooks(bert, {"layer_2": "encoder.layer.1"})`.

    Call the model, then `take()` the features of that call. Raises ValueError for a path that the model lacks.
    """

    def __init__(self, model: nn.Module, paths: dict[str, str]) -> None:
        modules = dict(model.named_modules())
        missing = [path for path in paths.values() if path not in modules]
        if missing:
            raise ValueError(f"{type(model).__name__} has no submodule {', '.join(missing)}")
        self._features: dict[str, Tensor] = {}
        self._handles = [modules[path].register_forward_hook(self._recorder(name)) for name, path in paths.items()]

    def _recorder(self, name: str) -> Any:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            self._features[name] = output[0] if isinstance(output, tuple) else output

        return record

    def take(self) -> dict[str, Tensor]:
        """The features of the last call, which are then forgotten, so that no graph is kept alive."""
        features, self._features = self._features, {}
        return features

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
