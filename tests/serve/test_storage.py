"""Objects over real sockets: an S3 server and an HTTP server on localhost, well behaved and not."""

import io
import re
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from s3 import s3_server
from serve_model import build_model, colour_of, encode, probabilities_for, solid

from serve import main as serve_main
from serve import storage
from serve.contract.errors import UserError
from serve.inputs.inventory import Entry
from serve.inputs.sources import Source, open_source
from serve.merge import main as merge_main

PNG = {f"{number}.png": encode(solid(colour_of(number)), "PNG") for number in range(6)}


def tar_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def contents(source: Source) -> dict[str, bytes]:
    return {entry.name: source.read(entry) for entry in source.inventory.entries()}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.01)


# -- S3 --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """s3://bucket of a server on localhost, with images, a list, a manifest and tar files."""
    with s3_server() as client:
        objects = {f"in/{name}": data for name, data in PNG.items()}
        objects |= {"in/deep/er/6.png": PNG["0.png"], "in/notes.txt": b"x", "in/empty.png": b""}
        objects |= {"in/고양이 1%.png": PNG["1.png"], "lists/l.txt": b"../in/0.png\ns3://bucket/in/1.png\n"}
        objects |= {"lists/m.csv": b"path\n../in/2.png\n", "index.png": PNG["5.png"]}
        objects |= {"nas/a.png": PNG["0.png"], "nas/@eaDir/a.png/thumb.png": PNG["0.png"]}
        objects |= {"made/by/hand/": b"", "made/by/hand/0.png": PNG["0.png"]}
        objects |= {
            f"tars/{n:02}.tar": tar_of({f"{n}.png": PNG[f"{n}.png"], "a.cls": b"1"}) for n in range(3)
        }
        for key, data in objects.items():
            client.put_object(Bucket="bucket", Key=key, Body=data)
        yield "s3://bucket"


