"""What a script checks of how it was started, before it does anything."""

import os
import sys

from kd.common.utils.errors import UserError


def require_single_process() -> None:
    """Raises UserError in one of several processes, as of torchrun."""
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    if processes > 1:
        raise UserError(
            f"policies are trained and evaluated in one process, not in {processes}: start the script with python "
            "instead of torchrun or accelerate launch"
        )


def require_module_on_command_line(environment: str, where: str) -> None:
    """Raises UserError where a file, `where`, names an environment as `module:id`, and the command line does not:
    importing the module runs its code.
    """
    module, _, id = environment.rpartition(":")
    if module and not any(environment in word for word in sys.argv[1:]):
        raise UserError(
            f"{where} names the environment {environment}, and importing {module} would run its code: pass "
            f"--environment {environment} if you trust it, or the registered {id} alone"
        )
