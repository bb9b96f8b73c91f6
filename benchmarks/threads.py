"""Duration of training steps with several settings of OpenMP: alone, and next to other processes.

    python benchmarks/threads.py
    python benchmarks/threads.py --models bert-384 resnet-32 --seconds 5

Each setting runs in a new process, because OpenMP reads the environment when torch is imported: alone, next to a
process that uses one core without pause (`busy`), and next to a copy of itself (`twice`).
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch  # before kd, so that only the environment below counts
import torch.nn.functional as F
from torch import Tensor, nn

from kd.common.cli import Parser, run
from kd.common.utils.ranges import Range
from kd.image_classification.teacher_model.backbones import build_backbone

SETTINGS = {  # "" is torch's default: as many threads as cores, which wait actively for about a millisecond
    "default": "",
    "spin 10,000": "GOMP_SPINCOUNT=10000",
    "spin 1,000": "GOMP_SPINCOUNT=1000",
    "passive": "OMP_WAIT_POLICY=passive",
    "1 thread": "OMP_NUM_THREADS=1",
}
NEXT_TO = ("alone", "busy", "twice")
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "KMP_BLOCKTIME")
PARSER = Parser(description=__doc__)


def bert(width: int, layers: int, batch: int, tokens: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from transformers import BertConfig, BertForSequenceClassification  # after kd: it imports torchvision

    size = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=1000, num_hidden_layers=layers, **size))
    ids, labels = torch.randint(1000, (batch, tokens)), torch.randint(2, (batch,))
    return model, lambda model: model(input_ids=ids, labels=labels).loss


def resnet(size: int, batch: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    images, targets = torch.randn(batch, 3, size, size), torch.randn(batch, 256)
    model = build_backbone("resnet32x4")
    return model, lambda model: F.mse_loss(model(images).mean((2, 3)), targets)


def policy() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    observations, actions = torch.randn(256, 4), torch.randint(2, (256,))
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    return model, lambda model: F.cross_entropy(model(observations), actions)


MODELS: dict[str, Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]] = {
    "policy 64-64": policy,
    "bert-128": lambda: bert(width=128, layers=4, batch=32, tokens=12),
    "bert-384": lambda: bert(width=384, layers=6, batch=32, tokens=32),
    "resnet-8": lambda: resnet(size=8, batch=64),
    "resnet-32": lambda: resnet(size=32, batch=16),
}
PARSER.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="Models to train.")
PARSER.add_argument("--next_to", nargs="+", default=list(NEXT_TO), choices=NEXT_TO, help="Other processes.")
PARSER.add_argument(
    "--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), help="Settings of OpenMP."
)
PARSER.add_argument("--seconds", type=float, default=3.0, within=Range(0, above=True), help="Seconds for each model.")
PARSER.add_argument("--measure", action="store_true", help="Measure in this process and print JSON (internal).")


def milliseconds(name: str, seconds: float) -> float:
    """The mean duration of a step: forward, backward and Adam."""
    model, loss = MODELS[name]()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    steps, started = -1, time.perf_counter()  # the first step does not count
    while steps < 1 or time.perf_counter() - started < seconds:
        if steps == 0:
            started = time.perf_counter()
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        steps += 1
    return 1000 * (time.perf_counter() - started) / steps


def measure(models: list[str], setting: str, next_to: str, seconds: float) -> dict[str, float]:
    """Milliseconds of a step of each model, in a new process; the mean over the processes of `twice`."""
    name, _, value = SETTINGS[setting].partition("=")
    environment = {key: text for key, text in os.environ.items() if key not in VARIABLES} | (
        {name: value} if name else {}
    )
    command = [sys.executable, __file__, "--measure", "--seconds", str(seconds), "--models", *models]
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"])] if next_to == "busy" else []
    try:
        processes = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            for _ in range(1 + (next_to == "twice"))
        ]
        found = [json.loads(process.communicate()[0]) for process in processes]
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return {model: sum(one[model] for one in found) / len(found) for model in models}


def main() -> None:
    args = PARSER.parse_args()
    if args.measure:
        torch.manual_seed(0)
        print(json.dumps({model: milliseconds(model, args.seconds) for model in args.models}))
        return
    print(f"| ms a step | | {' | '.join(args.settings)} |\n|---|---|{'---|' * len(args.settings)}")
    for next_to in args.next_to:
        found = [measure(args.models, setting, next_to, args.seconds) for setting in args.settings]
        for model in args.models:
            print(f"| {model} | {next_to} | {' | '.join(f'{one[model]:.3g}' for one in found)} |", flush=True)


if __name__ == "__main__":
    run(main)
