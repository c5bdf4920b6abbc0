"""Device, precision and memory format: what a recipe leaves open, and how the probe decides it."""

import copy
import dataclasses
import json

import pytest
import torch
from small_run import TREE, small_digits

from toolkit import compute
from toolkit import data as datasets
from toolkit.compute import Numbers
from toolkit.engine import fit, predict
from toolkit.errors import DeviceError
from toolkit.learner import new_model
from toolkit.recipe import resolve
from toolkit.run import Run

CPU = torch.device("cpu")
USUAL = Numbers(torch.bfloat16, torch.channels_last)
OTHER = Numbers(torch.float32, torch.contiguous_format)


@pytest.fixture
def open_recipe(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    return resolve(TREE, "distill", {"precision": "auto", "channels_last": None})


def test_candidates_are_what_the_recipe_leaves_open(open_recipe):
    assert len(compute.candidates(open_recipe, CPU)) == 4
    assert compute.candidates(open_recipe, CPU)[0] == USUAL == compute.usual(open_recipe, CPU)
    set_layout = open_recipe.model_copy(update={"channels_last": False})
    assert {choice.layout for choice in compute.candidates(set_layout, CPU)} == {torch.contiguous_format}
    both_set = set_layout.model_copy(update={"precision": "fp32"})
    assert compute.candidates(both_set, CPU) == [OTHER]


def test_bf16_is_tried_only_where_the_hardware_has_it(open_recipe, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert {choice.dtype for choice in compute.candidates(open_recipe, CPU)} == {torch.float32}


@pytest.mark.parametrize(("others", "expected"), [(0.95, USUAL), (0.8, OTHER), (2.0, USUAL)])
def test_the_usual_choice_yields_only_to_a_clear_difference(
    open_recipe, monkeypatch, tmp_path, capsys, others, expected
):
    monkeypatch.setattr(compute, "probe", lambda *_: [1.0, 2.0, 2.0, others])
    run = Run.start(tmp_path / "run", open_recipe, False)
    assert compute.chosen(torch.nn.Identity(), open_recipe, CPU, run) == expected
    assert f"probe: {expected}, " in capsys.readouterr().err
    monkeypatch.setattr(compute, "probe", lambda *_: pytest.fail("probed again"))
    assert compute.chosen(torch.nn.Identity(), open_recipe, CPU, run) == expected
    for field, value in (("probe", False), ("deterministic", True)):
        without = open_recipe.model_copy(update={field: value})
        run = Run.start(tmp_path / field, without, False)
        assert compute.chosen(torch.nn.Identity(), without, CPU, run) == USUAL
        assert not (run.path / "probe.json").exists()


def test_a_probed_run_is_the_run_that_was_told_its_numbers(monkeypatch, tmp_path):
    data = dataclasses.replace(small_digits(), val=None)
    alike = {"loss.ce_weight": 1, "loss.kd_weight": 0, "epochs": 1, "data.image_size": 16, "batch_size": 100}
    monkeypatch.setattr(compute, "WORTH", 0)  # the fastest, whatever it is
    probed = Run.start(tmp_path / "probed", resolve(TREE, "distill", alike | {"channels_last": None}), False)
    fit(probed.recipe, data, probed)
    kept = json.loads((probed.path / "probe.json").read_text())
    assert set(kept["images_per_second"]) == {"float32 channels_last", "float32 contiguous"}
    told = resolve(TREE, "distill", alike | {"channels_last": kept["chosen"].endswith("channels_last")})
    told_run = Run.start(tmp_path / "told", told, False)
    summary = fit(told, data, told_run)
    assert summary["memory_format"] in ("channels_last", "contiguous_format")
    assert probed.history()[0]["train_loss"] == told_run.history()[0]["train_loss"]


def test_a_probe_leaves_the_model_as_it_was(open_recipe):
    data = datasets.load(open_recipe.data)
    model = new_model(open_recipe, data)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    seconds = compute.probe(model, open_recipe, CPU, compute.candidates(open_recipe, CPU))
    assert all(0 < s < 60 for s in seconds)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_was_asked_for_and_is_not_there():
    for name in ("cuda", "cuda:200"):  # PyTorch takes the number as one of 8 bits
        with pytest.raises(DeviceError, match=f"{name} was asked for"):
            compute.pick_device(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", ""])
def test_a_device_that_is_none(name):
    with pytest.raises(DeviceError, match="is no device: give auto, cpu, cuda or cuda:N"):
        compute.pick_device(name)


@pytest.mark.parametrize(
    ("told", "processes", "expected"), [(None, 1, 6), (None, 2, 3), ("1", 1, None), ("1", 2, 3), ("4", 2, None)]
)
def test_a_process_has_its_share_of_the_cores_unless_it_is_told_otherwise(monkeypatch, told, processes, expected):
    """torchrun tells several processes to take 1 thread each, where nobody said anything."""
    asked = []
    monkeypatch.setattr(compute, "available_cores", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(compute.distributed, "LOCAL_SIZE", processes)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    compute.settle(torch.device("cuda"))
    assert not asked
    predict(torch.nn.Flatten(), torch.zeros(1, 3, 2, 2, dtype=torch.uint8), CPU)  # as validate and export do
    assert asked == ([] if expected is None else [expected])
