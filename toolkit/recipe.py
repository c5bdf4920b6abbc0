"""Recipes: frozen models of everything that decides a run. No torch here.

A recipe file is YAML. Its top level holds the fields of ``Recipe``; the optional sections ``train`` and
``distill`` hold what differs between the teacher's run and the student's run of one file.
``resolve`` merges file, section and overrides into the ``Recipe`` of one run.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    SerializeAsAny,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from toolkit import losses
from toolkit.catalogue import BUDGET, GIVEN, PRETRAINED, ROLES, TEACHER, closest, names, pretrained
from toolkit.choices import Balance, Role, Stage, Views
from toolkit.errors import RecipeError, UserError, in_line, listing

RECIPES = Path(__file__).parent / "recipes"
STAGES: tuple[Stage, ...] = get_args(Stage)
# Where a run happens, not what it computes: left out of its identity.
PLACES = (
    "data.data_dir",
    "data.offline",
    "data.memory",
    "device",
    "teacher.checkpoint",
    "teacher.also",
    "teacher.classes",
    "keep_checkpoints",
    "checkpoint_minutes",
)
TITLES = ("name", "source", "reported_top1")  # nor what is only said about it
# Nor is a run with another one of these another system than the one that a report speaks of.
INCIDENTAL = (
    *PLACES, *TITLES, "seed", "precision", "channels_last", "probe", "compile", "deterministic", "micro_batch",
    "sync_norm", "eval_epochs", "budget", "data.val_size", "select",
)  # fmt: skip
SPLIT = ("val_size", "split_seed", "group_by", "skip_broken", "skip_leaks")
TABLES = (".csv", ".tsv", ".txt")
LATE = 1 - 1e-6  # of a run: a ramp to 0 that takes the whole of it still teaches
DEVICES = r"^(auto|cpu|cuda|cuda:\d+)$"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Data(Section):
    """Which images, at which size, and how they are split."""

    dataset: str = Field(
        "cifar10",
        pattern=r"^(cifar10|cifar100|digits|folder|folder:.+)$",
        description="cifar10, cifar100, digits, or folder:PATH",
    )
    data_dir: Path | None = Field(None, description="folder of the data set; then $TOOLKIT_DATA and ./data are tried")
    offline: bool = Field(False, description="never download")
    image_size: int = Field(32, ge=16, le=512, description="side of the images in pixels")
    val_size: int | float = Field(
        0.1, ge=0, description="validation split: a fraction below 1, or a count of images; 0 for none"
    )
    split_seed: int = Field(0, ge=0, lt=2**32, description="seed of the splits; the same for teacher and student")
    memory: float | None = Field(
        None,
        gt=0,
        description="GiB for a folder's images and a copy; beyond it they stay on disk. null: half of the memory",
    )
    skip_broken: bool = Field(False, description="leave unreadable images of a folder out")
    skip_leaks: bool = Field(False, description="leave training images out that are in val or test too")
    images: Path | None = Field(
        None,
        description="JSON file: a list of a folder's images that count, by their paths in it; others are left out. A "
        "run keeps its own (images.json)",
    )
    group_by: str | None = Field(
        None,
        description="regular expression: images of a folder in whose paths it finds the same (its first group, if it "
        "has one) stay on one side of a split",
    )
    unlabelled: bool = Field(False, description="a folder's images have no classes: the teacher's answers are taken")

    @property
    def kind(self) -> str:
        """``cifar10``, ``cifar100``, ``digits`` or ``folder``."""
        return self.dataset.partition(":")[0]

    @property
    def title(self) -> str:
        """What it is called: of a folder by the last part of its path, without the places that lead there."""
        kind, _, text = self.dataset.partition(":")
        path = Path(text).expanduser().resolve()
        name = path.stem if path.suffix.lower() in TABLES else path.name
        return f"{kind}:{name}" if text else kind

    @property
    def split(self) -> dict[str, Any]:
        """What decides, for given images, which are held out for val and test."""
        return {key: getattr(self, key) for key in SPLIT}

    @field_validator("dataset")
    @classmethod
    def _a_path_has_one_name(cls, dataset: str) -> str:
        kind, colon, path = dataset.partition(":")
        try:
            Path(path).expanduser()
        except RuntimeError as error:
            raise ValueError(f"there is no such home directory: {path}") from error
        return f"{kind}:{Path(path)}" if colon else dataset  # photos/ is photos

    @field_validator("group_by")
    @classmethod
    def _a_pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return pattern

    @model_validator(mode="before")
    @classmethod
    def _folder_by_its_path(cls, tree: Any) -> Any:
        # data_dir only says where a known data set lies; a folder's path is what tells it from another.
        if isinstance(tree, Mapping) and tree.get("dataset") == "folder" and tree.get("data_dir"):
            return {**tree, "dataset": f"folder:{tree['data_dir']}", "data_dir": None}
        return tree


class Augment(Section):
    """Augmentation of the training images, in the order in which it is applied."""

    flip: Literal["none", "random", "alternating"] = Field(
        "random", description="horizontal flip; alternating: each image every second epoch (airbench)"
    )
    crop_padding: int = Field(4, ge=0, le=64, description="pixels of padding before a random crop; 0: off")
    padding_mode: Literal["reflect", "zero", "white"] = Field("reflect", description="what the padding holds")
    policy: Literal["none", "trivial", "rand"] = Field(
        "none",
        description="trivial: TrivialAugment (arXiv 2103.10158), one random operation of random strength for each "
        "image; rand: RandAugment (arXiv 1909.13719), rand_operations of them, each of strength rand_magnitude",
    )
    rand_operations: int = Field(2, ge=1, le=14, description="rand: operations one after the other")
    rand_magnitude: int = Field(9, ge=0, le=30, description="rand: their strength, from 0 to 30")
    rotation: float = Field(0, ge=0, le=180, description="degrees: uniform in plus or minus this")
    translation: float = Field(0, ge=0, le=1, description="fraction of the side: uniform in plus or minus this")
    brightness: float = Field(0, ge=0, description="colour jitter: factor uniform in 1 plus or minus this")
    contrast: float = Field(0, ge=0, description="colour jitter: factor uniform in 1 plus or minus this")
    saturation: float = Field(0, ge=0, description="colour jitter: factor uniform in 1 plus or minus this")
    hue: float = Field(
        0, ge=0, le=0.5, description="colour jitter: fraction of a full turn of the colour circle, plus or minus"
    )
    cutout: int = Field(0, ge=0, description="side of a black square in pixels, at a random place; 0: off")
    erasing: float = Field(
        0, ge=0, le=1, description="fraction of the images of which a random box is painted over (arXiv 1708.04896)"
    )
    mixup: float = Field(0, ge=0, description="alpha of mixup's Beta(alpha, alpha); 0: off")
    cutmix: float = Field(0, ge=0, description="alpha of CutMix's Beta(alpha, alpha); 0: off")
    mix_probability: float = Field(
        1, ge=0, le=1, description="fraction of the images that mixup or CutMix is applied to"
    )
    plain_copy: bool = Field(False, description="each epoch also shows every image as it is: twice as many samples")

    @property
    def copies(self) -> int:
        """Samples of each image in an epoch."""
        return 2 if self.plain_copy else 1


class Model(BaseModel):
    """A name from the catalogue; every further key is an argument of that architecture's builder."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str

    @model_validator(mode="before")
    @classmethod
    def _as_json(cls, tree: Any) -> Any:
        # What is read from a file again has lists.
        if not isinstance(tree, Mapping):
            return tree
        return {key: list(value) if isinstance(value, tuple) else value for key, value in tree.items()}

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


