import kd.common  # noqa: F401  import it before torchvision, which a CPU-only torch cannot load alone
