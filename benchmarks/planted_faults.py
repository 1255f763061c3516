"""Plant small faults in a copy of the code, one at a time, and see which test of `make test` finds each.

    python benchmarks/planted_faults.py [--only NAME ...] [--list] [--tests near|all]

First the test files that are nearest to the fault are run, and if none of them fails, all of `make test`'s;
with --tests near only those, with --tests all the whole at once.
Ends with a table of faults and the tests that found them; exit code 1 if one was not found.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("train", "export", "serve", "pipelines", "k8s", "tests", "benchmarks", "docs")
FILES = ("pyproject.toml", "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile")


LONGEST = 1800.0  # seconds of all tests on a slow machine


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    old: str
    """Text that is in the file once."""
    new: str
    near: tuple[str, ...] = ()
    """Names of test files, without `test_`; empty: the one of the module."""

    def plant(self, root: Path) -> None:
        """Replace the text, and raise ValueError if it is not there exactly once."""
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.name}: {self.file} has its text {text.count(self.old)} times, not once"
            )
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")

    def tests(self) -> list[str]:
        names = self.near or (Path(self.file).stem,)
        return [next(map(str, Path("tests").rglob(f"test_{name}.py"))) for name in names]


FAULTS = [
    # the command line
    Fault(
        "a recipe is looked for in the working folder alone",
        "train/cli.py",
        "return str(known[path.stem])",
        "return str(path)",
    ),
    Fault(
        "the doctor's exit code hides an error",
        "pipelines/doctor.py",
        'worst |= finding.level == "error"',
        "worst |= 0",
        ("training_doctor",),
    ),
    # what is trained
    Fault(
        "an unlabelled test part validates",
        "train/data/layouts/part_folders.py",
        "[part for part in kinds[1] if part.classes & train.classes]",
        "kinds[1]",
    ),
    Fault(
        "validation without a cache ignores colour profiles",
        "train/engine/loaders.py",
        "load, side = validation_entries(config).load, config.preprocess().size",
        "load, side = training_entries(config).load, config.preprocess().size",
        ("profiles",),
    ),
    Fault(
        "an earlier scan's verdict holds under another limit of pixels",
        "train/data/scan.py",
        "{DECODER}{limit}",
        "{DECODER}",
    ),
    Fault(
        "rows without a label become the last class",
        "train/data/convert_parquet.py",
        "value == UNLABELLED",
        "value is UNLABELLED is None",
    ),
    Fault(
        "a seed of the order without the epoch",
        "train/data/sampler.py",
        'seed_of("order", self.seed, epoch)',
        'seed_of("order", self.seed)',
    ),
    Fault(
        "padding of the last batch counts in the loss",
        "train/data/sampler.py",
        "weights = (positions < self.num_samples).astype(float).tolist()",
        "weights = (positions >= 0).astype(float).tolist()",
        ("sampler", "loop"),
    ),
    Fault(
        "ranks train on the same part of a batch",
        "train/data/sampler.py",
        "part = self.rank * self.accumulation + micro_step",
        "part = micro_step",
    ),
    Fault(
        "a resumed epoch begins one step late",
        "train/data/sampler.py",
        "for step in range(first_step, self.steps):",
        "for step in range(first_step + (first_step > 0), self.steps):",
    ),
    Fault(
        "validation images are padded to equal parts",
        "train/data/sampler.py",
        "mine = range(rank, num_samples, world_size)",
        "whole = -(-num_samples // world_size) * world_size\n"
        "    mine = np.resize(np.arange(num_samples), whole)[rank::world_size].tolist()",
    ),
    Fault(
        "loader processes end with the job's signals",
        "train/data/workers.py",
        "    ignore_stops(worker)\n",
        "",
        ("workers", "loader"),
    ),
    Fault(
        "a rank's loss is dropped from the sum",
        "train/engine/loop.py",
        "loss, correct = sum_over_ranks(progress.sums.clone()).tolist()",
        "loss, correct = (progress.sums * run.ranks.world_size).tolist()",
        ("loop", "pipeline", "faults"),
    ),
    Fault(
        "gradients are averaged over ranks, not over images",
        "train/engine/loop.py",
        "factor = run.ranks.world_size / plan.real_size(step)",
        "factor = 1 / plan.real_size(step)",
        ("loop", "pipeline"),
    ),
    Fault(
        "dropout is the same on all ranks",
        "train/engine/loop.py",
        "key = (config.seed, run.history.epochs_done, step, micro_step, run.ranks.rank)",
        "key = (config.seed, run.history.epochs_done, step, micro_step)",
    ),
    Fault(
        "training stays in evaluation mode",
        "train/engine/state.py",
        "        self.model.train()\n",
        "",
        ("loop", "state", "architectures"),
    ),
    Fault(
        "each micro-batch's gradients are reduced, or none",
        "train/engine/loop.py",
        "gradient_sync(state.wrapped, micro_step == plan.accumulation - 1)",
        "gradient_sync(state.wrapped, micro_step == 0 and plan.accumulation > 1)",
        ("loop", "pipeline", "faults"),
    ),
    Fault(
        "a skipped step's loss counts",
        "train/engine/loop.py",
        "self.sums += torch.where(finite, sums, 0)",
        "self.sums += sums",
    ),
    Fault(
        "the teacher's temperature is not squared",
        "train/engine/loss.py",
        "self.share * self.temperature**2 * divergence",
        "self.share * self.temperature * divergence",
    ),
    Fault(
        "gradients are summed although synchronisation is off",
        "train/distributed.py",
        "    if enabled or not isinstance(model, DistributedDataParallel):",
        "    if True or not isinstance(model, DistributedDataParallel):",
    ),
    Fault(
        "an error of rank 0 stays with rank 0",
        "train/distributed.py",
        "    if outcome[1] is not None:\n        raise outcome[1]\n",
        "    if outcome[1] is not None and ranks.is_main:\n        raise outcome[1]\n",
    ),
    Fault(
        "rows of the ranks are gathered without the last rank",
        "train/distributed.py",
        "return torch.cat([torch.from_numpy(part) for part in parts]) if parts else None",
        "return torch.cat([torch.from_numpy(part) for part in parts[:-1]]) if parts else None",
    ),
    Fault(
        "addresses of an earlier attempt are read",
        "train/distributed.py",
        'PrefixStore(f"purebred/{agree_on_attempt(shared, ranks.rank, ranks.world_size)}", shared)',
        'PrefixStore("purebred", shared)',
        ("faults",),
    ),
    Fault(
        "two ranks on one GPU are not noticed",
        "train/distributed.py",
        "if (first := found.index(gpu)) < rank:",
        "if (first := found.index(gpu)) > rank:",
    ),
    Fault(
        "fp32 is TF32",
        "train/engine/device.py",
        'config.precision != "fp32" and torch',
        "torch",
    ),
    Fault(
        "the warm-up begins at 0",
        "train/optim/schedule.py",
        "return (step + 1) / warmup",
        "return step / warmup",
    ),
    Fault(
        "biases decay too",
        "train/optim/optimizers.py",
        'groups.append({"params": others, "weight_decay": 0.0, "lr": lr})',
        'groups.append({"params": others, "weight_decay": config.weight_decay, "lr": lr})',
    ),
    Fault(
        "the deepest group learns fastest",
        "train/optim/optimizers.py",
        "lr = config.lr * config.layer_decay**depth",
        "lr = config.lr * config.layer_decay ** (len(by_depth) - 1 - depth)",
    ),
    Fault(
        "muon's columns are in another order than the weights'",
        "train/optim/muon.py",
        "torch.empty_like(parameter).copy_(value)",
        "value.clone()",
    ),
    Fault(
        "muon's momentum takes up gradients that are not finite",
        "train/optim/muon.py",
        '            found_inf=self._given("found_inf"),\n            lr=lr,',
        "            lr=lr,",
        ("muon", "optimizers"),
    ),
    Fault(
        "muon's small matrix is not that of the next iteration",
        "train/optim/muon.py",
        "gram = torch.bmm(factor, torch.bmm(gram, factor))",
        "gram = torch.bmm(factor, gram)",
    ),
    Fault(
        "muon takes the steps of one rank for another's",
        "train/optim/muon.py",
        "zip(owned, parts, lengths, strict=True)",
        "zip(owned, parts[::-1], lengths, strict=True)",
    ),
    Fault(
        "muon waits for the device",
        "train/optim/muon.py",
        "    _step_supports_amp_scaling = True",
        "    _step_supports_amp_scaling = False",
        ("cuda_pretended",),
    ),
    Fault(
        "the subject's box waits for the device",
        "train/models/subject_crop/crop.py",
        "torch.cat([pixels.new_zeros(2), pixels.new_ones(2)])",
        "pixels.new_tensor([0.0, 0.0, 1.0, 1.0])",
        ("cuda_pretended",),
    ),
    Fault(
        "the moving average takes the new weights' share",
        "train/optim/ema.py",
        "[theirs[i] for i in mixed], 1 - decay)",
        "[theirs[i] for i in mixed], decay)",
    ),
    Fault(
        "the moving average is not restored",
        "train/engine/state.py",
        '            self.ema.module.load_state_dict(state["ema"])\n',
        "",
    ),
    Fault(
        "the optimizer is not restored",
        "train/engine/state.py",
        '        self.optimizer.load_state_dict(state["optimizer"])\n',
        "",
    ),
    Fault(
        "the schedule is not restored",
        "train/engine/state.py",
        '        self.scheduler.load_state_dict(state["scheduler"])\n',
        "",
    ),
    Fault(
        "batch-norm statistics of a skipped step stay",
        "train/engine/state.py",
        "        self.batch_norm.restore_unless(finite)\n",
        "",
        ("state", "loop"),
    ),
    Fault(
        "batch-norm statistics are not averaged over the ranks",
        "train/engine/loop.py",
        "    state.average_statistics()\n",
        "",
        ("state",),
    ),
    Fault(
        "all ranks resume with the first one's batch-norm statistics",
        "train/engine/state.py",
        "values = rows[ranks.rank] if len(rows) == ranks.world_size else rows.mean(0)",
        "values = rows[0] if len(rows) == ranks.world_size else rows.mean(0)",
    ),
    Fault(
        "of equal accuracies the higher log loss wins",
        "train/runs/history.py",
        'return (accuracy, loss) if config.best_by == "accuracy" else (loss, accuracy)',
        'return (accuracy, -loss) if config.best_by == "accuracy" else (loss, accuracy)',
    ),
    Fault(
        "gradients are never clipped",
        "train/engine/state.py",
        "norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip_grad)",
        "norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1e9)",
        ("state", "loop"),
    ),
    # what is seen of the images
    Fault(
        "augmentation does not depend on the epoch",
        "train/data/augment.py",
        'random = uniforms(seed_of("view", seed, epoch), indices, 4 * TRIES)',
        'random = uniforms(seed_of("view", seed), indices, 4 * TRIES)',
        ("augment", "loader"),
    ),
    Fault(
        "crops are resized without antialiasing",
        "train/data/augment.py",
        "F.interpolate(pixels, (size, size), mode=interpolation, antialias=True)",
        "F.interpolate(pixels, (size, size), mode=interpolation)",
    ),
    Fault(
        "all images are flipped in the same epochs",
        "train/data/augment.py",
        "(starts + epoch * share) % 1 < share",
        "(0 * starts + epoch * share) % 1 < share",
    ),
    Fault(
        "images in the device's memory are not flipped",
        "train/data/device_cache.py",
        "torch.where(flip[:, None, None] > 0, across.flip(1), across)",
        "across",
    ),
    Fault(
        "images are flipped upside down",
        "train/data/augment.py",
        "pixels = pixels.flip(1)",
        "pixels = pixels.flip(0)",
    ),
    Fault(
        "mixup keeps the labels of one",
        "train/data/augment.py",
        "targets = torch.lerp(two.flip(1), two, shares)",
        "targets = two",
    ),
    Fault(
        "CutMix's share is that of the planned rectangle, not of what was cut",
        "train/data/augment.py",
        "            own[i] = 1 - cut / (height * width)\n",
        "",
    ),
    Fault(
        "width and height of a box are swapped",
        "train/data/augment.py",
        "return int(x * (width - w + 1)), int(y * (height - h + 1)), w, h",
        "return int(x * (width - w + 1)), int(y * (height - h + 1)), h, w",
    ),
    # what validates, and what is reported of it
    Fault(
        "of two columns that may be the label the first is taken",
        "train/data/layouts/label_candidates.py",
        "if len(candidates) == 1:",
        "if candidates:",
        ("label_columns",),
    ),
    Fault(
        "training takes the validation rows of a label file too",
        "train/data/layouts/label_file.py",
        "for path, label in labels.items() if parts[path] == taken",
        "for path, label in labels.items()",
        ("label_columns", "index"),
    ),
    Fault(
        "a label file of training takes images of the test part",
        "serve/contract/image_files.py",
        'if self.is_of_training and folder and part_of(folder) == "test":',
        "if not folder and not path:",
    ),
    Fault(
        "an image that is in two folders is taken from the first",
        "serve/contract/image_files.py",
        "            if len(hits) > 1:\n                raise UserError(",
        "            if len(hits) > 9:\n                raise UserError(",
    ),
    Fault(
        "copies of an image are on both sides of the split",
        "train/data/split.py",
        "members.setdefault(group, []).append(i)",
        'members.setdefault(f"{group}{i}", []).append(i)',
        ("split", "index"),
    ),
    Fault(
        "the split depends on the order of listing",
        "train/data/split.py",
        'groups.sort(key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())',
        "groups.sort(key=lambda group: -len(members[group]))",
        ("split", "index", "tar_files"),
    ),
    Fault(
        "ROC AUC of the first class",
        "train/evaluation/metrics.py",
        "first = 1 if num_classes == 2 else 0",
        "first = 0",
    ),
    Fault(
        "top-5 accuracy with equal logits in favour of the label",
        "train/evaluation/metrics.py",
        "rank = np.count_nonzero(~(logits <= own) | ((logits == own) & (classes < label)), axis=1)",
        "rank = np.count_nonzero(~(logits <= own), axis=1)",
    ),
    Fault(
        "confusion pairs on their side",
        "train/evaluation/classes.py",
        "np.stack([predictions.labels[wrong], predictions.predicted[wrong]], axis=1)",
        "np.stack([predictions.predicted[wrong], predictions.labels[wrong]], axis=1)",
    ),
    Fault(
        "a submission in the order of the images",
        "serve/outputs/submission.py",
        'yield entry._replace(key=f"{position:010}")',
        "yield entry",
    ),
    Fault(
        "columns of a submission in the model's order",
        "serve/outputs/submission_columns.py",
        "[str(value) for value in p[order]]",
        "[str(value) for value in p]",
    ),
    Fault(
        "a submission's probability of the other class",
        "serve/outputs/submission_columns.py",
        "return Column(lambda p: [str(p[at])]",
        "return Column(lambda p: [str(p[1 - at])]",
    ),
    Fault(
        "equal scores count as won in ROC AUC",
        "train/evaluation/metrics.py",
        'np.searchsorted(ordered, own, side).sum() for side in ("left", "right")',
        'np.searchsorted(ordered, own, side).sum() for side in ("right", "right")',
    ),
    Fault(
        "the table of an earlier stop stays beside better arrays",
        "train/evaluation/predictions.py",
        "        (run / TABLE).unlink(missing_ok=True)\n",
        "",
    ),
    Fault(
        "a confusion matrix on its side",
        "train/evaluation/predictions.py",
        "np.add.at(counts, (self.labels, self.predicted), 1)",
        "np.add.at(counts, (self.predicted, self.labels), 1)",
    ),
    Fault(
        "predictions without the temperature that is served",
        "train/evaluation/predictions.py",
        "return log_probability_blocks(self.logits, self.temperature, self.clip)",
        "return log_probability_blocks(self.logits, 1.0, self.clip)",
    ),
    # what is kept
    Fault(
        "a checkpoint's checksum is not checked",
        "train/checkpoint.py",
        "if trailer[: len(MARK)] != MARK or trailer[len(MARK) :] != hashlib.sha256(payload).digest():",
        "if trailer[: len(MARK)] != MARK:",
    ),
    Fault(
        "checkpoints may run code",
        "train/checkpoint.py",
        "torch.load(io.BytesIO(payload), map_location=device, weights_only=True)",
        "torch.load(io.BytesIO(payload), map_location=device, weights_only=False)",
    ),
    Fault(
        "a checkpoint is written in place",
        "train/checkpoint.py",
        "with atomic_write(path) as file:",
        'with open(path, "wb") as file:',
    ),
    Fault(
        "one snapshot is kept",
        "train/runs/snapshots.py",
        "for old in list_snapshots(self.folder)[KEPT:]:",
        "for old in list_snapshots(self.folder)[1:]:",
    ),
    Fault(
        "tensors of a snapshot change while it is written",
        "train/runs/snapshots.py",
        'return value.detach().to("cpu", copy=True)',
        'return value.detach().to("cpu")',
    ),
    Fault(
        "the best checkpoint is the last one",
        "train/engine/trainer.py",
        "if improved and evaluation is not None:",
        "if evaluation is not None:",
        ("trainer", "pipeline", "directory"),
    ),
    # MLflow
    Fault(
        "a status that is always FINISHED",
        "train/tracking/mlflow_tracker.py",
        "self.record.status, self.ending = status, True",
        'self.record.status, self.ending = "FINISHED", True',
    ),
    Fault(
        "metrics are sent again after a resume",
        "train/tracking/sender.py",
        "        if epoch not in self.known[key]:\n            return False\n",
        "        return False\n",
        ("mlflow_tracker", "opening", "faults"),
    ),
    # the model and its file
    Fault(
        "the exported weights are not the moving average",
        "train/models/build.py",
        'checkpoint["ema"] or checkpoint["model"]',
        'checkpoint["model"] or checkpoint["ema"]',
        ("build", "convert"),
    ),
    Fault(
        "a stamp without a gate",
        "export/record.py",
        "    if report.passed:\n        unverified.replace(published)",
        "    if True:\n        unverified.replace(published)",
        ("record", "export_main"),
    ),
    Fault(
        "logits may differ by anything",
        "export/verify.py",
        "if report.max_difference_probabilities > limits.probabilities:",
        "if report.max_difference_probabilities > 1:",
    ),
    Fault(
        "noise is not compared",
        "export/verify.py",
        "zip(real, noise, strict=True)",
        "zip(real, real, strict=True)",
    ),
    Fault(
        "class names are not compared",
        "export/verify.py",
        "if list(served.class_names) != class_names:",
        "if len(served.class_names) != len(class_names):",
    ),
    Fault(
        "the file's preprocessing is not compared",
        "export/verify.py",
        "if served.preprocess != preprocess:",
        "if served.preprocess.size != preprocess.size:",
    ),
    # scoring
    Fault(
        "the threshold is that of the right answers alone",
        "serve/contract/confidence.py",
        "chosen = float(candidates[np.abs(above - right.sum()).argmin()])",
        "chosen = float(np.quantile(probabilities[right] if right.any() else probabilities, 0.1))",
    ),
    Fault(
        "a summary forgets what an earlier call scored",
        "serve/progress.py",
        "self.summary.join(summary_of(manifest))",
        "pass",
        ("outcome",),
    ),
    Fault(
        "merging does not judge the errors",
        "serve/merge.py",
        "return outcome_code(summary, summary.rows, max_errors) or int(",
        "return int(",
        ("outcome",),
    ),
    Fault(
        "an alias is its newest version",
        "serve/mlflow_models.py",
        'number = aliases.get(alias, "") if alias else',
        "number = str(newest) if alias else",
        ("mlflow_models",),
    ),
    Fault(
        "probabilities are logits",
        "serve/predictor.py",
        "return self.run(pixels)[1]",
        "return self.run(pixels)[0]",
    ),
    Fault(
        "a broken file gets the pixels before it",
        "serve/batch.py",
        "            if batch.errors[slot]:\n                self.pixels[slot] = 0\n",
        "",
    ),
    Fault(
        "calls of one classifier decode without a common limit",
        "serve/classifier.py",
        "            turns=self._turns,\n",
        "",
    ),
    Fault(
        "MLflow's answer has NaN for an image that cannot be read",
        "serve/pyfunc.py",
        "model_input.index, dtype=object)",
        "model_input.index)",
    ),
    Fault(
        "base64 text that comes as bytes is taken for a file",
        "serve/pyfunc.py",
        "if (text := BASE64.fullmatch(data)) and not PLAIN_PPM.match(data):",
        "if False:",
    ),
    Fault(
        "MLflow decodes base64, and refuses a request for one malformed text",
        "export/mlflow_package.py",
        'types.ColSpec("string", COLUMN)',
        'types.ColSpec("binary", COLUMN)',
        near=("mlflow_package",),
    ),
    Fault(
        "each logged model imports serving's code of the same name",
        "export/mlflow_package.py",
        "digest.hexdigest()[:12]",
        "'0' * 12",
    ),
    Fault(
        "the run above the folds in MLflow has no accuracy",
        "pipelines/folds.py",
        'parent.end("FINISHED", data.accuracy)',
        'parent.end("FINISHED")',
        near=("label_issues",),
    ),
    Fault(
        "an evaluation estimates its accuracy by the answers below the threshold",
        "pipelines/evaluation_report.py",
        "scored.probabilities.max(axis=1) > threshold.probability",
        "scored.probabilities.max(axis=1) < threshold.probability",
        near=("evaluate",),
    ),
    Fault(
        "images that cannot be read are left out of the evaluation's counts",
        "pipelines/evaluation_report.py",
        "num_images=images + len(scored.bad),",
        "num_images=images,",
        near=("evaluate",),
    ),
    Fault(
        "a label file of images to evaluate is read as one of training",
        "pipelines/labelled_scores.py",
        "data_format, HELD_OUT, columns)",
        'data_format, "--data", columns)',
        near=("evaluate",),
    ),
    Fault(
        "an accuracy below --min-accuracy has exit code 0",
        "pipelines/evaluate.py",
        "    return BELOW\n",
        "    return 0\n",
    ),
    Fault(
        "a part without its checksum",
        "serve/shards.py",
        "return manifest if file_sha256(part) == manifest.sha256 else None",
        "return manifest",
        ("shards", "job"),
    ),
    Fault(
        "a SLURM array begins at 0",
        "serve/schedulers.py",
        "    first = first or 0\n",
        "    first = 0\n",
    ),
    Fault(
        "the last batch belongs to no shard",
        "serve/shards.py",
        "batches = -(-total // batch_size)",
        "batches = total // batch_size",
    ),
    Fault(
        "a shard's part is of any job",
        "serve/shards.py",
        "if (manifest.job, manifest.first, manifest.rows) != (job, rows.start, len(rows)):",
        "if (manifest.first, manifest.rows) != (rows.start, len(rows)):",
        ("shards", "job"),
    ),
    Fault(
        "errors that may pass are kept",
        "serve/shards.py",
        "        if manifest.transient:\n            return None\n",
        "",
        ("shards", "job"),
    ),
    Fault(
        "the output is written in place",
        "serve/contract/files.py",
        "        os.replace(temporary, path)\n",
        "        path.write_bytes(temporary.read_bytes())\n",
        ("files", "job"),
    ),
    Fault(
        "pixels are resized with another filter",
        "serve/contract/preprocess.py",
        "resample = RESAMPLING[self.interpolation]",
        "resample = Image.Resampling.NEAREST",
    ),
    Fault(
        "padding is at the bottom right",
        "serve/contract/preprocess.py",
        "canvas.paste(resized, ((self.size - resized.width) // 2, (self.size - resized.height) // 2))",
        "canvas.paste(resized, (0, 0))",
    ),
    Fault(
        "the crop is not central",
        "serve/contract/preprocess.py",
        "left = round((resized_w - self.size) / 2)",
        "left = 0",
    ),
    Fault(
        "linked folders are passed over in silence",
        "serve/contract/listing.py",
        'yield name, "folder", "linked folder, not followed"',
        "pass",
    ),
    Fault(
        "transparency is laid over black",
        "serve/contract/colours.py",
        "(255, 255, 255, 255)",
        "(0, 0, 0, 255)",
        ("colours", "images"),
    ),
    Fault(
        "a JPEG that ends before its last rows is a picture with grey in their place",
        "serve/contract/images.py",
        'elif image.format in ("JPEG", "MPO") and not last.strip(GREY):',
        "elif False:",
        ("jpeg",),
    ),
    # Jobs in a cluster
    Fault(
        "a Job made again by somebody else is waited for",
        "k8s/runner/job.py",
        """raise PipelineError(1, f"{job.name} was replaced by somebody else: {describe}")""",
        "pass",
        ("k8s_pipeline",),
    ),
    Fault(
        "an active Job is deleted without a word",
        "k8s/runner/job.py",
        "if live is None or ending(live) or anew:",
        "if True:",
        ("k8s_pipeline",),
    ),
    Fault(
        "runs share the names of their Jobs",
        "k8s/runner/render.py",
        '"nameSuffix": f"-{run}",',
        '"nameSuffix": "-run",',
        ("k8s_pipeline",),
    ),
    Fault(
        "settings can be changed under a running Job",
        "k8s/runner/render.py",
        '"generatorOptions": {"immutable": True},',
        "",
        ("k8s_pipeline",),
    ),
    Fault(
        "a container that never started hides what the doctor wrote",
        "k8s/runner/reasons.py",
        '"--ignore-errors", "--prefix"',
        '"--prefix"',
        ("k8s_pipeline",),
    ),
    Fault(
        "a Job that was made without an answer is refused",
        "k8s/runner/job.py",
        'if live and live["metadata"].get("annotations", {}).get(TOKEN) == token:',
        "if False:",
        ("k8s_pipeline",),
    ),
    Fault(
        "a Job runs on after its time",
        "k8s/runner/job.py",
        'cluster.once("patch", target,',
        'cluster.once("get", target,',
        ("k8s_pipeline",),
    ),
    Fault(
        "a missing Secret is found by the pod that waits for it",
        "k8s/runner/checks.py",
        "for name in sorted(set(names) - there):",
        "for name in []:",
        ("k8s_pipeline",),
    ),
    # the documents
    Fault(
        "a link names a heading that is gone",
        "docs/scoring.md",
        "(label_files.md)",
        "(label_files.md#label-files)",
        ("documents",),
    ),
    Fault(
        "a command in a page has another program's flag",
        "docs/evaluating.md",
        "--data LABELLED --min-accuracy 0.95",
        "--images LABELLED --min-accuracy 0.95",
        ("documents",),
    ),
    Fault(
        "a command within a line has a flag that is gone",
        "docs/comparing.md",
        "`python pipelines/report.py --run runs/NAME`",
        "`python pipelines/report.py --runs runs/NAME`",
        ("documents",),
    ),
]


def failed_test(root: Path, *arguments: str) -> tuple[str, int]:
    """Return the first test that failed, or "", and pytest's exit code."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=no", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=LONGEST
        )
    except subprocess.TimeoutExpired:
        return f"(a test does not end in {LONGEST} s)", 1
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return (found[1] if found else "", done.returncode)


