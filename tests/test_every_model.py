"""Each architecture of the catalogue: counts, shapes, gradients, and parity of its ONNX file."""

import inspect
import re
from functools import partial

import onnx
import pytest
import torch
import torch.nn.functional as F
from small_net import check, export

from export.artifact import Metadata
from serve.session import Session
from students.blocks import ResidualBlock
from students.resnet18_242 import BiasedBlock, DropoutBlock
from teachers.batch_doubling import LeakyBlock
from teachers.wrn import PreActivationBlock
from toolkit import catalogue, compute
from toolkit.catalogue import ROLES, build, builder, check_budget, info, mac_count, names, parameter_count
from toolkit.errors import BudgetError, RecipeError, UnknownNameError
from toolkit.footprint import footprint

MODELS = [(role, name) for role in ROLES for name in names(role)]
SIBLINGS = {"tpsnet_333", "tpsnet_777", "tpsnet_17", "tpsnet_23"}  # of tpsnet: other depths and widths
# The depth at which those that are slow show all of their code.
SMALLER = {
    "wrn28": {"depth": 10, "width": 2},
    "batch_doubling_resnet": {"blocks": (1, 1, 1)},
    "tpsnet": {"blocks": (1, 1, 1)},
    "se_resnet_443": {"blocks": (2, 1, 1)},
    "resnet18_42": {"blocks": (2, 1, 1, 1)},
}
OTHERS = {"resnet9_wide", "resnet18_242_k3", "resnet18_242_k7"}  # of code that is exported below
EXPORTED = [(role, name, SMALLER.get(name, {}), 32) for role, name in MODELS if name not in SIBLINGS | OTHERS]
EXPORTED += [("student", "resnet9", {}, 64), ("student", "resnet18_242_k7", {}, 128)]
EXPORTED += [("student", "tpsnet", SMALLER["tpsnet"], 224)]
SLOW = [(role, name, {}, 32) for role, name in MODELS if name in SIBLINGS | OTHERS | SMALLER.keys()]
EXPORTED += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


@pytest.mark.parametrize(("role", "name"), MODELS)
def test_counts_are_those_of_source_and_docstring(role, name):
    entry = info(name, role)
    assert entry.source
    assert entry.fits_budget == (entry.parameters < 5_000_000)
    assert entry.fits_budget or role == "teacher"
    doc = inspect.getdoc(builder(name, role))
    assert f"{entry.parameters:,} parameters" in doc
    giga = float(re.search(r"([\d.]+) G MACs at 32x32", doc)[1])
    assert giga == pytest.approx(entry.macs / 1e9, rel=0.05)


