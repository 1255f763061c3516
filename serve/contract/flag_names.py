"""Names of flags in other tools (timm, torchvision, Lightning, transformers, Keras), and what to give in
their place."""

import difflib
from collections.abc import Collection

OTHER_NAMES = {
    # training
    "--accumulation": "gradient-accumulation-steps grad-accum grad-accum-steps accum accum-steps "
    "accumulate accumulate-grad-batches",
    "--batch-size": "b bs batch batchsize train-batch-size global-batch-size eval-batch-size "
    "validation-batch-size val-batch-size",
    "--batch-size (of all processes together)": "per-device-batch-size per-device-train-batch-size "
    "per-gpu-batch-size per-gpu-train-batch-size micro-batch-size per-device-eval-batch-size",
    "--clip-grad": "clip grad-clip max-grad-norm gradient-clip-val clip-grad-norm clipnorm",
    "--color-jitter": "jitter colour-jitter",
    "--compile": "torch-compile torchcompile use-compile",
    "--config": "c cfg config-file conf yaml recipe",
    "--crop-scale": "scale rrc-scale min-scale",
    "--cutmix": "cutmix-alpha",
    "--data": "d data-dir data-path data-root dataset dataset-dir dataset-path dataset-root root "
    "train-data train-dir train-path train-folder train-root data-folder image-folder "
    "imagefolder img-dir csv labels train-csv train input input-dir directory images",
    "--device": "accelerator",
    "--dropout": "drop drop-rate dropout-rate",
    "--drop-path": "drop-path-rate stochastic-depth stochastic-depth-prob",
    "--ema": "model-ema ema-decay model-ema-decay use-ema",
    "--epochs": "e epoch n-epochs num-epochs max-epochs nb-epochs num-train-epochs train-epochs n-epoch "
    "iters",
    "--experiment": "experiment-name project project-name mlflow-experiment wandb-project",
    "--flip": "hflip horizontal-flip fliplr",
    "--freeze": "freeze-layers freeze-backbone frozen-layers linear-probe",
    "--image-size": "size img-size imgsize imgsz img image-width input-size resolution crop-size "
    "train-size train-crop-size width height",
    "--eval-size": "val-crop-size val-size test-input-size",
    "--resize-size": "val-resize-size",
    "--label-smoothing": "smoothing label-smooth label-smoothing-factor",
    "--layer-decay": "layer-lr-decay llrd",
    "--lr": "learning-rate learningrate learn-rate base-lr max-lr init-lr initial-lr peak-lr lr0 blr "
    "lr-base",
    "--mixup": "mixup-alpha",
    "--model": "m arch a architecture network net backbone model-name model-type model-path encoder "
    "model-file onnx onnx-model onnx-file",
    "--name": "run-name exp-name run-id task-name",
    "--num-workers": "j workers worker num-data-workers dataloader-num-workers n-workers nworkers "
    "num-threads",
    "--optimizer": "opt optim optimiser solver",
    "--output": "o out out-dir output-dir outdir output-path output-file outfile save-dir save-path "
    "save-to log-dir logdir default-root-dir root-dir runs-dir results-dir checkpoint-dir "
    "ckpt-dir work-dir model-dir dest csv-out results submission",
    "--patience": "early-stopping early-stopping-patience es-patience early-stop earlystop",
    "--precision bf16": "bf16",
    "--precision fp16": "fp16 half float16",
    "--precision auto": "amp use-amp mixed-precision autocast apex amp-dtype no-amp dtype",
    "--random-erasing": "reprob random-erase erasing random-erase-prob cutout",
    "--resume": "resume-from resume-training resume-from-checkpoint continue auto-resume ckpt-path "
    "checkpoint ckpt load last-ckpt",
    "--schedule": "sched scheduler lr-scheduler lr-scheduler-type lr-schedule",
    "--seed": "s random-seed random-state manual-seed rng-seed seed-everything",
    "--trivial-augment": "aa auto-augment autoaugment randaugment rand-augment augment augmentation aug",
    "--val-data": "val-dir val-path val-folder val valid validation validation-dir validation-data "
    "valid-dir eval-data eval-dir test-data test-dir val-csv",
    "--val-fraction": "val-split valid-split validation-split val-size-fraction val-ratio "
    "valid-fraction validation-fraction test-size split train-ratio",
    "--val-interval": "eval-every eval-interval check-val-every-n-epoch val-freq eval-freq "
    "evaluation-strategy",
    "--warmup-epochs": "warmup warmup-steps num-warmup-steps warmup-ratio lr-warmup-epochs",
    "--weight-decay": "wd decay l2 weightdecay",
    "--weights": "pretrained pretrained-weights imagenet finetune fine-tune init-weights "
    "initial-checkpoint pretrained-path load-weights checkpoint ckpt transfer",
    "--deterministic": "benchmark cudnn-deterministic",
    "--class-weights": "weighted-loss balanced class-weight",
    "--teacher": "distill distillation teacher-model",
    "--snapshot-minutes": "save-every save-interval save-steps checkpoint-interval checkpoint-freq "
    "save-freq",
    "--track": "mlflow log-mlflow tracking",
    "--columns": "image-column label-column path-column target-column img-col label-col filename-col",
    # scoring, merging, evaluation
    "--images": "i image input inputs input-dir data data-dir data-path dataset source src img img-dir "
    "image-dir image-folder test-data test-dir folder dir path",
    "--format": "output-format fmt save-format type",
    "--device-id": "gpu gpu-id gpus devices device-ids cuda",
    "--provider": "device providers execution-provider backend ep accelerator cpu",
    "--run": "checkpoint ckpt model weights resume load model-path r run-dir run-name name",
    "--sample-submission": "sample submission-sample template",
    "--top-k": "topk k top num-predictions",
    "--threads": "intra-op-num-threads num-threads omp-num-threads",
    "--workers": "j num-workers n-workers dataloader-num-workers processes",
    "--overwrite": "force f y yes clobber exist-ok replace",
    "--max-errors": "max-failures max-bad error-rate",
    "--verify-provider": "provider device",
    "--embeddings": "features feature-extraction return-features embed",
    "--min-accuracy": "threshold min-acc",
    "--promote": "champion register-champion",
    "--register": "registered-model-name register-model model-name",
    "--limit": "num-images max-images n num-samples",
}
"""A flag, or a flag and its value -> other tools' names of it, without dashes."""

