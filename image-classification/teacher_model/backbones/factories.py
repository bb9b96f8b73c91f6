"""Networks that this project does not define, with their classifiers: of a user's module, timm or transformers.

package.module:factory           a class or function of a module
timm:NAME, timm:NAME:key=value   timm's network NAME, with arguments of that network
transformers:NAME                an image classifier of transformers, with the configuration of a folder or Hub name
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from kd.common.pretrained import reading
from kd.common.utils.errors import UserError, reason_of
from kd.common.utils.modules import import_named
from kd.image_classification.teacher_model.backbones.names import TIMM, TRANSFORMERS

CLASSES = ("num_classes", "n_classes", "classes", "num_labels")  # parameters of a factory, by their usual names
SIZES = ("image_size", "img_size", "input_size")


def build_network(name: str, classes: int, image_size: int, config: dict[str, Any] | None = None) -> nn.Module:
    """The network NAME with random weights and its classifier. `config`: of a network of transformers.

    Parameters are real tensors, also while transformers builds models on the meta device.
    """
    with torch.device("cpu"):
        if name.startswith(TIMM):
            from kd.image_classification.teacher_model.backbones.timm_networks import timm_network

            return timm_network(name, classes, image_size)
        if name.startswith(TRANSFORMERS):
            settings = AutoConfig.for_model(**(config or {}))
            return AutoModelForImageClassification.from_config(settings, trust_remote_code=False)
        return call_factory(name, classes, image_size)


# ---- transformers ----


def transformers_config(name: str, classes: int, image_size: int) -> dict[str, Any]:
    """The configuration of `transformers:NAME` for a network with random weights for this data."""
    source = name.removeprefix(TRANSFORMERS)
    with reading(source, "an image classifier of transformers"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if type(config) not in AutoModelForImageClassification._model_mapping:
        raise UserError(f"{source} is a {config.model_type}, which transformers has no image classifier for")
    config.num_labels = classes
    if hasattr(config, "image_size"):
        config.image_size = image_size
    values: dict[str, Any] = config.to_dict()
    return values


# ---- a user's module ----


def import_factory(architecture: str) -> None:
    """Imports the module of `package.module:factory`, which the command line names, also from the working directory.

    Raises UserError if there is no such module. Files do not cause imports: `call_factory` needs an imported module.
    """
    import_named(architecture.partition(":")[0], architecture)


def call_factory(architecture: str, classes: int, image_size: int) -> nn.Module:
    """Builds the network of `package.module:factory`, for a class or a function that returns an nn.Module.

    The factory is called without arguments, except for the number of classes and the image size if it has parameters
    for them (`num_classes`, `image_size` or similar). Raises UserError if it fails or is not imported.
    """
    module, _, attribute = architecture.partition(":")
    if module not in sys.modules:
        raise UserError(
            f"the network {architecture} is defined in module {module}: pass --import_module {module}, or import it "
            "in Python; files cause no imports"
        )
    factory: Any = sys.modules[module]
    for name in attribute.split("."):
        if not hasattr(factory, name):
            raise UserError(f"module {module} has no {attribute}: pass {module}:NAME with a class or function of it")
        factory = getattr(factory, name)
    if not callable(factory) or isinstance(factory, nn.Module):
        raise UserError(f"{architecture} is a {type(factory).__name__}: pass a class or a function that returns one")
    try:
        network = factory(**_arguments(factory, classes, image_size))
    except Exception as error:  # of the user's code
        raise UserError(f"{architecture} cannot be built: {in_one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{architecture} returns a {type(network).__name__}, not a torch.nn.Module")
    return network


def _arguments(factory: Callable[..., Any], classes: int, image_size: int) -> dict[str, int]:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # of a class written in C
        return {}
    names: dict[str, int] = {}
    for known, value in (CLASSES, classes), (SIZES, image_size):
        names |= {name: value for name in known if name in parameters}
    return names


def in_one_line(error: Exception) -> str:
    """The type and the message of an exception in one line of bounded length."""
    return f"{type(error).__name__}: {reason_of(error).rstrip('.')}"
