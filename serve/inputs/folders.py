"""Images below a folder on disk, or below a prefix in an object store."""

from collections.abc import Iterator

from serve import storage
from serve.contract.listing import has_image_suffix, system_folder, walk_images
from serve.inputs.base import Inputs
from serve.inputs.inventory import Entry


class LocalFolder(Inputs):
    def entries(self) -> Iterator[Entry]:
        for name, kind, problem in walk_images(self.base):
            if kind == "system":
                self.left_out.system.add(name)
            elif kind == "other":
                self.left_out.count(name)
            else:
                yield Entry(name, problem=problem)


class RemoteFolder(Inputs):
    def entries(self) -> Iterator[Entry]:
        for file in storage.list_files(self.base):
            if folder := system_folder(file.name):
                self.left_out.system.add(folder.rstrip("/"))
            elif not has_image_suffix(file.name):
                self.left_out.count(file.name)
            else:
                yield Entry(file.name, location=file.stamp)

    def read(self, entry: Entry) -> bytes:
        return storage.read_object(f"{self.base}/{entry.name}")

    def stamp(self, entry: Entry) -> str:
        return entry.location  # as it was listed: a look at each object would take longer
