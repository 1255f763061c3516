"""Put what `make run` prints into README.md, without the epochs between the first and the last.

    python benchmarks/draw_readme.py

Runs pipelines/quickstart.py in a temporary folder, in two minutes.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- make run: python benchmarks/draw_readme.py -->\n", "<!-- end of make run -->\n"
PAGES = ("README.md", "README.ko.md")
# what each step is about; the rest names folders of this machine
SHOWN = re.compile(r"train |val  |sample: |epoch (1|15)/|best epoch|verified:|\d+ rows|report ")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "pipelines" / "quickstart.py"]
        printed = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
    lines = [line for line in printed.splitlines() if SHOWN.match(line)]
    for page in (ROOT / name for name in PAGES):
        text = page.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text(
            before + BEGIN + "```\n" + "\n".join(lines) + "\n```\n" + END + after, encoding="utf-8"
        )


if __name__ == "__main__":
    main()
