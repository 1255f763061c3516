"""Progress of an epoch: a bar on a terminal, one plain line every few seconds otherwise."""

import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """Counts the images of an epoch, of which `count` are done. Disabled, it shows nothing."""

    def __init__(self, title: str, total: int, enabled: bool, count: int = 0):
        self.title, self.total = title, total
        self.count = self.first = count
        self.started = self.reported = time.perf_counter()
        hidden = None if enabled else True  # None: unless there is a terminal
        self.bar = tqdm(total=total, initial=count, desc=title, unit="image", leave=False, disable=hidden)
        self.prints = enabled and bool(self.bar.disable)

    def close(self) -> None:
        self.bar.close()

    def advance(self, images: int) -> None:
        self.count += images
        self.bar.update(images)
        now = time.perf_counter()
        if not self.prints or now - self.reported < SECONDS_BETWEEN_LINES:
            return
        self.reported = now
        rate = (self.count - self.first) / (now - self.started)
        left = (self.total - self.count) / rate
        print(
            f"{self.title}: {self.count}/{self.total}, {rate:.0f} images/s, {left:.0f} s left", flush=True
        )