def _three(value: Any) -> Any:
    return tuple(value.split(",")) if isinstance(value, str) else value


def _in_range(channels: tuple[float, float, float]) -> tuple[float, float, float]:
    if not all(0 <= value <= 1 for value in channels):
        raise ValueError(f"{channels} must lie in 0..1, as the images do: of images in 0..255, divide by 255")
    return channels


def _above_zero(channels: tuple[float, float, float]) -> tuple[float, float, float]:
    if not all(channels):
        raise ValueError(f"{channels} must be greater than 0")
    return channels


Channels = Annotated[tuple[float, float, float], BeforeValidator(_three), AfterValidator(_in_range)]


class TeacherInput(Section):
    """What a teacher from elsewhere is given: (image - mean) / std * scale, of images in [0,1]."""

    image_size: int | None = Field(None, ge=8, description="side of its images in pixels; null: what its file says")
    layout: Literal["nchw", "nhwc"] | None = Field(None, description="order of its input's axes; null: by its shape")
    scale: float | None = Field(None, gt=0, description="what white is before normalisation: 1 or 255; null: 1")
    mean: Channels | None = Field(None, description="of each channel, in 0..1; null: 0")
    std: Annotated[Channels, AfterValidator(_above_zero)] | None = Field(
        None, description="of each channel, in 0..1; null: 1"
    )


