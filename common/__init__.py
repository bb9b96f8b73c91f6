"""The core that all domains share. It imports no domain and knows no dataset."""

from kd.common.utils.startup import declare_missing_operators, handle_interrupts_while_importing

handle_interrupts_while_importing()
declare_missing_operators()
