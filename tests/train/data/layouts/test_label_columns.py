"""Which columns of a label file are taken for labels, and which files are refused with the flag to give."""

import json
import re
from pathlib import Path

import pytest

from serve.contract.errors import UserError
from train.data.layouts.label_file import read

COUNT = 24
PETS = ("cat", "dog")


def label_file(root: Path, header: str, row: str, name: str = "labels.csv") -> Path:
    """Write rows, formatted with their number, and an image for each of them."""
    values = [
        {
            "i": i,
            "pet": PETS[i % 2],
            "bit": i % 2,
            "not": 1 - i % 2,
            "part": ("train", "val")[i % 4 == 3],
            "is": i % 4 == 3,
            "third": i % 3,
            "few": f"x{i * 2 // 3}",
        }
        for i in range(COUNT)
    ]
    (root / "images").mkdir(exist_ok=True)
    for i in range(COUNT):
        (root / "images" / f"{i}.jpg").touch()
    (root / name).write_text("\n".join([header, *(row.format(**each) for each in values)]))
    return root / name


WANTED = {f"images/{i}.jpg": PETS[i % 2] for i in range(COUNT)}


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("id,breed", "{i},{pet}"),
        ("Species,File Name", "{pet},{i}.jpg"),
        ("id,label,colour", "{i},{pet},{bit}"),
        ("id,Label,box_id", "{i},{pet},7{i}"),
        ("id,score,breed,url", "{i},{i}.25,{pet},http://host/{i}"),
        ("file,width,height,class,xmin,Roi.X1,bbox_y2", "{i}.jpg,64{bit},48{not},{pet},{bit},{bit},{not}"),
        ("id,cat,dog", "{i},{not},{bit}"),
        ("id,cat,dog,cow", "{i},{not}.0,{bit}.0,0.0"),
        ("id,cat,dog", "{i}.jpg,TRUE,FALSE|{bit}"),
        ("id,species,fold", "{i},{pet},{third}"),
        ("id,species,kfold", "{i},{pet},fold_{third}"),
        ("fn,y", "images/{i}.jpg,{pet}"),
        ("id,phase,area", "{i},{pet},{third}"),
        ("id,class_id,class_name", "{i},{bit},{pet}"),
        ("id,class_name,target", "{i},{pet},{bit}.0"),
        ("file,boxes.x,boxes.width,kind", "images/{i}.jpg,{third},{bit},{pet}"),
        ("id,cat,dog,is_test,width", "{i},{not},{bit},0,1"),
    ],
)
def test_labels_are_in_the_column_label_or_in_the_only_one_that_can_be(
    tmp_path: Path, header: str, row: str
) -> None:
    if "|" in row:
        row = row.replace("TRUE,FALSE|{bit}", "{not},{bit}")
    assert read(label_file(tmp_path, header, row)).labels == WANTED


@pytest.mark.parametrize(
    ("header", "row", "reason"),
    [
        (
            "id,breed,colour",
            "{i},{pet},{third}",
            r"'breed', 'colour'.*--columns id,breed .*--columns id,colour",
        ),
        ("fn,y,valid", "{i},{third},{is}", r"--columns fn,y .*--columns fn,valid"),
        ("id,species,sex", "{i},{few},{bit}", r"--columns id,sex .*--columns id,species"),
        ("id,area,is_new", "{i},a{third},{bit}", r"--columns id,area "),
        ("id,phase,colour", "{i},{pet},{third}", r"--columns id,phase "),
        ("id,breed,a,b", "{i},{pet},{bit},{not}", r"--columns id,breed or --columns id,a,b$"),
        ("the id,breed,sex", "{i},{pet},{third}", r"--columns 'the id,breed'"),
        ("id,score", "{i},{i}.5", "'score' holds measurements$"),
        ("id,label", "{i},{i}.5", "'label'.*24 "),
        ("id;price", "{i};1{bit},5", "'price' .*--columns id,price$"),
        ("id,text", "{i},a photo of {i}", r"'text'.*--columns id,text"),
        ("id,kind", "{i},cat", "'kind'"),
        ("id,a,b,c", "{i},{bit},{not},1", r"line 2 .*'b', 'c'.*--columns id,a"),
        ("id,a,b,c", "{i},1,{bit},{not}", r"line 2 .*'a', 'c'.*--columns id,a"),
        ("id,a,b,c", "{i},0,0,{bit}", None),
        ("id", "{i}", "column label"),
        ("id,breed,breed", "{i},{pet},{pet}", "breed twice"),
        ("ImageId,PredictionString", "{i},n0{bit} {i} 2 3 4 n0{bit} 1 2 3 {i}", "run: sed "),
        ("id,file,breed", "{i},IMG_{i}.jpg,{pet}", r"'id', 'file'.*--columns id,breed "),
        ("id,width,height", "{i},6{bit},4{bit}", "'width'"),
    ],
)
def test_what_cannot_be_the_label_is_refused_and_two_candidates_are_named(
    tmp_path: Path, header: str, row: str, reason: str | None
) -> None:
    file = label_file(tmp_path, header, row)
    if reason is None:
        assert len(read(file).labels) == COUNT
        return
    with pytest.raises(UserError, match=reason):
        read(file)


