"""Test-time augmentation against airbench's, stochastic depth, and resizing inside the network."""

import pytest
import torch
import torch.nn.functional as F

from students.blocks import StochasticDepth
from toolkit.catalogue import build
from toolkit.classifier import TestTimeAugmentation
from toolkit.errors import RecipeError


def mirrored(model, images):
    return (model(images) + model(images.flip(-1))) / 2


def test_views_are_airbenchs():
    """``infer_mirror`` and ``infer_mirror_translate`` of airbench94.py, in their own words."""
    model = build("resnet9", "student", 7, widths=(8, 8, 8)).eval()
    images = torch.rand(3, 3, 20, 16)
    with torch.no_grad():
        flipped = mirrored(model, images)
        torch.testing.assert_close(TestTimeAugmentation(model, "flip")(images), flipped)
        padded = F.pad(images, (1,) * 4, "reflect")
        shifted = [mirrored(model, padded[:, :, 0:20, 0:16]), mirrored(model, padded[:, :, 2:22, 2:18])]
        expected = 0.5 * flipped + 0.5 * torch.stack(shifted).mean(0)
        torch.testing.assert_close(TestTimeAugmentation(model, "flip_and_shift")(images), expected)


def test_the_views_add_no_weights_and_leave_the_answers_of_a_constant_image():
    model = build("resnet9", "student", 7, widths=(8, 8, 8)).eval()
    views = TestTimeAugmentation(model)
    assert sum(value.numel() for value in views.parameters()) == sum(value.numel() for value in model.parameters())
    grey = torch.full((2, 3, 16, 16), 0.3)
    with torch.no_grad():
        torch.testing.assert_close(views(grey), model(grey))


def test_stochastic_depth_leaves_out_branches_of_images_in_training_alone():
    depth, branch = StochasticDepth(0.25), torch.rand(4000, 2, 1, 1) + 1
    found = depth(branch)
    left_out = (found == 0).all((1, 2, 3))
    assert left_out.float().mean() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(found[~left_out], branch[~left_out] / 0.75)
    assert torch.equal(depth.eval()(branch), branch)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet9", {"widths": (8, 8, 8)}),
        ("tpsnet", {"blocks": (2, 1, 1), "base": 4}),
        ("se_resnet_443", {"stem": 16, "widths": (8, 8, 8), "blocks": (1, 1, 2)}),
    ],
)
def test_models_leave_out_their_last_blocks_most(name, arguments):
    plain, deep = build(name, "student", 5, **arguments), build(name, "student", 5, stochastic_depth=0.4, **arguments)
    assert list(plain.state_dict()) == list(deep.state_dict())
    found = [module.probability for module in deep.modules() if isinstance(module, StochasticDepth)]
    assert found == pytest.approx([0.4 * (i + 1) / len(found) for i in range(len(found))])
    deep.load_state_dict(plain.state_dict())
    images = torch.rand(8, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), deep.eval()(images))
        assert not torch.equal(deep.train()(images), deep.train()(images))


def test_a_net_that_resizes_answers_as_for_the_larger_image():
    plain, larger = (build("resnet9", "student", 5, widths=(8, 8, 8), resize=side).eval() for side in (None, 40))
    torch.manual_seed(0)
    larger.load_state_dict(plain.state_dict())
    images = torch.rand(6, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(larger(images), plain(F.interpolate(images, size=(40, 40), mode="bilinear")))
        larger.prepare(images)
        plain.prepare(F.interpolate(images[::2], size=(40, 40), mode="bilinear"))
    filters = (model.network.first.weight.abs() for model in (larger, plain))  # a component has no sign
    torch.testing.assert_close(*filters, rtol=1e-2, atol=1e-3)
    with pytest.raises(RecipeError, match=r"resize \(=8\) must be at least 16"):
        build("resnet9", "student", 5, resize=8)
