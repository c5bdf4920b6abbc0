"""Teachers from elsewhere: any classifier as an ONNX file, run by ONNX Runtime, and timm's models (extra ``timm``)."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from pydantic import ValidationError
from torch import Tensor, nn

from toolkit.catalogue import closest
from toolkit.classifier import members
from toolkit.data import at_once
from toolkit.errors import ArtifactError, DeviceError, TeacherError, in_line, install
from toolkit.folders import listed, nfc
from toolkit.progress import say
from toolkit.recipe import Teacher, TeacherInput
from toolkit.run import weights_digest

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# What a file that says nothing may want, as flags and as the input's fields.
GUESSES: dict[str, dict[str, Any]] = {
    "--teacher-scale 255": {"scale": 255.0},
    "--teacher-mean 0.485,0.456,0.406 --teacher-std 0.229,0.224,0.225": IMAGENET,
    "--teacher-mean 0.5,0.5,0.5 --teacher-std 0.5,0.5,0.5": {"mean": (0.5,) * 3, "std": (0.5,) * 3},
}
TOLD = ("image_size", "layout", "scale", "mean", "std")
CPU = torch.device("cpu")
NAMES = ("labels", "classes", "names")  # of class names in a file's metadata
MORE = 0.05  # of top-1, and three standard deviations of it: what makes another input clearly better


class External(nn.Module):
    """Images ``[B,3,H,W]`` in [0,1] to logits ``[B,K]`` of the data's classes, by a network that wants them otherwise.

    They are resized (bilinear, antialiased) to ``input.image_size``; the network gets (image - mean) / std * scale.
    ``columns`` holds for each class the network's outputs that mean it, whose probabilities are added up; None: they
    are the same. ``digest`` tells one teacher from another where logits are kept.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        input: TeacherInput,
        columns: Sequence[Sequence[int]] | None,
        digest: str,
        stated: bool,
    ) -> None:
        super().__init__()
        self.network, self.columns, self.stated, self.hex_digest = network, columns, stated, digest
        self.register_buffer("digest", torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8))
        self.register_buffer("mean", torch.empty(1, 3, 1, 1))
        self.register_buffer("std", torch.empty(1, 3, 1, 1))
        self.probabilities = False
        self.set_input(input)

    def set_input(self, input: TeacherInput) -> None:
        self.input = input
        self.mean.copy_(torch.tensor(input.mean or (0.0,) * 3).view(1, 3, 1, 1))
        self.std.copy_(torch.tensor(input.std or (1.0,) * 3).view(1, 3, 1, 1))

    def outputs(self, images: Tensor) -> Tensor:
        """What the network itself answers, ``[B,N]``."""
        assert self.input.image_size
        if images.shape[-1] != self.input.image_size:
            images = F.interpolate(images, size=self.input.image_size, mode="bilinear", antialias=True)
        return self.network((images - self.mean) / self.std * (self.input.scale or 1)).float()

    def forward(self, images: Tensor) -> Tensor:
        logits = self.outputs(images)
        if self.probabilities:
            logits = logits.clamp(min=1e-9).log()
        if self.columns is None:
            return logits
        return torch.stack([logits[:, list(some)].logsumexp(1) for some in self.columns], 1)

    def probe(self) -> int:
        """Count the network's outputs, and find out whether they are probabilities: each row adds up to about 1."""
        side = self.input.image_size or 0
        with torch.no_grad():
            some = self.outputs(torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0)))
        off = 1e-3 + min(some.shape[1] / 512, 0.2)  # a softmax in INT8 rounds each by up to 1/512
        self.probabilities = bool((some >= 0).all() and ((some.sum(1) - 1).abs() < off).all())
        return some.shape[1]

    def __str__(self) -> str:
        side, mean, std = self.input.image_size, self.input.mean or 0, self.input.std or 1
        scale = self.input.scale or 1
        return f"{side}x{side} pixels, (image - mean) / std * scale with mean {mean}, std {std}, scale {scale:g}"


def images_at_once(net: nn.Module, side: int) -> int:
    """How many images of ``side`` pixels a net takes at once: fewer where a teacher from elsewhere enlarges them."""
    return at_once(max([side, *(one.input.image_size or 0 for one in members(net) if isinstance(one, External))]))