class Teacher(Model):
    checkpoint: Path | None = Field(
        None,
        description="run directory or weights (.safetensors) of a teacher, or an ONNX file; else the newest run",
    )
    input: TeacherInput = TeacherInput()
    classes: Path | None = Field(
        None,
        description="YAML: names of its outputs in their order, or a mapping from them (or their numbers) to classes",
    )
    views: Views | None = Field(
        None, description="test-time augmentation: its logits are the mean over views of each image"
    )
    weights: str | None = Field(
        None, description="SHA-256 of that teacher's weights; written when a run starts, and then held to"
    )
    also: tuple[Teacher, ...] = Field(
        (),
        description="more teachers, each by its run directory, weights or ONNX file, or as a mapping of these fields: "
        "their probabilities are averaged with its own, and those without a mapping take its views",
    )

    @model_validator(mode="before")
    @classmethod
    def _written_shortly(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        tree = dict(tree)
        if str(tree.get("name")).endswith(".onnx"):
            if str(tree.get("checkpoint") or tree["name"]) != tree["name"]:
                raise ValueError(f"name (={tree['name']}) and checkpoint (={tree['checkpoint']}) are two: give one")
            tree |= {"name": "onnx", "checkpoint": tree["name"]}
        if isinstance(tree.get("also"), list | tuple):
            tree["also"] = [_one_more(entry, tree.get("views")) for entry in tree["also"]]
        return tree

    @property
    def external(self) -> bool:
        """Whether it is from elsewhere: an ONNX file, or one of timm's models."""
        return is_external(self.name)


def _one_more(entry: Any, views: Any) -> Any:
    """An entry of ``teacher.also`` as the fields of a teacher: its name is that of its weights, unless it is given."""
    if isinstance(entry, Mapping):
        file = str(entry.get("checkpoint") or "")
        named = {"name": file if file.endswith(".onnx") else "", **entry}
        if not (file or is_external(str(named["name"]))):
            raise ValueError(f"also: {dict(entry)} names no weights: give it a checkpoint")
        if named.get("also"):
            raise ValueError(f"also: {named['also']} belongs to the first teacher's also, not to that of another one")
        return named
    if not isinstance(entry, str | Path):
        return entry
    named = {"name": str(entry)} if is_external(str(entry)) else {"name": "", "checkpoint": entry}
    return named | {"views": views}


def is_external(name: str) -> bool:
    """Whether a teacher's name is none of the catalogue."""
    return name == "onnx" or name.endswith(".onnx") or name.startswith("timm:")


class Ramp(Section):
    """A number that moves in a straight line from ``start`` to ``end`` and stays there."""

    start: float = Field(ge=0, description="value at the first step")
    end: float = Field(ge=0, description="value from then on")
    over: float = Field(1, gt=0, le=1, description="fraction of the run's epochs in which it moves")

    def at(self, progress: float) -> float:
        """The value when this fraction of the run is done."""
        return self.start + (self.end - self.start) * min(progress / self.over, 1)


def at(number: float | Ramp, progress: float) -> float:
    """What a number, or one that moves, is when this fraction of the run is done."""
    return number.at(progress) if isinstance(number, Ramp) else number


def peak(number: float | Ramp) -> float:
    """The largest that a number becomes."""
    return max(number.start, number.end) if isinstance(number, Ramp) else number


def _positive(number: float | Ramp) -> float | Ramp:
    if isinstance(number, Ramp) and not number.start * number.end:
        raise ValueError(f"start (={number.start:g}) and end (={number.end:g}) must be greater than 0")
    return number


KINDS = ("number", "ramp")
_kind = Discriminator(lambda value: KINDS[isinstance(value, Mapping | Ramp)])
Weight = Annotated[Annotated[NonNegativeFloat, Tag("number")] | Annotated[Ramp, Tag("ramp")], _kind]
Temperature = Annotated[
    Annotated[PositiveFloat, Tag("number")] | Annotated[Ramp, Tag("ramp")], _kind, AfterValidator(_positive)
]


class Method(Section):
    """What the ``Params`` of all distillation methods share; each adds its own in ``toolkit/losses/``."""

    terms: ClassVar[tuple[str, ...]] = ()  # the fields that weigh its terms: with all at 0 it would teach nothing

    weight: Weight = Field(1, description="weight of this method among the methods")

    @model_validator(mode="after")
    def _teaches(self) -> Method:
        if self.terms and not any(getattr(self, term) for term in self.terms):
            raise ValueError(f"{' and '.join(self.terms)} are both 0: one must be positive")
        return self


class FeatureMethod(Method):
    """A method that compares outputs of modules within the nets, not their logits."""

    maps: ClassVar[bool] = True  # it takes feature maps [B,C,S,S] alone; else vectors [B,C] too

    layers: tuple[tuple[str, str], ...] = Field(
        (),
        description="pairs of a module of the student and one of the teacher, by path (network.stages.1); none: the "
        "last ones of the three lowest resolutions, in turn, or of the lowest alone where vectors would do too",
    )


def _methods(tree: Any) -> Any:
    """A mapping from names to settings as one to each method's ``Params``."""
    if not isinstance(tree, Mapping):
        return tree
    methods, problems = {}, list[Any]()
    for name, settings in tree.items():
        if name not in losses.names():
            unknown = ValueError(f"there is no such method{closest(str(name), losses.names())}")
            problems.append({"type": "value_error", "loc": (name,), "input": settings, "ctx": {"error": unknown}})
            continue
        try:
            methods[name] = losses.load(name).Params.model_validate({} if settings is None else settings)
        except ValidationError as error:
            problems += [
                {"type": item["type"], "loc": (name, *item["loc"]), "input": item["input"], "ctx": item.get("ctx", {})}
                for item in error.errors()
            ]
    if problems:
        raise ValidationError.from_exception_data("methods", problems)
    return methods


class Loss(Section):
    """The terms of the loss and what each is multiplied by. Weights and the temperature may be ramps."""

    ce_weight: Weight = Field(1, description="weight of the cross entropy with the labels")
    kd_weight: Weight = Field(0, description="weight of the distillation term: of the sum of the methods")
    temperature: Temperature = Field(4, description="what soft_targets, dkd and dist divide the logits by")
    label_smoothing: float = Field(0, ge=0, lt=1, description="mass spread over all classes, in the cross entropy")
    methods: Annotated[dict[str, SerializeAsAny[Method]], BeforeValidator(_methods)] = Field(
        {},
        description="distillation methods by name (the files of toolkit/losses/), each with its settings, which add "
        "up; none: soft targets alone",
    )

    @model_validator(mode="after")
    def _some_weight(self) -> Loss:
        if peak(self.ce_weight) + peak(self.kd_weight) == 0:
            raise ValueError(
                "ce_weight and kd_weight are both 0: one must be positive, for images without labels kd_weight"
            )
        if self.methods and not any(peak(method.weight) for method in self.methods.values()):
            raise ValueError(f"the weights of all methods ({', '.join(self.methods)}) are 0: one must be positive")
        methods = [at(method.weight, LATE) for method in self.methods.values()] or [1.0]
        if at(self.ce_weight, LATE) + at(self.kd_weight, LATE) * sum(methods) == 0:
            raise ValueError("all weights come down to 0 before the end: from there on nothing would be learnt")
        return self


class Optimizer(Section):
    name: Literal["sgd", "adam", "adamw", "muon"] = Field(
        "sgd", description="muon: Muon for the filters of all convs (made for those that BN follows), SGD for the rest"
    )
    lr: float = Field(0.1, gt=0, description="peak learning rate, per step on the batch's mean loss")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's momentum, Adam's and AdamW's first beta")
    nesterov: bool = Field(True, description="SGD with Nesterov's momentum")
    weight_decay: float = Field(5e-4, ge=0, description="as torch.optim takes it")
    decay_norm: bool = Field(True, description="weight decay on normalisation layers and biases too")
    norm_bias_lr: float = Field(
        1, gt=0, description="factor on the learning rate of the normalisation layers' biases (airbench: 64)"
    )
    filter_lr: float = Field(0.1, gt=0, description="muon: peak length of a step, as a fraction of the filter's")
    filter_momentum: float = Field(0.6, ge=0, lt=1, description="muon: momentum of the filters' gradients")
    lookahead_steps: int = Field(
        0, ge=0, description="steps between two updates of Lookahead's slow weights (arXiv 1907.08610); 0: off"
    )
    lookahead_alpha: float = Field(0.5, gt=0, le=1, description="how far the slow weights move to the fast ones")
    grad_clip: float | None = Field(None, gt=0, description="largest L2 norm of the gradient")
    sam_radius: float = Field(
        0, ge=0, description="rho of sharpness-aware minimisation (arXiv 2010.01412): two passes a step; 0: off"
    )

    @model_validator(mode="after")
    def _nesterov_wants_momentum(self) -> Optimizer:
        if self.name in ("sgd", "muon") and self.nesterov and self.momentum == 0:
            raise ValueError("nesterov (=true) needs a momentum above 0")
        return self


class Schedule(Section):
    """The learning rate over training, as a factor on the peak."""

    name: Literal["cosine", "triangular", "constant", "step"] = Field(
        "cosine",
        description="cosine or triangular (straight): from the peak to final_fraction; step: times gamma at each "
        "milestone",
    )
    warmup_epochs: float = Field(0, ge=0, description="epochs of linear warm-up from initial_fraction")
    initial_fraction: float = Field(0, ge=0, le=1, description="factor at the first step of the warm-up")
    final_fraction: float = Field(0, ge=0, le=1, description="factor at the end (cosine, triangular)")
    milestones: tuple[float, ...] = Field((), description="epochs at which step multiplies by gamma")
    gamma: float = Field(0.1, gt=0, le=1, description="factor at each milestone")


class Progressive(Section):
    """Images that are small at first and grow: the early epochs take less time. The teacher sees them whole."""

    start: int | None = Field(None, ge=16, description="side in the first epoch, in pixels; null: whole from the start")
    over: float = Field(0.5, gt=0, le=1, description="fraction of the run's epochs after which they are whole")

    def side(self, progress: float, whole: int) -> int:
        """The side when this fraction of the run is done: ``start``, then up in steps of 4 pixels to ``whole``."""
        if self.start is None or progress >= self.over:
            return whole
        return self.start + int((whole - self.start) * progress / self.over) // 4 * 4


class EarlyStop(Section):
    """The end of a run whose val metric has stopped improving."""

    patience: int | None = Field(None, ge=1, description="epochs without a better value before the run ends; null: off")
    metric: Literal["val_loss", "val_top1"] = Field("val_loss", description="what has to improve")


class BatchGrowth(Section):
    """A batch that grows at constant learning rate (Anand; Smith et al., arXiv 1711.00489)."""

    factor: int = Field(2, ge=2, description="what the batch size is multiplied by")
    milestones: tuple[int, ...] = Field((), description="epochs after which it grows")
    patience: int | None = Field(
        None, ge=1, description="it also grows after this many epochs without a lower training loss; null: off"
    )
    ceiling: int = Field(1024, ge=2, description="largest batch size")


class Recipe(Section):
    """Everything that decides one run: the training of a teacher, or the distillation of a student."""

    name: str = Field("recipe", description="the file it came from")
    source: str | None = Field(None, description="the paper or report whose run this is")
    reported_top1: float | None = Field(None, ge=0, le=1, description="the test top-1 that the source claims")
    data: Data = Data()
    augment: Augment = Augment()
    teacher: Teacher | None = Field(None, description="trained, or distilled from where a student is given")
    student: Model | None = Field(None, description="trained where it is given")
    loss: Loss = Loss()
    cached_epochs: int = Field(
        0,
        ge=0,
        description="distinct views of each image; the teacher's logits of them are kept and replayed. 0: new views "
        "in every epoch, and the teacher runs in every step",
    )
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    epochs: int = Field(200, ge=1, description="passes over the training split")
    minutes: float | None = Field(
        None, gt=0, description="minutes that training may take here; epochs follow from what an epoch takes"
    )
    batch_size: int = Field(128, ge=2, description="images a step")
    batch_growth: BatchGrowth = BatchGrowth()
    balance: Balance = Field(
        "none",
        description="for classes of unequal size. weights: each class weighs the same in the cross entropy; sampling: "
        "an epoch shows as many images of each class, those of small classes several times",
    )
    micro_batch: int | None = Field(
        None, ge=2, description="most images in memory at once: larger batches add up their gradients; null: all"
    )
    progressive: Progressive = Progressive()
    early_stop: EarlyStop = EarlyStop()
    average_decay: float | None = Field(
        None, gt=0, lt=1, description="decay a step of an exponential average of weights and BN buffers"
    )
    swa_start: int | None = Field(
        None,
        ge=0,
        description="after this many epochs the weights at each epoch's end are averaged, and BN's statistics measured "
        "anew on training images (SWA, arXiv 1803.05407); null: off",
    )
    select: Literal["best", "last"] = Field(
        "best", description="weights that are kept: best on val, or of the last epoch"
    )
    eval_epochs: int = Field(1, ge=1, description="epochs between two evaluations on val")
    budget: int = Field(BUDGET, gt=0, description="a student has fewer parameters than this")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of convs and products; auto: bf16 where the hardware computes in it, and it is faster"
    )
    start_from: Path | None = Field(
        None,
        description="run directory or weights (.safetensors) to start from; pretrained: the shipped ones of this "
        "student; teacher: those of its teacher, if it has the same layers. The last layer starts at random where the "
        "classes are others",
    )
    int8: bool = Field(
        False, description="train for INT8: inputs and weights of convs and products are rounded to 8 bits"
    )
    deterministic: bool = Field(
        False, description="repeat to the last bit: no probe, and CUDA kernels that do, which are slower"
    )
    compile: bool = Field(True, description="torch.compile on CUDA; where it fails the run goes on without")
    sync_norm: bool = Field(False, description="BN statistics over all GPUs that share a step, not of each alone")
    channels_last: bool | None = Field(None, description="memory format of the images and weights; unset: the faster")
    probe: bool = Field(True, description="on a CPU, time a few steps for what precision and channels_last leave open")
    checkpoint_minutes: float = Field(10, gt=0, description="most minutes of work that a kill can lose")
    keep_checkpoints: int = Field(2, ge=1, description="newest training states that are kept")
    seed: int = Field(0, ge=0, lt=2**63, description="of weights, order and augmentation")
    device: str = Field("auto", pattern=DEVICES, description="auto, cpu, cuda or cuda:N")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if problems := [*self._of_the_teacher(), *self._of_the_run()]:
            raise ValueError("\n".join(problems))
        return self

    def _of_the_teacher(self) -> Iterator[str]:
        """What does not go together about who is trained, and by whom."""
        if self.teacher is None and self.student is None:
            yield "neither a teacher nor a student is named"
        for role, model in (("teacher", self.teacher), ("student", self.student)):
            if model is not None and not is_external(model.name):
                for key in filter(model.arguments.__contains__, GIVEN):
                    yield f"{role}.{key}: {model.name} takes no such argument; the data and the recipe decide it"
        if not self.distils and not at(self.loss.ce_weight, LATE) and not self.data.unlabelled:
            yield (
                "loss.ce_weight is or becomes 0, and no teacher is asked: nothing would be learnt (where the student "
                "alone is meant, it is distill.loss.ce_weight)"
            )
        if self.distils and self.teacher is None:
            yield f"loss.kd_weight (={peak(self.loss.kd_weight):g}) needs a teacher"
        if self.starts_from_teacher and (not self.distils or self.teacher is None or self.teacher.external):
            yield (
                "start_from=teacher needs a student that learns from a teacher that was trained here: leave it out, or "
                "name a run (in a file for both stages it is distill.start_from)"
            )
        teachers = () if self.teacher is None else (self.teacher, *self.teacher.also)
        if any(one.input != TeacherInput() and not one.external for one in teachers):
            yield "teacher.input (--teacher-mean and the like) is for teachers from elsewhere; one of ours needs none"
        by_features = [name for name, method in self.loss.methods.items() if isinstance(method, FeatureMethod)]
        if self.distils and by_features:
            needs = f"loss.methods.{by_features[0]} needs the teacher's features"
            if self.cached_epochs:
                yield f"{needs}, cached_epochs (={self.cached_epochs}) keeps its logits alone: set it to 0"
            if self.teacher is not None and self.teacher.also:
                yield f"{needs}, teacher.also makes it an ensemble that gives logits alone: leave it out"
            if self.teacher is not None and self.teacher.views:
                yield f"{needs}, teacher.views (={self.teacher.views}) averages its logits: leave it out"
            if self.teacher is not None and self.teacher.name == "onnx" and (maps := self._by_maps()):
                yield (
                    f"loss.methods.{maps[0]} needs the teacher's features, an ONNX file gives logits alone: take "
                    "another teacher, or another method"
                )
        if self.data.unlabelled and (not self.distils or peak(self.loss.ce_weight) or self.balance == "weights"):
            yield (
                "data.unlabelled leaves no labels to learn from: it needs a teacher, loss.ce_weight=0 and a "
                "loss.kd_weight above 0, and no balance=weights"
            )

    def _of_the_run(self) -> Iterator[str]:
        """What does not go together about lengths, sizes and averages."""
        if self.balance == "weights" and not peak(self.loss.ce_weight) and not self.data.unlabelled:
            yield "balance=weights weighs the cross entropy, and loss.ce_weight is 0: take sampling, or a ce_weight"
        if self.early_stop.patience and not self.data.val_size:
            yield "early_stop.patience needs a validation split: data.val_size is 0"
        averages = {"average_decay": self.average_decay, "optimizer.lookahead_steps": self.optimizer.lookahead_steps,
                    "swa_start": self.swa_start is not None}  # fmt: skip
        if len(given := [name for name, value in averages.items() if value]) > 1:
            yield f"{' and '.join(given)} each average the weights: choose one"
        if self.swa_start is not None and self.swa_start >= self.epochs:
            yield f"swa_start (={self.swa_start}) must be less than epochs (={self.epochs})"
        if self.progressive.start is not None and self.progressive.start >= self.data.image_size:
            yield (
                f"progressive.start (={self.progressive.start}) must be less than data.image_size "
                f"(={self.data.image_size})"
            )
        if self.progressive.start is not None and self.model.arguments.get("resize"):
            yield "progressive.start and resize exclude each other: of small images the model makes large ones again"
        if self.progressive.start is not None and (maps := self._by_maps()):
            yield f"progressive.start and {maps[0]} exclude each other: the teacher's maps would be larger"
        if self.schedule.warmup_epochs > self.epochs:
            yield f"schedule.warmup_epochs (={self.schedule.warmup_epochs:g}) must be at most epochs (={self.epochs})"

    def _by_maps(self) -> list[str]:
        """The methods that compare feature maps."""
        return [name for name, method in self.loss.methods.items() if isinstance(method, FeatureMethod) and method.maps]

    @property
    def distils(self) -> bool:
        """Whether a teacher's logits are part of the loss."""
        return self.student is not None and peak(self.loss.kd_weight) > 0

    @property
    def starts_from_teacher(self) -> bool:
        return str(self.start_from) == TEACHER

    @property
    def model(self) -> Model:
        """What is trained."""
        model = self.student or self.teacher
        assert model is not None
        return model

    @property
    def role(self) -> Role:
        return "student" if self.student is not None else "teacher"

    def identity(self) -> dict[str, Any]:
        """The recipe without the fields that only say where it runs."""
        tree = self.model_dump(mode="json")
        for path in (*PLACES, *TITLES):
            parent, _, leaf = path.rpartition(".")
            if node := at_path(tree, parent) if parent else tree:
                node.pop(leaf, None)
        return tree

    def digest(self) -> str:
        """SHA-256 of the identity, as 64 hex digits."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def differences(self, other: Recipe) -> list[str]:
        """One line ``field: mine -> theirs`` for each field of the identity that differs."""
        return differing(_flatten(self.identity()), _flatten(other.identity()))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """One line ``key: mine -> theirs`` for each key whose values differ."""
    return [
        f"{key}: {mine.get(key)} -> {theirs.get(key)}"
        for key in sorted({*mine, *theirs})
        if mine.get(key) != theirs.get(key)
    ]


def shipped(folder: Path = RECIPES) -> list[str]:
    """Names of the recipes (or what else the folder holds) that come with the toolkit."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read(source: str | Path, readers: tuple[str, ...] = ()) -> dict[str, Any]:
    """The tree of a shipped recipe (by name) or of a file (by path); ``readers`` are the recipes that asked for it.

    A stage may be another recipe's name: it is then that recipe's own run of this stage. Raises ``RecipeError``.
    """
    tree, readers = read_mapping(source, RECIPES, "recipe", RecipeError), (*readers, str(source))
    tree.setdefault("name", str(source))  # by which a later command finds it again
    for stage in STAGES:
        if isinstance(tree.get(stage), str):
            if tree[stage] in readers:
                raise RecipeError(f"{stage}: the recipes {' and '.join(readers)} name each other")
            other = read(tree[stage], readers)
            tree[stage] = {key: value for key, value in other.items() if key not in ("name", *STAGES)}
            _merge(tree[stage], other.get(stage) or {})
        elif not isinstance(tree.get(stage) or {}, Mapping):
            raise RecipeError(f"{stage} (={tree[stage]!r}) must be a mapping of recipe fields, or a recipe's name")
    return tree


