"""What a logged model needs beside its ONNX file: serving's code, requirements, providers, an example."""

import hashlib
import importlib.metadata
import io
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import pandas as pd
from PIL import Image, ImageDraw

import serve
from serve.contract.heic import PACKAGE
from serve.contract.metadata import ModelMetadata
from serve.pyfunc import COLUMN, DEFAULTS
from train.tracking.client import mlflow

SOURCE = Path(serve.__path__[0])
IMPORT = re.compile(r"^(\s*(?:from|import)\s+)serve(?=[.\s])", re.MULTILINE)
PINNED = ("mlflow", "onnx", "pandas", "numpy", "pillow")
DECODERS = ("numpy", "pillow", PACKAGE)
CPU = "CPUExecutionProvider"
CUDA = ("CUDAExecutionProvider", {"use_tf32": "0"})


class ServedModel:
    """A flavor of MLflow: the ONNX file for mlflow.onnx, and for mlflow.pyfunc the code that takes image
    bytes to it."""

    __name__ = "purebred"

    def __init__(self, file: Path, metadata: ModelMetadata):
        self.file, self.metadata = file, metadata

    def save_model(self, path: str, mlflow_model: Any, **_: Any) -> None:
        """Write the folder of a logged model; mlflow.models.Model.log calls this of a flavor."""
        with TemporaryDirectory(prefix="purebred-") as folder:
            name = copy_serving_code(Path(folder), SOURCE)
            mlflow.onnx.save_model(
                onnx.load(self.file),
                path,
                mlflow_model=mlflow_model,
                code_paths=[str(Path(folder, name))],
                signature=_signature(),
                input_example=pd.DataFrame({COLUMN: [example_image()]}),
                pip_requirements=pinned_requirements(self.metadata),
                onnx_execution_providers=[CUDA, CPU]
                if self.metadata.is_verified("cuda", "fp32")
                else [CPU],
                metadata={"class_names": list(self.metadata.class_names)},
                save_as_external_data=False,
            )
        served = mlflow_model.flavors["python_function"]
        shutil.copyfile(self.file, Path(path, served["data"]))  # the very bytes that were verified
        served |= {"loader_module": f"{name}.pyfunc", "config": dict(DEFAULTS)}
        mlflow_model.save(str(Path(path, "MLmodel")))


def _signature() -> Any:
    types = mlflow.types
    answers = [
        types.ColSpec("string", "label"),
        types.ColSpec("double", "probability", required=False),
        types.ColSpec(types.schema.Array("double"), "probabilities", required=False),
        types.ColSpec("string", "error"),
    ]
    # bytes pass as they are; of a binary column MLflow would decode the base64 text of JSON itself, and
    # refuse the whole request for one text that is malformed or null
    images = types.Schema([types.ColSpec("string", COLUMN)])
    return mlflow.models.ModelSignature(inputs=images, outputs=types.Schema(answers))


def copy_serving_code(folder: Path, source: Path) -> str:
    """Copy the package `serve` under a name made of its content, and return the name."""
    texts = {path.relative_to(source): path.read_text("utf-8") for path in sorted(source.rglob("*.py"))}
    digest = hashlib.sha256(repr([(path.as_posix(), text) for path, text in texts.items()]).encode())
    name = f"purebred_serve_{digest.hexdigest()[:12]}"
    for path, text in texts.items():
        target = folder / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(IMPORT.sub(rf"\g<1>{name}", text), encoding="utf-8")
    return name


def pinned_requirements(metadata: ModelMetadata) -> list[str]:
    """Return requirements with the versions that the model was verified with, where its file names them."""
    verified = {name: metadata.versions[name] for name in DECODERS if name in metadata.versions}
    versions = {name: importlib.metadata.version(name) for name in PINNED} | verified
    runtime = importlib.metadata.packages_distributions()["onnxruntime"][0]  # builds differ in name
    verified_with = [pairing.onnxruntime for pairing in metadata.verified]
    versions[runtime] = verified_with[0] if verified_with else importlib.metadata.version(runtime)
    return [f"{name}=={version}" for name, version in versions.items()]


def example_image() -> bytes:
    """Return a JPEG file of a drawn picture."""
    image = Image.new("RGB", (96, 72), (120, 160, 200))
    ImageDraw.Draw(image).ellipse((24, 14, 72, 62), (200, 150, 90))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
