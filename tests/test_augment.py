"""Augmentation: what torchvision does, and a pure function of (seed, epoch, sample index)."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as v2
import torchvision.transforms.v2.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from toolkit.adjust import JITTER, affine, inverse_affine
from toolkit.augment import (
    EDIT_OF,
    OPERATIONS,
    STRENGTHS,
    VIEWS,
    Augmenter,
    cutmix_boxes,
    edit_values,
    erased_boxes,
)
from toolkit.errors import RecipeError
from toolkit.recipe import Augment

N, SIDE, CLASSES = 60, 20, 5
OFF = {"flip": "none", "crop_padding": 0}
EVERYTHING = {
    "flip": "random", "crop_padding": 3, "policy": "rand", "rotation": 20, "translation": 0.1,
    "brightness": 0.3, "contrast": 0.4, "saturation": 0.5, "hue": 0.1, "cutout": 6, "erasing": 0.5,
    "mixup": 0.4, "cutmix": 1, "mix_probability": 0.8,
}  # fmt: skip
IMAGES = torch.randint(0, 256, (N, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(N) % CLASSES
ALL = torch.arange(N)


def augmenter(seed: int = 0, epoch: int = 0, **config: object) -> Augmenter:
    made = Augmenter(IMAGES, LABELS, CLASSES, Augment.model_validate(OFF | config), seed)
    made.start_epoch(epoch)
    return made


def plain() -> Tensor:
    return TF.to_dtype(IMAGES, torch.float32, scale=True)


def drawn(n: int, **config: object) -> dict[str, np.ndarray]:
    """The table of many tiny samples."""
    images = torch.zeros(n, 3, SIDE, SIDE, dtype=torch.uint8)
    made = Augmenter(images, torch.zeros(n, dtype=torch.int64), 2, Augment.model_validate(OFF | config), 3)
    return {name: rows.numpy() for name, rows in made.table.items()}


@pytest.mark.parametrize(
    ("policy", "means"),
    [
        ("rand", [0.5099, 0.3798, 0.3344, 0.2342, 0.4515, 0.1722]),
        ("trivial", [0.3806, 0.3685, 0.371, 0.2241, 0.4359, 0.3262]),
    ],
)
def test_views_that_change_raise_their_version(policy: str, means: list[float]) -> None:
    """Else a new version would take logits that are cached of the old views: after a raise, pin what is shown now."""
    images, labels = augmenter(epoch=1, **EVERYTHING | {"policy": policy}).batch(ALL)
    shown = images.mean((1, 2, 3))[:6].tolist(), labels.amax(1)[:4].tolist()
    assert (VIEWS, *shown) == (1, pytest.approx(means, abs=2e-3), pytest.approx([0.86, 0.52, 0.7298, 1], abs=1e-4))


# --- each augmentation against torchvision's ---------------------------------------------------------------


def test_nothing_enabled_gives_the_images() -> None:
    images, labels = augmenter().batch(ALL)
    torch.testing.assert_close(images, plain(), rtol=0, atol=1e-7)
    assert torch.equal(labels, torch.nn.functional.one_hot(LABELS, CLASSES).float())
    assert images.dtype == labels.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("flip", ["none", "random"])
@pytest.mark.parametrize("mode", ["reflect", "zero", "white"])
def test_flip_and_crop(mode: str, flip: str) -> None:
    made = augmenter(crop_padding=4, padding_mode=mode, flip=flip)
    fill, kind = {"reflect": (0, "reflect"), "zero": (0, "constant"), "white": (1, "constant")}[mode]
    padded = TF.pad(plain(), [4], fill=fill, padding_mode=kind)
    expected = torch.stack(
        [
            TF.crop(image, *corner.tolist(), SIDE, SIDE)
            for image, corner in zip(padded, made.table["corner"], strict=True)
        ]
    )
    if flip == "random":
        flipped = made.table["flip"]
        assert 0 < flipped.sum() < N
        expected = torch.where(flipped[:, None, None, None], TF.horizontal_flip(expected), expected)
    torch.testing.assert_close(made.batch(ALL)[0], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("degrees", "right", "down"), [(-33, 0, 0), (5, 0, 0), (90, 0, 0), (0, 3, -2), (0, -1, 5), (25, 4, 1)]
)
def test_rotation_and_translation(degrees: float, right: int, down: int) -> None:
    shift = np.tile([right / SIDE, down / SIDE], (N, 1))
    inverse = torch.from_numpy(inverse_affine(np.full(N, np.deg2rad(degrees)), shift))
    expected = TF.affine(  # whose angle runs clockwise
        plain(), -degrees, [right, down], scale=1, shear=[0, 0], interpolation=TF.InterpolationMode.BILINEAR
    )
    torch.testing.assert_close(affine(plain(), inverse), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", JITTER)
def test_colour_jitter(name: str) -> None:
    images = plain()
    images[0], images[1], images[2] = 0, 1, images[2, :1].clone()  # black, white, shades of grey
    factors = torch.linspace(-0.5, 0.5, N) if name == "hue" else torch.linspace(0, 2.5, N)
    adjust = getattr(TF, f"adjust_{name}")
    expected = torch.stack([adjust(image, float(factor)) for image, factor in zip(images, factors, strict=True)])
    torch.testing.assert_close(JITTER[name](images, factors), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", ["trivial", "rand"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_the_policies(policy: str, name: str) -> None:
    """Each at some strengths and both signs as torchvision does it to whole levels of 0 to 255.

    Torchvision cuts fractions of a level off, in grey or blurred images and after blending: up to 2 levels are let
    pass. A place halfway between two pixels, as a few strengths make them all along a line, may show either.
    """
    theirs = v2.TrivialAugmentWide() if policy == "trivial" else v2.RandAugment()
    strengths, signed = theirs._AUGMENTATION_SPACE[name]
    strengths = strengths(STRENGTHS, SIDE, SIDE)
    made, number = augmenter(), OPERATIONS.index(name)
    values = torch.from_numpy(edit_values(policy, SIDE))[number]
    images = IMAGES.clone()
    images[0], images[1, 0], images[2] = 7, 200, images[2] // 9 + 60  # of one level, also in one channel; narrow
    wrong = []
    for sign in (0, 1) if signed else (0,):
        for strength in (0, 1, 7, 15, 23, STRENGTHS - 1) if strengths is not None else (0,):
            size = 0.0 if strengths is None else float(strengths[strength]) * (-1) ** sign
            expected = theirs._apply_image_or_video_transform(
                images, name, size, v2.InterpolationMode.NEAREST, theirs._fill
            )
            edit = torch.full((N,), int(EDIT_OF[number]))
            view = TF.to_dtype(images, torch.float32, scale=True).contiguous(memory_format=torch.channels_last)
            found = made._edit(view, edit, values[strength, sign].expand(N, -1))
            tolerance = 2 if name in ("Contrast", "Color", "Sharpness") else 1
            wrong.append(((found * 255 - expected).abs() > tolerance + 1e-3).float().mean().item())
    halfway = name in ("ShearX", "ShearY", "Rotate")
    assert max(wrong) <= (0.06 if halfway else 1e-4)
    assert np.mean(wrong) <= (0.01 if halfway else 1e-4)


def test_each_image_has_its_own_operation() -> None:
    """The groups of a batch on the CPU, and what other devices do to all images, are the same."""
    made = augmenter(policy="rand", rand_operations=3)
    edit, values = made.table["edit"], made.table["values"]
    assert edit.shape == (N, 3)
    images = made.batch(ALL)[0]
    one_by_one = []
    for i in range(N):
        view = augmenter().batch(ALL[i : i + 1])[0]
        for step in range(3):
            view = made._edit(view, edit[i : i + 1, step], values[i : i + 1, step])
        one_by_one.append(view)
    assert torch.equal(images, torch.cat(one_by_one))
    made.device = torch.device("meta")  # anything but the CPU
    assert torch.equal(made.batch(ALL)[0], images)


def test_policies_draw_every_operation_and_strength_alike() -> None:
    table = drawn(28_000, policy="trivial")
    counts = np.bincount(table["edit"][:, 0], minlength=10)
    assert counts / 2000 == pytest.approx([1, 5, *[1] * 8], rel=0.12)
    steps = table["values"][table["edit"] == list(EDIT_OF)[OPERATIONS.index("Posterize")], 0]
    assert set(steps) == {1, 2, 4, 8, 16, 32, 64}
    factors = table["values"][table["edit"] == list(EDIT_OF)[OPERATIONS.index("Color")], 0]
    assert factors.min() == pytest.approx(0.01)
    assert factors.max() == pytest.approx(1.99)
    assert len(np.unique(factors.round(4))) == 2 * STRENGTHS - 1
    assert len(np.unique(drawn(500, policy="rand", rand_magnitude=30)["values"][..., 0].round(4))) < 20


def test_erasing_paints_boxes_of_one_colour() -> None:
    made = augmenter(erasing=0.6)
    boxes, colours = made.table["erased"], made.table["colour"]
    erased = (boxes[:, 2:] > boxes[:, :2]).all(1)
    assert 0.4 < erased.float().mean() < 0.8
    for image, before, box, colour in zip(made.batch(ALL)[0], plain(), boxes.tolist(), colours, strict=True):
        top, left, bottom, right = box
        expected = TF.erase(before, top, left, bottom - top, right - left, colour[:, None, None])
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-7)


def test_erased_boxes_are_distributed_as_torchvisions() -> None:
    theirs = v2.RandomErasing()
    some = [theirs.make_params([torch.empty(3, SIDE, SIDE)]) for _ in range(2000)]
    expected = np.array([[box["i"], box["j"], box["i"] + box["h"], box["j"] + box["w"]] for box in some])
    found = erased_boxes(np.random.default_rng(0), 20_000, SIDE)
    assert found.min() == 0
    assert found.max() == SIDE
    assert found.mean(0) == pytest.approx(expected.mean(0), abs=0.3)
    assert found.std(0) == pytest.approx(expected.std(0), abs=0.3)
    height, width = (found[:, 2:] - found[:, :2]).T
    assert (height * width / SIDE**2).mean() == pytest.approx(0.175, abs=0.01)


def test_batch_moves_then_jitters_then_cuts_out() -> None:
    jitter = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.2}
    made = augmenter(rotation=30, translation=0.2, cutout=5, **jitter)
    jittered = affine(plain(), made.table["affine"])
    for name in jitter:
        jittered = JITTER[name](jittered, made.table[name])
    assert made.batch(ALL)[0].is_contiguous(memory_format=torch.channels_last)
    for image, before, box in zip(made.batch(ALL)[0], jittered, made.table["cutout"].tolist(), strict=True):
        top, left, bottom, right = (min(max(edge, 0), SIDE) for edge in box)
        expected = TF.erase(before, top, left, bottom - top, right - left, torch.zeros(1))
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing(kind: str) -> None:
    """As torchvision's, which mixes each image with the one before it; the partner is augmented too."""
    made = augmenter(flip="random", **{kind: 1.0})
    views = augmenter(flip="random").batch(ALL)[0]
    images, labels = made.batch(ALL)
    mix = v2.MixUp(num_classes=CLASSES) if kind == "mixup" else v2.CutMix(num_classes=CLASSES)
    for i, partner in enumerate(made.table["partner"].tolist()):
        lam = float(made.table["lam"][i])
        if kind == "mixup":
            parameters = {"lam": lam}
        else:
            top, left, bottom, right = made.table["box"][i].tolist()
            parameters = {"box": (left, top, right, bottom), "lam_adjusted": lam}
            assert lam == pytest.approx(1 - (bottom - top) * (right - left) / SIDE**2)
        mix.make_params = lambda _, parameters=parameters: parameters
        expected = mix(views[[partner, i]], LABELS[[partner, i]])
        torch.testing.assert_close(images[i], expected[0][1], rtol=0, atol=1e-6)
        torch.testing.assert_close(labels[i], expected[1][1], rtol=0, atol=1e-6)


