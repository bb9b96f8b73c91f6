"""Training steps of gpu.py without a trainer: in fp32 on any device, and as a CUDA graph."""

import copy

import torch
from image_training import DEVICE
from torch import Tensor, nn

from kd.common.methods import Method
from kd.common.outputs import FeatureHooks, Outputs
from kd.common.utils.devices import AUTOCAST
from kd.image_classification.data.views import Views


class Distillation(nn.Module):
    """Student, teacher and objective. The output is the loss of a batch, in fp32 as in KDTrainer."""

    def __init__(self, student: nn.Module, method: Method, teacher: nn.Module, precision: str) -> None:
        super().__init__()
        self.student, self.teacher, self.objective = student, teacher.eval(), method.objective
        self.hooks = FeatureHooks(student, method.features), FeatureHooks(teacher, method.teacher_features)
        self.precision = precision

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        # The cache of casted weights must not outlive the recording of a CUDA graph.
        dtype, enabled = AUTOCAST.get(self.precision, torch.bfloat16), self.precision in AUTOCAST
        with torch.autocast(pixels.device.type, dtype, enabled, cache_enabled=False):
            logits = self.student(pixels).logits
            with torch.no_grad():
                teacher_logits = self.teacher(pixels).logits
        student, teacher = (
            Outputs(logits=one.float(), features={name: feature.float() for name, feature in hooks.take().items()})
            for one, hooks in zip((logits, teacher_logits), self.hooks, strict=True)
        )
        return torch.stack(list(self.objective(student, teacher, labels).values())).sum()

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for part in (self.student, self.objective) for p in part.parameters() if p.requires_grad]


def step_in_fp32(
    student: nn.Module, method: Method, teacher: nn.Module, batch: dict[str, Tensor], device: torch.device
) -> dict[str, list[Tensor]]:
    """The logits in eval mode, and the loss, gradients and weights of a step of SGD, on copies of the networks."""
    student, method, teacher = copy.deepcopy((student, method, teacher))
    distillation = Distillation(student, method, teacher, "fp32").to(device)
    pixels, labels = batch["pixel_values"].to(device), batch["labels"].to(device)
    with torch.no_grad():
        logits = student.eval()(pixels).logits
    student.train()
    loss = distillation(pixels, labels)
    loss.backward()
    trained = [parameter for parameter in distillation.trained if parameter.grad is not None]
    torch.optim.SGD(trained, lr=0.1).step()
    gradients, weights = [parameter.grad for parameter in trained], [parameter.detach() for parameter in trained]
    return {"logits": [logits], "loss": [loss.detach()], "gradients": gradients, "weights": weights}


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest |found - expected| / |expected| of several tensors, with Euclidean norms."""
    pairs = [(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True)]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs)


class GraphStep:
    """A training step, from uint8 images to new weights, that a GPU replays as one CUDA graph. A CPU just runs it."""

    def __init__(
        self, student: nn.Module, method: Method, teacher: nn.Module, views: Views, batch: int, precision: str
    ) -> None:
        student.to(DEVICE, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.distillation = Distillation(student, method, teacher, precision).to(DEVICE)
        self.views, self.rows = views, torch.zeros(batch, dtype=torch.long, device=DEVICE)  # images of the next step
        self.optimizer = torch.optim.SGD(
            self.distillation.trained, 0.05, 0.9, weight_decay=5e-4, nesterov=True, fused=True
        )
        self.graph = self._recorded() if DEVICE.type == "cuda" else None

    def _recorded(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the optimizer creates its state, and the libraries their workspaces
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad(set_to_none=True)  # the recorded gradients are in the memory of the graph
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph

    def _step(self) -> None:
        numbers = torch.randint(self.views.number_of_views, self.rows.shape, device=DEVICE)
        pixels = self.views.normalized(self.views.crop(self.rows, numbers))
        loss = self.distillation(pixels, self.views.labels[self.rows])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def __call__(self, rows: Tensor) -> None:
        """One step on the images `rows` (batch,), each in a random view."""
        self.rows.copy_(rows)
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()