class OnnxNetwork(nn.Module):
    """An ONNX file as a module: pixels ``[B,3,S,S]`` to its output ``[B,N]``, on CUDA where the pixels are.

    ``device`` is what the user asked for: with ``auto`` the file is run on the CPU where ONNX Runtime has no CUDA.
    """

    def __init__(self, path: Path, layout: str, device: str) -> None:
        super().__init__()
        self.path, self.layout, self.device = path, layout, device
        self.sessions: dict[str, Any] = {}
        session = self._session(CPU)
        (self.input,) = session.get_inputs()
        two = [output for output in session.get_outputs() if len(output.shape) == 2]
        if not two:
            shapes = [f"{output.name} {output.shape}" for output in session.get_outputs()]
            raise TeacherError(f"{path} has no output [batch, classes]: {listed(shapes)}")
        self.output = next((output.name for output in two if output.name == "logits"), two[0].name)
        batch = self.input.shape[0]
        self.batch = batch if isinstance(batch, int) and batch > 0 else None

    def _session(self, place: torch.device) -> Any:
        device = str(place)
        if device not in self.sessions:
            import onnxruntime as ort

            from serve.session import need_cuda, session_options

            options = session_options(torch.get_num_threads())
            providers: list[Any] = ["CPUExecutionProvider"]
            try:
                if place.type == "cuda":
                    need_cuda()
                    # CPU fallback stays allowed: other tools' graphs compute shapes there even in a CUDA session.
                    options_there = {"cudnn_conv_algo_search": "HEURISTIC", "device_id": str(place.index or 0)}
                    providers.insert(0, ("CUDAExecutionProvider", options_there))
                session = ort.InferenceSession(self.path, options, providers=providers, enable_fallback=0)
                session.disable_fallback()
                if place.type == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
                    raise RuntimeError("the session runs on the CPU")
            except Exception as error:  # ONNX Runtime's errors share no base class
                reason = in_line(error, 200)
                if place.type == "cpu":
                    raise TeacherError(f"ONNX Runtime cannot run {self.path}: {reason}") from error
                if self.device != "auto":
                    raise DeviceError(f"ONNX Runtime cannot run {self.path} on CUDA: {reason}") from error
                say(f"the teacher {self.path} runs on the CPU: {reason}")
                session = self._session(CPU)
            self.sessions[device] = session
        return self.sessions[device]

    def forward(self, pixels: Tensor) -> Tensor:
        # Not as a decorator, which would import the compiler with this file.
        return torch.compiler.disable(self._answers)(pixels)

    def _answers(self, pixels: Tensor) -> Tensor:
        session = self._session(pixels.device)
        if self.layout == "nhwc":
            pixels = pixels.permute(0, 2, 3, 1)
        kinds = {"tensor(uint8)": np.uint8, "tensor(float16)": np.float16}
        kind = kinds.get(self.input.type, np.float32)
        values = pixels.float().contiguous().cpu().numpy()
        values = values.round().clip(0, 255).astype(kind) if kind is np.uint8 else values.astype(kind)
        size = self.batch or len(values)
        answers = []
        for start in range(0, len(values), size):
            part = values[start : start + size]
            full = np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)]) if len(part) < size else part
            answers.append(session.run([self.output], {self.input.name: full})[0][: len(part)])
        return torch.from_numpy(np.concatenate(answers).astype(np.float32)).to(pixels.device)


def load(teacher: Teacher, classes: Sequence[str] | None, device: str, offline: bool) -> tuple[External, list[str]]:
    """A teacher from elsewhere, and the names of its logits' classes: ``classes``, or with None its own.

    Raises ``TeacherError`` where it cannot be run, does not say what it must, or its classes do not map.
    """
    if teacher.name == "onnx":
        network, input, told, digest, stated = _onnx(teacher, device)
    else:
        network, input, told, digest, stated = _timm(teacher, classes, offline)
    about = json.dumps([digest, input.model_dump(mode="json"), _text(teacher.classes) if teacher.classes else None])
    digest = hashlib.sha256(about.encode()).hexdigest()
    external = External(network.eval(), input, None, digest, stated).eval()
    try:
        count = external.probe()
    except Exception as error:  # of PyTorch or ONNX Runtime, whose errors share no base class
        reason = in_line(error)
        raise TeacherError(f"{title(teacher)} does not take {external}: {reason}") from error
    if count < 2:
        raise TeacherError(f"{title(teacher)} has one output: one for each of at least two classes is needed")
    theirs = _class_names(teacher, told, count)
    names, external.columns = match_classes(title(teacher), theirs, count, classes, teacher.classes)
    return external, names


