"""Commands that pip installs: each runs the program of its name, of whichever package, as its path does."""

import runpy
import sys
from pathlib import Path

from serve.contract.command_line import INSTALLED


def run_installed() -> None:
    """Run the program of the command that started this process, as in purebred-train.

    For several processes: torchrun --nproc_per_node=4 --no-python purebred-train --data DIR
    """
    programs = {name: program for program, name in INSTALLED.items()}
    program = programs[Path(sys.argv[0]).name.removesuffix(".exe")]
    module = program.removesuffix(".py").replace("/", ".")
    runpy.run_module(module, run_name="__main__", alter_sys=True)
