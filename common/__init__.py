"""The core that all domains share. It imports no domain and knows no dataset."""

from kd.common.utils.startup import declare_operators_before_torchvision, handle_interrupts_while_importing

handle_interrupts_while_importing()
declare_operators_before_torchvision()
