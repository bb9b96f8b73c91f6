"""Memory and time of the nearest-key search in blocks, compared with computing all distances at once.

    python benchmarks/nearest_keys.py
    python benchmarks/nearest_keys.py --codebooks 64 --codebook_size 4096 --key_dim 12 --rows 16384

Each search runs in a separate process and reports the increase of its peak resident memory. All distances of the
default shape (32 texts of 512 tokens, 64 codebooks of 4,096 keys) would need 17 GB. Therefore the naive search runs on
`--naive_rows` rows, and the last column extrapolates its memory to all rows.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from kd.common.bottleneck.keys import nearest_keys


def naive(heads: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return torch.cdist(heads.transpose(0, 1), keys).argmin(-1).T  # (codebooks, rows, codebook_size) at once


def measure(side: str, codebooks: int, codebook_size: int, key_dim: int, rows: int) -> dict[str, float]:
    torch.manual_seed(0)
    heads, keys = torch.randn(rows, codebooks, key_dim), torch.randn(codebooks, codebook_size, key_dim)
    search = {"blocks": nearest_keys, "naive": naive}[side]
    search(heads[:2], keys)  # one-time allocations of libraries
    before, started = _peak(), time.perf_counter()
    search(heads, keys)
    return {"mib": _peak() - before, "seconds": time.perf_counter() - started}


def _peak() -> float:
    """Peak resident memory in MiB. Linux counts ru_maxrss in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codebooks", type=int, default=64, help="Number of codebooks.")
    parser.add_argument("--codebook_size", type=int, default=4096, help="Number of keys per codebook.")
    parser.add_argument("--key_dim", type=int, default=12, help="Width of a key.")
    parser.add_argument("--rows", type=int, default=32 * 512, help="Number of embeddings: texts times tokens.")
    parser.add_argument("--naive_rows", type=int, default=2048, help="Number of embeddings of the naive search.")
    parser.add_argument("--side", choices=["blocks", "naive"], help="Run one search and print JSON (internal).")
    args = parser.parse_args()
    rows = {"blocks": args.rows, "naive": args.naive_rows}
    if args.side:
        print(json.dumps(measure(args.side, args.codebooks, args.codebook_size, args.key_dim, rows[args.side])))
        return
    print(f"C = {args.codebooks}, K = {args.codebook_size}, key width {args.key_dim}, {args.rows} rows")
    print("| search | rows | peak MiB | ms per 1,000 rows | peak MiB at all rows |\n|---|---|---|---|---|")
    for side, n in rows.items():
        command = [sys.executable, *sys.argv, "--side", side]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        total = found["mib"] * (args.rows / n if side == "naive" else 1)
        print(f"| {side} | {n} | {found['mib']:.0f} | {1e6 * found['seconds'] / n:.0f} | {total:.0f} |")


if __name__ == "__main__":
    main()
