"""Features by module path, the objective that adds up methods, and training with it."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from colour_net import colour_net, loaded
from conftest import Chain, Toolkit, refused
from small_run import EVERYTHING, LAYERS, TEACHER, TREE, small_digits

from toolkit import engine, learner
from toolkit.catalogue import build
from toolkit.errors import RecipeError
from toolkit.features import Features, output_shapes, pair
from toolkit.losses import attention_transfer, relational_kd
from toolkit.objective import Objective
from toolkit.recipe import Ramp, at, resolve
from toolkit.run import Run, load_tensors, save_tensors


def nets(student="tpsnet", teacher="wrn28"):
    arguments = {"tpsnet": {"blocks": [1, 1, 1], "base": 4}, "wrn28": {"depth": 10, "width": 1}}
    pair = (
        build(name, role, 10, **arguments.get(name, {})) for name, role in ((student, "student"), (teacher, "teacher"))
    )
    return [net.eval() for net in pair]


# --- features ----------------------------------------------------------------------------------------------


def test_features_are_what_the_modules_put_out_and_the_net_stays_as_it_is():
    _, net = nets()
    images = torch.rand(3, 3, 32, 32)
    before, keys = net(images), list(net.state_dict())
    features = Features(net, ["network.blocks.0", "network.head"])
    after = net(images)
    assert torch.equal(before, after)
    assert list(net.state_dict()) == keys
    assert torch.equal(features.kept["network.head"], after)
    normal = (images - net.mean) / net.std
    assert torch.equal(features.kept["network.blocks.0"], net.network.blocks[0](net.network.conv(normal)))
    features.remove()
    features.kept.clear()
    net(images)
    assert features.kept == {}


def test_a_dry_pass_tells_the_shapes_and_changes_nothing():
    net = build("resnet9", "student", 10, widths=(8, 8, 16)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    shapes = output_shapes(net, torch.zeros(2, 3, 32, 32))
    assert (shapes["network.stages.1"], shapes["network.head"]) == ((8, 7, 7), (10,))
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_layers_that_are_not_named_are_those_of_the_lowest_resolutions():
    ours, theirs = (output_shapes(net, torch.zeros(2, 3, 32, 32)) for net in nets("resnet9"))
    expected = [
        ("network.stages", "network.norm"),
        ("network.stages.1", "network.blocks.1"),
        ("network.stages.0", "network.blocks.0"),
    ]
    assert pair(attention_transfer.Params(), "attention_transfer", ours, theirs) == expected
    assert pair(relational_kd.Params(), "relational_kd", ours, theirs) == expected[:1]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (
            ["network.stage.1", "network.norm"],
            ["the student has no module 'network.stage.1'", "network.stages.1 [16, 16"],
        ),
        (["network.stages", "norm"], ["the teacher has no module 'norm'", "network.blocks.2 [64, 8, 8]"]),
        (
            ["network.head", "network.norm"],
            ["'network.head' of the student puts out [10]", "feature maps", "stages.0 ["],
        ),
    ],
)
def test_layers_that_do_not_fit_are_told_with_those_that_do(layers, words):
    student, teacher = nets()
    tree = TREE | {"teacher": TEACHER, "loss": {"kd_weight": 1, "methods": {"fitnets": {"layers": [layers]}}}}
    with pytest.raises(RecipeError) as caught:
        Objective(resolve(tree, "distill"), student, teacher)
    assert str(caught.value).startswith("loss.methods.fitnets.layers: ")
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(str(caught.value)) < 700


class Tokens(torch.nn.Module):
    """A teacher whose features are tokens, maps with the channels last, and a pooled map."""

    def __init__(self):
        super().__init__()
        self.tokens, self.last, self.pool = (torch.nn.Identity() for _ in range(3))

    def forward(self, images):
        self.tokens(images.flatten(2).mT)
        self.last(images.permute(0, 2, 3, 1))
        return self.pool(images.mean((2, 3), keepdim=True)).flatten(1)


@pytest.mark.parametrize(
    ("method", "layers", "words"),
    [
        (
            "relational_kd",
            [["network.head", "tokens"]],
            "'tokens' of the teacher puts out [1024, 3], and relati",
        ),
        ("fitnets", [["network.stages", "last"]], "'last' of the teacher puts out [32, 32, 3], and fitnets compares"),
        ("attention_transfer", [["network.stages", "pool"]], "maps of one position have nowhere else to look"),
        (
            "attention_transfer",
            [],
            "one of the nets has no feature maps [C,S,S] to compare; give pairs of modules.",
        ),
    ],
)
def test_what_is_no_map_of_an_image_is_refused(method, layers, words):
    student, _ = nets("resnet9")
    methods = {method: {"layers": layers}}
    tree = TREE | {"teacher": TEACHER, "loss": {"kd_weight": 1, "methods": methods}}
    with pytest.raises(RecipeError) as caught:
        Objective(resolve(tree, "distill"), student, Tokens())
    assert words in str(caught.value)
    assert ("tokens [1024, 3]" in str(caught.value)) == (not layers)  # what there is is listed


def test_layers_within_an_onnx_file_are_told_not_to_be_there(tmp_path):
    student, _ = nets()
    teacher = loaded(colour_net(tmp_path / "t.onnx"))
    layers = [["network.head", "network.layer4"]]
    tree = TREE | {"teacher": TEACHER, "loss": {"kd_weight": 1, "methods": {"relational_kd": {"layers": layers}}}}
    with pytest.raises(RecipeError, match=r"no module 'network\.layer4' .* gives logits alone: network \[3\]"):
        Objective(resolve(tree, "distill"), student, teacher)


def test_a_vector_will_do_where_images_are_related():
    student, teacher = nets()
    layers = [["network.head", "network.norm"]]
    tree = TREE | {"teacher": TEACHER, "loss": {"kd_weight": 1, "methods": {"relational_kd": {"layers": layers}}}}
    objective = Objective(resolve(tree, "distill"), student, teacher)
    assert objective.pairs == {"relational_kd": [("network.head", "network.norm")]}


# --- recipes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"methods": {"dkx": {}}}, "loss.methods.dkx: there is no such method; did you mean 'dkd'?"),
        ({"methods": {"dkd": {"bata": 1}}}, "loss.methods.dkd.bata: there is no such field; did you mean 'beta'?"),
        ({"methods": {"dkd": {"weight": 0}, "dist": {"weight": 0}}}, "weights of all methods (dkd, dist) are 0"),
        ({"methods": {"fitnets": {"layers": [["a"]]}}}, "loss.methods.fitnets.layers.0.1: is missing"),
        ({"temperature": {"start": 4, "end": 0}}, "loss.temperature: start (=4) and end (=0) must be greater than 0"),
        ({"temperature": {"start": 4}}, "loss.temperature.end: is missing"),
        (
            {"kd_weight": {"start": 1, "end": 0, "over": 2}},
            "loss.kd_weight.over = 2: input should be less than or equal",
        ),
        ({"kd_weight": {"start": 0, "end": 0}, "ce_weight": 0}, "ce_weight and kd_weight are both 0"),
        (
            {"kd_weight": {"start": 1, "end": 0, "over": 0.5}, "ce_weight": {"start": 1, "end": 0, "over": 0.1}},
            "loss: all weights come down to 0 before the end",
        ),
        (
            {"ce_weight": 0, "methods": {"dkd": {"weight": {"start": 1, "end": 0, "over": 0.9}}}},
            "loss: all weights come down to 0 before the end",
        ),
    ],
)
def test_losses_that_are_none(loss, message):
    tree = TREE | {"teacher": TEACHER, "loss": {"kd_weight": 1} | loss}
    with pytest.raises(RecipeError) as caught:
        resolve(tree, "distill")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cached_epochs": 3},
            r"attention_transfer needs the teacher's features, cached_epochs \(=3\) keeps its logits",
        ),
        ({"teacher": TEACHER | {"also": ["runs/other"]}}, "attention_transfer needs .* an ensemble that gives logits"),
        ({"teacher": {"name": "a.onnx"}}, "attention_transfer needs .* an ONNX file gives logits alone"),
        ({"teacher": TEACHER | {"views": "flip"}}, r"attention_transfer needs .* teacher.views \(=flip\) averages its"),
    ],
)
def test_features_of_a_teacher_that_gives_logits_alone(change, message):
    with pytest.raises(RecipeError, match=message):
        resolve(TREE | EVERYTHING | change, "distill")


def test_a_written_recipe_holds_every_setting_of_its_methods():
    recipe = resolve(TREE | EVERYTHING, "distill", {"loss.methods.dkd.beta": 2})
    written = yaml.safe_load(recipe.to_yaml())
    assert resolve(written, "distill") == recipe
    assert (written["loss"]["methods"]["dkd"]["beta"], written["loss"]["methods"]["relational_kd"]["angle"]) == (2, 50)


def test_weights_may_come_down_with_the_run():
    loss = {"ce_weight": 0, "kd_weight": {"start": 1, "end": 0}, "methods": {"dkd": {}}}
    assert resolve(TREE | {"teacher": TEACHER, "loss": loss}, "distill").distils
    rising = {"kd_weight": {"start": 0, "end": 1}}
    assert resolve(TREE | {"teacher": TEACHER, "loss": rising}, "distill").distils


def test_a_ramp_goes_straight_and_stays():
    ramp = Ramp(start=4, end=1, over=0.5)
    assert [at(ramp, progress) for progress in (0, 0.25, 0.5, 1)] == [4, 2.5, 1, 1]
    assert at(3, 0.7) == 3


# --- the objective and training ----------------------------------------------------------------------------


def test_the_objective_is_the_weighted_sum_of_its_terms():
    student, teacher = nets()
    images, labels = torch.rand(6, 3, 32, 32), torch.eye(10)[:6]

    def value(progress=0.5, **loss):
        objective = Objective(resolve(TREE | {"teacher": TEACHER, "loss": loss}, "distill"), student, teacher)
        objective.progress = progress
        return objective(student(images), labels, teacher(images)).item()

    ce = value(ce_weight=1, kd_weight=1e-12)
    dist = value(ce_weight=0, kd_weight=1, methods={"dist": {}})
    attention = value(ce_weight=0, kd_weight=1, methods={"attention_transfer": {"weight": 1}})
    assert min(ce, dist, attention) > 0
    ramp = {"start": 0, "end": 6, "over": 1}
    methods = {"dist": {"weight": 2}, "attention_transfer": {"weight": ramp}}
    expected = 0.5 * ce + 0.1 * (2 * dist + 3 * attention)
    assert value(ce_weight=0.5, kd_weight=0.1, methods=methods) == pytest.approx(expected, rel=1e-4)
    assert value(ce_weight=0, kd_weight=1) == value(ce_weight=0, kd_weight=1, methods={"soft_targets": {}})
    cooling = {"start": 7, "end": 1, "over": 0.75}  # 3 when half is done
    assert value(ce_weight=0, kd_weight=1, temperature=cooling) == value(ce_weight=0, kd_weight=1, temperature=3)
    evenly = -student(images).log_softmax(1).mean().item()
    smoothed = value(ce_weight=1, kd_weight=1e-12, label_smoothing=0.3)
    assert smoothed == pytest.approx(0.7 * ce + 0.3 * evenly)
    warm = [value(ce_weight=0, kd_weight=1, methods={"dkd": {}}, progress=p) for p in (0, 1 / 24, 1 / 12, 1)]
    assert warm == pytest.approx([0, warm[3] / 2, warm[3], warm[3]])


def test_regressors_are_trained_and_are_no_part_of_the_student(tmp_path):
    data = small_digits()
    recipe = resolve(TREE | EVERYTHING, "distill", {"optimizer.lr": 0.01, "epochs": 2})
    run = Run.start(tmp_path / "run", recipe, resume=True)
    engine.fit(recipe, data, run, build("resnet9_wide", "teacher", 10, widths=TEACHER["widths"]))
    before, after = (load_tensors(run.checkpoint(name))[0] for name in ("last-1", "last"))
    for index in range(len(LAYERS)):
        name = f"objective.terms.fitnets.regressors.{index}.0.weight"
        assert not torch.equal(before[name], after[name])
    shipped, _ = load_tensors(run.checkpoint("best"))
    assert shipped.keys() == learner.new_model(recipe, data).state_dict().keys()


# --- the teacher is looked at first ------------------------------------------------------------------------


def test_what_a_teacher_is_worth_is_told_once_and_kept(toolkit: Toolkit, chain: Chain) -> None:
    distil = ("distill", "--recipe", "digits", "--teacher-checkpoint", chain.teacher, "--epochs", 1, "--run-dir", "new",
              "--set", "schedule.warmup_epochs=0", "--set", "data.val_size=0")  # fmt: skip
    first = toolkit(*distil)
    assert "of 1,000 training images right, a guess 10" in first.stderr
    kept = json.loads(Path("new/environment.json").read_text())["teacher"]
    assert (kept["images"], kept["split"]) == (1000, "training")
    assert f"the teacher {chain.teacher} gets {kept['top1']:.1%} of" in first.stderr
    assert "versions" in json.loads(Path("new/environment.json").read_text())
    again = toolkit(*distil)
    assert again.exit_code == 0
    assert "a guess" not in again.stderr


def test_a_teacher_that_knows_other_classes_is_refused(toolkit: Toolkit, chain: Chain) -> None:
    """Each answer is taken for the next class; the file says what the data says."""
    weights = chain.teacher / "checkpoints/best.safetensors"
    tensors, header = load_tensors(weights)
    head = "network.head.weight"
    save_tensors(weights, tensors | {head: tensors[head].roll(1, 0)}, header)
    distil = ("distill", "--recipe", "digits", "--teacher-checkpoint", chain.teacher, "--run-dir", "new")
    words = ("has nothing to teach", "of 144 val images right", "trained on these images")
    refused(toolkit(*distil), chain.teacher, *words)
    save_tensors(weights, tensors | {head: tensors[head].roll(1, 0)}, header | {"image_size": 64})
    refused(toolkit(*distil), "It was trained on other images: image_size 64 there, 32 here")
    assert not Path("new").exists()
