"""What a model file says of itself: read back as it was written, or refused with the reason."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from serve.contract.metadata import (
    FORMAT_VERSION,
    METADATA_KEY,
    VERIFIED_KEY,
    ModelMetadata,
    Pairing,
    read_props,
)
from serve.contract.preprocess import Preprocess

# Surrogates too: a class may be named after a folder whose name is not UTF-8.
names = st.text(st.characters())
finite = st.floats(allow_nan=False, allow_infinity=False)
METADATA = ModelMetadata(("cat", "dog"), Preprocess("squash", 96), model="resnet18", epoch=3)


def changed(**changes: Any) -> str:
    return json.dumps(json.loads(METADATA.to_json()) | changes)


pairings = st.builds(Pairing, names, names, st.integers(0), finite, finite, finite, names)


@given(
    class_names=st.lists(names, min_size=2, unique=True).map(tuple),
    precision=names,
    verified=st.lists(pairings).map(tuple),
    size=st.integers(1, 4096),
    metrics=st.dictionaries(names, finite),
    versions=st.dictionaries(names, names),
    run_name=names,
    epoch=st.integers(0),
)
def test_what_was_written_is_what_is_read(size: int, **fields: Any) -> None:
    metadata = ModelMetadata(preprocess=Preprocess("pad", size, interpolation="bicubic"), **fields)
    assert ModelMetadata.from_json(metadata.to_json()) == metadata


@given(st.lists(names, min_size=2, unique=True).map(tuple))
def test_any_class_name_can_be_stored_in_an_onnx_file(class_names: tuple[str, ...]) -> None:
    """Its properties are protobuf strings, which must be UTF-8."""
    text = ModelMetadata(class_names, Preprocess()).to_json()
    assert ModelMetadata.from_props({METADATA_KEY: text.encode("utf-8").decode("utf-8")}) == (
        ModelMetadata(class_names, Preprocess())
    )


@given(
    props=st.dictionaries(st.text(), st.text()),
    raw=st.binary(max_size=300),
    version=st.integers(0, 2**62),
    producer=st.text(),
)
def test_properties_are_read_from_a_file_as_onnx_reads_them(
    tmp_path_factory: pytest.TempPathFactory, props: dict[str, str], raw: bytes, version: int, producer: str
) -> None:
    model = onnx.ModelProto(ir_version=version, producer_name=producer, model_version=-1)
    model.graph.initializer.add(raw_data=raw, name="14")
    helper.set_model_props(model, props)
    file = tmp_path_factory.getbasetemp() / "any.onnx"
    file.write_bytes(model.SerializeToString())
    assert read_props(file) == props


@given(st.binary(max_size=200))
def test_what_is_no_onnx_file_is_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.onnx"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"any\.onnx: "):
        ModelMetadata.read(file)


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    model = onnx.ModelProto(ir_version=10)
    model.graph.initializer.add(raw_data=bytes(range(256)))
    helper.set_model_props(model, {METADATA_KEY: METADATA.to_json()})
    whole = model.SerializeToString()
    file = tmp_path / "cut.onnx"
    file.write_bytes(whole)
    assert ModelMetadata.read(file) == METADATA
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.onnx: "):
            ModelMetadata.read(file)


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        (FORMAT_VERSION + 1, "update purebred"),
        (FORMAT_VERSION - 1, "export the model again"),
        (None, "update purebred"),
        (str(FORMAT_VERSION), "update purebred"),
    ],
)
def test_another_format_version_is_refused_and_the_message_says_what_to_do(
    version: object, remedy: str
) -> None:
    with pytest.raises(ValueError, match=f"format_version {version}.*{FORMAT_VERSION}.*{remedy}"):
        ModelMetadata.from_json(changed(format_version=version))


def test_a_field_that_this_version_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="'calibration'"):
        ModelMetadata.from_json(changed(calibration=1.5))
    with pytest.raises(ValueError, match="'rotate'"):
        ModelMetadata.from_json(changed(preprocess={**METADATA.preprocess.to_dict(), "rotate": 90}))


@pytest.mark.parametrize("field", ["class_names", "preprocess", "data_digest"])
def test_a_missing_field_is_refused(field: str) -> None:
    values = json.loads(METADATA.to_json())
    del values[field]
    with pytest.raises(ValueError, match=field):
        ModelMetadata.from_json(json.dumps(values))


@pytest.mark.parametrize("class_names", [("cat", "dog", "cat"), ("", "")])
def test_repeated_class_names_are_refused(class_names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"cat|''"):
        ModelMetadata(class_names, Preprocess())
    with pytest.raises(ValueError, match=r"cat|''"):
        ModelMetadata.from_json(changed(class_names=class_names))


@pytest.mark.parametrize("class_names", [(), ("cat",)])
def test_fewer_than_two_classes_are_refused(class_names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"\('cat',\)|\(\)"):
        ModelMetadata(class_names, Preprocess())


def test_pairings_that_were_appended_count() -> None:
    pairing = Pairing("cuda", "fp32", 9, 1.0, 1.0, 0.0, "1.31.1")
    props = {METADATA_KEY: METADATA.to_json(), VERIFIED_KEY: json.dumps([pairing.to_dict()])}
    assert ModelMetadata.from_props(props).verified == (pairing,)
    for text in ("{", "3", '[{"provider": "cpu"}]'):
        with pytest.raises(ValueError, match=VERIFIED_KEY):
            ModelMetadata.from_props(props | {VERIFIED_KEY: text})


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"cat"', '{"class_names": ["a", "b"]}'])
def test_text_that_is_not_metadata_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="metadata"):
        ModelMetadata.from_json(text)


@pytest.mark.parametrize(
    "field",
    [
        {"class_names": None},
        {"class_names": [["cat"], ["dog"]]},
        {"preprocess": 3},
        {"verified": None},
        {"verified": [3]},
        {"verified": [{"provider": "cpu", "precision": "fp32"}]},
        {"preprocess": {**METADATA.preprocess.to_dict(), "size": "96"}},
    ],
)
def test_a_value_of_the_wrong_type_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="model metadata"):
        ModelMetadata.from_json(changed(**field))


def test_a_file_that_export_did_not_write_is_refused() -> None:
    with pytest.raises(ValueError, match=r"export/main\.py"):
        ModelMetadata.from_props({"description": "somebody else's model"})