def title(teacher: Teacher) -> str:
    """What messages call a teacher: its run directory, its file, or the name of one of timm's; and its views."""
    path = teacher.checkpoint
    if path is None or teacher.name.startswith("timm:"):
        name = teacher.name
    else:
        folder = path.parent.parent
        name = str(folder if (folder / "recipe.yaml").is_file() and not teacher.external else path)
    return f"{name} (mean over views: {teacher.views})" if teacher.views else name


def titles(teacher: Teacher) -> str:
    """The title of a teacher and those of ``teacher.also``."""
    return " and ".join(title(one) for one in (teacher, *teacher.also))


def _onnx(teacher: Teacher, device: str) -> tuple[nn.Module, TeacherInput, dict[str, Any], str, bool]:
    from export.artifact import load as load_onnx
    from export.artifact import read_bytes

    path = teacher.checkpoint
    if path is None:
        raise TeacherError("the teacher onnx needs its file: give it by --teacher FILE.onnx")
    try:
        data = read_bytes(path)
        proto = load_onnx(data, str(path))
    except ArtifactError as error:
        raise TeacherError(f"the teacher cannot be loaded: {error}") from error
    told = {item.key: item.value for item in proto.metadata_props}
    flags = teacher.input.model_dump(exclude_none=True)
    given = _told_input(path, {key: _read(told[key]) for key in TOLD if key in told and key not in flags}) | flags
    inputs = [value for value in proto.graph.input if value.name not in {t.name for t in proto.graph.initializer}]
    # What is free has a name, nothing, or -1.
    shape = [max(0, side.dim_value) for side in inputs[0].type.tensor_type.shape.dim] if inputs else []
    if len(inputs) != 1 or len(shape) != 4:
        raise TeacherError(f"{path} is no classifier of images: its inputs are {listed([v.name for v in inputs])}")
    layout = given.setdefault("layout", "nhwc" if shape[3] == 3 and shape[1] != 3 else "nchw")
    height, width = shape[2:] if layout == "nchw" else shape[1:3]
    if 0 < height != width > 0:
        raise TeacherError(f"{path} takes images of {height} x {width} pixels, and only square ones are given")
    if side := height or width:
        if given.setdefault("image_size", side) != side:
            raise TeacherError(f"{path} takes images of {side} pixels, not of {given['image_size']}")
    elif "image_size" not in given:
        raise TeacherError(f"{path} takes images of any size: say which it was trained with by --teacher-image-size")
    stated = bool({"scale", "mean", "std"} & given.keys())
    if inputs[0].type.tensor_type.elem_type == 2:  # uint8
        given, stated = {"scale": 255.0, **given}, True
    names = {key: _read(told[key]) for key in NAMES if key in told}
    network, digest = OnnxNetwork(path, layout, device), hashlib.sha256(data)
    entries = [entry for tensor in proto.graph.initializer for entry in tensor.external_data]
    for file in sorted({entry.value for entry in entries if entry.key == "location"}):  # weights beside the graph
        digest.update((path.parent / file).read_bytes())
    return network, TeacherInput.model_validate(given), names, digest.hexdigest(), stated


def _told_input(path: Path, told: dict[str, Any]) -> dict[str, Any]:
    """What a file's metadata say of its input, as fields of ``TeacherInput``."""
    told = {key: value.lower() if key == "layout" and isinstance(value, str) else value for key, value in told.items()}
    try:
        return TeacherInput.model_validate(told).model_dump(exclude_none=True)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        raise TeacherError(
            f"{path} says {key} = {told[key]!r} of its input, which is not understood: say it by "
            f"--teacher-{key.replace('_', '-')}"
        ) from error


