"""The servers that ``serving.py`` compares with: ``python serving_peers.py gradio|litserve ARTIFACT PORT BATCH``."""

from __future__ import annotations

import base64
import sys
from typing import Any

import litserve
import numpy as np
from numpy.typing import NDArray

from export.preprocess import fit
from serve.decode import decode
from serve.session import Session


class Api(litserve.LitAPI):
    """An image as base64 in JSON, answered as our API answers."""

    def setup(self, device: str) -> None:
        self.session = Session(sys.argv[2], "cpu")
        self.about = self.session.metadata

    def decode_request(self, request: dict[str, str]) -> NDArray[np.uint8]:
        return fit(decode(base64.b64decode(request["image"])), self.about.image_size)

    def batch(self, inputs: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        return np.stack(inputs)

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.session.run(images)[1]

    def unbatch(self, outputs: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        return list(outputs)

    def encode_response(self, output: NDArray[np.float32]) -> dict[str, Any]:
        best = np.argsort(-output)[:5]
        return {"classes": [{"label": self.about.labels[i], "probability": float(output[i])} for i in best]}


def gradio(port: int) -> None:
    """The plain interface of Gradio's first page."""
    import gradio as gr

    session = Session(sys.argv[2], "cpu")

    def predict(image: NDArray[np.uint8]) -> dict[str, float]:
        prediction = session.predict(image)
        return dict(zip(prediction.labels, prediction.probabilities, strict=True))

    gr.Interface(predict, gr.Image(), gr.Label()).launch(server_port=port, quiet=True)


if __name__ == "__main__":
    if sys.argv[1] == "gradio":
        gradio(int(sys.argv[3]))
    else:
        api = Api(max_batch_size=int(sys.argv[4]), batch_timeout=0.001)
        server = litserve.LitServer(api, accelerator="cpu")
        server.run(port=int(sys.argv[3]), generate_client_file=False, log_level="error")
