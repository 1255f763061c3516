"""The images, built and run as a cluster runs them: a read-only root, user 10001."""

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlflow
import psutil
import pyarrow.parquet
import pytest
import requests
from containers import USER, Image, build, buildah, image, require
from s3 import s3_server
from serve_model import build_model, encode, solid
from servers import free_port

pytestmark = pytest.mark.slow
SERVE_MEGABYTES = 430
S3 = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
SMALL = ["--model=simple_cnn", "--image-size=32", "--batch-size=16", "--epochs=2", "--precision=fp32"]
MINUTES = (
    "minutes, and 15 GB of disk: PUREBRED_IMAGES=1 builds and runs the images of training and of MLflow"
)


@contextmanager
def built(*images: str) -> Iterator[None]:
    """The images, until the block ends."""
    require()
    build(*images)
    try:
        yield
    finally:
        buildah("rmi", "--force", *(f"purebred-{name}:test" for name in images))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A volume's folder."""
    volume = tmp_path / "volume"
    volume.mkdir()
    os.chown(volume, USER, USER)
    return volume


def output(run: "subprocess.CompletedProcess[str]", code: int = 0) -> str:
    """What a container printed; no library adds to it what it thinks at the end."""
    assert run.returncode == code, run.stdout + run.stderr
    assert "leaked" not in run.stdout + run.stderr
    return run.stdout


def score_and_merge(
    serve: Image, volumes: dict[Path, str], model: str, images: str, environment: Sequence[str] = ()
) -> None:
    """Score the images in two shards and merge them into /runs/all.parquet."""
    checks = ["--write=/runs", f"--model={model}", "--free=0.1"]
    output(serve.run("doctor", *checks, volumes=volumes))
    output(serve.run("-c", "import os; os.mkdir('/runs/parts')", volumes=volumes, entrypoint=["python"]))
    arguments = [f"--model={model}", f"--images={images}", "--output=/runs/parts", "--format=parquet"]
    for shard in range(2):
        output(
            serve.run("score", *arguments, f"--shard={shard}/2", volumes=volumes, environment=environment)
        )
    output(serve.run("merge", "/runs/parts", "--output=/runs/all.parquet", volumes=volumes))


def test_the_serving_image_is_small_and_scores_from_s3_for_whoever_it_runs_as(folder: Path) -> None:
    with built("serve"), image("purebred-serve:test") as serve, s3_server() as s3:
        size, unit = buildah("images", "--format", "{{.Size}}", "purebred-serve:test").split()
        assert unit == "MB"
        assert float(size) < SERVE_MEGABYTES
        for number in range(4):
            s3.put_object(
                Bucket="bucket", Key=f"{number}.png", Body=encode(solid((40 * number, 0, 0)), "PNG")
            )
        build_model(folder / "model.onnx")
        code = "import os; assert os.getuid() == 10001; open('/app/x', 'w')"
        assert "Read-only" in serve.run("-c", code, entrypoint=["python"]).stderr
        environment = [f"{name}={os.environ[name]}" for name in S3]
        score_and_merge(serve, {folder: "/runs"}, "/runs/model.onnx", "s3://bucket", environment)
        assert pyarrow.parquet.read_table(folder / "all.parquet").num_rows == 4


@contextmanager
def mlflow_server(server: Image, folder: Path) -> Iterator[str]:
    """Its address, once it answers."""
    port, deadline = free_port(), time.monotonic() + 180
    flags = ["--port", port, "--workers", "1", "--serve-artifacts", "--artifacts-destination", "/artifacts"]
    store = ["MLFLOW_BACKEND_STORE_URI=sqlite:////artifacts/mlflow.db"]
    store += ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"]
    command, environment = server.command(
        "server", *flags, volumes={folder: "/artifacts"}, environment=store
    )
    process = subprocess.Popen(command, env=environment)
    try:
        address = f"http://127.0.0.1:{port}"
        while True:
            try:
                if requests.get(f"{address}/health", timeout=5).ok:
                    break
            except requests.RequestException:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.5)
        yield address
    finally:
        (tini,) = psutil.Process(process.pid).children()  # of unshare, which ignores SIGTERM
        tini.terminate()
        process.wait()


@pytest.mark.skipif("PUREBRED_IMAGES" not in os.environ, reason=MINUTES)
def test_a_run_goes_through_all_images(folder: Path, tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    artifacts.mkdir()
    os.chown(artifacts, USER, USER)
    volumes = {folder: "/runs"}
    with (
        built("train", "serve", "mlflow"),
        image("purebred-train:test") as train,
        image("purebred-serve:test") as serve,
        image("purebred-mlflow:test") as server,
        mlflow_server(server, artifacts) as address,
    ):
        tracking = [f"MLFLOW_TRACKING_URI={address}", "OMP_NUM_THREADS=1"]
        checks = ["doctor", "--write=/runs", "--processes=2", "--threads=1", f"--mlflow={address}"]
        assert "\nok      MLflow" in output(train.run(*checks, volumes=volumes))
        before = time.monotonic()
        unknown = train.run(*checks, "--wait=300", volumes=volumes, name="nobody", known=False)
        assert "error   own name nobody" in output(unknown, code=1)
        assert time.monotonic() - before < 60  # torchrun would wait for 300 s
        sample = ["train/data/sample.py", "--output=/runs/sample", "--train-per-class=40", "--num-test=20"]
        output(train.run(*sample, volumes=volumes, entrypoint=["python"]))
        run = ["train/main.py", "--data=/runs/sample/train", "--output=/runs", "--name=first", *SMALL]
        torchrun = ["train", "--standalone", "--nproc-per-node=2"]
        assert "2 processes" in output(train.run(*torchrun, *run, volumes=volumes, environment=tracking))
        output(train.run("export", "--run=/runs/first", volumes=volumes, environment=tracking))
        score_and_merge(serve, volumes, "/runs/first/export/model.onnx", "/runs/sample/test")
        assert pyarrow.parquet.read_table(folder / "all.parquet").num_rows == 20
        client = mlflow.MlflowClient(address)
        (experiment,) = (
            one for one in client.search_experiments() if client.search_runs([one.experiment_id])
        )
        (tracked,) = client.search_runs([experiment.experiment_id])
        assert (tracked.info.run_name, tracked.info.status) == ("first", "FINISHED")
