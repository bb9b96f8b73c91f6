"""Finds the classifier and the grids of a network of any make, from the shapes and outputs of its submodules."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kd.common.utils.errors import UserError, reason_of
from kd.image_classification.teacher_model.backbones.network import (
    Grid,
    Layout,
    Structure,
    ToMap,
    average_pooled,
    logits_of,
)

MOST_PREFIX = 8  # class, distillation and register tokens
MOST_POOL = 4
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)  # their inputs have more positions
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def find_structure(network: nn.Module, name: str, classes: int, image_size: int) -> Structure:
    """The structure of a network with its classifier. `name` is for messages.

    Raises UserError if it does not take images (batch, 3, image_size, image_size) or does not return logits (batch,
    classes).
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
        trace = _Trace(copy.deepcopy(network).eval(), name, images)
        _check_logits(name, trace.output, classes)
        heads = _find_heads(trace, classes)
        inputs = [trace.inputs[path] for path in heads]
        pooled = torch.cat(inputs, dim=-1) if heads else trace.output
        chain = _grids(trace, image_size)
        last, channels, pool, exact = _find_last(trace, chain, pooled, len(heads))
        if exact:  # and in training, without a dropout in between
            trained = _Trace(copy.deepcopy(network).train(), name, images)
            assert last is not None
            average = average_pooled(ToMap(last)(trained.outputs[last.path]), pool)
            exact = _close(average, torch.cat([trained.inputs[path] for path in heads], dim=-1))
        before = [grid for grid, _ in chain].index(replace(last, relu=False)) + 1 if last else len(chain)
        stages, same_size = _find_stages(trace, chain[:before])
    return Structure(heads, pooled.shape[1], channels, last, pool, exact, stages, same_size)


class _Trace:
    """One forward pass: the logits, and the inputs and outputs of submodules in the order in which they end."""

    def __init__(self, network: nn.Module, name: str, images: Tensor) -> None:
        self.network = network
        self.outputs: dict[str, Any] = {}
        self.inputs: dict[str, Any] = {}
        handles = [m.register_forward_hook(self._recorder(path)) for path, m in network.named_modules() if path]
        try:
            self.output = logits_of(network(images))
        except UserError:
            raise
        except Exception as error:  # of the user's code
            raise UserError(
                f"{name} does not support images of {images.shape[-1]} pixels, {tuple(images.shape)}: "
                f"{type(error).__name__}: {reason_of(error).rstrip('.')}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()

    def _recorder(self, path: str) -> Any:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            self.outputs.pop(path, None)  # a module that is called twice counts as the later call
            self.outputs[path] = output[0] if isinstance(output, tuple) and output else output
            self.inputs[path] = inputs[0] if inputs else None

        return record


def _check_logits(name: str, output: Any, classes: int) -> None:
    if not isinstance(output, Tensor):
        raise UserError(f"{name} returns a {type(output).__name__}, not logits (batch, {classes})")
    if output.dim() != 2 or output.shape[0] != 2:
        raise UserError(f"{name} returns a tensor of shape {tuple(output.shape)} for 2 images, not (2, {classes})")
    if output.shape[1] != classes:
        raise UserError(
            f"{name} returns {output.shape[1]} logits, the data have {classes} classes: pass a network of that many"
        )


def _find_heads(trace: _Trace, classes: int) -> list[str]:
    """The paths of the linear layers whose output, or the mean of whose outputs, is the logits."""
    modules = dict(trace.network.named_modules())
    linear = [
        path
        for path, output in trace.outputs.items()
        if isinstance(modules[path], nn.Linear) and isinstance(output, Tensor) and output.shape == (2, classes)
    ]
    for number in 1, 2:
        chosen = linear[-number:]
        if len(chosen) == number and _close(sum(trace.outputs[path] for path in chosen) / number, trace.output):
            return chosen
    return []


# ---- grids ----


def _grids(trace: _Trace, image_size: int) -> list[tuple[Grid, int]]:
    """The grids along the main path of a network with their sizes, in order: the outputs of its children and, instead
    of a child that only contains others, of their children.
    """
    modules = dict(trace.network.named_modules())
    paths = set(_main_path(trace, ""))
    found = []
    for path, output in trace.outputs.items():
        if path in paths and not isinstance(modules[path], POOLS):
            grid = _as_grid(path, output, image_size)
            if grid is not None:
                found.append(grid)
    return found


def _main_path(trace: _Trace, path: str) -> Iterator[str]:
    for name, child in trace.network.get_submodule(path).named_children():
        inner = f"{path}.{name}" if path else name
        yield inner
        if isinstance(child, CONTAINERS) or not _has_positions(trace.outputs.get(inner)):
            yield from _main_path(trace, inner)


def _has_positions(output: Any) -> bool:
    return isinstance(output, Tensor) and output.dim() in (3, 4)


def _as_grid(path: str, output: Any, image_size: int) -> tuple[Grid, int] | None:
    """An output as a grid, with its size; None if it has no square of positions."""
    if not _has_positions(output):
        return None
    if output.dim() == 4:
        _, a, b, c = output.shape
        layout: Layout | None = "channels first" if b == c else "channels last" if a == b else None
        size = c if layout == "channels first" else a
        return None if layout is None or size < 2 else (Grid(path, layout), size)
    side = int(output.shape[1] ** 0.5)
    prefix = output.shape[1] - side**2
    if side < 2 or prefix > MOST_PREFIX or side > image_size:
        return None
    return Grid(path, "tokens", prefix), side


def _find_last(
    trace: _Trace, chain: list[tuple[Grid, int]], pooled: Tensor, heads: int
) -> tuple[Grid | None, int, int, bool]:
    """The last grid that fits the input `pooled` (batch, width) of the classifiers, its channels, the size that it is
    averaged to, and whether this average is the input.
    """
    width = pooled.shape[1]
    for grid, size in reversed(chain) if heads else []:
        for relu in False, True:
            chosen = replace(grid, relu=relu)
            maps = ToMap(chosen)(trace.outputs[grid.path])
            for pool in range(1, min(MOST_POOL, size) + 1):
                fits = maps.shape[1] * pool**2 == width and size % pool == 0
                if fits and _close(average_pooled(maps, pool), pooled):
                    return chosen, maps.shape[1], pool, True
        maps = ToMap(grid)(trace.outputs[grid.path])
        if maps.shape[1] * heads == width:  # a class token, or a layer after pooling
            return grid, width, 1, False
    return None, width, 1, False


def _find_stages(trace: _Trace, chain: list[tuple[Grid, int]]) -> tuple[list[Grid], bool]:
    """The last grid of each size or, if all sizes are equal, the grids of the blocks; and whether they are equal.

    Sizes of layers alone, before the first block, are the stem.
    """
    modules = dict(trace.network.named_modules())

    def is_block(grid: Grid) -> bool:
        return any(True for _ in modules[grid.path].children())

    first = next((i for i, (grid, _) in enumerate(chain) if is_block(grid)), 0)
    sizes = list(dict.fromkeys(size for i, (_, size) in enumerate(chain) if i >= first))
    if len(sizes) > 1:
        return [[grid for grid, other in chain if other == size][-1] for size in sizes], False
    siblings: dict[str, list[Grid]] = {}
    for grid, _ in chain:
        parent, _, name = grid.path.rpartition(".")
        if name.isdigit() and is_block(grid):
            siblings.setdefault(parent, []).append(grid)
    blocks = max(siblings.values(), key=len, default=[grid for grid, _ in chain][-1:])
    return blocks, True


def _close(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, **TOLERANCE)  # type: ignore[arg-type]
