"""Prefixes of names: networks that this project does not define, `timm:NAME`, `transformers:NAME` and
`package.module:factory`, and its trained teachers, `pretrained:NAME`.
"""

import re

TIMM, TRANSFORMERS, PRETRAINED = "timm:", "transformers:", "pretrained:"
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_factory(architecture: str) -> bool:
    """Whether the name is `package.module:factory`."""
    return FACTORY.fullmatch(architecture) is not None and not architecture.startswith(PRETRAINED)
