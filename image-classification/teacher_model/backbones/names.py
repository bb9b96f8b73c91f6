"""Names of networks that this project does not define: `timm:NAME`, `transformers:NAME`, `package.module:factory`."""

import re

TIMM, TRANSFORMERS = "timm:", "transformers:"
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_factory(architecture: str) -> bool:
    """Whether the name is `package.module:factory`."""
    return FACTORY.fullmatch(architecture) is not None
