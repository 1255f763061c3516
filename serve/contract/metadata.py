"""What an exported ONNX file says about itself: enough to score with the file alone."""

import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Self

from serve.contract.confidence import Threshold
from serve.contract.errors import UserError
from serve.contract.files import file_sha256
from serve.contract.preprocess import Preprocess
from serve.contract.profile import ValidationProfile

METADATA_KEY = "purebred"  # in the ONNX file's metadata_props
VALIDATION_KEY = "purebred.validation"  # appended with it: a profile of the validation images
VERIFIED_KEY = "purebred.verified"  # appended to the file once it has passed: a list of pairings
VERIFIED_BYTES_KEY = "purebred.verified_bytes"  # appended with it: size and sha256 of the file that passed
METADATA_PROPS = 14  # its number in onnx.proto's ModelProto; in its entries 1 is the key, 2 the value
FORMAT_VERSION = 4  # raised with the fields: a file is understood wholly or not at all
INPUT_NAME = "images"  # uint8 [N, size, size, 3], RGB
LOGITS_NAME = "logits"  # float32 [N, num_classes]
PROBABILITIES_NAME = "probabilities"  # float32 [N, num_classes], rows sum to 1
EMBEDDINGS_NAME = (
    "embeddings"  # float32 [N, features], the last layer's input; only with export --embeddings
)


@dataclass(frozen=True)
class Pairing:
    """A provider and the precision of its arithmetic that gave the trained answers with this file."""

    provider: str
    """As given to `--provider`, never "auto"."""
    precision: str
    num_images: int
    accuracy: float
    """Of this file, on this provider."""
    argmax_agreement: float
    """Share of images, noise included, to which PyTorch in float32 gives the same class."""
    max_difference_probabilities: float
    onnxruntime: str
    """Its version."""
    threshold: Threshold | None = None
    """By which scoring estimates its accuracy; None: it does not."""
    speed: float = 0.0
    """Images a second as a multiple of those on the cpu provider at fp32, timed in turn by verification; 0:
    not timed. Only in the record beside the file (serve/verification.py)."""

    def to_dict(self) -> dict[str, Any]:
        """Return what the file's list of pairings holds of it."""
        return {name: value for name, value in asdict(self).items() if name not in ("speed", "threshold")}