def _read(text: str) -> Any:
    """A value in a file's metadata: JSON, or Python's spelling, or the text itself."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError):
            return read(text)
    return text


def _timm(
    teacher: Teacher, classes: Sequence[str] | None, offline: bool
) -> tuple[nn.Module, TeacherInput, dict[str, Any], str, bool]:
    try:
        import timm
    except ImportError as error:
        raise TeacherError(f"{teacher.name} needs timm: {install('timm')}") from error
    name, path = teacher.name.removeprefix("timm:"), teacher.checkpoint
    if not timm.is_model(name):
        raise TeacherError(f"timm has no model {name!r}{closest(name, timm.list_models())}")
    if path is None:
        if offline:
            raise TeacherError(f"{teacher.name} has no weights without the network: give them by --teacher-checkpoint")
        try:
            model = timm.create_model(name, pretrained=True, **teacher.arguments)
        except Exception as error:  # of the network, of the hub, of a model without weights
            reason = in_line(error, 200)
            raise TeacherError(f"no weights for {teacher.name}: {reason}; give them by --teacher-checkpoint") from error
    else:
        model = _with_weights(timm, name, path, teacher.arguments, len(classes or ()))
    config = timm.data.resolve_model_data_config(model)
    told = {"image_size": config["input_size"][-1], "mean": config["mean"], "std": config["std"]}
    input = TeacherInput.model_validate(told | teacher.input.model_dump(exclude_none=True))
    return model, input, {}, weights_digest(model), True


def _with_weights(timm: Any, name: str, path: Path, arguments: dict[str, Any], classes: int) -> nn.Module:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise TeacherError(
            f"{path} is not a safetensors file: {error}. Weights of torch.save become one by "
            "safetensors.torch.save_file(state_dict, path)."
        ) from error
    try:
        model = timm.create_model(name, **({"num_classes": classes or 1000} | arguments))
    except Exception as error:  # a model's builder raises what it likes
        reason = in_line(error, 200)
        raise TeacherError(f"timm cannot build {name} with {arguments or 'no arguments'}: {reason}") from error
    last = str(model.pretrained_cfg.get("classifier") or "")
    if f"{last}.weight" in tensors:  # as many classes as the weights have
        model.reset_classifier(len(tensors[f"{last}.weight"]))
    ours = model.state_dict()
    problems = {
        "missing": [key for key in ours if key not in tensors],
        "not of this model": [key for key in tensors if key not in ours],
        "of another shape": [
            f"{key} {list(tensors[key].shape)} for {list(value.shape)}"
            for key, value in ours.items()
            if key in tensors and tensors[key].shape != value.shape
        ],
    }
    if wrong := [f"{len(keys)} {what}: {listed(keys, 3)}" for what, keys in problems.items() if keys]:
        raise TeacherError(f"{path} does not fit timm's {name} with its {len(ours)} tensors: {'; '.join(wrong)}")
    model.load_state_dict(tensors)
    return model


# --- classes -----------------------------------------------------------------------------------------------


def _class_names(teacher: Teacher, told: Mapping[str, Any], count: int) -> list[str] | None:
    """Names of the outputs by a file's metadata; None where these say nothing. Raises ``TeacherError``.

    What is not understood does no harm where the user says it: a wrong order would make a wrong student in silence.
    """
    understood = (_in_order(value, count) for value in told.values())
    names = next((found for found in understood if found is not None), None)
    if told and names is None and teacher.classes is None:
        said = "; ".join(f"{key} = {in_line(value, 60)}" for key, value in told.items())
        raise TeacherError(
            f"the class names in {title(teacher)} are not understood ({said}): name its {count} outputs by "
            "--teacher-classes FILE"
        )
    return names


def _in_order(names: Any, count: int) -> list[str] | None:
    """The names of the outputs, from a list, a mapping between names and numbers, or a text of ``count`` names."""
    if isinstance(names, str):
        texts = ([name.strip() for name in names.strip().split(mark)] for mark in ("\n", ","))
        return next((some for some in texts if len(some) == count and all(some)), None)
    if isinstance(names, Mapping):
        readings = [_by_number(names.items())]
        if all(isinstance(value, int) for value in names.values()):
            readings.append(_by_number((value, key) for key, value in names.items()))
        orders = [order for order in readings if order is not None]
        return orders[0] if orders and orders[0] == orders[-1] else None  # else either could be meant
    return _as_texts(names) if isinstance(names, list | tuple) else None


def _by_number(pairs: Iterable[tuple[Any, Any]]) -> list[str] | None:
    """The names in the order of their numbers, where these are 0, 1, 2 and so on."""
    pairs = list(pairs)
    named = {int(str(number)): name for number, name in pairs if str(number).isdecimal()}
    return _as_texts([named[i] for i in range(len(pairs))]) if named.keys() == set(range(len(pairs))) else None


def _as_texts(names: Sequence[Any]) -> list[str] | None:
    return [str(name) for name in names] if all(isinstance(name, str | int | float) for name in names) else None


def match_classes(
    teacher: str, theirs: Sequence[str] | None, count: int, ours: Sequence[str] | None, file: Path | None
) -> tuple[list[str], list[list[int]] | None]:
    """Names of the classes, and for each the teacher's outputs (0 to ``count`` - 1) that mean it; None: one for one.

    ``theirs`` are the outputs' names, where the teacher knows them, ``ours`` the data's classes (None: there are no
    labels). ``file`` is YAML: a list names the outputs in their order, a mapping gives the data's class for an output,
    by name or number; outputs that it leaves out, or maps to null, mean none. Raises ``TeacherError``.
    """
    mapping: Any = _mapping(file) if file else None
    theirs = None if theirs is None else list(map(nfc, theirs))
    if isinstance(mapping, list):
        theirs, mapping = [str(name) for name in mapping], None
    if theirs is not None and len(theirs) != count:
        raise TeacherError(f"{teacher} has {count} outputs, but {len(theirs)} names of classes: {listed(theirs)}")
    if mapping is None:
        if theirs is None:
            if ours is None:
                return list(map(str, range(count))), None
            if count != len(ours):
                raise TeacherError(
                    f"{teacher} answers with {count} classes, the data has {len(ours)}: say by --teacher-classes FILE "
                    "which output means which class"
                )
            return list(ours), None
        if len(set(theirs)) == count and (ours is None or list(theirs) == list(ours)):
            return list(theirs), None
        mapping = {name: name for name in theirs if ours is None or name in ours}
    named = defaultdict(list)  # outputs of the same name are of the same class
    for i, name in enumerate(theirs or ()):
        named[name].append(i)
    place = {str(i): [i] for i in range(count)} | named
    columns: dict[str, list[int]] = {
        name: [] for name in ours or dict.fromkeys(str(name) for name in mapping.values() if name is not None)
    }
    unknown = [str(key) for key in mapping if str(key) not in place]
    strange = sorted({str(value) for value in mapping.values() if value is not None and str(value) not in columns})
    for key, value in mapping.items():
        if value is not None and not unknown and not strange:
            columns[str(value)] += place[str(key)]
    empty = [] if unknown or strange else [name for name, some in columns.items() if not some]
    problems = {"no outputs of the teacher": unknown, "no classes of the data": strange, "not mapped to": empty}
    if wrong := [f"{len(names)} are {what}: {listed(names)}" for what, names in problems.items() if names]:
        known = f"; the teacher knows {listed(theirs)}" if theirs else ""
        raise TeacherError(f"the classes of {teacher} do not map to the data's ({'; '.join(wrong)}){known}. "
                           "--teacher-classes FILE says which is which.")  # fmt: skip
    if len(columns) < 2:
        only = next(iter(columns), "none")
        raise TeacherError(f"{file or teacher} leaves one class, {only}: at least two are needed")
    return list(columns), list(columns.values())


def _mapping(file: Path) -> Any:
    """A list or a mapping of texts: ``no`` and ``010`` are names of classes. Empty, ``~`` and ``null`` are None."""
    try:
        mapping = yaml.load(_text(file), Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise TeacherError(f"{file} is not YAML: {in_line(error)}") from error
    if not isinstance(mapping, list | dict):
        raise TeacherError(f"{file} must hold a list of the teacher's classes, or a mapping from them to the data's")
    if isinstance(mapping, dict):
        return {key: None if value in ("", "~", "null") else value for key, value in mapping.items()}
    return mapping


def _text(file: Path) -> str:
    try:
        return nfc(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise TeacherError(f"cannot read the classes in {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TeacherError(f"{file} is not text in UTF-8: {in_line(error)}") from error


def hint(members: Sequence[nn.Module], top1: Callable[[], float], images: int) -> str:
    """Flags under which a single teacher that was told nothing of its input gets clearly more right; else nothing.

    ``top1`` measures it, on so many ``images``.
    """
    teacher = members[0]
    if len(members) > 1 or not isinstance(teacher, External) or teacher.stated:
        return ""
    before, plain = teacher.input, top1()
    found = {}
    for flags, fields in GUESSES.items():
        teacher.set_input(before.model_copy(update=fields))
        found[flags] = top1()
    teacher.set_input(before)
    best = max(found, key=found.__getitem__)
    if found[best] < plain + max(MORE, 3 * (plain * (1 - plain) / images) ** 0.5):
        return ""
    return f"with {best} it would get {found[best]:.1%} of some of them, against {plain:.1%}"
