"""Names that users of other tools type lead to the flag of the same meaning in each command that has it."""

import pytest

import serve.arguments
import serve.doctor
from serve.contract.flag_names import EXPLAINED, OTHER_NAMES, canonical, suggestion
from train.config import SETTINGS
from train.settings import flag

TRAINING = ["--config", *map(flag, SETTINGS)]
SCORING = serve.arguments.build_parser().flags()


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        *(("--learning-rate", "--lr"), ("--learning_rate", "--lr"), ("--Learning-Rate", "--lr")),
        *(
            ("--bs", "--batch-size"),
            ("-b", "--batch-size"),
            ("--per_device_train_batch_size", "--batch-size"),
        ),
        *(("--wd", "--weight-decay"), ("--arch", "--model"), ("--img-size", "--image-size")),
        *(("--pretrained", "--weights"), ("--epoch", "--epochs"), ("--workers", "--num-workers")),
        *(
            ("--opt", "--optimizer"),
            ("--sched", "--schedule"),
            ("--data-dir", "--data"),
            ("-j", "--num-workers"),
        ),
        *(("--output-dir", "--output"), ("--amp", "--precision"), ("--fp16", "--precision fp16")),
        *(("--max_epochs", "--epochs"), ("--resume_from_checkpoint", "--resume"), ("--LR", "--lr")),
        *(
            ("--gpus", "torchrun --nproc_per_node"),
            ("--no-flip", "--flip false"),
            ("\u2013epochs", "--epochs"),
        ),
        *(("--learning-rat", "--lr"), ("--batch-sise", "--batch-size"), ("--warmup", "--warmup-epochs")),
    ],
)
def test_training_names_its_own_flag(typed: str, expected: str) -> None:
    assert expected in suggestion(typed, TRAINING, values=True).split(" or ")[0]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        *(("--input", "--images"), ("--data-dir", "--images"), ("--device", "--provider")),
        *(
            ("--checkpoint", ""),
            ("--onnx", "--model"),
            ("--out", "--output"),
            ("--num-workers", "--workers"),
        ),
        *(("--half", "--precision fp16"), ("--topk", "--top-k"), ("--force", "--overwrite")),
        *(("--gpu", "--device-id"), ("--no-resume", "--resume"), ("--part", "--part-size")),
    ],
)
def test_scoring_names_its_own_flag(typed: str, expected: str) -> None:
    assert expected in suggestion(typed, SCORING)


def test_a_hint_is_never_a_flag_that_the_command_lacks() -> None:
    for flags in (TRAINING, SCORING, serve.doctor.build_parser().flags()):
        for name in {name for names in OTHER_NAMES.values() for name in names.split()}:
            for word in suggestion(f"--{name}", flags).rstrip("?").split():
                assert not word.startswith("--") or word in flags or word == "--nproc_per_node=N", (
                    name,
                    word,
                )


def test_the_table_lists_no_flag_of_training_as_another_name_of_one() -> None:
    own = {flag(name)[2:] for name in SETTINGS}
    for given, names in OTHER_NAMES.items():
        assert len(names.split()) == len(set(names.split())), given
        assert all(name == canonical(name) for name in names.split()), given
        if given.split()[0] in TRAINING:
            assert not own & set(names.split()), given
    explained = [name for names in EXPLAINED.values() for name in names.split()]
    assert len(explained) == len(set(explained))
    assert all(name == canonical(name) for name in explained)


def test_nothing_is_better_than_a_wrong_hint() -> None:
    assert suggestion("--zzz", TRAINING) == ""