@dataclass(frozen=True)
class ModelMetadata:
    class_names: tuple[str, ...]
    """In the order of the logits."""
    preprocess: Preprocess
    model: str = ""
    """Architecture name, as given to `--model`."""
    precision: str = "fp32"
    """What the file's own weights and layers are in: fp32, int8 or fp16."""
    verified: tuple[Pairing, ...] = ()
    """What this file may be served with; more may be in the record beside it (serve/verification.py)."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Validation metrics of the exported checkpoint."""
    temperature: float = 1.0
    """What the graph divides the network's logits by."""
    flip_tta: bool = False
    """Whether the graph averages the logits of an image and of its mirror image."""
    clip_probabilities: float = 0.0
    """Smallest probability that the graph gives."""
    subject_crop: str = "none"
    """Whether the graph finds the subject and classifies what it cuts out: none, cam or detector."""
    run_name: str = ""
    run_id: str = ""
    """MLflow run; empty when the run was not tracked."""
    epoch: int = 0
    """Epochs trained when the checkpoint was written."""
    data_digest: str = ""
    """sha256 over names, labels and contents of the training and validation images."""
    checkpoint_sha256: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    """Library versions at export."""
    validation: ValidationProfile | None = None
    """In metadata of its own (VALIDATION_KEY); None: of a file that was not verified."""

    def __post_init__(self) -> None:
        if not all(isinstance(name, str) for name in self.class_names):
            raise TypeError(f"class_names {self.class_names}")
        if len(self.class_names) < 2:
            raise UserError(f"a classifier needs two classes or more, not {self.class_names}")
        if len(set(self.class_names)) != len(self.class_names):
            twice = sorted(name for name, count in Counter(self.class_names).items() if count > 1)
            raise UserError(f"class names repeat: {', '.join(map(repr, twice[:5]))}")

    def pairing(self, provider: str, precision: str) -> Pairing | None:
        return next((p for p in self.verified if (p.provider, p.precision) == (provider, precision)), None)

    def is_verified(self, provider: str, precision: str) -> bool:
        return self.pairing(provider, precision) is not None

    def validation_on(self, provider: str, precision: str) -> ValidationProfile | None:
        """Return the profile of the validation images, with the threshold of this pairing alone."""
        pairing = self.pairing(provider, precision)
        threshold = pairing.threshold if pairing else None
        return replace(self.validation, threshold=threshold) if self.validation else None

    def to_json(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "validation"}
        values["preprocess"] = self.preprocess.to_dict()
        values["verified"] = [pairing.to_dict() for pairing in self.verified]
        return json.dumps({"format_version": FORMAT_VERSION, **values}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Build from JSON. Raises UserError when this version does not understand it."""
        try:
            values: dict[str, Any] = json.loads(text)
            version = values.pop("format_version")
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"model metadata is not readable: {error!r}") from error
        if version != FORMAT_VERSION:
            older = isinstance(version, int) and version < FORMAT_VERSION
            raise UserError(
                f"model metadata has format_version {version}, this version reads {FORMAT_VERSION}: "
                + ("export the model again" if older else "update purebred")
            )
        known = {f.name for f in fields(cls)} - {"validation"}
        if set(values) != known:
            raise UserError(f"model metadata fields {sorted(values)} are not {sorted(known)}")
        try:
            for name, kind in (("class_names", list), ("versions", dict), ("metrics", dict)):
                if not isinstance(values[name], kind):
                    raise TypeError(f"{name} {values[name]!r}")
            values["class_names"] = tuple(values["class_names"])
            values["versions"] = {str(name): str(version) for name, version in values["versions"].items()}
            values["preprocess"] = Preprocess.from_dict(values["preprocess"])
            values["verified"] = tuple(Pairing(**pairing) for pairing in values["verified"])
            return cls(**values)
        except TypeError as error:
            raise UserError(f"model metadata hold a value of the wrong type: {error}") from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read those of an ONNX file, whose graph is not looked at.

        A tool that rewrites the file keeps its metadata: it is verified only while it begins with the bytes
        that were.

        Raises:
            UserError: not an exported model.
        """
        try:
            props = read_props(path)
            metadata = cls.from_props(props)
            size, _, sha256 = props.get(VERIFIED_BYTES_KEY, "").partition(" ")
            if size and file_sha256(path, int(size)) != sha256:
                metadata = replace(metadata, verified=(), validation=None)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        return metadata

    @classmethod
    def from_props(cls, props: Mapping[str, str]) -> Self:
        """Build from an ONNX file's metadata_props. Raises UserError when there is none of ours."""
        if METADATA_KEY not in props:
            raise UserError(
                f"no {METADATA_KEY!r} metadata in this ONNX file: it was not made by export/main.py"
            )
        metadata = cls.from_json(props[METADATA_KEY])
        try:
            if VERIFIED_KEY in props:
                verified = tuple(Pairing(**pairing) for pairing in json.loads(props[VERIFIED_KEY]))
                metadata = replace(metadata, verified=verified)
            if VALIDATION_KEY in props:
                profile = ValidationProfile.from_dict(json.loads(props[VALIDATION_KEY]))
                verified = tuple(replace(p, threshold=profile.threshold) for p in metadata.verified)
                metadata = replace(metadata, verified=verified, validation=profile)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            known = f"{VERIFIED_KEY!r} or {VALIDATION_KEY!r}"
            raise UserError(f"model metadata {known} is not readable: {error!r}") from error
        return metadata


def read_props(path: Path) -> dict[str, str]:
    """Return an ONNX file's metadata_props.

    By hand: they decide how the session is opened. serve has no onnx, and a session that is opened for them
    alone reads all weights: 0.1 s and 60 MB for a ResNet-18 of 45 MB, instead of 0.2 ms.

    Raises:
        UserError: not an ONNX file.
    """
    props = {}
    try:
        with path.open("rb") as file:
            for _, entry in _strings(file, os.fstat(file.fileno()).st_size, {METADATA_PROPS}):
                parts = dict(_strings(io.BytesIO(entry), len(entry), {1, 2}))
                props[parts.get(1, b"").decode()] = parts.get(2, b"").decode()
    except (EOFError, UnicodeDecodeError) as error:
        raise UserError(f"not an ONNX file, or a damaged one: {error}") from error
    return props


def _strings(message: BinaryIO, size: int, wanted: set[int]) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of the length-delimited fields that are wanted
    (protobuf.dev/programming-guides/encoding).

    Raises:
        EOFError: the message ends within a field, or is none.
    """
    while message.tell() < size:
        key = _varint(message)
        number, kind = key >> 3, key & 7
        if kind == 0:
            _varint(message)
            continue
        length = _varint(message) if kind == 2 else {1: 8, 5: 4}.get(kind, size)
        if length > size - message.tell():
            raise EOFError(f"field {number} does not end within the file")
        if kind == 2 and number in wanted:
            yield number, message.read(length)
        else:
            message.seek(length, os.SEEK_CUR)


def _varint(message: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = message.read(1)
        if not byte:
            break
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    raise EOFError("a number does not end")
