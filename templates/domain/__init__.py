import kd.common  # noqa: F401  must be imported before torchvision, which otherwise does not load with a CPU-only torch
