"""The core that all domains share. It imports no domain and knows no dataset."""

from common.utils.torchvision_shim import declare_missing_operators

declare_missing_operators()
