"""Kill one rank of each of many jobs at a random step; torchrun restarts it, and it must end as if quiet.

    python benchmarks/restarts.py --jobs 20

Each job is a plain `torchrun --nproc_per_node=2 --max-restarts=3 train/main.py`, on drawn images. Prints a
line for each: the step of the kill, seconds from the kill to the first new step, how much was done twice.
Exit code: 0 when all finished with the weights of the quiet run.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.jobs import EXACT, SMALL, TrainingJob, weights_sha256
from train.data.sample import make_sample

STEPS, EPOCHS = 9, 4  # 68 images in batches of 8


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nproc_per_node", type=int, default=2)
    parser.add_argument("--signal", type=int, default=9, help="sent to the rank; 9: SIGKILL")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_sample(root / "sample", train_per_class=40, num_test=4)
        settings = ["--data", root / "sample" / "train", *SMALL, *EXACT, "--epochs", EPOCHS]
        settings += ["--track", "false", "--num-workers", 0]
        with TrainingJob(root, *settings, "--name", "quiet", processes=args.nproc_per_node) as job:
            assert job.wait() == 0, job.printed()
            quiet = weights_sha256(job.folder)
        good, seconds, twice = 0, [], []
        for number in range(args.jobs):
            epoch, step = divmod(draw.randrange(1, STEPS * EPOCHS - 1), STEPS)
            rank = draw.randrange(args.nproc_per_node)
            agent = () if number % 2 else ("--standalone",)  # both of torchrun's stores
            port = ("--master-port", str(29600 + number)) if not agent else ()
            with TrainingJob(
                root,
                *settings,
                *("--name", f"job{number}"),
                processes=args.nproc_per_node,
                restarts=3,
                agent=(*agent, *port),
            ) as job:
                job.wait_for(epoch, step)
                job.kill(rank, args.signal)
                killed, at = time.monotonic(), job.place()
                job.wait_for_text("resuming from ")
                gone_on = job.printed().split("resuming from ")[1].split("epoch-")[1].split(".pt")[0]
                back = (int(gone_on.split("-")[0]), int(gone_on.split("-")[2]))
                job.wait_for(*divmod(back[0] * STEPS + back[1] + 1, STEPS))
                seconds.append(time.monotonic() - killed)
                twice.append(max(0, (at[0] - back[0]) * STEPS + at[1] - back[1]))
                code = job.wait()
                same = code == 0 and weights_sha256(job.folder) == quiet
                good += same
                print(
                    f"job {number}: rank {rank} killed at epoch {epoch} step {step}, exit code {code}, "
                    f"{seconds[-1]:.1f} s to the next new step, {twice[-1]} snapshots lost, "
                    f"weights {'equal' if same else 'DIFFER'}",
                    flush=True,
                )
                if not same:
                    print(job.printed())
    print(
        f"{good} of {args.jobs} finished with the weights of the quiet run; to the next new step "
        f"{sorted(seconds)[len(seconds) // 2]:.1f} s (median), at most {max(twice)} steps lost"
    )
    return int(good < args.jobs)


if __name__ == "__main__":
    sys.exit(main())