EXPLAINED = {
    "the classes are those of the data, and are kept in the model file": "num-classes n-classes classes "
    "class-names",
    "torchrun --nproc_per_node=N starts a process for each GPU": "gpus devices distributed strategy ddp "
    "world-size local-rank rank",
    "torchrun --nnodes=N starts processes on N machines": "num-nodes",
    "torchrun --rdzv-endpoint gives the address": "dist-url",
    "it belongs to torchrun, before the script": "nproc-per-node nnodes",
    "CUDA_VISIBLE_DEVICES chooses the GPU": "gpu gpu-id",
    "batch-norm statistics are averaged over the processes at the end of each epoch": "sync-bn",
    "--optimizer sgd has Nesterov momentum 0.9": "momentum nesterov",
    "the weights' own mean and standard deviation are taken, and kept in the model file": "mean std",
    "the loss is cross-entropy; --label-smoothing and --class-weights change it": "loss criterion",
    "runs are logged to MLflow": "wandb tensorboard",
    "MLFLOW_TRACKING_URI names the MLflow server": "tracking-uri mlflow-uri mlflow-tracking-uri",
    "pipelines/evaluate.py evaluates a model on labelled images": "eval evaluate test test-only",
    "serve/main.py scores images": "predict",
    "export/main.py exports a run": "export",
    "predictions have all probabilities: filter their columns": "threshold conf",
    "the model file has the size of its images": "img-size image-size imgsz",
    "the file is written in the run directory, in export/": "output output-dir",
    "the batch is dynamic": "dynamic dynamic-axes batch-size",
    "export/quantize.py makes int8 and fp16 files": "quantize int8 fp16 half",
}
"""Why no flag is needed, or what does it -> other tools' names that no flag here has the meaning of."""

MOST_NAMED = 3
LONG_ENOUGH = 4  # characters: anything is close to a name of three
CLOSE = 0.75  # of 1, as difflib counts: learning-rate is not error-rate
OTHER_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # text editors and web pages put them for --


def canonical(typed: str) -> str:
    """Return a flag's name without dashes of any kind, value and capitals: --Batch_Size=8 -> batch-size."""
    return typed.lstrip("-" + OTHER_DASHES).partition("=")[0].lower().replace("_", "-")


def suggestion(typed: str, flags: Collection[str], values: bool = False) -> str:
    """Return what to give in place of a flag that a command does not have; "" if nothing comes close.

    `flags` are the command's own, with dashes; with `values` a switch takes true or false.
    """
    name = canonical(typed)
    if f"--{name}" in flags:
        return f"give --{name}"
    others: dict[str, list[str]] = {}
    for given, names in OTHER_NAMES.items():
        if given.split()[0] in flags:
            for other in names.split():
                others.setdefault(other, []).append(given)
    if name in others:
        return f"give {' or '.join(others[name])}"
    if reason := next((why for why, names in EXPLAINED.items() if name in names.split()), ""):
        return reason
    positive = f"--{name.removeprefix('no-')}"
    if positive != f"--{name}" and positive in flags:
        return f"give {positive} false" if values else f"leave {positive} out"
    if longer := [flag for flag in flags if flag.startswith(f"--{name}")][:MOST_NAMED]:
        return f"did you mean {' or '.join(longer)}?"
    near = {other: given[0] for other, given in others.items() if len(other) >= LONG_ENOUGH}
    near |= {flag[2:]: flag for flag in flags}
    close = difflib.get_close_matches(name, near, 1, CLOSE)
    return f"did you mean {near[close[0]]}?" if close else ""
