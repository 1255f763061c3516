"""What docs/engines.md shows runs, on images with broken ones among them, and answers as scoring does."""

import csv
import json
import os
import re
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY, launch
from serve_model import CLASS_NAMES, METADATA, broken_files, build_model, colour_of, encode, noise, solid

import serve.main
import serve.merge
from serve import Classifier

PAGE = (REPOSITORY / "docs" / "engines.md").read_text(encoding="utf-8")
PHOTOGRAPHS = os.environ.get("PUREBRED_PHOTOGRAPHS", "")
RUN = {"FastAPI", "Spark", "Ray Data", "Azure ML", "SLURM", "AWS Batch", "Google Batch", "Cloud Run"}


def blocks() -> dict[str, list[str]]:
    """Return the code below each heading of the page."""
    found: dict[str, list[str]] = {}
    heading, code = "", False
    for line in PAGE.splitlines():
        if line.startswith("```"):
            code = not code
            if code:
                found.setdefault(heading, []).append("")
        elif code:
            found[heading][-1] += line + "\n"
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    return found


def test_every_block_of_the_page_is_run_by_a_test() -> None:
    assert set(blocks()) == RUN


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory has the run that the page names."""
    export = tmp_path / "runs" / "NAME" / "export"
    export.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return build_model(export / "model.onnx", metadata=METADATA.to_json())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images in folders, each kind of broken file among them, and photographs where there are some."""
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    for number, suffix in enumerate(["JPEG", "PNG", "WEBP"] * 4):
        image = noise(40, 30, number) if number % 2 else solid(colour_of(number), (40, 30))
        (root / f"{number:02} é%20.{suffix.lower()}").write_bytes(encode(image, suffix))
    for name, (data, _) in broken_files().items():
        (root / "more" / name).write_bytes(data)
    shutil.copy(REPOSITORY / "docs" / "sample.jpg", root / "more")
    for number, path in enumerate(sorted(Path(PHOTOGRAPHS or root / "none").rglob("*.jpg"))[:20]):
        shutil.copy(path, root / "more" / f"{number}.jpg")
    return root


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def scored(photos: Path) -> dict[str, dict[str, str]]:
    """Return the rows of predictions.csv by their path."""
    output = photos.parent / "expected.csv"
    arguments = ["--model", "runs/NAME", "--images", str(photos), "--output", str(output)]
    assert serve.main.main(arguments) == 0
    return {row["path"]: row for row in read_csv(output)}


def check_rows(answers: list[dict[str, Any]], expected: dict[str, dict[str, str]], folder: str) -> None:
    """Compare answers, whose paths begin with `folder`, below the printed digits."""
    assert sorted(row["path"] for row in answers) == sorted(folder + path for path in expected)
    for answer in answers:
        row = expected[answer["path"].removeprefix(folder)]
        assert (answer["label"] or "", answer["error"] or "") == (row["label"], row["error"])
        if row["error"]:
            assert answer["probability"] is None
            assert answer.get("probabilities") is None
            continue
        assert answer["probability"] == pytest.approx(float(row["probability"]), abs=1e-7)
        if "probabilities" in answer:
            probabilities = [float(row[f"probability_{name}"]) for name in CLASS_NAMES]
            assert answer["probabilities"] == pytest.approx(probabilities, abs=1e-7)


def test_fastapi_answers_as_the_classifier_does(model: Path) -> None:
    testclient = pytest.importorskip("fastapi.testclient")
    names: dict[str, Any] = {}
    exec(compile(blocks()["FastAPI"][0], "engines.md", "exec"), names)
    images = [encode(solid(colour_of(number)), "PNG") for number in range(6)]
    images += [data for data, _ in broken_files().values()]
    with testclient.TestClient(names["app"]) as client:
        answers = [client.post("/classify", content=data).json() for data in images]
    for got, expected in zip(answers, Classifier(model)(images), strict=True):
        assert got.get("error") == expected.error
        if expected.probabilities is not None:
            assert (got["label"], got["probability"]) == (expected.label, expected.probability)
            assert got["probabilities"] == pytest.approx(
                dict(zip(CLASS_NAMES, expected.probabilities.tolist(), strict=True)), abs=1e-6
            )


