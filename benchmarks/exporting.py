"""Times ONNX Runtime, fp32 and INT8, beside PyTorch eager: `python benchmarks/exporting.py [NET...]`.

All take turns in one process with the same threads. Weights are random, as speed does not depend on them.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from export import onnx_export, quantise
from export.artifact import Metadata
from serve.session import Session
from toolkit.bench import alternate, pinned
from toolkit.catalogue import build, parameter_count
from toolkit.machine import available_cores

NETS = {
    "tpsnet": ("tpsnet", {}),
    "se_resnet_443": ("se_resnet_443", {}),
    "resnet_large": ("resnet_large", {}),
    "resnet9": ("resnet9", {"widths": [64, 256, 384]}),
    "shipped": ("resnet9", {"widths": [64, 256, 384], "resize": 40}),
}
SIZE = 32


def eager(module, images):
    with torch.inference_mode():
        return module(torch.from_numpy(images))


def contestants(net, threads):
    torch.manual_seed(0)
    name, arguments = NETS[net]
    model = build(name, "student", 10, **arguments)
    images = torch.randint(0, 256, (64, 3, SIZE, SIZE), dtype=torch.uint8)
    with torch.no_grad():
        model.train()(images / 255)  # norms that have seen images
    model.eval()
    about = Metadata(
        model=name,
        labels=tuple("abcdefghij"),
        image_size=SIZE,
        parameters=parameter_count(model),
        recipe_digest="",
        dataset="random",
        dataset_digest="",
    )
    graph = onnx_export.build(model, about)
    int8 = quantise.int8(graph, images.permute(0, 2, 3, 1).numpy(), "MinMax", quantise.scheme_for(gpu=False))
    calls = {
        "eager": partial(eager, onnx_export.deployed(model, about)),
        "eager, channels_last": partial(
            eager, onnx_export.deployed(model, about).to(memory_format=torch.channels_last)
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        for precision, proto in (("fp32", graph), ("int8", int8)):
            path = Path(folder, f"{precision}.onnx")
            onnx_export.save(proto, about.model_copy(update={"precision": precision}), path)
            calls[f"ONNX Runtime {precision}"] = Session(path, "cpu", threads).run
    return calls


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nets", nargs="*", default=list(NETS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    arguments = parser.parse_args()
    threads = available_cores()
    rng = np.random.default_rng(0)
    print(f"{threads} threads, medians of {arguments.rounds} turns; ratios: to eager, and to ONNX Runtime fp32")
    print("| net | batch | " + " | ".join(("eager, ms", "channels_last", "fp32", "int8", "fp32 to eager")), end="")
    print(" | to channels_last | int8 to fp32 |\n" + "|---" * 9 + "|")
    with pinned(threads):
        for name in arguments.nets:
            calls = contestants(name, threads)
            for batch in arguments.batches:
                images = rng.integers(0, 256, (batch, SIZE, SIZE, 3), dtype=np.uint8)
                times = alternate([partial(call, images) for call in calls.values()], arguments.rounds)
                plain, last, fp32, int8 = (1000 * statistics.median(seconds) for seconds in times)
                cells = [f"{value:.2f}" for value in (plain, last, fp32, int8)]
                cells += [f"{ratio:.2f}" for ratio in (plain / fp32, last / fp32, fp32 / int8)]
                print(f"| {name} | {batch} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
