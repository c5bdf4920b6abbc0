"""What one step learns from: which images, in which order, by which loss, and how far it goes."""

import dataclasses

import pytest
import torch
from small_run import TREE, small_digits

from toolkit.catalogue import build
from toolkit.data import Split
from toolkit.learner import Learner
from toolkit.optim import ascended, norms
from toolkit.recipe import resolve
from toolkit.run import Run


@pytest.fixture(scope="module")
def data():
    return small_digits()


def learning(folder, data, teacher=None, **settings):
    recipe = resolve(TREE, "distill", settings)
    return Learner(recipe, data, Run.start(folder, recipe, resume=False), torch.device("cpu"), teacher)


@pytest.mark.parametrize(
    ("balance", "shown", "weights"),
    [("none", [200, 20], None), ("sampling", [110, 110], None), ("weights", [200, 20], [0.55, 5.5])],
)
def test_rare_classes_are_shown_more_often_or_count_more(tmp_path, data, balance, shown, weights):
    labels = (torch.arange(220) < 20).long()
    data = dataclasses.replace(data, classes=("usual", "rare"), train=Split(data.train.images, labels))
    learner = learning(tmp_path / "run", data, balance=balance)
    learner.start_epoch(0, lambda: True)
    assert labels[learner.order].bincount().tolist() == shown
    found = learner.objective.class_weights
    assert (None if found is None else found.tolist()) == (weights and pytest.approx(weights))


def test_teacher_and_student_see_the_same_views_which_come_in_turn(tmp_path, data):
    seen = {}

    def watched(module, name):
        seen[name] = []
        module.register_forward_pre_hook(lambda _, inputs: seen[name].append(inputs[0]))

    def taught(views):
        teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 10))
        changes = {"teacher.name": "wrn28", "loss.kd_weight": 1, "cached_epochs": views}
        learner = learning(tmp_path / str(views), data, teacher, **changes)
        watched(learner.model, "student")
        watched(learner.teacher, "teacher")
        orders = []
        for epoch in range(3):
            learner.start_epoch(epoch, lambda: True)
            orders.append(learner.order[:50])
            learner.step(orders[-1], epoch)
        return orders

    taught(views=0)
    assert all(one is other for one, other in zip(seen["student"], seen["teacher"], strict=True))

    orders = taught(views=2)
    first, second = seen["teacher"]  # all images of an epoch; the third epoch is the first again
    assert not torch.equal(first, second)
    assert not torch.equal(orders[0], orders[2])
    for shown, views, order in zip(seen["student"], (first, second, first), orders, strict=True):
        assert torch.equal(shown, views[order])


def test_a_step_tells_its_loss_how_far_the_run_is(tmp_path, data):
    learner = learning(tmp_path / "run", data)
    learner.start_epoch(1, lambda: True)
    learner.step(learner.order[:50], done=1.5)
    assert learner.objective.progress == 0.5


def test_a_net_takes_its_first_weights_from_all_over_the_training_images(tmp_path, data, monkeypatch):
    """A folder's images come class by class."""
    seen = []
    monkeypatch.setattr("toolkit.learner.PREPARE_IMAGES", 10)
    monkeypatch.setattr("toolkit.classifier.Classifier.prepare", lambda _, images: seen.append(images))
    learning(tmp_path / "run", data)
    assert torch.equal(seen[0], data.train.images[torch.linspace(0, 219, 10).long()] / 255)


def test_the_student_alone_rounds_as_int8_does(tmp_path, data):
    losses, answers = [], []
    for rounds in (False, True):
        torch.manual_seed(0)
        teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 10))
        teacher.register_forward_hook(lambda *given: answers.append(given[2]))
        changes = {"teacher.name": "wrn28", "loss.kd_weight": 1, "loss.ce_weight": 0, "student.dropout": 0}
        learner = learning(tmp_path / str(rounds), data, teacher, int8=rounds, **changes)
        learner.start_epoch(0, lambda: True)
        losses.append(learner.step(learner.order[:50], done=0)[0])
    assert torch.equal(*answers[-2:])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1].item(), rel=0.1)


