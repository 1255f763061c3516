"""Labelled data sets as contests, hubs and annotation tools publish them, drawn small.

Each function of LAYOUTS draws one into a folder and returns what --data names and, for each image that is
to be trained on, its label.
"""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from train_data import draw

Labels = dict[str, str]
Layout = Callable[[Path], tuple[Path, Labels]]
LAYOUTS: dict[str, Layout] = {}
COLUMNS = {"ham10000": "image_id,dx"}
"""Value of --columns, for the layouts that need it."""
COUNT = 12


def layout(function: Layout) -> Layout:
    LAYOUTS[function.__name__] = function
    return function


def write(file: Path, header: str, rows: Iterable[Sequence[object]], delimiter: str = ",") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as text:
        text.write(f"{header}\n" if header else "")
        csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return file


def draw_all(root: Path, labels: Labels) -> None:
    for i, path in enumerate(labels):
        draw(root / path, sorted(set(labels.values())).index(labels[path]), i)


def labelled(pattern: str, classes: Sequence[str], count: int = COUNT) -> Labels:
    """Return paths by a pattern of their number -> the classes in turn."""
    return {pattern.format(i): classes[i % len(classes)] for i in range(count)}


def stems(labels: Labels) -> list[tuple[str, str]]:
    return [(Path(path).stem, label) for path, label in labels.items()]


@layout
def dog_breed(root: Path) -> tuple[Path, Labels]:
    labels = labelled("train/{:06x}ab.jpg", ("beagle", "boston_bull", "whippet"))
    draw_all(root, labels)
    draw(root / "test" / "00beef.jpg")
    write(root / "sample_submission.csv", "id,beagle,boston_bull,whippet", [("00beef", 0.3, 0.3, 0.4)])
    return write(root / "labels.csv", "id,breed", stems(labels)), labels


@layout
def cassava(root: Path) -> tuple[Path, Labels]:
    names = {"0": "Bacterial Blight", "1": "Brown Streak", "2": "Healthy"}
    labels = labelled("train_images/{:09}.jpg", tuple(names.values()))
    numbers = {name: number for number, name in names.items()}
    draw_all(root, labels)
    draw(root / "test_images" / "2216849948.jpg")
    (root / "label_num_to_disease_map.json").write_text(json.dumps(names))
    rows = [(Path(path).name, numbers[label]) for path, label in labels.items()]
    return write(root / "train.csv", "image_id,label", rows), labels


@layout
def aptos(root: Path) -> tuple[Path, Labels]:
    labels = labelled("train_images/{:012x}.png", ("0", "1", "2", "3", "4"), 20)
    draw_all(root, labels)
    draw(root / "test_images" / "0005cfc8afb6.png")
    return write(root / "train.csv", "id_code,diagnosis", stems(labels)), labels


@layout
def histopathologic(root: Path) -> tuple[Path, Labels]:
    labels = labelled("train/{:040x}.tif", ("0", "1"))
    draw_all(root, labels)
    draw(root / "test" / "0b2ea2a822ad23fdb1b5dd26653da899fbd2c0d5.tif")
    return write(root / "train_labels.csv", "id,label", stems(labels)), labels


@layout
def plant_pathology_2020(root: Path) -> tuple[Path, Labels]:
    classes = ("healthy", "multiple_diseases", "rust", "scab")
    labels = labelled("images/Train_{}.jpg", classes)
    draw_all(root, labels)
    draw(root / "images" / "Test_0.jpg")
    rows = [(stem, *(int(label == name) for name in classes)) for stem, label in stems(labels)]
    return write(root / "train.csv", f"image_id,{','.join(classes)}", rows), labels


@layout
def plant_pathology_2021(root: Path) -> tuple[Path, Labels]:
    labels = labelled("train_images/{:016x}.jpg", ("healthy", "scab frog_eye_leaf_spot", "rust"))
    draw_all(root, labels)
    rows = [(Path(path).name, label) for path, label in labels.items()]
    return write(root / "train.csv", "image,labels", rows), labels


