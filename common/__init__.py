"""The core that all domains share. It imports no domain and knows no dataset."""

from kd.common.utils.startup import declare_missing_operators, prepare_script

prepare_script()
declare_missing_operators()