def test_a_step_of_sam_is_by_the_gradient_where_the_loss_has_risen(tmp_path, data):
    plain = {"momentum": 0, "nesterov": False, "weight_decay": 0, "sam_radius": 0.1}

    def fresh(name):
        torch.manual_seed(0)
        learner = learning(tmp_path / name, data, optimizer=plain, **{"student.dropout": 0})
        learner.start_epoch(0, lambda: True)
        return learner

    learner, twin = fresh("a"), fresh("b")
    index, before = learner.order[:50], [parameter.detach().clone() for parameter in twin.trained]
    learner.step(index, done=1)
    twin._backward(index)
    with ascended(twin.model, twin.trained, 0.1):
        twin._backward(index)
    for parameter, other, old in zip(learner.trained, twin.trained, before, strict=True):
        torch.testing.assert_close(parameter.detach(), old - learner.lr(1) * other.grad)


def test_averaged_weights_get_statistics_of_their_own(tmp_path, data, monkeypatch):
    learner = learning(tmp_path / "run", data, swa_start=1)
    sizes = []
    learner.kept.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr("toolkit.learner.at_once", lambda side: 1)  # as of images of 512 pixels
    for epoch in (0, 1):
        learner.start_epoch(epoch, lambda: True)
        learner.end_epoch(epoch)
        measured = [norm.running_mean.abs().sum().item() > 0 for norm in norms(learner.kept)]
        assert set(measured) == {epoch == 1}
    assert sizes == [44] * 5  # about as many at once as in training


def test_where_nothing_is_kept_views_are_new(tmp_path, data):
    learner = learning(tmp_path / "run", data, cached_epochs=1)
    epochs = []
    for epoch in range(2):
        learner.start_epoch(epoch, lambda: True)
        epochs.append(learner.augmenter.batch(torch.arange(20))[0])
    assert not torch.equal(*epochs)


def test_a_gradient_is_clipped_to_its_largest_norm(tmp_path, data):
    """That of all that is trained: FitNets' regressors are no part of the model."""
    plain = {"momentum": 0, "nesterov": False, "weight_decay": 0, "lr": 0.1, "grad_clip": 0.01}
    distil = {"teacher.name": "resnet9_wide", "loss.kd_weight": 1, "loss.methods": {"fitnets": {}}}
    teacher = build("resnet9_wide", "teacher", 10, widths=[8, 16, 32])
    learner = learning(tmp_path / "run", data, teacher, optimizer=plain, **distil)
    trained = [parameter for group in learner.optimizer.param_groups for parameter in group["params"]]
    assert len(trained) > len(list(learner.model.parameters()))
    learner.start_epoch(0, lambda: True)
    before = [parameter.detach().clone() for parameter in trained]
    learner.step(learner.order[:50], done=1)
    moved = [new.detach() - old for new, old in zip(trained, before, strict=True)]
    assert torch.nn.utils.get_total_norm(moved).item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_what_a_method_trains_is_not_decayed(tmp_path, data):
    distil = {"teacher.name": "resnet9_wide", "loss.kd_weight": 1, "loss.methods": {"fitnets": {}}}
    teacher = build("resnet9_wide", "teacher", 10, widths=[8, 16, 32])
    learner = learning(tmp_path / "run", data, teacher, **{"optimizer.name": "adamw"}, **distil)
    assert learner.optimizer.param_groups[-1]["weight_decay"] == 0


def test_logits_beyond_half_precision_are_kept_as_its_largest(tmp_path, data):
    class Sure(torch.nn.Module):
        def forward(self, images):
            return torch.tensor([1e6, -1e6, 0]).repeat(len(images), 4)[:, :10]

    taught = {"teacher.name": "wrn28", "loss.kd_weight": 1, "cached_epochs": 1}
    learner = learning(tmp_path / "run", data, Sure(), **taught)
    learner.start_epoch(0, lambda: True)
    assert learner.replayed.unique().tolist() == [-65504, 0, 65504]
