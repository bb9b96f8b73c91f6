"""The core that all domains share. It imports no domain and contains no dataset."""

from kd.common.utils.startup import declare_operators_before_torchvision, prepare_script

prepare_script()
declare_operators_before_torchvision()
