"""Every distillation method against a straightforward computation of its own in float64.

The tests walk the catalogue: a new file in ``toolkit/losses/`` is tested by being there, and fails until ``BY_HAND``
holds its formula.
"""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from toolkit import losses
from toolkit.errors import RecipeError
from toolkit.objective import Objective
from toolkit.recipe import FeatureMethod, Method, resolve

# Feature maps of two pairs of layers: equal in size, and of another size and number of channels.
PAIRS = [((4, 5, 5), (4, 5, 5)), ((3, 4, 4), (6, 8, 8))]


def softmax(logits):
    exps = np.exp(logits - logits.max())
    return exps / exps.sum()


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum()


def soft_targets(term, student, teacher, labels, temperature):
    each = [kl(softmax(t / temperature), softmax(s / temperature)) for s, t in zip(student, teacher, strict=True)]
    return temperature**2 * np.mean(each)


def standardised_logits(term, student, teacher, labels, temperature):
    student, teacher = ((x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in (student, teacher))
    return soft_targets(term, student, teacher, labels, 2)


def dkd(term, student, teacher, labels, temperature):
    total = 0.0
    for s, t, target in zip(student, teacher, labels.argmax(1), strict=True):
        q, p = softmax(s / temperature), softmax(t / temperature)
        total += kl(*(np.array([x[target], 1 - x[target]]) for x in (p, q)))
        total += 8 * kl(*(np.delete(x, target) / np.delete(x, target).sum() for x in (p, q)))
    return temperature**2 * total / len(student)


def dist(term, student, teacher, labels, temperature):
    s, t = (np.array([softmax(row / temperature) for row in x]) for x in (student, teacher))
    loss = term.beta * np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)])
    if len(s) > 1:
        loss += term.gamma * np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T, strict=True)])
    return temperature**2 * loss


