"""benchmarks/gpu.py on a CPU: packed images, and all parts with only the packages of a GPU machine."""

import importlib
import json
import os
import re
import subprocess
import sys
import zipfile
import zlib

import pytest
import torch

from kd_testing.image_files import in_colour, small
from kd_testing.paths import REPO

SCRIPT = REPO / "benchmarks" / "gpu.py"
# What requirements.txt installs and a machine with torch, numpy, safetensors, transformers and accelerate may lack.
ABSENT = (
    "einops datasets torchvision timm pandas scipy PIL pyarrow sklearn pydantic rich matplotlib gymnasium tensorboard "
    "stable_baselines3 optuna sentence_transformers"
).split()
RUN_WITHOUT = f"""
import runpy, sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and name in {ABSENT!r}:
            path = [place for place in sys.path if place.endswith(".zip")]
        return super().find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
sys.argv = sys.argv[1:]
sys.path[0] = {str(SCRIPT.parent)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def packing():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield importlib.import_module("packed_images")


def gradients(images: int, size: int) -> torch.Tensor:
    """Images with a color gradient, some noise, and values at both ends of the range."""
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randint(-12, 13, (images, 1, 1, 3, 2), generator=generator)
    down, across = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    values = 128 + slopes[..., 0] * down[None, :, :, None] + slopes[..., 1] * across[None, :, :, None]
    noise = torch.randint(-3, 4, values.shape, generator=generator)
    return (values + noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(("images", "size"), [(64, 12), (3, 5), (1, 1)])
def test_packed_images_come_back_unchanged(packing, images, size):
    pixels = gradients(images, size)
    packed = packing.pack(pixels)
    assert torch.equal(packing.unpack(packed, torch.device("cpu")), pixels)


def test_noise_comes_back_unchanged(packing):
    pixels = torch.randint(256, (50, 8, 8, 3), dtype=torch.uint8)
    assert torch.equal(packing.unpack(packing.pack(pixels), torch.device("cpu")), pixels)


def test_packed_images_are_smaller_than_png_like_compression(packing):
    pixels = gradients(512, 16)
    differences = pixels.clone()
    differences[:, :, 1:] -= pixels[:, :, :-1]  # the filter "sub" of PNG
    compressed = len(zlib.compress(differences.numpy().tobytes(), 9))
    assert sum(tensor.nbytes for tensor in packing.pack(pixels).values()) < 0.9 * compressed


def run_script(*flags: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", code] if code else []), str(SCRIPT), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_the_written_files_hold_the_dataset(packing, tmp_path, capsys):
    folder, gpu = tmp_path / "packed", importlib.import_module("gpu")
    source = in_colour(tmp_path / "data")
    gpu.write_data(folder, source)
    assert re.findall(r"(\d+) images", capsys.readouterr().out) == ["36", "36"]
    read = importlib.import_module("gpu_parts").read_packed([folder / name for name in gpu.FILES])
    data = small(source, validation_share=0)
    assert (read.label_names, read.mean, read.std, read.size) == (data.label_names, data.mean, data.std, data.size)
    for split, images in data.splits.items():
        assert torch.equal(read.splits[split].pixels, images.pixels)
        assert torch.equal(read.splits[split].labels, images.labels)


@pytest.mark.slow
def test_dry_run_needs_only_the_packages_of_a_gpu_machine(tmp_path):
    folder, output = tmp_path / "packed", tmp_path / "gpu.json"
    written = run_script("--write_data", folder, "--dataset", in_colour(tmp_path / "data"))
    assert written.returncode == 0, written.stderr
    assert all(name.startswith("einops/") for name in zipfile.ZipFile(folder / "einops.zip").namelist())
    flags = ["--dry_run", "--data", folder, "--output", output, "--batch_size", 2, "--teacher", "resnet8",
             "--student", "resnet8", "--skip", "compiled"]  # fmt: skip
    done = run_script(*flags, code=RUN_WITHOUT)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert list(results) == ["about", "data", "agreement", "speed", "teacher", "control", "kd", "simkd_control",
                             "simkd", "compiled"]  # fmt: skip
    assert results["agreement"]["agree"] and results["compiled"] == {"skipped": "--skip"}
    assert {row.split(",")[0] for row in results["speed"] if "," in row} == {"plain", "trainer", "graph"}
    assert all(0 <= results[name]["test_accuracy"] <= 1 for name in ("teacher", "control", "kd", "simkd"))


@pytest.mark.slow
def test_parts_without_time_are_skipped(tmp_path):
    output = tmp_path / "gpu.json"
    done = run_script("--dry_run", "--minutes", 1e-6, "--output", output)
    assert done.returncode == 1  # not even the data were read
    assert "skipped" in json.loads(output.read_text())["data"]


def test_missing_files_are_one_line(tmp_path):
    done = run_script("--data", tmp_path)
    assert done.returncode == 2 and "--write_data" in done.stderr and len(done.stderr.splitlines()) == 1