def test_columns_of_classes_may_be_called_as_sides_and_parts_are(tmp_path: Path) -> None:
    file = label_file(tmp_path, "", "")
    rows = [f"{i},{int(i % 3 == 0)},{int(i % 3 == 1)},{int(i % 3 == 2)}" for i in range(COUNT)]
    file.write_text("\n".join(["id,top,left,train", *rows]))
    found = read(file)
    assert found.labels == {f"images/{i}.jpg": ("top", "left", "train")[i % 3] for i in range(COUNT)}
    assert found.validation == {}


def test_columns_that_are_named_are_taken(tmp_path: Path) -> None:
    file = label_file(tmp_path, "id,breed,colour,a,b", "{i},{pet},{bit},{not},{bit}")
    assert read(file, columns="id,Breed").labels == WANTED
    assert set(read(file, columns="id,colour").labels.values()) == {"0", "1"}
    assert set(read(file, columns="id,a,b").labels.values()) == {"a", "b"}
    for columns, reason in (("id,beed", "'beed'.*'breed'"), ("id", "id,breed"), ("id,b,colour", "line 2 ")):
        with pytest.raises(UserError, match=reason):
            read(file, columns=columns)


def test_two_columns_of_different_images_are_an_error_that_names_the_flag(tmp_path: Path) -> None:
    file = label_file(tmp_path, "id,breed", "{i},{pet}")
    rows = [f"{i},{COUNT - 1 - i}.jpg,{PETS[i % 2]}" for i in range(COUNT)]
    file.write_text("\n".join(["id,file,breed", *rows]))
    with pytest.raises(UserError, match=r"--columns file,breed or --columns id,breed"):
        read(file)
    assert read(file, columns="id,breed").labels == WANTED


@pytest.mark.parametrize(
    ("header", "cell"),
    [
        ("id,breed,split", "{part}"),
        ("id,breed,subset", "{part}"),
        ("id,breed,is_valid", "{is}"),
        ("id,breed,is_test", "{is:d}"),
    ],
)
def test_a_column_of_parts_sets_images_aside(tmp_path: Path, header: str, cell: str) -> None:
    file = label_file(tmp_path, header, "{i},{pet}," + cell)
    found = read(file)
    assert len(found.labels) == 18
    assert found.validation == {path: WANTED[path] for i, path in enumerate(WANTED) if i % 4 == 3}
    assert read(file, "--val-data").labels == found.validation
    file.write_text(f"{file.read_text()}\n3.jpg,dog,")
    with pytest.raises(UserError, match="line 26"):
        read(file)


@pytest.mark.parametrize(
    "parts", [("train", "val", "holdout"), ("trn", "val", "tst"), ("training", "dev", "검증")]
)
def test_parts_have_the_names_that_folders_of_parts_have(tmp_path: Path, parts: tuple[str, ...]) -> None:
    file = label_file(tmp_path, "id,breed,subset", "{i},{pet},{part}")
    names = dict(zip(("train", "val", "test"), parts, strict=True))
    lines = [line.rpartition(",") for line in file.read_text().splitlines()]
    file.write_text("\n".join(f"{row},{names.get(part, part)}" for row, _, part in lines))
    assert set(read(file).validation) == {path for i, path in enumerate(WANTED) if i % 4 == 3}


def test_several_columns_of_parts_and_parts_that_are_numbers_are_refused(tmp_path: Path) -> None:
    file = label_file(tmp_path, "id,label,is_valid,is_test", "{i},{pet},{is:d},0")
    file.write_text(file.read_text().replace(",0,0", ",0,1", 1))
    with pytest.raises(UserError, match=r"is_valid and is_test.* 'split'"):
        read(file)
    file = label_file(tmp_path, "id,label,partition", "{i},{pet},{is:d}")
    with pytest.raises(UserError, match=r"line 2: .*partition holds '0'"):
        read(file)
    assert read(label_file(tmp_path, "id,label,fold", "{i},{pet},{is:d}")).validation == {}