@given(lam=st.floats(0, 1), x=st.integers(0, SIDE - 1), y=st.integers(0, SIDE - 1))
def test_cutmix_boxes_are_torchvisions(lam: float, x: int, y: int) -> None:
    random = SimpleNamespace(beta=lambda *_: np.array([lam]), integers=lambda *_: np.array([[y, x]]))
    top, left, bottom, right = cutmix_boxes(random, 1, 1, SIDE)[0].tolist()  # type: ignore[arg-type]

    theirs = v2.CutMix(num_classes=2)
    theirs._dist = SimpleNamespace(sample=lambda _: lam)
    centre = iter([torch.tensor([x]), torch.tensor([y])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_, **__: next(centre))
        parameters = theirs.make_params([torch.zeros(1, 3, SIDE, SIDE)])
    assert (left, top, right, bottom) == parameters["box"]


def test_mixup_and_cutmix_share_the_images() -> None:
    table = drawn(4000, mixup=1, cutmix=1, mix_probability=0.6)
    cut = (table["box"][:, 2:] > table["box"][:, :2]).all(1)
    blended = table["weight"] < 1
    assert not (cut & blended).any()
    assert blended.mean() == pytest.approx(0.3, abs=0.03)
    assert cut.mean() == pytest.approx(0.3, abs=0.05)  # some boxes are smaller than a pixel
    assert (table["lam"][~cut & ~blended] == 1).all()


# --- a pure function of (seed, epoch, sample index) --------------------------------------------------------


@settings(max_examples=30)
@given(st.permutations(range(N)), st.lists(st.integers(1, N - 1), max_size=6))
def test_a_sample_does_not_depend_on_its_batch(order: list[int], cuts: list[int]) -> None:
    made = augmenter(**EVERYTHING)
    images, labels = made.batch(ALL)
    for part in torch.tensor_split(torch.tensor(order), sorted(set(cuts))):
        some_images, some_labels = made.batch(part)
        assert torch.equal(some_images, images[part])
        assert torch.equal(some_labels, labels[part])


def test_same_seed_and_epoch_same_images_whatever_ran_before() -> None:
    images, labels = augmenter(seed=5, epoch=7, **EVERYTHING).batch(ALL)
    other = augmenter(seed=5, epoch=2, **EVERYTHING)
    other.batch(ALL)
    assert not torch.equal(other.batch(ALL)[0], images)
    other.start_epoch(7)
    assert torch.equal(other.batch(ALL)[0], images)
    assert torch.equal(other.batch(ALL)[1], labels)
    assert not torch.equal(augmenter(seed=6, epoch=7, **EVERYTHING).batch(ALL)[0], images)


def test_global_random_state_is_neither_read_nor_changed() -> None:
    before = torch.get_rng_state()
    images, _ = augmenter(**EVERYTHING).batch(ALL)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(augmenter(**EVERYTHING).batch(ALL)[0], images)


@pytest.mark.parametrize(
    "left_out", ["flip", "crop_padding", "policy", "rotation", *JITTER, "cutout", "erasing", "mixup", "cutmix"]
)
def test_one_augmentation_does_not_change_the_draws_of_the_others(left_out: str) -> None:
    whole = augmenter(**EVERYTHING).table
    fewer = augmenter(**{name: value for name, value in EVERYTHING.items() if name != left_out}).table
    for name in {"flip", "corner", "edit", "values", "cutout", "erased", "partner", *JITTER} & fewer.keys():
        assert torch.equal(whole[name], fewer[name]), name


def test_draws_stay_the_same_between_versions() -> None:
    """Runs that are resumed, and cached logits, count on these numbers."""
    made = augmenter(seed=1, epoch=2, flip="random", crop_padding=4)
    assert made.table["flip"][:8].int().tolist() == [1, 0, 1, 0, 1, 1, 1, 1]
    assert made.table["corner"][:3].tolist() == [[7, 0], [6, 7], [5, 8]]
    assert made.order(2)[:5].tolist() == [41, 36, 57, 10, 46]


def test_order_is_a_permutation_of_its_epoch() -> None:
    made = augmenter()
    assert sorted(made.order(3).tolist()) == list(range(N))
    assert torch.equal(made.order(3), augmenter(epoch=9, **EVERYTHING).order(3))
    assert not torch.equal(made.order(3), made.order(4))
    assert not torch.equal(made.order(3), augmenter(seed=1).order(3))


def test_alternating_flip_shows_each_side_every_second_epoch() -> None:
    made = augmenter(flip="alternating")
    first = made.batch(ALL)[0]
    flipped = made.table["flip"].float().mean()
    assert 0.3 < flipped < 0.7
    made.start_epoch(1)
    assert torch.equal(made.batch(ALL)[0], first.flip(3))
    made.start_epoch(2)
    assert torch.equal(made.batch(ALL)[0], first)
    assert not torch.equal(augmenter(seed=1, flip="alternating").batch(ALL)[0], first)


# --- the plain copy ----------------------------------------------------------------------------------------


def test_the_plain_copy_follows_the_augmented_one() -> None:
    made = augmenter(seed=5, epoch=7, plain_copy=True, **EVERYTHING)
    augmented = augmenter(seed=5, epoch=7, **EVERYTHING).batch(ALL)
    assert made.count == 2 * N
    assert torch.equal(made.batch(ALL)[0], augmented[0])
    assert torch.equal(made.batch(ALL)[1], augmented[1])
    images, labels = made.batch(N + ALL)
    torch.testing.assert_close(images, plain(), rtol=0, atol=1e-6)
    assert torch.equal(labels, torch.nn.functional.one_hot(LABELS, CLASSES).float())


def test_an_epoch_shows_both_copies_in_one_order() -> None:
    made = augmenter(plain_copy=True, **EVERYTHING)
    order = made.order(0)
    assert sorted(order.tolist()) == list(range(2 * N))
    assert 0 < (order[:N] < N).sum() < N
    whole = made.batch(torch.arange(2 * N))
    for part in order.split(7):
        images, labels = made.batch(part)
        assert torch.equal(images, whole[0][part])
        assert torch.equal(labels, whole[1][part])


# --- distributions -----------------------------------------------------------------------------------------


def test_crops_are_uniform() -> None:
    corners = drawn(20_000, crop_padding=2)["corner"]
    counts = np.bincount(corners[:, 0] * 5 + corners[:, 1], minlength=25)
    assert len(counts) == 25
    assert ((counts - 800) ** 2 / 800).sum() < 60  # chi-square, 24 degrees of freedom: p about 1e-4


def test_flips_are_fair() -> None:
    assert drawn(10_000, flip="random")["flip"].mean() == pytest.approx(0.5, abs=0.02)


def test_rotation_and_translation_stay_in_their_range() -> None:
    table = drawn(5000, rotation=30)["affine"]
    angles = np.rad2deg(np.arctan2(table[:, 1, 0], table[:, 0, 0]))
    assert -30 <= angles.min() < -29
    assert 29 < angles.max() <= 30
    assert angles.std() == pytest.approx(30 / 3**0.5, rel=0.03)
    shift = -drawn(5000, translation=0.25)["affine"][:, :, 2] / 2
    assert -0.25 <= shift.min() < -0.24
    assert 0.24 < shift.max() <= 0.25


@pytest.mark.parametrize(
    ("name", "reach", "lowest", "highest"),
    [("brightness", 0.4, 0.6, 1.4), ("contrast", 1.5, 0, 2.5), ("saturation", 1, 0, 2), ("hue", 0.1, -0.1, 0.1)],
)
def test_jitter_stays_in_its_range(name: str, reach: float, lowest: float, highest: float) -> None:
    factors = drawn(5000, **{name: reach})[name]
    slack = 0.01 * (highest - lowest)
    assert lowest <= factors.min() < lowest + slack
    assert highest - slack < factors.max() <= np.float32(highest)


def test_cutout_squares_have_their_size_and_any_centre() -> None:
    boxes = drawn(5000, cutout=7)["cutout"]
    assert (boxes[:, 2:] - boxes[:, :2] == 7).all()
    assert set((boxes[:, 0] + 3).tolist()) == set((boxes[:, 1] + 3).tolist()) == set(range(SIDE))


def test_cutmix_boxes_lie_anywhere() -> None:
    boxes = drawn(5000, cutmix=1)["box"]
    height, width = (boxes[:, 2:] - boxes[:, :2]).T
    # Boxes have even sides unless the border clips them: 1 pixel is left of 2 around the first one alone.
    assert (height == 1).any()
    assert (width == 1).any()
    assert boxes.min() == 0
    assert boxes.max() == SIDE
    assert (height * width).mean() / SIDE**2 == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_weights_follow_beta(alpha: float) -> None:
    table = drawn(20_000, mixup=alpha)
    assert table["lam"].mean() == pytest.approx(0.5, abs=0.02)
    assert table["lam"].var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)
    assert sorted(table["partner"]) == list(range(20_000))


# --- the rest ----------------------------------------------------------------------------------------------


def test_reflection_needs_room() -> None:
    with pytest.raises(RecipeError, match=r"crop_padding \(=20\) must be less than .* \(=20\)"):
        augmenter(crop_padding=20)
    augmenter(crop_padding=20, padding_mode="zero")


def test_batch_never_waits_for_the_device() -> None:
    """Tensors without storage: an operation that needs a value on the host, or a CPU tensor, fails."""
    made = Augmenter(IMAGES.to("meta"), LABELS.to("meta"), CLASSES, Augment.model_validate(EVERYTHING), 0)
    images, labels = made.batch(made.order(0)[:8])
    assert images.shape == (8, 3, SIDE, SIDE)
    assert labels.shape == (8, CLASSES)
    assert images.device.type == labels.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_cuda_gives_the_images_of_the_cpu() -> None:
    made = Augmenter(IMAGES.cuda(), LABELS.cuda(), CLASSES, Augment.model_validate(EVERYTHING), 0)
    index = made.order(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        images, labels = made.batch(index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = augmenter(**EVERYTHING).batch(index.cpu())
    torch.testing.assert_close(images.cpu(), expected[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(labels.cpu(), expected[1])
