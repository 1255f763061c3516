"""Rows as JSON Lines: an object with path, label, probability, probabilities {class: p} or top [{label,
probability}], embedding, error on each line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from serve.inputs.inventory import printable
from serve.outputs.layout import Format, Joiner, Layout, Row, Writer, are_columns

MAX_LINE = 1 << 24  # bytes of a first line that is looked at


class JsonlWriter(Writer):
    def __init__(self, file: IO[bytes], layout: Layout):
        self.layout, self.file = layout, file
        self.names = [json.dumps(printable(name)) for name in layout.class_names]

    def write(self, row: Row) -> None:
        field = "top" if self.layout.top_k else "probabilities"
        cells = {"path": json.dumps(printable(row.path)), "label": "null", "probability": "null"}
        cells[field] = "null"
        if row.probabilities is not None:
            likeliest = self.layout.likeliest(row.probabilities)
            # str of a float32 is the shortest text that reads back as the same number, and valid JSON
            ranked = [(self.names[i], str(row.probabilities[i])) for i in likeliest]
            cells |= dict(zip(("label", "probability"), ranked[0], strict=True))
            if self.layout.top_k:
                pairs = (f'{{"label":{name},"probability":{value}}}' for name, value in ranked)
                cells[field] = f"[{','.join(pairs)}]"
            else:
                pairs = (f"{name}:{p!s}" for name, p in zip(self.names, row.probabilities, strict=True))
                cells[field] = f"{{{','.join(pairs)}}}"
        if self.layout.embeddings:
            vector = row.embedding
            cells["embedding"] = "null" if vector is None else f"[{','.join(str(x) for x in vector)}]"
        cells["error"] = json.dumps(printable(row.error)) if row.error else "null"
        line = ",".join(f'"{key}":{value}' for key, value in cells.items())
        self.file.write(f"{{{line}}}\n".encode())


class JsonlJoiner(Joiner):
    def __init__(self, file: IO[bytes]):
        self.file = file

    def add(self, part: Path) -> Iterator[str]:
        with part.open("rb") as file:
            for line in file:
                self.file.write(line)
                yield json.loads(line)["path"]


def begins_as_jsonl(file: IO[bytes]) -> bool:
    line = file.readline(MAX_LINE)
    return line.startswith(b"{") and are_columns(list(json.loads(line)))


JSONL = Format(
    "jsonl", ".jsonl", JsonlWriter, begins_as_jsonl, (".ndjson",), open_joiner=JsonlJoiner, embeddings=True
)