@pytest.mark.parametrize("name", ["subset", "set", "phase", "fold"])
def test_a_part_of_an_unknown_name_is_an_error(tmp_path: Path, name: str) -> None:
    file = label_file(tmp_path, f"id,label,{name}", "{i},{pet},{part}")
    file.write_text(file.read_text().replace(",val", ",elsewhere"))
    with pytest.raises(UserError, match=rf"column {name} holds 'elsewhere'.*another name"):
        read(file)


def test_an_unknown_part_beside_train_and_val_is_an_error_whatever_the_column_is_called(
    tmp_path: Path,
) -> None:
    file = label_file(tmp_path, "id,label,ml_use", "{i},{pet},{part}")
    assert read(file).validation
    file.write_text(file.read_text().replace(",train", ",unassigned", 1))
    with pytest.raises(UserError, match=r"'unassigned'.*remove the column"):
        read(file)


def test_a_flag_that_would_set_most_images_aside_is_refused(tmp_path: Path) -> None:
    file = label_file(tmp_path, "id,breed,is_valid", "{i},{pet},1")
    file.write_text(file.read_text().replace("cat,1", "cat,0", 3))
    with pytest.raises(UserError, match=r"is_valid, 21 rows validate and 3 train.*column split"):
        read(file)


@pytest.mark.parametrize(
    ("name", "cell"), [("PatientID", "p{third}"), ("lesion id", "{third}"), ("fold", "{third}")]
)
def test_a_column_of_patients_is_warned_of_unless_a_column_of_parts_keeps_them_apart(
    tmp_path: Path, name: str, cell: str
) -> None:
    (warning,) = read(label_file(tmp_path, f"id,label,{name}", f"{{i}},{{pet}},{cell}")).warnings
    assert repr(name) in warning
    assert "column split" in warning
    assert read(label_file(tmp_path, f"id,label,{name}", "{i},{pet},x{i}")).warnings == []
    file = label_file(tmp_path, f"id,label,{name},split", f"{{i}},{{pet}},{cell},{{part}}")
    assert read(file).warnings == []


def test_a_first_line_without_names_is_a_row(tmp_path: Path) -> None:
    file = label_file(tmp_path, "", "{i},{pet}")
    file.write_text(file.read_text().lstrip())
    assert read(file).labels == WANTED
    assert read(file, columns="1,2").labels == WANTED
    file.write_text(file.read_text().replace("0,cat", "0,emu", 1))
    with pytest.raises(UserError, match=r"'0,emu'.*path,label"):
        read(file)


@pytest.mark.parametrize("header", ["", "name kind\n"])
def test_words_are_columns_where_the_whole_line_names_no_image(tmp_path: Path, header: str) -> None:
    file = label_file(tmp_path, "", "{i} {pet}")
    file.write_text(header + "".join(f"{i} {PETS[i % 2]}{' of mine' * (i > 9)}\n" for i in range(COUNT)))
    assert set(read(file).labels.values()) == {"cat", "dog", "cat of mine", "dog of mine"}


def test_columns_of_a_list_without_names_are_numbered_as_the_refusal_has_it(tmp_path: Path) -> None:
    file = label_file(tmp_path, "", "{i}")
    file.write_text("\n".join(f"{i} {1 + i % 2} {1 + i % 3} 1" for i in range(COUNT)))
    with pytest.raises(UserError, match="--columns 1,2 "):
        read(file)
    assert set(read(file, columns="1,3").labels.values()) == {"1", "2", "3"}


def test_a_list_of_images_without_labels_has_their_folders(tmp_path: Path) -> None:
    for i in range(COUNT):
        path = tmp_path / "images" / PETS[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "train.txt").write_text("\n".join(f"{PETS[i % 2]}/{i}" for i in range(COUNT)))
    wanted = {f"images/{PETS[i % 2]}/{i}.jpg": PETS[i % 2] for i in range(COUNT)}
    assert read(tmp_path / "train.txt").labels == wanted
    (tmp_path / "images.txt").write_text(
        "\n".join(f"{100 + i} {PETS[i % 2]}/{i}.jpg" for i in range(COUNT))
    )
    assert read(tmp_path / "images.txt").labels == wanted


