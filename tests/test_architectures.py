"""Architectures of each kind train, export and pass verification, at a small image size.

benchmarks/architectures.py does the same with all that are named, on photographs.
"""

from pathlib import Path

import pytest
from train_data import make_data, make_run, train_epochs

from export.convert import convert, describe
from export.validation_images import ValidationImages
from export.verify import verify
from train.engine.checkpointing import checkpoint_state
from train.models.build import build_model, rebuild
from train.runs.history import History

SIZES = {
    "lenet5": 32,
    "simple_cnn": 32,
    "googlenet": 32,
    "resnet18": 32,
    "timm/seresnet18": 32,
    "timm/resnext26ts": 32,
    "efficientnet_b0": 32,
    "mobilenet_v3_small": 32,
    "timm/convnext_atto": 32,
    "vit_tiny_patch16_224": 32,
}
# batch norm and dropout; auxiliary heads; attention
EACH_TIME = ("simple_cnn", "googlenet", "vit_tiny_patch16_224")


@pytest.mark.parametrize(
    "name", [name if name in EACH_TIME else pytest.param(name, marks=pytest.mark.slow) for name in SIZES]
)
def test_it_trains_exports_and_verifies(name: str, tmp_path: Path) -> None:
    config, data = make_data(
        tmp_path, model=name, image_size=SIZES[name], epochs=1, optimizer="sgd", ema=0.0
    )
    model, _ = build_model(name, 2, config.image_size)
    run = make_run(config, data, model)
    train_epochs(run, 0)
    moved = run.state.optimizer.state
    assert [k for k, p in model.named_parameters() if p not in moved] == [], "never had a gradient"

    checkpoint = checkpoint_state(run.state, History(1, 1, {"val/accuracy": 0.0}), data, config, "")
    exported = rebuild(checkpoint)
    convert(exported, describe(checkpoint, ""), tmp_path / "model.onnx")
    names = [data.val.class_names[label] for label in data.val.labels]
    images = ValidationImages(data.val.root, data.val.paths, names, is_whole_set=False)
    report = verify(exported, checkpoint, tmp_path / "model.onnx", images)
    assert report.passed, report.failures
    assert report.argmax_agreement == 1.0