def test_a_folder_of_a_bucket(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in (f"{bucket}/in", f"{bucket}/in/"):
        source = open_source(url)
        names = [entry.name for entry in source.inventory.entries()]
        assert names == sorted([*PNG, "deep/er/6.png", "empty.png", "고양이 1%.png"])
        assert source.ignored == 1
    assert source.read(Entry("3.png")) == PNG["3.png"]
    assert source.read(Entry("고양이 1%.png")) == PNG["1.png"]
    with pytest.raises((UserError, OSError)):
        source.read(Entry("empty.png"))
    with pytest.raises(FileNotFoundError):
        source.read(Entry("gone.png"))


def test_a_bucket_is_listed_page_by_page(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = storage.filesystem(bucket)
    honest = files.call_s3
    pages = 0

    def call_s3(method: str, **arguments: Any) -> Any:
        nonlocal pages
        pages += 1
        return honest(method, MaxKeys=2, **arguments)

    monkeypatch.setattr(files, "call_s3", call_s3)
    names = [file.name for file in storage.list_files(f"{bucket}/in")]
    assert len(names) == len(set(names)) == 10
    assert pages == 5


def test_a_key_that_s3fs_would_take_for_another_is_an_error(bucket: str) -> None:
    with pytest.raises(ValueError, match=r"\?versionId="):
        open_source(f"{bucket}/in").read(Entry("3.png?versionId=null"))


def test_what_consoles_call_a_folder_is_no_object(bucket: str) -> None:
    """An empty object whose name ends in a slash."""
    assert [file.name for file in storage.list_files(f"{bucket}/made")] == ["by/hand/0.png"]


def test_a_copy_that_breaks_off_leaves_no_file(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get_file(url: str, path: str) -> None:
        Path(path).write_bytes(PNG["0.png"][:20])
        raise OSError("connection reset")

    monkeypatch.setattr(storage.filesystem(bucket), "get_file", get_file)
    (tmp_path / "old.png").write_bytes(PNG["5.png"])
    for name in ("old.png", "new.png"):
        with pytest.raises(storage.OutageError, match="connection reset"):
            storage.get_file(f"{bucket}/in/0.png", tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"]
    assert (tmp_path / "old.png").read_bytes() == PNG["5.png"]


def test_system_folders_of_a_bucket_hold_no_inputs(bucket: str) -> None:
    for url in (f"{bucket}/nas", f"{bucket}/nas/**/*.png"):
        source = open_source(url)
        assert [entry.name for entry in source.inventory.entries()] == ["a.png"]
        assert source.system == {"@eaDir": 1}


def test_tar_files_in_a_bucket(bucket: str) -> None:
    expected = {f"{n:02}.tar/{n}.png": PNG[f"{n}.png"] for n in range(3)}
    for pattern in ("tars/*.tar", "tars/{00..02}.tar"):
        source = open_source(f"{bucket}/{pattern}")
        assert contents(source) == expected
        assert source.ignored == 3
    assert contents(open_source(f"{bucket}/tars/01.tar")) == {"01.tar/1.png": PNG["1.png"]}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("lists/l.txt", {"../in/0.png": "0.png", "s3://bucket/in/1.png": "1.png"}),
        ("lists/m.csv", {"../in/2.png": "2.png"}),
        ("index.png", {"index.png": "5.png"}),
    ],
)
def test_lists_and_single_objects(bucket: str, url: str, expected: dict[str, str]) -> None:
    assert contents(open_source(f"{bucket}/{url}")) == {n: PNG[png] for n, png in expected.items()}


@pytest.mark.parametrize("url", ["s3://missing-bucket/in", "s3://bucket/nothing/here"])
def test_a_folder_that_is_not_there_is_an_error_that_names_it(
    bucket: str, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_model(tmp_path / "model.onnx")
    output = str(tmp_path / "out.csv")
    assert serve_main.main(["--model", str(model), "--images", url, "--output", output]) == 2
    assert url in capsys.readouterr().err


def test_a_bucket_is_scored_like_a_folder(bucket: str, tmp_path: Path) -> None:
    model = build_model(tmp_path / "model.onnx")
    (tmp_path / "in" / "deep" / "er").mkdir(parents=True)
    for name, data in {**PNG, "deep/er/6.png": PNG["0.png"], "고양이 1%.png": PNG["1.png"]}.items():
        (tmp_path / "in" / name).write_bytes(data)
    for output, images in (("storage.csv", f"{bucket}/in"), ("local.csv", str(tmp_path / "in"))):
        arguments = ["--model", str(model), "--images", images, "--output", str(tmp_path / output)]
        assert serve_main.main(arguments) == 0
    rows = (tmp_path / "storage.csv").read_bytes().splitlines(keepends=True)
    (empty,) = [row for row in rows if row.startswith(b"empty.png,")]
    rows.remove(empty)
    assert b"".join(rows) == (tmp_path / "local.csv").read_bytes()


# -- HTTP ------------------------------------------------------------------------------------------------

Answer = Callable[[BaseHTTPRequestHandler], None]


class Handler(BaseHTTPRequestHandler):
    """/files/NAME answers with ranges; /plain/NAME without; the others as `answers` says."""

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]] = {}
    answers: ClassVar[dict[str, Answer]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        kind, _, name = self.path[1:].partition("?")[0].partition("/")
        self.asked.append(self.path)
        if answer := self.answers.get(name if kind == "odd" else ""):
            answer(self)
        elif name not in self.files:
            self.reply(404, b"")
        else:
            data, wanted = self.files[name], re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if wanted is None or kind == "plain":
                self.reply(200, data, {"Accept-Ranges": "none"} if kind == "plain" else {})
            else:
                first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
                body = data[first : last + 1]
                length = {"Content-Range": f"bytes {first}-{first + len(body) - 1}/{len(data)}"}
                self.reply(206, body, length)

    do_HEAD = do_GET  # noqa: N815

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (
            {"Content-Length": str(len(body)), "Accept-Ranges": "bytes"} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.files = {**PNG, "x.tar": tar_of(PNG), "l.txt": b"0.png\n1.png\n"}
    Handler.answers, Handler.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_images_lists_and_tar_files_over_http(server: str) -> None:
    assert contents(open_source(f"{server}/files/0.png")) == {"0.png": PNG["0.png"]}
    assert contents(open_source(f"{server}/plain/0.png")) == {"0.png": PNG["0.png"]}
    assert contents(open_source(f"{server}/files/l.txt")) == {n: PNG[n] for n in ("0.png", "1.png")}
    assert contents(open_source(f"{server}/files/x.tar")) == {f"x.tar/{n}": PNG[n] for n in PNG}
    assert list(contents(open_source(f"{server}/files/{{3..4}}.png"))) == ["3.png", "4.png"]


def test_a_list_on_disk_can_name_urls(server: str, tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text(f"{server}/files/2.png\n")
    assert contents(open_source(str(tmp_path / "l.txt"))) == {f"{server}/files/2.png": PNG["2.png"]}


SIGNED = "X-Amz-Credential=AKIA/2026/s3&X-Amz-Date=1&X-Amz-Signature=SECRET"


def test_presigned_urls_are_what_their_paths_say_and_rows_do_not_tell_the_secret(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = f"{server.replace('//', '//user:SECRET@')}/files"
    assert contents(open_source(f"{files}/x.tar?{SIGNED}")) == {f"x.tar/{n}": PNG[n] for n in PNG}
    assert contents(open_source(f"{files}/l.txt?sig=SECRET")) == {n: PNG[n] for n in ("0.png", "1.png")}
    assert contents(open_source(f"{files}/{{3..4}}.png?{SIGNED}")) == {
        n: PNG[n] for n in ("3.png", "4.png")
    }
    model, images, output = build_model(tmp_path / "model.onnx"), tmp_path / "l.txt", tmp_path / "out.csv"
    urls = [f"{files}/0.png?{SIGNED}", f"{files}/0.png?id=2&{SIGNED}", f"{files}/missing.png?{SIGNED}"]
    images.write_text("\n".join([*urls, urls[0].replace("Date=1", "Date=2")]))
    arguments = ["--model", str(model), "--images", str(images), "--output", str(output)]
    assert serve_main.main([*arguments, "--shard", "0/1", "--output", str(tmp_path / "parts")]) == 0
    assert serve_main.main(arguments) == 0
    rows = output.read_text().splitlines()[1:]
    names = ["0.png", "0.png?id=2", "missing.png"]
    assert [row.split(",")[0] for row in rows] == [f"{server}/files/{name}" for name in names]
    assert [row.endswith(",") for row in rows] == [True, True, False]
    written = [path.read_text() for path in tmp_path.rglob("*.csv*")]
    for text in (*written, *capsys.readouterr()):
        assert "SECRET" not in text
        assert "AKIA" not in text


def test_a_model_at_a_presigned_url_is_named_without_its_secret(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose signature is longer than a file's name may be."""
    model = build_model(tmp_path / "model.onnx")
    Handler.files |= {"model.onnx": model.read_bytes(), "broken.onnx": b"none"}
    signed = f"{SIGNED}&X-Amz-Security-Token={'SECRET' * 99}/x"
    for name, code in (("model.onnx", 0), ("broken.onnx", 2)):
        arguments = ["--model", f"{server}/files/{name}?{signed}", "--images", f"{server}/files/0.png"]
        assert serve_main.main([*arguments, "--output", str(tmp_path / "out.csv")]) == code
    printed = capsys.readouterr()
    assert f"error: {server}/files/broken.onnx" in printed.err
    for text in printed:
        assert "SECRET" not in text
        assert "AKIA" not in text


def test_urls_that_only_a_secret_tells_apart_are_refused(server: str, tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("".join(f"{server}/files/0.png?token=SECRET{n}\n" for n in range(2)))
    with pytest.raises(ValueError, match=r"files/0\.png") as raised:
        open_source(str(tmp_path / "l.txt"))
    assert "SECRET" not in str(raised.value)


def test_one_request_for_each_image(server: str) -> None:
    source = open_source(f"{server}/files/l.txt")
    Handler.asked.clear()
    contents(source)
    assert sorted(Handler.asked) == ["/files/0.png", "/files/1.png"]


def test_a_tar_file_needs_a_server_that_reads_ranges(server: str) -> None:
    with pytest.raises(ValueError, match=r"plain/x\.tar.*download"):
        open_source(f"{server}/plain/x.tar")


def breaks(times: int) -> Answer:
    """Cut the answers of several kilobytes short, so many of them."""
    left = [times]

    def answer(handler: BaseHTTPRequestHandler) -> None:
        assert isinstance(handler, Handler)
        data = Handler.files["x.tar"]
        wanted = re.match(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        first, last = (int(wanted[1]), int(wanted[2])) if wanted else (0, len(data) - 1)
        body = data[first : last + 1]
        if handler.command == "GET" and len(body) > 1000 and left[0] > 0:
            left[0] -= 1
            body = body[:1000]
            handler.close_connection = True
        length = {
            "Content-Range": f"bytes {first}-{last}/{len(data)}",
            "Content-Length": str(last + 1 - first),
        }
        handler.reply(206 if wanted else 200, body, length)

    return answer


def test_a_tar_file_is_listed_through_broken_connections_or_not_at_all(server: str) -> None:
    Handler.answers["x.tar"] = breaks(storage.ATTEMPTS - 1)
    names = [entry.name for entry in open_source(f"{server}/odd/x.tar").inventory.entries()]
    assert names == [f"x.tar/{name}" for name in PNG]
    Handler.answers["x.tar"] = breaks(99)
    with pytest.raises(storage.OutageError, match=r"odd/x\.tar"):
        open_source(f"{server}/odd/x.tar")


def test_a_download_may_last_as_long_as_bytes_come(server: str) -> None:
    timeout = storage.filesystem(f"{server}/files/0.png").client_kwargs["timeout"]
    assert timeout.total is None
    assert timeout.sock_read == storage.SILENT_SECONDS


def test_a_url_that_no_server_can_have_is_an_error_that_names_it() -> None:
    with pytest.raises(UserError, match=r"http://host:port/x\.png"):
        storage.read_object("http://host:port/x.png")


def test_http_has_no_folders(server: str) -> None:
    with pytest.raises(ValueError, match=f"{server}/files"):
        open_source(f"{server}/files/")


def fails(times: int, status: int) -> Answer:
    left = [times]

    def answer(handler: BaseHTTPRequestHandler) -> None:
        assert isinstance(handler, Handler)
        left[0] -= 1
        handler.reply(status, b"") if left[0] >= 0 else handler.reply(200, PNG["0.png"])

    return answer


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_passing_errors_are_retried_a_bounded_number_of_times(server: str, status: int) -> None:
    Handler.answers["a.png"] = fails(storage.ATTEMPTS - 1, status)
    assert storage.read_object(f"{server}/odd/a.png") == PNG["0.png"]
    Handler.answers["a.png"] = fails(99, status)
    Handler.asked.clear()
    with pytest.raises(storage.OutageError, match=rf"{status}.*attempt {storage.ATTEMPTS}"):
        storage.read_object(f"{server}/odd/a.png")
    assert len(Handler.asked) == storage.ATTEMPTS


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_final_errors_are_not_retried(server: str, status: int) -> None:
    Handler.answers["a.png"] = fails(99, status)
    with pytest.raises(OSError, match=r"a\.png") as raised:
        storage.read_object(f"{server}/odd/a.png")
    assert not isinstance(raised.value, storage.OutageError)
    assert len(Handler.asked) == 1


def test_each_pause_is_about_twice_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(storage, "time", SimpleNamespace(sleep=pauses.append))

    def refuse() -> None:
        raise OSError("try later")

    for _ in range(20):
        with pytest.raises(storage.OutageError, match="try later"):
            storage.retried("s3://b/x", refuse)
    for number, pause in enumerate(pauses):
        longest = storage.FIRST_PAUSE * 2 ** (number % (storage.ATTEMPTS - 1))
        assert longest / 2 <= pause <= longest
    assert len(set(pauses)) > storage.ATTEMPTS  # by chance: jobs that failed together come back apart


def half(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(PNG["0.png"])))
    handler.end_headers()
    handler.wfile.write(PNG["0.png"][:20])
    handler.close_connection = True


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b"100000\r\n" + b"\0" * 0x100000 + b"\r\n")
    except OSError:
        handler.close_connection = True


def silent(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(20)


def drop_by_drop(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    try:
        for _ in range(100):
            handler.wfile.write(b"\0")
            handler.wfile.flush()
            time.sleep(0.2)
    except OSError:
        pass


def test_a_connection_that_breaks_off_is_an_error_not_half_an_image(server: str) -> None:
    Handler.answers["a.png"] = half
    with pytest.raises(OSError, match=f"attempt {storage.ATTEMPTS}"):
        storage.read_object(f"{server}/odd/a.png")


def test_an_endless_answer_is_cut_at_the_limit(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.contract.images.MAX_FILE_BYTES", 5_000_000)
    Handler.answers["a.png"] = endless
    with pytest.raises(UserError, match="5000000"):
        storage.read_object(f"{server}/odd/a.png")


@pytest.mark.parametrize("answer", [silent, drop_by_drop, half, endless, fails(99, 503), fails(99, 403)])
def test_one_bad_object_costs_its_own_row_only(
    server: str, tmp_path: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.contract.images.MAX_FILE_BYTES", 5_000_000)
    Handler.answers["bad.png"] = answer
    model = build_model(tmp_path / "model.onnx")
    urls = [f"{server}/files/{name}" for name in PNG] + [f"{server}/odd/bad.png"]
    (tmp_path / "l.txt").write_text("\n".join(urls))
    arguments = ["--model", model, "--images", tmp_path / "l.txt", "--output", tmp_path / "out.csv"]
    started = time.monotonic()
    assert serve_main.main([str(a) for a in [*arguments, "--image-timeout", 1]]) == 0
    assert time.monotonic() - started < 15
    header, *rows = (line.split(",") for line in (tmp_path / "out.csv").read_text().splitlines())
    assert [row[0] for row in rows] == sorted(urls)
    for row in rows:
        name = row[0].rpartition("/")[2]
        if name == "bad.png":
            assert row[1] == ""
            assert row[-1]
        else:
            expected = probabilities_for(colour_of(int(name[0])))
            assert row[1:3] == [
                header[3 + expected.argmax()].removeprefix("probability_"),
                row[3 + expected.argmax()],
            ]


def test_a_package_or_a_scheme_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"nope://b/\*\*\*|nope://b/x"):
        storage.read_object("nope://b/x?token=SECRET")
    with pytest.raises(ValueError, match=r"az://.*adlfs"):
        storage.read_object("az://b/x")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    for url, extra in (("s3://b/x", "cloud"), ("https://h/x.png", "cloud"), ("gs://b/x", "gcs")):
        with pytest.raises(ValueError, match=rf"{url.partition('/')[0]}.*\[{extra}\]"):
            storage.read_object(url)


def test_a_scheme_that_needs_more_than_a_url_is_no_outage() -> None:
    with pytest.raises(UserError, match="dbfs://x"):
        storage.read_object("dbfs://x/a.jpg")


# -- any other scheme ------------------------------------------------------------------------------------


@pytest.fixture(params=["file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    url = f"file://{tmp_path}/store" if request.param == "file" else f"memory:/{tmp_path}/store"
    for name in ("a b.png", "deep/er/b.png", "notes.txt"):
        (tmp_path / "file").write_bytes(PNG["0.png"] if name.endswith(".png") else b"0123456789")
        storage.put_file(tmp_path / "file", f"{url}/{name}")
    return url


def test_every_scheme_is_listed_read_matched_and_written(folder: str, tmp_path: Path) -> None:
    files = {file.name: file for file in storage.list_files(folder + "/")}
    assert set(files) == {"a b.png", "deep/er/b.png", "notes.txt"}
    assert {file.url for file in files.values()} == {f"{folder}/{name}" for name in files}
    assert files["notes.txt"].size == 10
    assert [file.name for file in storage.list_files(f"{folder}/notes.txt")] == ["notes.txt"]
    assert list(storage.list_files(f"{folder}/none")) == []
    assert storage.match(f"{folder}/*/er/*.png") == ([f"{folder}/deep/er/b.png"], 0)
    assert storage.match(f"{folder}/*") == ([f"{folder}/a b.png", f"{folder}/notes.txt"], 1)
    assert storage.read_object(f"{folder}/a b.png") == PNG["0.png"]
    assert storage.read_range(f"{folder}/notes.txt", 3, 4) == b"3456"
    assert storage.open_seekable(f"{folder}/notes.txt").read() == b"0123456789"
    assert storage.download(f"{folder}/notes.txt").read() == b"0123456789"
    storage.get_files(files.values(), tmp_path / "copies")
    assert (tmp_path / "copies" / "deep" / "er" / "b.png").read_bytes() == PNG["0.png"]
    storage.copy_object(f"{folder}/notes.txt", f"{folder}/again.txt")
    assert storage.read_object(f"{folder}/again.txt") == b"0123456789"
    storage.check_store_writable(f"{folder}/new")
    for name in ("again.txt", "notes.txt", "a b.png"):
        storage.remove(f"{folder}/{name}")
    assert [file.name for file in storage.list_files(folder)] == ["deep/er/b.png"]
    with pytest.raises(FileNotFoundError, match=r"notes\.txt"):
        storage.stat(f"{folder}/notes.txt")


def test_every_scheme_is_scored_from_and_to(folder: str, tmp_path: Path) -> None:
    model = build_model(tmp_path / "model.onnx")
    storage.put_file(model, f"{folder}/model/model.onnx")
    for shard in ("0/2", "1/2"):
        arguments = ["--model", f"{folder}/model/model.onnx", "--images", folder, "--shard", shard]
        assert serve_main.main([*arguments, "--resume", "--output", f"{folder}/parts"]) == 0
    assert merge_main([f"{folder}/parts", "--output", f"{folder}/merged.csv"]) == 0
    rows = storage.download(f"{folder}/merged.csv").read().splitlines()[1:]
    assert [row.split(b",")[0] for row in rows] == [b"a b.png", b"deep/er/b.png"]


@pytest.mark.parametrize("name", ["../owned", "a/../../owned", "a//owned", "./owned"])
def test_a_name_that_leads_out_of_the_folder_is_not_copied(name: str, tmp_path: Path) -> None:
    file = storage.RemoteFile(f"s3://bucket/in/{name}", name, 1, "")
    with pytest.raises(ValueError, match="s3://bucket/in/"):
        storage.get_files([file], tmp_path / "copies")
    assert not list(tmp_path.iterdir())


def test_a_short_answer_is_asked_for_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = 0

    def get_file(url: str, target: str) -> None:
        nonlocal calls
        calls += 1
        Path(target).write_bytes(b"who" if calls == 1 else b"whole")

    monkeypatch.setattr(storage, "filesystem", lambda url: SimpleNamespace(get_file=get_file))
    storage.get_file("s3://b/x", tmp_path / "x", 5)
    assert calls == 2
    assert (tmp_path / "x").read_bytes() == b"whole"
    with pytest.raises(OSError, match=r"5 bytes.* 7"):
        storage.get_file("s3://b/y", tmp_path / "y", 7)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_is_no_file_and_a_bad_pattern_an_error_with_the_way_out(
    folder: str, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        storage.get_file(f"{folder}/deep", tmp_path / "copy")
    with pytest.raises(UserError, match=r"\*\*/\*\.jpg"):
        storage.match(f"{folder}/**.jpg")


def test_a_name_with_brackets_comes_before_what_it_would_match(folder: str, tmp_path: Path) -> None:
    for name in ("img[1].png", "img1.png", "set [2024]/x.png"):
        storage.put_file(tmp_path / "file", f"{folder}/{name}")
    found = {
        given: open_source(f"{folder}/{given}").inventory
        for given in ("img[1].png", "set [2024]", "img[0-9].png")
    }
    names = {given: [entry.name for entry in inventory.entries()] for given, inventory in found.items()}
    assert names == {"img[1].png": ["img[1].png"], "set [2024]": ["x.png"], "img[0-9].png": ["img1.png"]}


def test_a_file_is_put_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a file system writes in place."""

    def put_file(source: str, target: str) -> None:
        Path(target.removeprefix("file://")).write_bytes(b"half")
        raise OSError("connection reset")

    url = f"file://{tmp_path}/store/model.onnx"
    (tmp_path / "new").write_bytes(b"whole")
    storage.put_file(tmp_path / "new", url)
    monkeypatch.setattr(storage.filesystem(url), "put_file", put_file)
    with pytest.raises(storage.OutageError, match="connection reset"):
        storage.put_file(tmp_path / "new", url)
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["model.onnx"]
    assert (tmp_path / "store" / "model.onnx").read_bytes() == b"whole"


def test_what_another_process_has_removed_is_removed(tmp_path: Path) -> None:
    storage.remove(f"file://{tmp_path}/gone.csv")


def test_a_folder_that_changes_while_it_is_listed_is_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(*_: Any, **options: Any) -> None:
        raise FileNotFoundError("deep/er")

    monkeypatch.setattr(storage.filesystem(f"file://{tmp_path}"), "find", find)
    with pytest.raises(storage.OutageError, match=r"deep/er"):
        list(storage.list_files(f"file://{tmp_path}"))
    assert list(storage.list_files(f"file://{tmp_path}/none")) == []


def test_a_server_that_cannot_be_reached_is_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems connect when they are made, with exceptions of their own."""

    def connect(url: str) -> Any:
        raise RuntimeError("authentication timed out")

    monkeypatch.setattr(storage, "filesystem", connect)
    for listing in (storage.list_files, storage.match):
        with pytest.raises(storage.OutageError, match=r"^sftp://host/images/\*\.png: .*timed out"):
            list(listing("sftp://host/images/*.png"))