@layout
def paddy(root: Path) -> tuple[Path, Labels]:
    classes = ("blast", "hispa", "normal")
    labels = {f"train_images/{classes[i % 3]}/{100330 + i}.jpg": classes[i % 3] for i in range(COUNT)}
    draw_all(root, labels)
    draw(root / "test_images" / "200001.jpg")
    rows = [
        (Path(path).name, label, ("ADT45", "KarnatakaPonni")[i // 2 % 2], 45 + 5 * (i % 4))
        for i, (path, label) in enumerate(labels.items())
    ]
    return write(root / "train.csv", "image_id,label,variety,age", rows), labels


@layout
def cifar10(root: Path) -> tuple[Path, Labels]:
    labels = {f"train/{i + 1}.png": ("frog", "truck", "deer")[i % 3] for i in range(COUNT)}
    draw_all(root, labels)
    for i in range(20):
        draw(root / "test" / f"{i + 1}.png", 0, 100 + i)
    return write(root / "trainLabels.csv", "id,label", stems(labels)), labels


@layout
def isic_2019(root: Path) -> tuple[Path, Labels]:
    classes = ("MEL", "NV", "BCC")
    labels = labelled("ISIC_2019_Training_Input/ISIC_{:07}.jpg", classes)
    draw_all(root, labels)
    rows = [(stem, *(float(label == name) for name in classes), 0.0) for stem, label in stems(labels)]
    return write(
        root / "ISIC_2019_Training_GroundTruth.csv", f"image,{','.join(classes)},UNK", rows
    ), labels


@layout
def ham10000(root: Path) -> tuple[Path, Labels]:
    labels = {f"HAM10000_images_part_{1 + i // 6}/ISIC_{i:07}.jpg": ("nv", "mel")[i % 2] for i in range(12)}
    draw_all(root, labels)
    rows = [
        (
            f"HAM_{i // 2:07}",
            stem,
            label,
            ("histo", "follow_up")[i // 3 % 2],
            50.0 + 5 * (i % 3),
            "male",
            "back",
        )
        for i, (stem, label) in enumerate(stems(labels))
    ]
    header = "lesion_id,image_id,dx,dx_type,age,sex,localization"
    return write(root / "HAM10000_metadata.csv", header, rows), labels


@layout
def gtsrb(root: Path) -> tuple[Path, Labels]:
    labels = {f"GTSRB/Training/{i % 2:05}/{i:05}_0.ppm": str(i % 2) for i in range(COUNT)}
    draw_all(root, labels)
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
    rows = [
        (Path(p).name, 24 + i, 20 + i % 3, 5, 5, 20 + i % 3, 15, c)
        for i, (p, c) in enumerate(labels.items())
    ]
    return write(root / "GTSRB" / "GT-final.csv", header, rows, ";"), {
        path.removeprefix("GTSRB/"): label for path, label in labels.items()
    }


@layout
def leaf_classification(root: Path) -> tuple[Path, Labels]:
    labels = {f"images/{i + 1}.jpg": ("Acer_Opalus", "Quercus_Ilex")[i % 2] for i in range(COUNT)}
    draw_all(root, labels)
    header = "id,species," + ",".join(f"margin{i}" for i in range(150))
    rows = [
        (stem, label, *((int(stem) * 7 + j) % 100 / 1000 for j in range(150)))
        for stem, label in stems(labels)
    ]
    return write(root / "train.csv", header, rows), labels


@layout
def hugging_face_metadata(root: Path) -> tuple[Path, Labels]:
    labels = labelled("train/{:04}.png", ("cat", "dog"))
    draw_all(root, labels)
    names = {Path(path).name: label for path, label in labels.items()}
    return write(root / "train" / "metadata.csv", "file_name,label", names.items()), names


@layout
def hugging_face_jsonl(root: Path) -> tuple[Path, Labels]:
    labels = labelled("{:04}.png", ("cat", "dog"))
    draw_all(root, labels)
    lines = [json.dumps({"file_name": path, "label": label}) for path, label in labels.items()]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root / "metadata.jsonl", labels


@layout
def roboflow_classes(root: Path) -> tuple[Path, Labels]:
    classes = ("blue bike", "car", "van")
    labels = labelled("train/{}_png.rf.0a{:0}f.jpg".replace("{:0}", "b"), classes)
    draw_all(root, labels)
    rows = [
        (Path(path).name, *(f" {int(label == name)}" for name in classes)) for path, label in labels.items()
    ]
    header = "filename, blue bike, car, van"
    return write(root / "train" / "_classes.csv", header, rows), {
        Path(path).name: label for path, label in labels.items()
    }


@layout
def roboflow_annotations(root: Path) -> tuple[Path, Labels]:
    labels = labelled("{}_jpg.rf.77.jpg", ("helmet", "head"))
    draw_all(root, labels)
    boxes = [
        (path, 640, 480, label, 10 * j, 5, 80 + i, 90)
        for i, (path, label) in enumerate(labels.items())
        for j in range(1 + i % 2)
    ]
    return write(
        root / "_annotations.csv", "filename,width,height,class,xmin,ymin,xmax,ymax", boxes
    ), labels


@layout
def label_studio(root: Path) -> tuple[Path, Labels]:
    labels = labelled("upload/1/8c0f-img{}.jpg", ("Cat", "Dog"))
    draw_all(root, labels)
    rows = [
        (f"/data/{path}", 100 + i, 1, i, label, f"2024-05-0{1 + i % 9}T10:00:{i:02}Z", 3.25 + i)
        for i, (path, label) in enumerate(labels.items())
    ]
    header = "image,id,annotator,annotation_id,choice,created_at,lead_time"
    return write(root / "project-1.csv", header, rows), labels


@layout
def imagenet_val_list(root: Path) -> tuple[Path, Labels]:
    labels = labelled("val/ILSVRC2012_val_{:08}.JPEG", ("65", "970", "230"))
    for i, path in enumerate(labels):
        draw(root / path, i % 3, i)
    lines = [f"{Path(path).name} {label}" for path, label in labels.items()]
    (root / "val.txt").write_text("\n".join(lines) + "\n")
    return root / "val.txt", labels


@layout
def caffe_list(root: Path) -> tuple[Path, Labels]:
    labels = {f"train/n0{i % 2}/n0{i % 2}_{i} b.jpg": str(i % 2) for i in range(COUNT)}
    draw_all(root, labels)
    (root / "meta").mkdir()
    lines = [f"{path.removeprefix('train/')} {label}" for path, label in labels.items()]
    (root / "meta" / "train.txt").write_text("\r\n".join(lines))
    return root / "meta" / "train.txt", {f"../{path}": label for path, label in labels.items()}


@layout
def pandas_from_windows(root: Path) -> tuple[Path, Labels]:
    labels = labelled("Images/IMG_{}.JPG", ("ok", "scratch"))
    draw_all(root, labels)
    rows = [
        (i, f"C:\\Users\\Ann\\set\\images\\img_{i}.jpg", label, 0.5 + i)
        for i, label in enumerate(labels.values())
    ]
    file = write(root / "export.csv", "\tImage File\tDefect Type\tScore", rows, "\t")
    file.write_bytes(file.read_text().replace("\n", "\r\n").encode("utf-16"))
    return file, labels


@layout
def split_column(root: Path) -> tuple[Path, Labels]:
    labels = labelled("images/{}.png", ("cat", "dog"), 20)
    draw_all(root, labels)
    parts = ["train"] * 12 + ["valid"] * 4 + ["test"] * 4
    rows = [
        (Path(path).name, label, part) for (path, label), part in zip(labels.items(), parts, strict=True)
    ]
    return write(root / "all.csv", "file,species,subset", rows), dict(list(labels.items())[:12])


@layout
def plant_seedlings(root: Path) -> tuple[Path, Labels]:
    classes = ("Charlock", "Common Chickweed", "Maize")
    labels = {f"{classes[i % 3]}/{i:08x}f.png": classes[i % 3] for i in range(COUNT)}
    draw_all(root / "train", labels)
    draw(root / "test" / "0021e90e4.png")
    write(root / "sample_submission.csv", "file,species", [("0021e90e4.png", "Sugar beet")])
    return root / "train", labels
