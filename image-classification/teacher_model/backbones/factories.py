"""Networks that this project does not define, with their classifiers: of a user's module, timm or transformers.

package.module:factory           a class or function of a module
timm:NAME, timm:NAME:key=value   timm's network NAME, with arguments of that network
transformers:NAME                an image classifier of transformers, with the configuration of a folder or Hub name
"""

import ast
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from kd.common.data.readers import reason_of
from kd.common.pretrained import reading
from kd.common.utils.errors import UserError
from kd.common.utils.modules import import_named

TIMM, TRANSFORMERS = "timm:", "transformers:"
NOT_OF_THE_NETWORK = {  # arguments of timm.create_model that load weights or files
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path", "cache_dir"),
    *("num_classes", "img_size", "scriptable", "exportable", "no_jit"),
}
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
CLASSES = ("num_classes", "n_classes", "classes", "num_labels")  # parameters of a factory, by their usual names
SIZES = ("image_size", "img_size", "input_size")


def build_network(name: str, classes: int, image_size: int, config: dict[str, Any] | None = None) -> nn.Module:
    """The network NAME with random weights and its classifier. `config`: of a network of transformers.

    Parameters are real tensors, also while transformers builds models on the meta device.
    """
    with torch.device("cpu"):
        if name.startswith(TIMM):
            return timm_network(name, classes, image_size)
        if name.startswith(TRANSFORMERS):
            settings = AutoConfig.for_model(**(config or {}))
            return AutoModelForImageClassification.from_config(settings, trust_remote_code=False)
        return call_factory(name, classes, image_size)


# ---- timm and transformers ----


def timm_arguments(name: str) -> tuple[str, dict[str, Any]]:
    """`timm:NAME:key=value:...` -> NAME, {key: value}."""
    network, *words = name.removeprefix(TIMM).split(":")
    if words and not timm.is_model(network.partition(".")[0]):
        raise UserError(f"timm has no model {network!r}")
    arguments = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key.isidentifier() or not equals or key in NOT_OF_THE_NETWORK:
            raise UserError(f"{name} has {word!r}: pass arguments of timm's network as {TIMM}{network}:key=value")
        try:
            arguments[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            arguments[key] = value
    return network, arguments


def timm_network(name: str, classes: int, image_size: int, **options: Any) -> nn.Module:
    """`timm:NAME` for images of this size. Raises UserError if timm cannot build it."""
    network, arguments = timm_arguments(name)
    arguments = {"num_classes": classes} | options | arguments
    try:
        try:
            return timm.create_model(network, img_size=image_size, **arguments)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            return timm.create_model(network, **arguments)  # takes images of any size
    except UserError:
        raise
    except Exception as error:  # timm checks arguments with asserts, and modules raise others
        raise UserError(
            f"timm cannot build {name} for images of {image_size} pixels ({_in_one_line(error)}): pass another "
            f"--image_size, or arguments such as {TIMM}{network}:patch_size=4"
        ) from error


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


def is_factory(architecture: str) -> bool:
    """Whether the name is `package.module:factory`."""
    return FACTORY.fullmatch(architecture) is not None


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
        raise UserError(f"{architecture} cannot be built: {_in_one_line(error)}") from error
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


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {reason_of(error).rstrip('.')}"
