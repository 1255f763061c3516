"""Ctrl-C, SIGTERM and SIGHUP end a command in one line."""

import math
import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType

SECONDS_TO_INSIST = 5.0  # a signal may come twice, from the terminal and from the parent


def end_on_signal(advice: str = "", importing: bool = False, code: int = 0) -> None:
    """End this command at a signal: print one line, which ends with `advice`, and exit with `code`, or else
    with 128 + the signal's number. By SystemExit, so that unfinished files are removed; at once while it is
    `importing`, and when somebody insists. An ignored signal stays ignored, as SIGHUP under nohup."""
    ending_since = math.inf
    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    ]

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal ending_since
        now = time.monotonic()
        if now >= ending_since:
            if now > ending_since + SECONDS_TO_INSIST:
                os._exit(code or 128 + number)
            return
        ending_since = now
        with suppress(OSError):  # a terminal that is gone
            os.write(
                2, f"stopped by {signal.Signals(number).name}{advice}\n".encode()
            )  # print is not reentrant
        if importing:
            os._exit(code or 128 + number)
        sys.exit(code or 128 + number)

    for number in numbers:
        signal.signal(number, end)