# The layer tables of Xu, Tariq and Ahmed's report, in its order: channels x side of the output, and each layer with its
# parameters. Its global pool, which has none, is not a layer here.
LAYERS = {
    "resnet18_42": """
        42x32: conv 1134, norm 84, conv 15876, norm 84, dropout, conv 15876, norm 84, block
        42x32: conv 15876, norm 84, dropout, conv 15876, norm 84, block
        84x16: conv 31752, norm 168, dropout, conv 63504, norm 168, conv 3528, norm 168, block
        84x16: conv 63504, norm 168, dropout, conv 63504, norm 168, block
        168x8: conv 127008, norm 336, dropout, conv 254016, norm 336, conv 14112, norm 336, block
        168x8: conv 254016, norm 336, dropout, conv 254016, norm 336, block
        336x4: conv 508032, norm 672, dropout, conv 1016064, norm 672, conv 56448, norm 672, block
        336x4: conv 1016064, norm 672, dropout, conv 1016064, norm 672, block
        10: linear 3370
    """,
    "resnet_large": """
        64x32: conv 1728, norm 128, conv 36864, norm 128, conv 36864, norm 128, block
        128x16: conv 73728, norm 256, conv 147456, norm 256, conv 8192, norm 256, block
        256x8: conv 294912, norm 512, conv 589824, norm 512, conv 32768, norm 512, block
        512x4: conv 1179648, norm 1024, conv 2359296, norm 1024, conv 131072, norm 1024, block
        10: linear 5130
    """,
}
KINDS = {
    torch.nn.Conv2d: "conv",
    torch.nn.BatchNorm2d: "norm",
    torch.nn.Dropout: "dropout",
    torch.nn.Linear: "linear",
    ResidualBlock: "block",
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_those_of_the_report(name):
    model, layers = build(name, "student", 10), []

    def note(module, _, output):
        parameters = sum(p.numel() for p in module.parameters()) if KINDS[type(module)] != "block" else 0
        shape = "x".join(map(str, output.shape[1:3]))
        layers.append(f"{shape}: {KINDS[type(module)]}" + (f" {parameters}" if parameters else ""))

    for module in model.modules():
        if type(module) in KINDS:
            module.register_forward_hook(note)
    model(torch.rand(2, 3, 32, 32))
    lines = [line.strip().split(": ") for line in LAYERS[name].strip().splitlines()]
    assert layers == [f"{shape}: {layer}" for shape, of_block in lines for layer in of_block.split(", ")]


# What a block computes without its dropout: the two branches, and what stands around them.
RELU, LEAKY = torch.relu, partial(F.leaky_relu, negative_slope=0.01)
BLOCKS = [
    (ResidualBlock, lambda b, x: RELU(b.norm2(b.conv2(RELU(b.norm1(b.conv1(x))))) + b.shortcut(x))),
    (BiasedBlock, lambda b, x: RELU(RELU(b.norm2(b.conv2(RELU(b.norm1(b.conv1(x)))))) + b.shortcut(x))),
    (
        partial(DropoutBlock, dropout=0.1),
        lambda b, x: RELU(b.norm2(b.conv2(RELU(b.norm1(b.conv1(x))))) + b.shortcut(x)),
    ),
    (LeakyBlock, lambda b, x: LEAKY(b.norm2(b.conv2(LEAKY(b.norm1(b.conv1(x))))) + b.shortcut(x))),
    (
        partial(PreActivationBlock, dropout=0),
        lambda b, x: (
            b.conv2(RELU(b.norm2(b.conv1(RELU(b.norm1(x))))))
            + (x if b.shortcut is None else b.shortcut(RELU(b.norm1(x))))
        ),
    ),
]


@pytest.mark.parametrize(("block", "expected"), BLOCKS)
@pytest.mark.parametrize(("outputs", "stride"), [(4, 1), (6, 2)])
def test_blocks_activate_where_their_reports_do(block, expected, outputs, stride):
    block, x = block(4, outputs, stride).eval(), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected(block, x))


def test_quirks_of_the_reports():
    def order(model, *kinds):
        """Names of such modules in the order in which they are called."""
        called = []
        for module in model.modules():
            if isinstance(module, kinds):
                module.register_forward_hook(lambda module, *_: called.append(type(module).__name__))
        model(torch.rand(2, 3, 32, 32))
        return called

    dropped = build("resnet18_256_dropout", "student", 10).network.blocks[0:3]
    kinds = (torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.Dropout)
    called = order(torch.nn.Sequential(torch.nn.Conv2d(3, 64, 1), *dropped), *kinds)
    branch = ["Conv2d", "BatchNorm2d", "Dropout"]
    assert called == ["Conv2d", *branch * 4, *branch * 3]  # two blocks of two convs, one with a conv in its shortcut

    blocks = order(build("se_resnet_443", "student", 10, dropout=0.1), ResidualBlock, torch.nn.Dropout)
    assert blocks == ["ResidualBlock", "Dropout"] * 11

    squeeze, x = build("se_resnet_443", "student", 10).network.squeeze, torch.rand(2, 64, 4, 4)
    hidden = torch.relu(squeeze.squeeze.weight.flatten(1) @ x.mean((2, 3)).T + squeeze.squeeze.bias[:, None])
    gates = torch.sigmoid(squeeze.excite.weight.flatten(1) @ hidden + squeeze.excite.bias[:, None]).T
    torch.testing.assert_close(squeeze(x), x * gates[:, :, None, None])

    large = build("batch_doubling_resnet", "teacher", 10, blocks=(1, 1, 1)).network
    assert {norm.momentum for norm in large.modules() if isinstance(norm, torch.nn.BatchNorm2d)} == {0.003}
    seen = []
    large.hidden.register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    large.head.register_forward_hook(lambda *arguments: seen.append(arguments[1][0]))
    large(torch.rand(2, 3, 32, 32))
    torch.testing.assert_close(seen[1], seen[0].sigmoid())

    wide = build("wrn28", "teacher", 10, depth=10, width=1).network
    wide.head.register_forward_hook(lambda *arguments: seen.append(arguments[1][0]))
    wide(torch.rand(2, 3, 32, 32))
    assert seen[2].min() >= 0  # the mean of what is activated