@pytest.mark.parametrize(
    ("folder", "labels"),
    [
        ("{part}/{pet}", {"cat", "dog"}),
        ("/{pet}", {"cat", "dog"}),
        ("{part}2017", None),
        ("scene_{third}/{pet}", None),
        ("{third}/{pet}", None),
    ],
)
def test_folders_of_a_list_are_classes_unless_they_are_parts_or_below_several_others(
    tmp_path: Path, folder: str, labels: set[str] | None
) -> None:
    names = [
        folder.format(part=("train", "val")[i % 4 == 3], pet=PETS[i % 2], third="abc"[i % 3])
        for i in range(24)
    ]
    lines = [f"{name}/{i}.jpg" for i, name in enumerate(names)]
    for line in lines:
        path = tmp_path / "images" / line.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "all.txt").write_text("\n".join(lines))
    if labels:
        assert set(read(tmp_path / "all.txt").labels.values()) == labels
        return
    with pytest.raises(UserError, match="path,label"):
        read(tmp_path / "all.txt")


def test_labels_of_several_boxes_of_an_image_are_one_if_they_are_the_same(tmp_path: Path) -> None:
    file = label_file(tmp_path, "", "")
    records = [
        {
            "image": f"{i}.jpg",
            "annotations": [
                {"label": PETS[i % 2], "coordinates": {"x": i % 5 + j}} for j in range(1 + i % 2)
            ],
        }
        for i in range(COUNT)
    ]
    file.write_text(json.dumps(records))
    assert read(file).labels == WANTED
    records[1]["annotations"][0]["label"] = "cat"
    file.write_text(json.dumps(records, indent=1))
    with pytest.raises(UserError, match=r"line 2: .*several"):
        read(file)


def test_several_labels_in_one_cell_are_refused(tmp_path: Path) -> None:
    file = label_file(tmp_path, "", '{{"image": "{i}.jpg", "tags": ["{pet}"]}}', "labels.jsonl")
    file.write_text(file.read_text().lstrip())
    assert read(file).labels == WANTED
    file.write_text(file.read_text().replace('["cat"]', '["cat", "old"]'))
    with pytest.raises(UserError, match="line 1"):
        read(file)


def test_one_json_object_is_not_shown_whole(tmp_path: Path) -> None:
    label_file(tmp_path, "", "")
    (tmp_path / "a.json").write_text(
        json.dumps({"images": [{"id": i, "file": f"{i}.jpg"} for i in range(99)]})
    )
    with pytest.raises(UserError, match="path,label") as raised:
        read(tmp_path / "a.json")
    assert len(str(raised.value)) < 600
    (tmp_path / "a.json").write_text(json.dumps({"cat": ["0", "2"], "dog": ["1", "3"]}, indent=1))
    with pytest.raises(UserError, match="path,label"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_object_of_images_and_their_labels_is_read(tmp_path: Path, indent: int | None) -> None:
    file = label_file(tmp_path, "", "")
    file.write_text(json.dumps({f"{i}.jpg": PETS[i % 2] for i in range(COUNT)}, indent=indent))
    assert read(file).labels == WANTED
    kinds = {f"{i}.jpg": {"kind": PETS[i % 2], "split": "train"} for i in range(COUNT)}
    file.write_text(json.dumps(kinds, indent=indent))
    assert read(file).labels == WANTED


@pytest.mark.parametrize("suffix", ["zip", "dcm"])
def test_what_is_in_place_of_the_images_is_named(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"train.{suffix}").touch()
    for columns in ("", "id,breed"):
        (tmp_path / "labels.csv").write_text("id,breed\n1,cat\n2,dog\n")
        with pytest.raises(UserError, match=rf"\.{suffix} 1"):
            read(tmp_path / "labels.csv", columns=columns)


def test_very_many_columns_of_numbers_are_passed_over(tmp_path: Path) -> None:
    header = "id,species," + ",".join(f"margin{i}" for i in range(200))
    file = label_file(tmp_path, header, "{i},{pet}," + ",".join(["0.{bit}"] * 100 + ["9{i}"] * 100))
    assert read(file).labels == WANTED
    file.write_text(re.sub(r"(?m)^\d+,", "x,", file.read_text()))
    with pytest.raises(UserError, match="'id' 'x'"):
        read(file)


def test_rows_that_repeat_are_counted_and_contradictions_refused(tmp_path: Path) -> None:
    file = label_file(tmp_path, "filename,class,xmin", "{i}.jpg,{pet},{i}")
    text = file.read_text()
    file.write_text(f"{text}\n3.jpg,dog,99\n4.jpg,cat,99")
    assert "2 rows" in read(file).layout
    file.write_text(f"{text}\n3.jpg,cat,99")
    with pytest.raises(UserError, match=r"line 26: 'images/3.jpg' .*'dog' .*'cat'"):
        read(file)