def read_mapping(source: str | Path, folder: Path, what: str, wrong: type[UserError]) -> dict[str, Any]:
    """The mapping in a YAML file, by path or by its name in ``folder``. Raises ``wrong``."""
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{source}.yaml"
        if not path.is_file():
            raise wrong(f"no {what} named {str(source)!r}{closest(str(source), shipped(folder))}")
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise wrong(f"cannot read the {what} {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise wrong(f"{path} is not valid YAML: {in_line(error)}") from error
    if not isinstance(tree, dict):
        raise wrong(f"{path} must hold a mapping of {what} fields, not {type(tree).__name__}")
    return tree


def as_overrides(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe fields by their paths, as ``resolve`` takes them: of a section those that it names, the others stay."""
    found: dict[str, Any] = {}
    for path, value in tree.items():
        field = Recipe.model_fields.get(path)
        section = field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        if section and isinstance(value, Mapping):
            found |= {f"{path}.{key}": own for key, own in value.items()}
        else:
            found[path] = value
    return found


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """``["a.b=1"]`` to ``{"a.b": 1}``; values are YAML."""
    parsed, wrong = {}, []
    for setting in settings:
        key, equals, value = setting.partition("=")
        try:
            if not equals or not key:
                raise ValueError
            parsed[key.strip()] = as_number(yaml.safe_load(value))
        except (ValueError, yaml.YAMLError):
            wrong.append(setting)
    if wrong:
        raise RecipeError(f"--set takes key.path=value, not {', '.join(map(repr, wrong))}")
    return parsed


def as_number(value: Any) -> Any:
    """A value from YAML, whose version 1.1 reads 1e-3 as a string."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def of_stage(tree: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
    """A copy of a recipe file's tree with what its section for this stage says, and without the sections."""
    merged = copy.deepcopy({key: value for key, value in tree.items() if key not in STAGES})
    _merge(merged, tree.get(stage) or {})
    return merged


def resolve(
    source: str | Path | Mapping[str, Any],
    stage: Stage,
    overrides: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe of one run.

    ``source`` is a shipped name, a file, or a tree. ``overrides`` maps paths such as ``optimizer.lr`` to
    values; a path that starts with ``train.`` or ``distill.`` counts for that stage alone. Raises
    ``RecipeError`` with one line for each wrong field.
    """
    tree = of_stage(source if isinstance(source, Mapping) else read(source), stage)
    given: dict[str, Any] = {}
    for path, value in (overrides or {}).items():
        head, _, rest = path.partition(".")
        if head not in STAGES or not rest:
            given[path] = value
        elif head == stage:
            given[rest] = value
    if any(path not in INCIDENTAL and value != at_path(tree, path) for path, value in given.items()):
        tree |= {"source": None, "reported_top1": None}  # those of another run
    for key in ("teacher", "student"):
        node, name = tree.get(key), given.get(f"{key}.name")
        if isinstance(node, dict) and name not in (None, node.get("name")):
            tree[key] = {}  # what the recipe says of one model does not hold for another
    if "epochs" in given and "minutes" not in given:
        tree.pop("minutes", None)
    for path, value in given.items():
        _set(tree, path, value)
    missing = None
    if stage == "train":  # a file for both stages names the student too
        tree.pop("student", None)
        if tree.get("teacher") is None:
            missing = "it names no teacher to train: give one by --teacher NAME"
        elif isinstance(tree["teacher"], Mapping):
            if is_external(str(tree["teacher"].get("name"))):
                raise RecipeError(
                    f"{tree['teacher']['name']} is not trained here: toolkit distill takes it as a teacher"
                )
            # How it is looked at later is nothing of its own.
            tree["teacher"] = {key: value for key, value in tree["teacher"].items() if key not in ("views", "also")}
    elif tree.get("student") is None:
        missing = "it names no student to distil: give one by --student NAME"
    elif tree.get("start_from") == PRETRAINED and isinstance(tree["student"], Mapping):
        side = at_path(tree, "data.image_size") or Data().image_size
        tree["student"] = {**pretrained(str(tree["student"].get("name")), side)[1], **tree["student"]}
    return validate(tree, missing)


def check_length(recipe: Recipe) -> None:
    """Raise ``RecipeError`` where ``minutes`` would give runs that are to be compared different lengths."""
    if recipe.minutes is not None:
        raise RecipeError(f"minutes (={recipe.minutes:g}) gives each run a length of its own: give --epochs N instead")


def validate(tree: Mapping[str, Any], missing: str | None = None) -> Recipe:
    """A ``Recipe`` from a tree, or a ``RecipeError`` that lists everything that is wrong with it.

    ``missing`` says that nothing is named that could be trained; what contradicts that is left out.
    """
    problems = [missing] if missing else []
    recipe = None
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        items = [item for item in error.errors() if item["loc"] or not missing]
        problems += [line for item in items for line in _explain(item).splitlines()]
    for role in ROLES:
        name, known = at_path(tree, f"{role}.name"), names(role)
        if not isinstance(name, str) or name in known or (role == "teacher" and is_external(name)):
            continue
        if role == "teacher" and tree.get("student") and name in names("student"):
            # A student may teach (arXiv 1805.04770), but which one must be said.
            if at_path(tree, "teacher.checkpoint") is None:
                problems.append(f"teacher.name = {name!r} is a student: name its run by --teacher-checkpoint")
        else:
            problems.append(f"{role}.name = {name!r}: there is no such {role}{closest(name, known)}")
    if problems or recipe is None:
        raise RecipeError(listing("the recipe is wrong", problems))
    return recipe


def _explain(item: Any) -> str:
    item = item | {"loc": tuple(part for part in item["loc"] if part not in KINDS)}
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        leaf, everywhere = str(item["loc"][-1]), [f"{s}.{f}" for s in _fields(()) for f in _fields((s,))]
        elsewhere = next((repr(other) for other in everywhere if other.endswith(f".{leaf}")), None)
        known = _fields(item["loc"][:-1]) if item["loc"][1:] else [*_fields(()), *(s for s in STAGES if s != leaf)]
        nearest = f"; did you mean {elsewhere}?" if elsewhere else closest(leaf, known)
        return f"{path}: there is no such field{nearest}"
    if item["type"] == "string_pattern_mismatch" and (field := _field(item["loc"])):
        item["msg"] = f"should be {field}"
    return explained(path, item)


def explained(path: str, item: Mapping[str, Any]) -> str:
    """One line for an item of pydantic's ``ValidationError.errors()``."""
    message = item["msg"].removeprefix("Value error, ")
    if not path:
        return message
    if item["type"] == "missing":
        return f"{path}: is missing"
    if item["type"] == "value_error":
        return f"{path}: {message}"
    return f"{path} = {item['input']!r}: {message[:1].lower()}{message[1:]}"


def _section(location: tuple[Any, ...]) -> type[BaseModel] | None:
    section: Any = Recipe
    if location[:2] == ("loss", "methods") and len(location) > 2:
        section, location = losses.load(location[2]).Params, location[3:]
    for part in location:
        info = section.model_fields.get(part)
        kinds = (info.annotation, *getattr(info.annotation, "__args__", ())) if info else ()
        kinds = tuple(getattr(kind, "__origin__", kind) for kind in kinds)  # Annotated[X, ...] is X
        section = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if section is None:
            return None
    return section


def _fields(location: tuple[Any, ...]) -> list[str]:
    section = _section(location)
    return list(section.model_fields) if section else []


def _field(location: tuple[Any, ...]) -> str | None:
    section = _section(location[:-1])
    info = section.model_fields.get(location[-1]) if section else None
    return info.description if info else None


def _merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = copy.deepcopy(value)


def with_settings(tree: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a recipe's tree with these fields, by their paths."""
    changed = copy.deepcopy(dict(tree))
    for path, value in settings.items():
        _set(changed, path, value)
    return changed


def at_path(tree: Any, path: str) -> Any:
    """What a tree has at a path such as ``optimizer.lr``, or None where there is nothing."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for parent in parents:
        node = tree.get(parent)
        if not isinstance(node, dict):
            node = tree[parent] = {}
        tree = node
    tree[leaf] = value


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}.{key}" if prefix else key))
    return flat