def test_quirks_of_short_trainings():
    network = build("resnet9", "student", 10).network
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.4}
    assert not any(norm.weight.requires_grad for norm in norms)
    assert all(norm.bias.requires_grad for norm in norms)
    for stage in network.stages:
        x = torch.rand(2, stage.conv2.in_channels, 5, 5)
        torch.testing.assert_close(stage.conv2(x), x)  # as it begins


@pytest.mark.parametrize(("role", "name"), MODELS)
def test_shapes_and_finite_gradients(role, name):
    model = build(name, role, 100, **SMALLER.get(name, {}))
    logits = model(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 100)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize(
    ("role", "name"), [one for one in MODELS if one[1] not in SIBLINGS | {"batch_doubling_resnet"}]
)
def test_stems_halve_images_from_64_pixels_on_and_twice_from_128_on(role, name):
    sides, parameters = [], set()
    for image_size in (32, 63, 64, 127, 128):
        with torch.device("meta"):
            model = build(name, role, 3, image_size=image_size).eval()
            stages = getattr(model.network, "stages", None) or model.network.blocks
            stages.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[-1]))
            assert model(torch.empty(1, 3, image_size, image_size)).shape == (1, 3)
        parameters.add(parameter_count(model))
    assert len(parameters) == 1
    first, *others = sides
    assert others == pytest.approx([2 * first, first, 2 * first, first], abs=3)  # not all convs and pools have padding


def test_a_footprint_grows_with_the_image(monkeypatch):
    small, large = (footprint("resnet9", "student", size, "cpu") for size in (32, 96))
    assert 1 < large.memory / small.memory < 3  # 48 x 48 behind the stem
    assert small.memory > 64 * 32 * 32 * 2  # at least the first stage's output in bf16
    monkeypatch.setattr(compute, "seconds_an_image", lambda model, recipe, backward, count: 0.5 if backward else 0.25)
    found = footprint("tpsnet_17", "student", 32, "cpu")
    assert (found.training, found.inference) == (2, 4)

    class Cube(torch.nn.Module):
        def forward(self, images):
            return (self.weight * images).pow(3).mean((2, 3))  # keeps the images, and what is raised to a power

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

    monkeypatch.setattr("toolkit.footprint.build", lambda *_, **__: Cube())
    assert footprint("tpsnet_17", "student", 32, "cpu").memory == 2 * 3 * 32 * 32 * 4


