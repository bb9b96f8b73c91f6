"""KeyboardInterrupt that Python drops, raised again.

Python raises KeyboardInterrupt wherever the program happens to be. Where that is code whose exceptions nobody gets (a
finalizer, a callback of the garbage collector or of a C library), the exception is dropped and the program goes on.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupts() -> Iterator[threading.Event]:
    """Yields an event that is set by Ctrl-C, which also raises KeyboardInterrupt, and raises it again at the end of
    the block if Python dropped it. In other threads, and where Ctrl-C means something else, nothing changes.
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
        raise_if(pressed)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def raise_if(pressed: threading.Event) -> None:
    """Raises KeyboardInterrupt where Ctrl-C was pressed before."""
    if pressed.is_set():
        raise KeyboardInterrupt
