"""Tree of folders and the images in them, built once from paths."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from train.data.layouts.flat import labels_of


@dataclass
class Folder:
    """Images directly in a folder, and the folders in it that lead to images."""

    images: list[str] = field(default_factory=list)
    folders: dict[str, "Folder"] = field(default_factory=dict)

    @classmethod
    def of(cls, paths: Iterable[str]) -> "Folder":
        """Build the tree of `paths`, which are relative to the folder."""
        root = cls()
        known = {"": root}
        for path in paths:
            parent, _, image = path.rpartition("/")
            if parent not in known:
                known[parent] = root
                for name in parent.split("/"):
                    known[parent] = known[parent].folders.setdefault(name, cls())
            known[parent].images.append(image)
        return root

    def unwrap(self) -> tuple[str, "Folder"]:
        """Return the path to the first folder that holds images or several folders, and that folder."""
        parents, folder = [], self
        while len(folder.folders) == 1 and not folder.images:
            ((name, folder),) = folder.folders.items()
            parents.append(name)
        return "/".join(parents), folder

    def image_paths(self) -> list[str]:
        """Paths of all images below the folder, relative to it."""
        below = [(name, path) for name, folder in self.folders.items() for path in folder.image_paths()]
        return self.images + [f"{name}/{path}" for name, path in below]

    def class_names(self) -> set[str]:
        """Names of the classes if this were the folder to train on; empty if there are fewer than two."""
        _, folder = self.unwrap()
        names = set(folder.folders)
        if folder.images:
            labels = Counter(labels_of(folder.images)[0].values())
            names = {label for label in labels if label}
            if len(names) < len(labels) or min(labels.values()) < 2:
                return set()
        return names if len(names) > 1 else set()
