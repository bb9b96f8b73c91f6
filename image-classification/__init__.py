import kd.common  # noqa: F401  lets torchvision load with a CPU-only torch, before anything here imports it
