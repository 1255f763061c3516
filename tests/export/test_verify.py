"""The gate bites: whatever is damaged between training and serving is found, and named."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import TrainedRun
from onnx import numpy_helper

from export.convert import convert, describe
from export.gate import check_accuracy
from export.report import Verification
from export.validation_images import ValidationImages
from export.verify import _noise, verify
from serve.contract.metadata import METADATA_KEY, ModelMetadata
from serve.predictor import Predictor
from train.checkpoint import load_checkpoint
from train.models.build import rebuild


@pytest.fixture
def good(exported: TrainedRun) -> Path:
    return exported.folder / "export" / "model.onnx"


def check(trained: TrainedRun, onnx_file: Path, limit: int = 0, accuracy_added: float = 0) -> Verification:
    """`accuracy_added` to that recorded in training."""
    checkpoint = load_checkpoint(trained.folder / "checkpoints" / "best.pt")
    checkpoint["history"]["best"]["val/accuracy"] += accuracy_added
    images = ValidationImages.of_run(trained.folder, checkpoint, limit=limit)
    return verify(rebuild(checkpoint), checkpoint, onnx_file, images)


def damaged(source: Path, target: Path, **metadata: object) -> Path:
    """A copy of the file with other metadata values."""
    proto = onnx.load(source)
    props = {prop.key: prop.value for prop in proto.metadata_props}
    values = ModelMetadata.from_json(props[METADATA_KEY])
    values = type(values)(**{**values.__dict__, **metadata})
    onnx.helper.set_model_props(proto, {METADATA_KEY: values.to_json()})
    onnx.save(proto, target)
    return target


def test_an_honest_export_passes_on_all_images(trained: TrainedRun, good: Path) -> None:
    report = check(trained, good)
    assert report.passed, report.failures
    assert (report.num_images, report.num_noise_images) == (24, 1 + 2 + 7 + 32)
    assert report.argmax_agreement == 1.0
    assert 0 < report.max_difference_probabilities <= 1e-4
    assert report.accuracy_pytorch == report.accuracy_served == report.accuracy_trained
    assert report.log_loss_served == pytest.approx(report.log_loss_pytorch, abs=1e-5)


def test_limit_takes_evenly_spaced_images(trained: TrainedRun, good: Path) -> None:
    report = check(trained, good, limit=10)
    assert report.passed
    assert report.num_images == 10


def test_another_accuracy_than_in_training_fails_on_the_whole_set(trained: TrainedRun, good: Path) -> None:
    """A part of it has another one anyway."""
    (failure,) = check(trained, good, accuracy_added=0.5).failures
    assert f"{check(trained, good).accuracy_pytorch:.4f} now" in failure
    assert check(trained, good, limit=10, accuracy_added=0.5).passed


def scored(whole: bool, total: int = 1000, **values: Any) -> list[str]:
    report = Verification(
        **{"accuracy_pytorch": 0.9, "accuracy_served": 0.9, "accuracy_trained": 0.9, **values}
    )
    check_accuracy(report, total, whole)
    return report.failures


def test_one_image_more_or_less_than_in_training_is_rounding() -> None:
    for total, trained, fails in (
        (1000, 0.896, False),
        (1000, 0.906, True),
        (100, 0.89, False),
        (100, 0.92, True),
    ):
        assert bool(scored(True, total, accuracy_trained=trained)) == fails
        assert not scored(False, total, accuracy_trained=trained)


def test_served_float32_may_win_or_lose_one_image() -> None:
    for served, fails in ((0.8991, False), (0.898, True), (0.9009, False), (0.902, True)):
        assert bool(scored(True, accuracy_served=served)) == fails


def test_log_loss_is_limited_below_float32_also_where_no_accuracy_is_lost() -> None:
    """At chance level, accuracy shows no damage."""
    loss = {"log_loss_pytorch": 0.69, "max_accuracy_drop": 0.003}
    assert not scored(True, **loss, log_loss_served=0.70)
    assert not scored(True, **loss, log_loss_served=0.30)
    (failure,) = scored(True, **loss, log_loss_served=0.72)
    assert all(number in failure for number in ("0.7200", "0.6900", "0.0300", "0.02"))


def test_a_tampered_graph_fails(trained: TrainedRun, good: Path, tmp_path: Path) -> None:
    """One weight of the last layer, changed."""
    proto = onnx.load(good)
    head = next(w for w in proto.graph.initializer if "classifier" in w.name and w.name.endswith("weight"))
    values = numpy_helper.to_array(head).copy()
    values[0, 0] += 0.5
    head.CopyFrom(numpy_helper.from_array(values, head.name))
    onnx.save(proto, tmp_path / "tampered.onnx")
    report = check(trained, tmp_path / "tampered.onnx")
    assert not report.passed
    assert any("probabilities differ" in failure for failure in report.failures)


def test_a_wrong_preprocess_fails(trained: TrainedRun, good: Path, tmp_path: Path) -> None:
    metadata = ModelMetadata.from_json(onnx.load(good).metadata_props[0].value)
    other = type(metadata.preprocess)(mode="squash", size=32, resize_size=37)
    report = check(trained, damaged(good, tmp_path / "squash.onnx", preprocess=other))
    assert not report.passed
    assert any("preprocessing" in failure for failure in report.failures)
    # and it is found in the answers as well, not by comparing settings alone
    assert any("probabilities differ" in failure for failure in report.failures)


def test_swapped_class_names_fail(trained: TrainedRun, good: Path, tmp_path: Path) -> None:
    swapped = damaged(good, tmp_path / "swapped.onnx", class_names=("dog", "cat"))
    report = check(trained, swapped)
    assert not report.passed
    assert any("['dog', 'cat']" in failure for failure in report.failures)
    assert report.accuracy_served == pytest.approx(1 - report.accuracy_pytorch)


def validation_pixels(onnx_file: Path, root: Path) -> np.ndarray:
    predictor = Predictor(onnx_file, "cpu")
    images = ValidationImages.of_run(root, load_checkpoint(root / "checkpoints" / "best.pt"))
    return np.stack([predictor.preprocess(images.load(path, predictor.decode)) for path in images.paths])


def largest(onnx_file: Path, tensor: str, pixels: np.ndarray) -> float:
    """Return the largest value of a tensor inside the graph for all images."""
    proto = onnx.load(onnx_file)
    proto.graph.output.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return float(session.run([tensor], {"images": pixels})[0].max())


def test_a_graph_that_is_wrong_on_noise_alone_fails(
    trained: TrainedRun, good: Path, tmp_path: Path
) -> None:
    """Validation images are much alike; noise reaches values that they do not."""
    proto = onnx.load(good)
    real = validation_pixels(good, trained.folder)
    noise = np.concatenate(list(_noise(real.shape[1])))

    def excess(node: onnx.NodeProto) -> float:
        return largest(good, node.input[0], noise) / largest(good, node.input[0], real)

    relu = max((n for n in proto.graph.node if n.op_type == "Relu"), key=excess)
    assert excess(relu) > 1.2
    ceiling = largest(good, relu.input[0], real) + 1e-3
    clip = onnx.helper.make_node("Clip", [relu.input[0], "zero", "ceiling"], [relu.output[0]])
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(0), "zero"))
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(ceiling), "ceiling"))
    position = list(proto.graph.node).index(relu)
    proto.graph.node.remove(relu)
    proto.graph.node.insert(position, clip)
    onnx.save(proto, tmp_path / "clipped.onnx")
    report = check(trained, tmp_path / "clipped.onnx")
    assert not report.passed
    assert report.max_difference_validation < 1e-5


def test_embeddings_are_verified_too(trained: TrainedRun, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(trained.folder / "checkpoints" / "best.pt")
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    convert(rebuild(checkpoint), describe(checkpoint, "0" * 64), good, embeddings=True)
    report = check(trained, good, limit=4)
    assert report.passed, report.failures
    assert 0 < report.max_difference_embeddings < 1e-3

    proto = onnx.load(good)
    last = next(n for n in proto.graph.node if "embeddings" in n.output)
    last.output[list(last.output).index("embeddings")] = "honest"
    for node in proto.graph.node:  # the head gets the right ones
        node.input[:] = ["honest" if name == "embeddings" else name for name in node.input]
    proto.graph.node.append(onnx.helper.make_node("Neg", ["honest"], ["embeddings"]))
    onnx.save(proto, bad)
    report = check(trained, bad, limit=4)
    assert len(report.failures) == 1
    assert report.failures[0].startswith("embeddings")


def test_not_a_model_at_all_fails(trained: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    report = check(trained, tmp_path / "text.onnx")
    assert not report.passed
    assert "text.onnx" in report.failures[0]


def test_a_validation_image_that_is_gone_is_an_error(trained: TrainedRun, good: Path) -> None:
    checkpoint = load_checkpoint(trained.folder / "checkpoints" / "best.pt")
    images = ValidationImages(Path("/nowhere"), ["cat.0.jpg"], ["cat"], is_whole_set=False)
    with pytest.raises(ValueError, match=r"/nowhere/cat\.0\.jpg"):
        verify(rebuild(checkpoint), checkpoint, good, images)


@pytest.mark.parametrize("total", [7, 10, 100, 1000, 2250])
def test_one_image_may_change_sides_and_two_may_not(total: int) -> None:
    for right in range(2, total + 1):
        for lost, failures in ((1, 0), (2, 1)):
            report = Verification(
                accuracy_pytorch=right / total,
                accuracy_trained=right / total,
                accuracy_served=(right - lost) / total,
            )
            check_accuracy(report, total, is_whole_set=True)
            assert len(report.failures) == failures, (right, lost)
