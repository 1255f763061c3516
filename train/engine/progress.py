"""Progress of an epoch: a bar on a terminal, one plain line every few seconds otherwise."""

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """Counts the images of an epoch, of which `count` are done. Disabled, it shows nothing."""

    def __init__(self, title: str, total: int, enabled: bool, count: int = 0):
        self.title, self.total, self.enabled = title, total, enabled
        self.count = self.first = count
        self.started = self.reported = time.perf_counter()
        terminal = enabled and sys.stderr.isatty()
        self.bar = tqdm(
            total=total, initial=count, desc=title, unit="image", leave=False, disable=not terminal
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def advance(self, images: int) -> None:
        self.count = min(self.total, self.count + images)
        self.bar.update(self.count - self.bar.n)
        now = time.perf_counter()
        if not self.enabled or not self.bar.disable or now - self.reported < SECONDS_BETWEEN_LINES:
            return
        self.reported = now
        rate = (self.count - self.first) / (now - self.started)
        left = (self.total - self.count) / rate
        print(
            f"{self.title}: {self.count}/{self.total}, {rate:.0f} images/s, {left:.0f} s left", flush=True
        )
