"""Errors that users read, and the ways a script ends: normally, with one line on stderr, or interrupted."""

import errno
import gc
import json
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tqdm import tqdm

from kd.common.utils.startup import exit_on_interrupt

OUT_OF_MEMORY = "out of memory: pass a smaller batch size or model"
PICKLE = "a file of weights is damaged or contains a pickle that would run code, which is not loaded"
# Errors of the operating system that explain an exception which another library raised while it handled them.
SYSTEM_ERRORS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENOMEM", "EMFILE", "ENFILE", "EIO", "ENAMETOOLONG")
    if hasattr(errno, name)
}
MESSAGES = {  # part of the message of a library that is not written in Python -> message for the user
    "No space left on device": "no space left on the disk",
    "Disk quota exceeded": "the disk quota is exceeded",
    "database or disk is full": "no space left on the disk",
    "unexpected pos": "a file could not be written completely: is the disk full?",
    "file write failed": "a file could not be written completely: is the disk full?",
    "Read-only file system": "the file system is read-only",
    "readonly database": "the file system is read-only",
    "unable to open database file": "a database cannot be opened or written",
    "Too many open files": "too many open files: raise the limit (ulimit -n)",
    "can't allocate memory": OUT_OF_MEMORY,
    "Cannot allocate memory": OUT_OF_MEMORY,
    "out of memory": OUT_OF_MEMORY,
    "DataLoader worker (pid": "a process that loads data was killed, probably because the memory is full: pass "
    "--dataloader_num_workers 0",
}
MAX_REASON = 300  # characters of a parser's message, which may quote a whole row
PATIENCE = 5.0  # seconds that processes of rank > 0 wait for torchrun to end them before they print their error
RECIPES = ("recipe.yaml", "*/recipe.yaml", "*/*/*/recipe.yaml")  # in the folder of a run, a seed run, or a GLUE system
parsed: list[Any] = []  # the arguments of the running script


class UserError(Exception):
    """Bad input: one line that states what is wrong and how to fix it. Scripts print it and exit with code 2."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a program in the same way as Ctrl-C."""


# ---- one line for an exception ----


def reason_of(error: Exception) -> str:
    """The message of an exception in one line of bounded length."""
    reason = (
        getattr(error, "strerror", None)
        or getattr(error, "msg", None)
        or " ".join(str(error).split())
        or type(error).__name__
    )
    return reason if len(reason) <= MAX_REASON else reason[:MAX_REASON] + " ..."


def explained(error: BaseException) -> str | None:
    """A one-line message for the user, or None for an exception that points to a bug."""
    for cause in _causes(error):
        if isinstance(cause, UserError) and cause is error:
            return _message(cause)
        if isinstance(cause, MemoryError):
            return OUT_OF_MEMORY
        if isinstance(cause, pickle.UnpicklingError):
            return f"{PICKLE}: save the model again, as safetensors" if "Weights only" in str(cause) else None
        if isinstance(cause, OSError) and (cause is error or cause.errno in SYSTEM_ERRORS):
            place = " -> ".join(str(name) for name in (cause.filename, cause.filename2) if name is not None)
            return f"{place}: {cause.strerror}" if place and cause.strerror else cause.strerror or _message(cause)
        known = next((line for message, line in MESSAGES.items() if message in str(cause)), None)
        if known is not None:
            return known
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, the exception it was raised from, and so on."""
    visited: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in visited:
        visited.add(id(cause))
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _message(error: BaseException) -> str:
    """An exception's message. If a data-loading process raised it, the line after the traceback."""
    text = str(error).strip()
    if text.startswith("Caught ") and "Traceback (most recent call last)" in text:
        return text.splitlines()[-1].partition(": ")[2]
    return text or type(error).__name__


# ---- the end of a script ----


def fail(message: str) -> NoReturn:
    """Prints one line on stderr and exits with code 2. If several processes fail for the same reason, only rank 0
    prints the line, and torchrun ends the others.
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
    """Calls a script's main and turns expected errors into one line on stderr.

    Exit codes: 2 for a UserError, an operating system error and insufficient memory, 130 for Ctrl-C, 143 for SIGTERM.
    A closed pipe (`| head`) is not an error.
    """
    for stream in (sys.stdout, sys.stderr):
        if not (stream.encoding or "").lower().startswith("utf") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an ASCII terminal has no ±
    if "transformers" in sys.modules:
        from transformers import dynamic_module_utils

        dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # no prompt whether to run code that comes with a model
    if signal.getsignal(signal.SIGINT) is exit_on_interrupt:  # everything is imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
        gc.freeze()  # accelerate collects garbage around each training: the imported modules would take it 0.5 s
    parsed.clear()
    before, main_process = signal.getsignal(signal.SIGTERM), os.getpid()
    _on_sigterm(lambda *_: _terminate(main_process))
    try:
        _main_or_one_line(main)
    except KeyboardInterrupt as interrupt:  # including one that arrives while an error is printed
        by_sigterm = isinstance(interrupt, Terminated)
        # Rank 0 prints a line, unless torchrun ended it because another process failed.
        if os.environ.get("RANK", "0") == "0" and not (by_sigterm and "TORCHELASTIC_RUN_ID" in os.environ):
            _print_error("interrupted" + _resume_hint())
        sys.exit(143 if by_sigterm else 130)
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
        sys.exit(141)  # the exit code that shells report for a program ended by SIGPIPE
    except Exception as error:
        line = explained(error)
        if line is None:
            raise
        fail(line)


def _resume_hint() -> str:
    """A hint for continuing an interrupted run; empty if it has not started or its script cannot continue it."""
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
        pass  # not in the main thread, or the handler was not set from Python


def _print_error(line: str) -> None:
    for bar in list(getattr(tqdm, "_instances", ())):  # an open bar would precede the line
        bar.close()
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        _detach(sys.stderr)


def _detach(stream: Any) -> None:
    """Redirects a stream whose reader is gone to the null device. Otherwise Python reports an error at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ---- Ctrl-C ----


@contextmanager
def recording_interrupts() -> Iterator[threading.Event]:
    """Yields an event that Ctrl-C sets. KeyboardInterrupt is raised as usual, and again at the end of the block if it
    was dropped. Other threads and programs with another handler are unaffected.

    Python drops a KeyboardInterrupt that is raised in a finalizer or in a callback of a C library, and the program
    continues.
    """
    pressed = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        pressed.set()
        signal.default_int_handler(number, frame)

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield pressed
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield pressed
        if pressed.is_set():
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
