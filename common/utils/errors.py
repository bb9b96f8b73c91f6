"""Errors that users read: one line that states what is wrong and what would be right."""

import errno
import pickle
from collections.abc import Iterator

OUT_OF_MEMORY = "out of memory: pass a smaller batch size or model"
PICKLE = "a file of weights is damaged or holds a pickle that would run code, which is not loaded"
# Faults of the operating system that explain an exception which another library raised while it handled them.
FAULTS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENOMEM", "EMFILE", "ENFILE", "EIO", "ENAMETOOLONG")
    if hasattr(errno, name)
}
MESSAGES = {  # of libraries that are not written in Python
    "No space left on device": "no space left on the disk",
    "Disk quota exceeded": "the disk quota is exceeded",
    "database or disk is full": "no space left on the disk",
    "unexpected pos": "a file could not be written to its end: is the disk full?",
    "file write failed": "a file could not be written to its end: is the disk full?",
    "Read-only file system": "the file system is read-only",
    "readonly database": "the file system is read-only",
    "unable to open database file": "a database cannot be opened or written",
    "Too many open files": "too many open files: raise the limit (ulimit -n)",
    "can't allocate memory": OUT_OF_MEMORY,
    "Cannot allocate memory": OUT_OF_MEMORY,
    "out of memory": OUT_OF_MEMORY,
    "DataLoader worker (pid": "a process that loads data was killed: is the memory full? pass "
    "--dataloader_num_workers 0",
}


class UserError(Exception):
    """Bad input: one line that states what is wrong and what would be right. Scripts print it and exit with 2."""


def explained(error: BaseException) -> str | None:
    """A one-line message for a user, or None for an exception that points to a bug."""
    for cause in chain(error):
        if isinstance(cause, UserError) and cause is error:
            return last_line(cause)
        if isinstance(cause, MemoryError):
            return OUT_OF_MEMORY
        if isinstance(cause, pickle.UnpicklingError):
            return f"{PICKLE}: save the model anew, as safetensors" if "Weights only" in str(cause) else None
        if isinstance(cause, OSError) and (cause is error or cause.errno in FAULTS):
            place = " -> ".join(str(name) for name in (cause.filename, cause.filename2) if name is not None)
            return f"{place}: {cause.strerror}" if place and cause.strerror else cause.strerror or last_line(cause)
        found = next((line for message, line in MESSAGES.items() if message in str(cause)), None)
        if found is not None:
            return found
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, what it was raised from, and so on."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def last_line(error: BaseException) -> str:
    """An exception's message; of one that a data-loading process raised, the line after the traceback."""
    text = str(error).strip()
    if text.startswith("Caught ") and "Traceback (most recent call last)" in text:
        return text.splitlines()[-1].partition(": ")[2]
    return text or type(error).__name__
