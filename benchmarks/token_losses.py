"""Memory and time of the objective of language models over a large vocabulary: in chunks of positions, and at once.

    python benchmarks/token_losses.py
    python benchmarks/token_losses.py --methods kd tv --positions 1024 --dense_positions 1024 --vocabulary 50257

The objective is the sum of the labels' cross-entropy and a divergence. Each run is a separate process: it creates the
logits of student and teacher, computes loss and gradient, and reports the increase of its peak resident memory. So the
gradient counts and the two tensors do not. At once, the default shape needs more memory than most machines have:
therefore that loss runs on `--dense_positions`, and the last column scales its memory to all positions.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from kd.common import token_terms
from kd.common.outputs import Outputs
from kd.nlp.student_model.token_objective import divergence_of, token_level

MIB = 2**20


def measure(method: str, at_once: bool, positions: int, vocabulary: int, dtype: torch.dtype) -> dict[str, float]:
    objective = token_level(0.5, divergence_of(method, 2.0)).objective
    if at_once:
        token_terms.CHUNK = sys.maxsize
    torch.manual_seed(0)
    step(objective, *logits_and_labels(2, 8, dtype))  # one-time allocations of libraries
    student, teacher, labels = logits_and_labels(positions, vocabulary, dtype)
    before, started = peak(), time.perf_counter()
    step(objective, student, teacher, labels)
    return {"mib": peak() - before, "seconds": time.perf_counter() - started}


def logits_and_labels(positions: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """They are filled in place, so that the peak before the step is their size."""
    student, teacher = (torch.empty(1, positions, vocabulary, dtype=dtype).normal_(0, 3) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(vocabulary, (1, positions))


def step(objective: torch.nn.Module, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> None:
    parts = objective(Outputs(logits=student), Outputs(logits=teacher), labels)
    torch.stack(list(parts.values())).sum().backward()


def peak() -> float:
    """Peak resident memory in MiB. Linux counts ru_maxrss in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["kd", "js", "abkd"], help="Values of --method to measure.")
    parser.add_argument("--positions", type=int, default=4096, help="Number of positions.")
    parser.add_argument("--dense_positions", type=int, default=512, help="Number of positions of the loss at once.")
    parser.add_argument("--vocabulary", type=int, default=152_000, help="Number of tokens of the vocabulary.")
    parser.add_argument("--dtype", default="bfloat16", help="Data type of the logits.")
    parser.add_argument("--side", choices=["chunks", "at_once"], help="Run one side and print JSON (internal).")
    args = parser.parse_args()
    positions = {"chunks": args.positions, "at_once": args.dense_positions}
    if args.side:
        settings = args.side == "at_once", positions[args.side], args.vocabulary, getattr(torch, args.dtype)
        print(json.dumps(measure(args.methods[0], *settings)))
        return
    size = torch.empty(0, dtype=getattr(torch, args.dtype)).element_size() * args.vocabulary / MIB
    shape = f"{args.positions} positions, {args.vocabulary} tokens, {args.dtype}"
    print(f"{shape}: {args.positions * size:.0f} MiB a tensor")
    print("| method | loss | positions | peak MiB | of them gradient | ms per position | peak MiB at all positions |")
    print("|---|---|---|---|---|---|---|")
    for method in args.methods:
        for side, n in positions.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--methods", method]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            total = found["mib"] * args.positions / n
            print(
                f"| {method} | {side.replace('_', ' ')} | {n} | {found['mib']:.0f} | {n * size:.0f} "
                f"| {1000 * found['seconds'] / n:.1f} | {total:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
