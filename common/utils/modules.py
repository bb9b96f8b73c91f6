"""Imports of modules that the command line names. Files never cause imports."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from kd.common.utils.errors import UserError


def import_named(module: str, purpose: str) -> None:
    """Imports a module, also from the working directory. Raises UserError if there is none, or if it fails.

    Args:
        purpose: what needs it, for the message.
    """
    with working_directory():
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing = error.name or module
            if module == missing or module.startswith(f"{missing}."):
                raise UserError(
                    f"there is no module {module} for {purpose}: run the command in the folder that contains "
                    f"{module.replace('.', '/')}.py, or install its package"
                ) from error
            raise UserError(f"module {module} needs {missing}, which is not installed") from error
        except Exception as error:  # of the module's code
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"module {module} cannot be imported: {reason}") from error


@contextmanager
def working_directory() -> Iterator[None]:
    """Modules of the working directory are importable, after all installed ones."""
    here = os.getcwd()
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)
