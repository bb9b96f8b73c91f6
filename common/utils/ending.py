"""How a script ends: normally, with one line on stderr, or interrupted."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from kd.common.utils.errors import explained
from kd.common.utils.startup import exit_on_interrupt

PATIENCE = 5.0  # seconds that a process other than the first waits to be terminated before it prints its error
RECIPES = ("recipe.yaml", "*/recipe.yaml", "*/*/*/recipe.yaml")  # of a run, of one run a seed, of GLUE's cells
parsed: list[Any] = []  # the arguments of the running script


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a program as Ctrl-C does."""


def fail(message: str) -> NoReturn:
    """Ends the program as bad input does: one line on stderr, exit code 2. Of several processes that refuse the same
    input, only the first prints it; torchrun ends the others.
    """
    line = "error: " + " ".join(message.split())
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun's summary then names the reason
        report = json.dumps({"message": line, "timestamp": int(time.time())})
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(report, encoding="utf-8")
    if os.environ.get("RANK", "0") != "0":
        _on_sigterm(signal.SIG_DFL)
        time.sleep(PATIENCE)
    _print_error(line)
    sys.exit(2)


def run(main: Callable[[], None]) -> None:
    """Calls a script's main. A UserError, a fault of the operating system and too little memory are one line and exit
    code 2, Ctrl-C is one line and 130, SIGTERM one line and 143; a closed pipe (`| head`) is no error.
    """
    for stream in (sys.stdout, sys.stderr):
        if not (stream.encoding or "").lower().startswith("utf") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an ASCII terminal has no ±
    if "transformers" in sys.modules:
        from transformers import dynamic_module_utils

        dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # never ask whether to run code that comes with a model
    if signal.getsignal(signal.SIGINT) is exit_on_interrupt:  # everything is imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    parsed.clear()
    before, main_process = signal.getsignal(signal.SIGTERM), os.getpid()
    _on_sigterm(lambda *_: _terminate(main_process))
    try:
        _main_or_one_line(main)
    except KeyboardInterrupt as interrupt:  # also one that arrives while an error is printed
        _end_interrupted(isinstance(interrupt, Terminated))
    finally:
        _on_sigterm(before)


def _main_or_one_line(main: Callable[[], None]) -> None:
    try:
        main()
        if "torch" in sys.modules:
            from kd.common.utils.devices import end_processes

            end_processes()
        sys.stdout.flush()
    except BrokenPipeError as error:
        if error.filename is not None:
            fail(explained(error) or str(error))
        _detach(sys.stdout)
        sys.exit(141)  # as a shell reports a program that SIGPIPE ended
    except Exception as error:
        line = explained(error)
        if line is None:
            raise
        fail(line)


def _end_interrupted(by_sigterm: bool) -> NoReturn:
    """The first process prints a line, unless torchrun ended it because another one failed."""
    if os.environ.get("RANK", "0") == "0" and not (by_sigterm and "TORCHELASTIC_RUN_ID" in os.environ):
        _print_error("interrupted" + _resume_hint())
    sys.exit(143 if by_sigterm else 130)


def _resume_hint() -> str:
    """What continues an interrupted run, where it has begun and its script can continue it."""
    for arguments in parsed:
        folder = getattr(arguments, "output_dir", None)
        if folder and hasattr(arguments, "resume_from_checkpoint"):
            if any(found for pattern in RECIPES for found in Path(folder).glob(pattern)):
                return ": the same command with --resume_from_checkpoint continues the run"
    return ""


def _terminate(main_process: int) -> None:
    if os.getpid() == main_process:
        raise Terminated
    _on_sigterm(signal.SIG_DFL)  # a process that loads data or steps environments ends silently
    os.kill(os.getpid(), signal.SIGTERM)


def _on_sigterm(handler: Any) -> None:
    try:
        signal.signal(signal.SIGTERM, handler)
    except (ValueError, TypeError):
        pass  # signals belong to the main thread; or the handler was not set from Python


def _print_error(line: str) -> None:
    for bar in list(getattr(tqdm, "_instances", ())):  # an open bar would precede the line
        bar.close()
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        _detach(sys.stderr)


def _detach(stream: Any) -> None:
    """Python flushes its streams at exit, and would report one without a reader."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
