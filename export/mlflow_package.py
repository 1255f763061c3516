"""What a logged model needs beside its ONNX file: serving's code, requirements, providers, an example."""

import hashlib
import importlib.metadata
import io
import re
from pathlib import Path

from PIL import Image, ImageDraw

import serve
from serve.contract.heic import PACKAGE
from serve.contract.metadata import ModelMetadata
from serve.pyfunc import COLUMN, DEFAULTS
from train.tracking.registry import PyfuncPackage

SOURCE = Path(serve.__path__[0])
IMPORT = re.compile(r"^(\s*(?:from|import)\s+)serve(?=[.\s])", re.MULTILINE)
PINNED = ("mlflow", "onnx", "pandas", "numpy", "pillow")
DECODERS = ("numpy", "pillow", PACKAGE)
CPU = "CPUExecutionProvider"
CUDA = ("CUDAExecutionProvider", {"use_tf32": "0"})


def package_model(metadata: ModelMetadata, folder: Path) -> PyfuncPackage:
    """Write the code into a folder, and return what mlflow is given."""
    name = copy_serving_code(folder, SOURCE)
    verified_on_cuda = metadata.is_verified("cuda", "fp32")
    return PyfuncPackage(
        code=folder / name,
        loader_module=f"{name}.pyfunc",
        column=COLUMN,
        config=dict(DEFAULTS),
        providers=[CUDA, CPU] if verified_on_cuda else [CPU],
        requirements=pinned_requirements(metadata),
        example=example_image(),
    )


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