def program(heading: str, folder: Path) -> str:
    """Write the page's block into a file, and return its name."""
    (text,) = blocks()[heading]
    (folder / "block.py").write_text(text, encoding="utf-8")
    return "block.py"


@pytest.mark.slow
def test_spark_answers_as_scoring_does(
    store: str, model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyspark", reason="Spark: pyspark is not installed")
    if not (shutil.which("java") or "JAVA_HOME" in os.environ):
        pytest.skip("Spark needs Java 17, as of default-jre-headless")
    from mlflow_store import log_to_mlflow

    log_to_mlflow(model, register="NAME")
    (photos / "_hidden.png").write_bytes(encode(solid((250, 0, 0)), "PNG"))
    expected = scored(photos)
    for dropped in ("_hidden.png", "more/empty.jpg"):
        del expected[dropped]
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    launch(sys.executable, program("Spark", photos.parent), cwd=photos.parent)
    answers = pq.read_table(photos.parent / "predictions").to_pylist()
    check_rows(answers, expected, f"file:{photos}/")
    assert {row["error"] for row in answers if row["label"]} == {""}  # neither "None" nor "nan"
    assert {row["label"] for row in answers if row["error"]} == {""}


@pytest.mark.slow
def test_ray_answers_as_scoring_does(model: Path, photos: Path) -> None:
    pytest.importorskip("ray", reason="Ray Data: ray is not installed")
    (photos / "_hidden.png").write_bytes(encode(solid((250, 0, 0)), "PNG"))
    expected = scored(photos)
    del expected["_hidden.png"]
    block = photos.parent / program("Ray Data", photos.parent)
    path = str(REPOSITORY)  # on the nodes of a cluster the package is installed
    start = f"import sys\nsys.path.insert(0, {path!r})\nimport ray\n"
    start += f"environment = {{'env_vars': {{'PYTHONPATH': {path!r}}}}}\n"
    start += "ray.init(num_cpus=2, include_dashboard=False, runtime_env=environment)\n"
    block.write_text(start + block.read_text())
    launch(sys.executable, block, cwd=photos.parent, timeout=300)
    table = pq.read_table(photos.parent / "predictions")
    assert [str(field.type) for field in table.schema] == [
        *("string", "string", "double", "list<element: float>", "string")
    ]
    (start_of_path,) = {row["path"].split("photos/")[0] for row in table.to_pylist()}
    check_rows(table.to_pylist(), expected, f"{start_of_path}photos/")


def test_azure_ml_answers_as_scoring_does(
    model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = scored(photos)
    monkeypatch.setenv("AZUREML_MODEL_DIR", str(model.parents[1]))
    names: dict[str, Any] = {}
    exec(compile(blocks()["Azure ML"][0], "engines.md", "exec"), names)
    names["init"]()
    paths = sorted(str(photos / path) for path in expected)
    answers = []
    for first in range(0, len(paths), 10):  # mini_batch_size
        table = names["run"](paths[first : first + 10])
        assert list(table.columns) == ["path", "label", "probability", "error"]
        answers += table.astype(object).where(table.notna(), None).to_dict("records")
    check_rows(answers, expected, f"{photos}/")


@pytest.fixture
def bucket(model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the commands of the clouds name as their bucket, without variables of a scheduler."""
    for name in [name for name in os.environ if "TASK" in name or "ARRAY" in name]:
        monkeypatch.delenv(name)
    shutil.copy(model, photos.parent)
    return photos.parent


def run_tasks(
    bucket: Path, command: list[str], variables: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a container's command once for each task, and compare the merged parts with one scoring job."""
    action, *arguments = [re.sub(r"^(s3|gs)://bucket", str(bucket), text) for text in command]
    assert action == "score"
    for task in variables:
        with monkeypatch.context() as patch:
            for name, value in task.items():
                patch.setenv(name, str(value))
            assert serve.main.main(arguments) == 0
    assert serve.merge.main([str(bucket / "parts"), "--output", str(bucket / "predictions.csv")]) == 0
    scored(bucket / "photos")
    assert (bucket / "predictions.csv").read_bytes() == (bucket / "expected.csv").read_bytes()


def test_aws_batch_scores_in_an_array(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The requests are those that boto3 accepts."""
    boto3 = pytest.importorskip("boto3")
    client = boto3.client("batch", "eu-west-1", aws_access_key_id="key", aws_secret_access_key="secret")
    requests: list[dict[str, Any]] = []

    def answer(model: Any, params: dict[str, Any], **_: Any) -> tuple[Any, dict[str, Any]]:
        requests.append(json.loads(params["body"]))
        return type("Response", (), {"status_code": 200}), {}

    client.meta.events.register("before-call.batch", answer)
    monkeypatch.setattr(boto3, "client", lambda name: client)
    exec(compile(blocks()["AWS Batch"][0], "engines.md", "exec"), {})
    definition, job = requests
    size = job["arrayProperties"]["size"]
    tasks = [
        {"AWS_BATCH_JOB_ARRAY_INDEX": index, "AWS_BATCH_JOB_ARRAY_SIZE": size} for index in range(size)
    ]
    run_tasks(bucket, definition["containerProperties"]["command"], tasks, monkeypatch)


def test_google_batch_scores_in_an_array(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = blocks()["Google Batch"]
    (group,) = json.loads(text)["taskGroups"]
    count = group["taskCount"]
    (runnable,) = group["taskSpec"]["runnables"]
    tasks = [{"BATCH_TASK_INDEX": index, "BATCH_TASK_COUNT": count} for index in range(count)]
    run_tasks(bucket, runnable["container"]["commands"], tasks, monkeypatch)


def test_google_batch_takes_the_job() -> None:
    batch = pytest.importorskip("google.cloud.batch_v1", reason="Google's type of a job is not installed")
    job = batch.Job.from_json(blocks()["Google Batch"][0])
    assert job.task_groups[0].task_spec.lifecycle_policies[0].action_condition.exit_codes == [2, 4]


def stand_in(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a Python program on the PATH."""
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    file = bin_folder / name
    file.write_text(f"#!{sys.executable}\n{text}")
    file.chmod(file.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")


def test_cloud_run_scores_in_tasks(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = "import json, sys\nprint(json.dumps(sys.argv[1:]), file=open('calls', 'a'))\n"
    stand_in(bucket, "gcloud", recorder, monkeypatch)
    launch("bash", "-c", blocks()["Cloud Run"][0], cwd=bucket)
    deploy, execute = map(json.loads, (bucket / "calls").read_text().splitlines())
    assert execute[:4] == ["run", "jobs", "execute", deploy[3]]
    (arguments,) = [text.removeprefix("--args=") for text in deploy if text.startswith("--args=")]
    count = int(deploy[deploy.index("--tasks") + 1])
    tasks = [{"CLOUD_RUN_TASK_INDEX": index, "CLOUD_RUN_TASK_COUNT": count} for index in range(count)]
    run_tasks(bucket, arguments.split(","), tasks, monkeypatch)


SBATCH = """
import os, re, subprocess, sys
if "--wrap" in sys.argv:
    assert "--dependency=afterok:77" in sys.argv
    sys.exit(subprocess.run(["bash", "-c", sys.argv[sys.argv.index("--wrap") + 1]]).returncode)
script = open(sys.argv[-1]).read()
first, last = map(int, re.search(r"^#SBATCH --array=(\\d+)-(\\d+)$", script, re.M).groups())
array = {"MIN": first, "MAX": last, "COUNT": last - first + 1, "STEP": 1}
variables = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()}
for task in range(first, last + 1):
    own = os.environ | variables | {"SLURM_ARRAY_TASK_ID": str(task)}
    subprocess.run(["bash", sys.argv[-1]], env=own, check=True, stdout=sys.stderr)
print(77)
"""


@pytest.mark.slow
def test_slurm_scores_in_an_array(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(bucket, "sbatch", SBATCH, monkeypatch)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    script, submit = blocks()["SLURM"]
    (bucket / "score.sh").write_text(script)
    (bucket / "serve").symlink_to(REPOSITORY / "serve")
    launch("bash", "-c", submit, cwd=bucket)
    scored(bucket / "photos")
    assert (bucket / "predictions.csv").read_bytes() == (bucket / "expected.csv").read_bytes()