def halved(maps):
    batch, channels, height, width = maps.shape
    return maps.reshape(batch, channels, height // 2, 2, width // 2, 2).mean((3, 5))


def attention_transfer(term, student, teacher):
    loss = 0.0
    for s, t in zip(student, teacher, strict=True):
        t = halved(t) if t.shape[2] > s.shape[2] else t
        a, b = ((x**2).mean(1).reshape(len(x), -1) for x in (s, t))
        a, b = (x / np.sqrt((x**2).sum(1, keepdims=True)) for x in (a, b))
        loss += ((a - b) ** 2).mean()
    return loss


def fitnets(term, student, teacher):
    loss = 0.0
    for (conv, _), s, t in zip(term.regressors, student, teacher, strict=True):
        mixed = np.einsum("oc,bchw->bohw", conv.weight.detach().double().numpy()[:, :, 0, 0], s)
        mean, variance = mixed.mean((0, 2, 3), keepdims=True), mixed.var((0, 2, 3), keepdims=True)
        t = halved(t) if t.shape[2] > s.shape[2] else t
        loss += (((mixed - mean) / np.sqrt(variance + 1e-5) - t) ** 2).mean()
    return loss


def relational_kd(term, student, teacher):
    def huber(a, b):
        return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5

    loss = 0.0
    for pair in zip(student, teacher, strict=True):
        s, t = (x.mean((2, 3)) for x in pair)
        count = len(s)
        for start in range(0, count, term.group):
            one, other = s[start : start + term.group], t[start : start + term.group]
            size = len(one)
            distance = [[[np.linalg.norm(a - b) for a in x] for b in x] for x in (one, other)]
            mean = [np.sum(d) / max(size * (size - 1), 1) or 1 for d in distance]
            every = range(size)
            for i in every:
                for j in every:
                    d = [distance[net][i][j] / mean[net] for net in (0, 1)]
                    loss += 25 * huber(*d) / size**2 * size / count
                    for k in every:
                        cosine = [
                            (x[j] - x[i]) @ (x[k] - x[i]) / (distance[net][i][j] * distance[net][i][k] or 1)
                            for net, x in enumerate((one, other))
                        ]
                        loss += 50 * huber(*cosine) / size**3 * size / count
    return loss


BY_HAND = {
    each.__name__: each
    for each in (soft_targets, standardised_logits, dkd, dist, attention_transfer, fitnets, relational_kd)
}
ON_LOGITS = [name for name in losses.names() if not issubclass(losses.load(name).Params, FeatureMethod)]
ON_FEATURES = [name for name in losses.names() if name not in ON_LOGITS]


def make(name, **settings):
    file = losses.load(name)
    params = file.Params(**settings)
    torch.manual_seed(0)
    return file.Term(params, PAIRS) if isinstance(params, FeatureMethod) else file.Term(params)


def example(name, batch, classes=10, seed=0, scale=1.0):
    """Student's and teacher's logits or features, each a list of arrays, and what else the term takes."""
    random = np.random.default_rng(seed)
    if name in ON_FEATURES:
        nets = ([random.normal(size=(batch, *shape)) * scale for shape in net] for net in zip(*PAIRS, strict=True))
        return *nets, []
    labels = np.eye(classes)[random.integers(classes, size=batch)]
    logits = ([random.normal(size=(batch, classes)) * 3 * scale] for _ in range(2))
    return *logits, [labels, random.uniform(1, 10)]


def run(name, term, student, teacher, rest):
    """The term's value for tensors or arrays; in float64 where they are arrays, by hand."""
    first = (student, teacher) if name in ON_FEATURES else (student[0], teacher[0])
    if isinstance(student[0], torch.Tensor):
        return term(*first, *(torch.tensor(each) if isinstance(each, np.ndarray) else each for each in rest))
    return BY_HAND[name](term, *first, *rest)


def tensors(arrays, dtype=torch.float32):
    return [torch.tensor(each, dtype=dtype, requires_grad=True) for each in arrays]


def against_hand(name, batch, classes, seed, **settings):
    """Value, and gradient in a random direction by central differences of the formula."""
    term = make(name, **settings)
    student, teacher, rest = example(name, batch, classes, seed)
    ours = tensors(student)
    loss = run(name, term, ours, tensors(teacher), rest)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    size = rest[1] ** 2 if rest else 1.0  # of the numbers that are subtracted from each other
    expected = run(name, term, student, teacher, rest)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=2e-6 * size)
    loss.backward()
    random, h = np.random.default_rng(seed), 1e-5
    way = [random.normal(size=each.shape) for each in student]
    ahead, behind = (
        run(name, term, [x + sign * h * v for x, v in zip(student, way, strict=True)], teacher, rest)
        for sign in (1, -1)
    )
    slope = sum((x.grad.double().numpy() * v).sum() for x, v in zip(ours, way, strict=True))
    assert slope == pytest.approx((ahead - behind) / (2 * h), rel=2e-3, abs=1e-4 * size)


@pytest.mark.parametrize("name", ON_LOGITS)
@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(2, 100), st.integers(0, 2**31))
def test_value_and_gradient_on_logits(name, batch, classes, seed):
    if name == "standardised_logits":
        classes = max(classes, 3)
    # Of logits that hardly differ the spread is kept above 0 (standardised_logits), which the formula does not say.
    assume(min(np.ptp(net[0], axis=1).min() for net in example(name, batch, classes, seed)[:2]) > 0.2)
    against_hand(name, batch, classes, seed)


@pytest.mark.parametrize("name", ON_LOGITS)
@pytest.mark.parametrize("classes", [2, 3])
def test_a_method_teaches_few_classes_too_or_says_that_it_cannot(name, classes):
    student, teacher, rest = example(name, 6, classes)
    ours = tensors(student)
    if name == "standardised_logits" and classes == 2:
        with pytest.raises(RecipeError, match=r"loss.methods.standardised_logits: .* take soft_targets"):
            run(name, make(name), ours, tensors(teacher), rest)
        return
    run(name, make(name), ours, tensors(teacher), rest).backward()
    assert ours[0].grad.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "settings"), [("standardised_logits", {}), ("dist", {"gamma": 0}), ("dkd", {"alpha": 0})]
)
def test_what_teaches_nothing_of_two_classes_is_told_before_the_first_step(name, settings):
    loss = {"kd_weight": 1, "methods": {name: settings}}
    tree = {"student": {"name": "resnet9"}, "teacher": {"name": "resnet9_wide"}, "loss": loss}

    def objective(classes):
        student = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, classes))
        return Objective(resolve(tree, "distill"), student, student)

    objective(3)
    with pytest.raises(RecipeError, match=f"^loss.methods.{name}: "):
        objective(2)


