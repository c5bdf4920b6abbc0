"""Bytes to pixels, for bytes that anybody may have sent."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from toolkit.errors import ImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
FORMATS_IN_WORDS = "PNG, JPEG, WebP, GIF or BMP"
MAX_PIXELS = 50_000_000


def read_image(path: Path | str, name: str | None = None) -> NDArray[np.uint8]:
    """``decode`` of a file, which messages call ``name``, else by its path. Raises ``ImageError``."""
    name = name or str(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror}") from error
    return decode(data, name)


def decode(data: bytes, name: str = "the image") -> NDArray[np.uint8]:
    """An encoded image to uint8 ``[H,W,3]``, RGB; ``name`` is what messages call it.

    The content decides the format, not a name. The first frame of an animation counts, EXIF orientation is
    applied, transparency lies on white, 16 bits become 8. Raises ``ImageError`` for what is empty, is not a
    PNG, JPEG, WebP, GIF or BMP, declares more than 50 megapixels (nothing is decoded then), or is broken.
    """
    if not data:
        raise ImageError(f"{name} is empty")
    try:
        with warnings.catch_warnings():
            # Pillow's own limit is higher than ours.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has too many pixels: at most 50 megapixels are read") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not a {FORMATS_IN_WORDS} image, or its start is broken") from error
    except Exception as error:  # a hostile file can raise nearly any type in Pillow
        raise ImageError(f"{name} is broken or cut short ({error})") from error
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ImageError(
                f"{name} has {width} x {height} pixels ({width * height / 1e6:.0f} megapixels): "
                f"at most {MAX_PIXELS // 1_000_000} megapixels are read"
            )
        try:
            image.load()
            return np.array(_rgb(_upright(image)))
        except Exception as error:
            raise ImageError(f"{name} is broken or cut short ({error})") from error


def _upright(image: Image.Image) -> Image.Image:
    """As the camera was held. Broken EXIF data do not spoil a good picture."""
    with contextlib.suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")
