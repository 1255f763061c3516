"""The model repository is one that Triton would read: checked with its own message type."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

import export.triton
from serve.predictor import Predictor

TYPES = {model_config_pb2.TYPE_UINT8: "tensor(uint8)", model_config_pb2.TYPE_FP32: "tensor(float)"}


def test_the_repository_describes_the_model_that_is_in_it(published: Path, tmp_path: Path) -> None:
    repository = tmp_path / "deep" / "models"
    assert export.triton.main(["--run", str(published), "--repository", str(repository)]) == 0
    folder = repository / "small"
    config = model_config_pb2.ModelConfig()
    text_format.Parse((folder / "config.pbtxt").read_text(), config)
    assert (config.name, config.backend, config.max_batch_size) == ("small", "onnxruntime", 64)
    kinds = [group.kind for group in config.instance_group]
    assert kinds == [model_config_pb2.ModelInstanceGroup.KIND_CPU], "verified there, and nowhere else"
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx")
    described = [*config.input, *config.output]
    for tensor, real in zip(described, [*session.get_inputs(), *session.get_outputs()], strict=True):
        assert tensor.name == real.name
        assert TYPES[tensor.data_type] == real.type
        assert list(tensor.dims) == real.shape[1:]  # Triton puts the batch in front
        assert isinstance(real.shape[0], str)
    predictor = Predictor(folder / "1" / "model.onnx", "cpu")
    assert (folder / "labels.txt").read_text().splitlines() == list(predictor.metadata.class_names)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    expected = Predictor(published / "export" / "model.onnx", "cpu").predict(pixels)
    np.testing.assert_array_equal(predictor.predict(pixels), expected)


def test_the_next_model_is_the_next_version(published: Path, tmp_path: Path) -> None:
    arguments = ["--run", str(published), "--repository", str(tmp_path / "models"), "--name", "pets"]
    assert export.triton.main(arguments) == 0
    (tmp_path / "models" / "pets" / ".2.tmp").mkdir()  # a call that was killed
    assert export.triton.main(arguments) == 0
    assert sorted(p.name for p in (tmp_path / "models" / "pets").iterdir()) == [
        "1",
        "2",
        "config.pbtxt",
        "labels.txt",
    ]


def test_a_model_that_was_struck_out_is_not_handed_on(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = published / "export" / "verification.json"
    record.write_text(record.read_text().replace('"passed": true', '"passed": false'))
    code = export.triton.main(["--run", str(published), "--repository", str(tmp_path / "models")])
    assert code == 2
    assert "model.onnx" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "../pets"], "--name '../pets' must hold"),
        (["--model-precision", "int8"], "model.int8.onnx does not exist"),
        (["--name", "other"], "config.pbtxt describes another model"),
        (["--repository", "s3://bucket/models"], "--repository s3://bucket/models is a URL"),
    ],
)
def test_what_cannot_be_written_is_an_error(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    other = tmp_path / "models" / "other"
    other.mkdir(parents=True)
    (other / "config.pbtxt").write_text('name: "other"\n')
    code = export.triton.main(
        ["--run", str(published), "--repository", str(tmp_path / "models"), *arguments]
    )
    assert code == 2
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"^2$"):
        export.triton.main(
            ["--run", str(published), "--repository", str(tmp_path), "--max-batch-size", "0"]
        )
    assert [p.name for p in other.iterdir()] == ["config.pbtxt"]