def find(fault: Fault, tests: str) -> str:
    """Return the test that finds the fault, or ""."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for part in PARTS:
            shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
        for name in FILES:
            if (ROOT / name).exists():
                shutil.copy(ROOT / name, root)
        fault.plant(root)
        if tests != "all":
            near = [name for name in fault.tests() if (root / name).exists()]
            test, code = failed_test(root, *near)
            if code not in (0, 5):  # 5: no test was collected
                return test or "(not one test could be collected)"
            if tests == "near":
                return ""
        test, code = failed_test(root, "-n", "2", "--dist", "worksteal")
        return test or ("(the run itself failed)" if code else "")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[], help="names of faults")
    parser.add_argument("--list", action="store_true", help="print the faults")
    parser.add_argument("--tests", choices=("near", "all"), default="", help="default: both, in turn")
    arguments = parser.parse_args()
    chosen = [fault for fault in FAULTS if not arguments.only or fault.name in arguments.only]
    lines, missed = [], 0
    for fault in chosen:
        if arguments.list:
            print(f"{fault.name:60} {fault.file}")
            continue
        started = time.perf_counter()
        test = find(fault, arguments.tests)
        missed += not test
        lines.append(f"| {fault.name} | {fault.file} | {test or '**not found**'} |")
        print(f"{time.perf_counter() - started:6.1f} s  {fault.name}: {test or 'NOT FOUND'}", flush=True)
    if lines:
        print("\n| fault | file | found by |\n|---|---|---|", *lines, sep="\n")
        print(f"{len(lines) - missed} of {len(lines)} planted faults found")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
