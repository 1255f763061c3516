"""The exported model as MLflow serves it (mlflow.pyfunc): a column of image bytes in, a table out.

Answers are those of serve/main.py. A logged model holds a copy of this package under a name made of its
content (export/mlflow_package.py), so that two models in one process answer by their own code.
"""

import binascii
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from serve.classifier import Classifier
from serve.contract.errors import UserError
from serve.contract.images import check_file_size

COLUMN = "content"
DEFAULTS = {"provider": "auto", "precision": "fp32", "threads": 0}
"""What model_config may change, as of serve.Classifier; 0 threads: OMP_NUM_THREADS, if it is set."""
BASE64 = re.compile(rb"(?:data:[^,]*,)?([\w+/\s-]+)={0,2}\s*", re.ASCII)
URL_SAFE = bytes.maketrans(b"-_", b"+/")
PLAIN_PPM = re.compile(rb"P[1-6]\s")  # an image whose file is text


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> "ImageModel":
    """Open the model at `path`; MLflow calls this function by its name."""
    config = {**DEFAULTS, **(model_config or {})}
    # Spark sets it to the processors of a task; on a cluster, mlflow's spark_udf forgets its model_config
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    threads = config.pop("threads") or (int(given) if given.isdecimal() else 0)
    return ImageModel(Classifier(path, threads=threads, **config))


class ImageModel:
    """What mlflow.pyfunc.load_model wraps."""

    def __init__(self, classifier: Classifier):
        self.classifier = classifier

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Return a DataFrame with a row for each one of `model_input`, and its index.

        Columns: label; probability; probabilities, a list in the order of `class_names` in the MLmodel
        file's metadata; error. An image that cannot be read has an error, the empty label, and None for the
        numbers: Spark writes None in a column of texts as "None", and NaN is not valid JSON.

        Args:
            model_input: DataFrame with the column `content`: bytes of image files, or base64 text of them.
        """
        import pandas as pd

        contents = list(model_input[COLUMN])
        answers = self.classifier.classify(len(contents), lambda number: file_bytes(contents[number]))
        columns: dict[str, list[Any]] = {
            "label": [answer.label or "" for answer in answers],
            "probability": [answer.probability for answer in answers],
            "probabilities": [
                None if answer.probabilities is None else [float(str(p)) for p in answer.probabilities]
                for answer in answers
            ],
            "error": [answer.error or "" for answer in answers],
        }
        # of objects: in a column of numbers, pandas would make None NaN
        return pd.DataFrame(columns, model_input.index, dtype=object)


def file_bytes(content: object) -> bytes:
    """Return the bytes of an image file, also of base64 text, which may come as bytes; else UserError.

    A data URL, the alphabet of URLs, white space and text without its padding are base64, too.
    """
    if isinstance(content, str):
        data = content.encode(errors="replace")
    elif isinstance(content, bytes | bytearray | memoryview):
        data = bytes(content)
    else:
        raise UserError(f"the bytes of an image or base64 text are expected, not {type(content).__name__}")
    if (text := BASE64.fullmatch(data)) and not PLAIN_PPM.match(data):
        digits = b"".join(text[1].split()).translate(URL_SAFE)
        with suppress(binascii.Error):
            data = binascii.a2b_base64(digits + b"=" * (-len(digits) % 4))
    elif isinstance(content, str) and content:
        raise UserError(f"text that is not base64: {content[:60]!r}")
    check_file_size(len(data))
    return data