def test_both_parts_of_dist_have_their_own_weights():
    assert losses.load("dist").Params().model_dump(include={"beta", "gamma"}) == {"beta": 2, "gamma": 2}
    against_hand("dist", 6, 10, 0, beta=1, gamma=3)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [("dist", "beta", "gamma"), ("dkd", "alpha", "beta"), ("relational_kd", "distance", "angle")],
)
def test_a_method_without_a_term_is_refused(name, one, other):
    tree = {"student": {"name": "resnet9"}, "teacher": {"name": "resnet9_wide"}}

    def resolved(**settings):
        return resolve(tree | {"loss": {"ce_weight": 0, "kd_weight": 1, "methods": {name: settings}}}, "distill")

    with pytest.raises(RecipeError, match=f"loss.methods.{name}: {one} and {other} are both 0: one must be positive"):
        resolved(**{one: 0, other: 0})
    resolved(**{one: 0})
    resolved(**{other: 0})


@pytest.mark.parametrize("name", ON_FEATURES)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_value_and_gradient_on_features(name, batch):
    for seed in range(3):
        against_hand(name, batch, 10, seed)


def test_relations_are_those_within_groups():
    against_hand("relational_kd", 7, 10, 0, group=3)
    with pytest.raises(ValidationError, match="group"):  # of two images nothing is learnt
        make("relational_kd", group=2)


@pytest.mark.parametrize("name", [name for name in losses.names() if name != "fitnets"])  # its regressors change it
@pytest.mark.parametrize("batch", [1, 6])
def test_no_loss_where_the_student_equals_the_teacher(name, batch):
    term = make(name)
    student, _, rest = example(name, batch)
    ours, same = tensors(student), tensors(student)
    loss = run(name, term, ours, same, rest)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-4)
    assert all(each.grad.abs().max() < 1e-3 for each in ours)


@pytest.mark.parametrize("name", losses.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0, 1, 1e4])
def test_any_numbers_give_finite_ones_and_no_gradient_to_the_teacher(name, dtype, scale):
    """Also where all logits or features are the same; in bf16 the arithmetic is that of float32."""
    student, teacher, rest = example(name, 6, scale=scale)
    ours, theirs = tensors(student, dtype), tensors(teacher, dtype)
    loss = run(name, make(name), ours, theirs, rest)
    loss.backward()
    assert loss.isfinite()
    assert all(each.grad.isfinite().all() for each in ours)
    assert all(each.grad is None for each in theirs)
    precise = run(name, make(name), [each.float() for each in ours], [each.float() for each in theirs], rest)
    assert loss == precise


@pytest.mark.parametrize("name", losses.names())
def test_a_file_says_what_it_is(name):
    file = losses.load(name)
    assert issubclass(file.Params, Method)
    assert "arXiv" in file.__doc__
    assert "``" in inspect.getdoc(file.Term), "the formula"
    assert all(field.description for field in file.Params.model_fields.values())
    assert name in BY_HAND, "its formula in this file"


def test_decoupled_soft_targets_add_up_to_soft_targets():
    """With beta as the teacher's probability of the other classes than the target."""
    student, teacher, (labels, temperature) = example("dkd", 1)
    p = softmax(teacher[0][0] / temperature)
    beta = 1 - p[labels[0].argmax()]
    whole = run("soft_targets", make("soft_targets"), tensors(student), tensors(teacher), [labels, temperature])
    parts = run("dkd", make("dkd", beta=beta), tensors(student), tensors(teacher), [labels, temperature])
    assert parts.item() == pytest.approx(whole.item(), rel=1e-4)
