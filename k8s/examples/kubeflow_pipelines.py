"""Pipeline of Kubeflow Pipelines that trains, exports, verifies, scores and merges.

pip install 'kfp[kubernetes]'
kfp dsl compile --py k8s/examples/kubeflow_pipelines.py --output pipeline.yaml

The pipeline runs in a namespace that has the claims of k8s/platform (with one-node, data-one-node and
runs-one-node). User 10001 has to be able to write to them: no fsGroup can be given here.
"""

from kfp import dsl, kubernetes

TRAIN_IMAGE = "purebred-train:0.1.0"
SERVE_IMAGE = "purebred-serve:0.1.0"
COMMAND = ["tini", "--", "/app/k8s/entrypoint.sh"]
USER = 10001
MLFLOW = "http://mlflow:5000"
PARTS = 2  # of the images, each scored by a pod of its own


@dsl.container_component
def train(run: str, data: str, model: str, epochs: int) -> dsl.ContainerSpec:
    """Resume the run if it exists: a retry continues with the newest snapshot."""
    return dsl.ContainerSpec(
        image=TRAIN_IMAGE,
        command=COMMAND,
        args=[
            "train",
            "--standalone",
            "--nproc-per-node=2",
            "train/main.py",
            f"--data={data}",
            "--output=/runs",
            f"--name={run}",
            "--resume=auto",
            f"--model={model}",
            f"--epochs={epochs}",
        ],
    )


@dsl.container_component
def export(run: str) -> dsl.ContainerSpec:
    return dsl.ContainerSpec(image=TRAIN_IMAGE, command=COMMAND, args=["export", f"--run=/runs/{run}"])


@dsl.container_component
def verify(run: str, provider: str, precision: str) -> dsl.ContainerSpec:
    return dsl.ContainerSpec(
        image=TRAIN_IMAGE,
        command=COMMAND,
        args=["export", f"--run=/runs/{run}", f"--verify-provider={provider}:{precision}"],
    )


@dsl.container_component
def score(run: str, images: str, provider: str, precision: str, shard: str) -> dsl.ContainerSpec:
    """Score one part of the images; a retry keeps what is finished."""
    return dsl.ContainerSpec(
        image=SERVE_IMAGE,
        command=COMMAND,
        args=[
            "score",
            f"--model=/runs/{run}/export/model.onnx",
            f"--images={images}",
            f"--provider={provider}",
            f"--precision={precision}",
            f"--shard={shard}",
            "--resume",
            f"--output=/runs/{run}/predictions",
        ],
    )


@dsl.container_component
def merge(run: str) -> dsl.ContainerSpec:
    return dsl.ContainerSpec(
        image=SERVE_IMAGE,
        command=COMMAND,
        args=["merge", f"/runs/{run}/predictions", f"--output=/runs/{run}/predictions.csv"],
    )


def on_cluster(task: dsl.PipelineTask, memory: str, retries: int) -> dsl.PipelineTask:
    """Give a task the claims, shared memory, limits and user that the programs need."""
    task.set_caching_options(False)  # a run's name says nothing of what its folder holds
    task.set_cpu_request("2").set_cpu_limit("2").set_memory_request(memory).set_memory_limit(memory)
    task.set_retry(retries, backoff_duration="30s")
    task.set_env_variable("MLFLOW_TRACKING_URI", MLFLOW)
    kubernetes.mount_pvc(task, pvc_name="data", mount_path="/data")
    kubernetes.mount_pvc(task, pvc_name="runs", mount_path="/runs")
    kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit="1Gi")
    kubernetes.empty_dir_mount(task, "tmp", "/tmp", size_limit="10Gi")
    kubernetes.add_pod_label(task, "app.kubernetes.io/part-of", "purebred")  # for the network policies
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    return task


@dsl.pipeline(name="purebred")
def purebred(
    run: str,
    data: str = "/data/sample/train",
    images: str = "/data/sample/test",
    model: str = "resnet18",
    epochs: int = 30,
    provider: str = "cpu",
    precision: str = "fp32",
) -> None:
    trained = on_cluster(train(run=run, data=data, model=model, epochs=epochs), "8Gi", retries=6)
    exported = on_cluster(export(run=run), "4Gi", retries=2).after(trained)
    verified = on_cluster(verify(run=run, provider=provider, precision=precision), "4Gi", retries=2)
    verified.after(exported)
    with dsl.ParallelFor(items=[f"{part}/{PARTS}" for part in range(PARTS)]) as shard:
        scored = score(run=run, images=images, provider=provider, precision=precision, shard=shard)
        on_cluster(scored, "2Gi", retries=3).after(verified)
    on_cluster(merge(run=run), "2Gi", retries=2).after(scored)
