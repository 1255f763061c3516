"""Score the images of the last days: IMAGES/YYYY-MM-DD to OUTPUT/YYYY-MM-DD.csv, the days in UTC.

IMAGES and OUTPUT are folders or URLs; they, MODEL, PROVIDER, PRECISION and DAYS come from the environment.
A day without images is left out. A day that is scored already costs seconds, and is scored again when
images were added. So the next night makes up for one that failed.

Exit code: that of serve/main.py for the first day that failed; the days after it are scored all the same.
"""

import os
import sys
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta

from serve.contract.errors import UserError
from serve.contract.interrupts import end_on_signal
from serve.contract.urls import is_remote, redact
from serve.inputs.sources import find_inputs
from serve.main import main
from serve.outcome import report_error


def has_images(images: str) -> bool:
    """Return whether a folder exists and holds images. Raises OSError when its store cannot be listed."""
    if not is_remote(images) and not os.path.isdir(images):
        return False
    return any(True for _ in find_inputs(images).entries())


def score_days(settings: Mapping[str, str], today: date) -> int:
    """Score the DAYS days before today; return the exit code of the first that failed, or 0."""
    images, output = (settings[name].rstrip("/") for name in ("IMAGES", "OUTPUT"))
    if not settings["DAYS"].isdecimal():
        return report_error(UserError(f"DAYS={settings['DAYS']}: a whole number of days is needed"))
    if not is_remote(output):
        os.makedirs(output, exist_ok=True)
    failed = 0
    for ago in range(int(settings["DAYS"]), 0, -1):
        day = today - timedelta(days=ago)
        code = score(settings, f"{images}/{day}", f"{output}/{day}.csv")
        failed = failed or code
    return failed


def score(settings: Mapping[str, str], images: str, output: str) -> int:
    """Return an exit code as serve/main.py has them."""
    try:
        if not has_images(images):
            print(f"no images in {redact(images)}")
            return 0
    except (UserError, OSError) as error:
        return report_error(error)
    return main(
        [
            f"--model={settings['MODEL']}",
            f"--images={images}",
            f"--provider={settings['PROVIDER']}",
            f"--precision={settings['PRECISION']}",
            "--resume",
            f"--output={output}",
        ]
    )


if __name__ == "__main__":
    end_on_signal()
    sys.exit(score_days(os.environ, datetime.now(UTC).date()))
