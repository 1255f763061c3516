"""Images below a folder on disk, or below a prefix in an object store."""

import os
from collections.abc import Iterator

from serve import storage
from serve.contract.archive import file_stamp
from serve.contract.images import read_image_file
from serve.contract.listing import has_image_suffix, system_folder, walk_images
from serve.inputs.base import Inputs
from serve.inputs.inventory import Entry


class LocalFolder(Inputs):
    def __init__(self, root: str):
        super().__init__()
        self.root = root

    def entries(self) -> Iterator[Entry]:
        for name, kind, problem in walk_images(self.root):
            if kind == "system":
                self.left_out.system.add(name)
            elif kind == "other":
                self.left_out.count(name)
            else:
                yield Entry(name, problem=problem)

    def read(self, entry: Entry) -> bytes:
        return read_image_file(os.path.join(self.root, entry.name))

    def stamp(self, entry: Entry) -> str:
        return file_stamp(os.path.join(self.root, entry.name))


class RemoteFolder(Inputs):
    def __init__(self, url: str):
        super().__init__()
        self.url = url

    def entries(self) -> Iterator[Entry]:
        for file in storage.list_files(self.url):
            if folder := system_folder(file.name):
                self.left_out.system.add(folder.rstrip("/"))
            elif not has_image_suffix(file.name):
                self.left_out.count(file.name)
            else:
                yield Entry(file.name, location=file.stamp)

    def read(self, entry: Entry) -> bytes:
        return storage.read_object(f"{self.url}/{entry.name}")

    def stamp(self, entry: Entry) -> str:
        return entry.location  # as it was listed: a look at each object would take longer