def test_the_normalisation_is_inside():
    model = build("resnet9", "student", 10, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3), widths=(8, 8, 8)).eval()
    images = torch.rand(2, 3, 32, 32)
    by_hand = (images - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    torch.testing.assert_close(model(images), model.network(by_hand))


def test_the_first_conv_whitens_the_images_it_was_shown():
    smooth = torch.nn.functional.interpolate(torch.rand(200, 3, 6, 6), 32, mode="bilinear")
    images = 0.5 * smooth + 0.5 * smooth.mean(1, keepdim=True)  # neighbours and channels go together
    model = build("resnet9", "student", 10, widths=(8, 8, 8))
    first = model.network.first
    model.prepare(images)
    with torch.no_grad():
        patches = first((images - model.mean) / model.std).transpose(0, 1).flatten(1)
    variances, others = (matrix := patches[:12] @ patches[:12].T / patches.shape[1]).diagonal(), matrix.clone()
    assert variances.max() == pytest.approx(1, abs=0.01)
    assert others.fill_diagonal_(0).abs().max() < 1e-3
    torch.testing.assert_close(patches[12:], -patches[:12])
    assert not first.weight.requires_grad


@pytest.mark.parametrize(("role", "name", "arguments", "image_size"), EXPORTED)
def test_the_artifact_computes_what_pytorch_computes(role, name, arguments, image_size, tmp_path):
    model = build(name, role, 10, image_size=image_size, **arguments)
    images = torch.randint(0, 256, (8, 3, image_size, image_size), dtype=torch.uint8)
    with torch.no_grad():  # norms that have seen images, so that folding them changes something
        for _ in range(2):
            model(images.float() / 255)
    about = Metadata(
        model=name,
        labels=tuple("abcdefghij"),
        image_size=image_size,
        parameters=parameter_count(model),
        recipe_digest="",
        dataset="random",
        dataset_digest="",
    )
    export(model, about, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    left = {makers[node.input[0]] for node in graph.node if node.op_type == "BatchNormalization"}
    assert left == ({"Add"} if name == "wrn28" else set())  # its norms before the convs of a block have none to go into
    session = Session(tmp_path / "model.onnx", "cpu")
    labels = torch.zeros(8, dtype=torch.int64)
    report = check(session.run, model, images, labels, provider=session.provider, batches=(1, 3))
    report.raise_if_failed()
    assert max(abs(session.run(images.permute(0, 2, 3, 1).numpy())[0]).ravel()) > 1e-3


def test_a_student_over_the_budget_stops_with_the_excess_and_what_fits():
    with pytest.raises(BudgetError) as caught:
        check_budget("tpsnet", 4_959_770, 4_000_000, 10)
    message = str(caught.value)
    assert "4,959,770" in message
    assert "959,771 too many" in message
    assert "resnet9 (3,190,456)" in message
    with pytest.raises(BudgetError, match=r"that fit: tpsnet_17 \(4,997,554\)"):  # of 100 classes
        check_budget("x", 6_000_000, 5_000_000, 100)
    check_budget("tpsnet", 4_959_770, 4_959_771, 10)
    with pytest.raises(BudgetError):
        check_budget("tpsnet", 4_959_770, 4_959_770, 10)


def test_unknown_names_and_arguments_are_refused_with_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'tpsnet'"):
        build("tpsnot", "student", 10)
    with pytest.raises(RecipeError, match=r"student\.widht.*did you mean 'width'"):
        build("tpsnet", "student", 10, widht=2)
    with pytest.raises(RecipeError, match="6 n"):
        build("wrn28", "teacher", 10, depth=27)


def test_a_network_that_does_not_compute_this_size_is_refused(monkeypatch):
    """A file of the user's own, for images of 32 pixels."""

    def fixed(num_classes, image_size):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, num_classes))

    monkeypatch.setattr(catalogue, "builder", lambda *_: fixed)
    with pytest.raises(RecipeError, match="student: resnet9 cannot compute images of 64 pixels: "):
        info("resnet9", "student", 64, 13)


def test_attention_is_counted_on_every_device():
    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = torch.nn.Conv2d(3, 16, 8, 8)
            self.layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

        def forward(self, images):
            return self.layer(self.patches(images).flatten(2).transpose(1, 2)).mean(1)

    model = Tokens()
    products = 16 * (3 * 64 * 16 + 4 * 16 * 16 + 2 * 16 * 32) + 2 * 16 * 16 * 16  # of 16 tokens
    assert mac_count(model, 32) == mac_count(model.to("meta"), 32) == products
    assert torch.backends.mha.get_fastpath_enabled()
