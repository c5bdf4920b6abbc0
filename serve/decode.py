"""Bytes to pixels, for bytes that anybody may have sent."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from toolkit.errors import ImageError, ImageFormatError, ImageSizeError

# Pillow's name of each format, and how its files begin.
FORMATS = {
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
    "BMP": re.compile(rb"BM"),
}
FORMATS_IN_WORDS = "PNG, JPEG, WebP, GIF or BMP"
MAX_PIXELS = 50_000_000
SCAN, MAX_SCANS = b"\xff\xda", 200  # each goes over all pixels of a JPEG; usual are up to 12
MAX_SEGMENTS = 10_000  # of a JPEG with as many scans as that
MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)  # in pixels 00 follows, or a restart
MAX_BYTES = 20 * 2**20  # of an upload, or of a request with several


def read_image(path: Path | str, name: str | None = None) -> NDArray[np.uint8]:
    """``decode`` of a file, which messages call ``name``, else by its path. Raises ``ImageError``."""
    name = name or str(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror}") from error
    return decode(data, name)


def decode(data: bytes, name: str = "the image", side: int | None = None) -> NDArray[np.uint8]:
    """An encoded image to uint8 ``[H,W,3]``, RGB; ``name`` is what messages call it.

    With ``side`` a JPEG may come out smaller, with no side below that many pixels: it is decoded in less time.

    The content decides the format, not a name. The first frame of an animation counts, EXIF orientation is
    applied, transparency lies on white, 16 bits become 8. Raises ``ImageFormatError`` for what does not begin as
    a PNG, JPEG, WebP, GIF or BMP, ``ImageSizeError`` for what declares more than 50 megapixels (nothing is decoded
    then), and ``ImageError`` for what is empty or broken.
    """
    if not data:
        raise ImageError(f"{name} is empty")
    format = next((format for format, start in FORMATS.items() if start.match(data)), None)
    if format is None:
        raise ImageFormatError(f"{name} is not a {FORMATS_IN_WORDS} image")
    if format == "JPEG" and data.count(SCAN) > MAX_SCANS and _scans(data) > MAX_SCANS:
        raise ImageError(f"{name} is broken: it has more than {MAX_SCANS} scans")
    _only_our_limit()
    try:
        image = Image.open(io.BytesIO(data), formats=(format,))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageSizeError(f"{name} has too many pixels: at most 50 megapixels are read") from error
    except UnidentifiedImageError as error:  # its message speaks of Pillow's objects
        raise ImageError(f"{name} is broken: it only begins as a {format}") from error
    except Exception as error:  # a hostile file can raise nearly any type in Pillow
        raise ImageError(f"{name} is broken or cut short ({error})") from error
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ImageSizeError(
                f"{name} has {width} x {height} pixels ({width * height / 1e6:.0f} megapixels): "
                f"at most {MAX_PIXELS // 1_000_000} megapixels are read"
            )
        try:
            if side is not None:
                image.draft(None, (side, side))
            image.load()
            _turn_upright(image)
            return np.array(_rgb(image))
        except Exception as error:
            raise ImageError(f"{name} is broken or cut short ({error})") from error


def _scans(data: bytes) -> int:
    """Scans of a JPEG up to its end, and no more than can be too many: cameras put films and raw data behind it."""
    at = scans = 0
    for _ in range(MAX_SEGMENTS):
        marker = MARKER.search(data, at)
        if marker is None or marker[1] == b"\xd9":  # the end of the image
            return scans
        scans += marker[1] == b"\xda"
        alone = marker[1] in (b"\x01", b"\xd8")  # without a length
        at = marker.end() + (0 if alone else max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big")))
    return MAX_SCANS + 1


@functools.cache
def _only_our_limit() -> None:
    """Pillow warns of sizes that we refuse anyway. Not by ``catch_warnings``, which threads must not share."""
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def _turn_upright(image: Image.Image) -> None:
    """As the camera was held. Broken EXIF data do not spoil a good picture."""
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
