"""Bytes to pixels, for bytes that anybody may have sent."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import BoundedSemaphore

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from toolkit.errors import ImageError, ImageFormatError, ImageSizeError
from toolkit.machine import available_cores, total_memory

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
MEMORY = 2**30  # bytes that it takes to decode so many, at most and about
SCAN, MAX_SCANS = b"\xff\xda", 200  # each goes over all pixels of a JPEG; usual are up to 12
MAX_SCANNED = 12 * MAX_PIXELS  # a second or two
MAX_PARTS = 10_000  # of a file: segments of a JPEG, chunks of a PNG, blocks of a GIF
MAX_HEAD = 2**20  # bytes of a JPEG's tables: usual are under 1,000
MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)  # in pixels 00 follows, or a restart
BLOCK = re.compile(rb"[!,;]")  # of a GIF: an extension, a picture, the end
CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # what a PNG's pixels depend on
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF's orientation
MAX_BYTES = 20 * 2**20  # of an upload, or of a request with several


def turns(processes: int = 1) -> BoundedSemaphore:
    """What a thread holds while it decodes: no more at once than the cores and the memory of the machine can bear.

    ``processes`` share the machine.
    """
    return BoundedSemaphore(max(1, min(2 * available_cores(), total_memory() // MEMORY) // processes))


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
    a PNG, JPEG, WebP, GIF or BMP and for a BMP in run lengths, ``ImageSizeError`` for what declares more than
    50 megapixels (nothing is decoded then), and ``ImageError`` for what is empty or broken.
    """
    image, exif = _open(data, name)
    with image:
        try:
            if side is not None:
                image.draft(None, (side, side))
            image.load()
            return np.array(_rgb(_upright(image, exif or image.info.get("exif", b""))))
        except Exception as error:
            raise ImageError(f"{name} is broken or cut short ({error})") from error


def declared(data: bytes) -> tuple[str, tuple[int, int]]:
    """Format, width and height of what ``decode`` reads, before it is turned. Raises ``ImageError``."""
    image, _ = _open(data, "the image")
    with image:
        return image.format or "", image.size


def _open(data: bytes, name: str) -> tuple[Image.Image, bytes]:
    """The image, nothing of it decoded yet, and its EXIF data where they lie around it; raises as ``decode``."""
    if not data:
        raise ImageError(f"{name} is empty")
    format = next((format for format, start in FORMATS.items() if start.match(data)), None)
    if format is None:
        raise ImageFormatError(f"{name} is not a {FORMATS_IN_WORDS} image")
    try:
        data, exif = BARE[format](data) if format in BARE else (data, b"")
    except _TooMuchError as error:
        raise ImageError(f"{name} is broken: {error}") from error
    _only_our_limit()
    try:
        image = Image.open(io.BytesIO(data), formats=(format,))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageSizeError(f"{name} has too many pixels: at most 50 megapixels are read") from error
    except UnidentifiedImageError as error:  # its message speaks of Pillow's objects
        raise ImageError(f"{name} is broken: it only begins as a {format}") from error
    except Exception as error:  # a hostile file can raise nearly any type in Pillow
        raise ImageError(f"{name} is broken or cut short ({error})") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageSizeError(
            f"{name} has {width} x {height} pixels ({width * height / 1e6:.0f} megapixels): "
            f"at most {MAX_PIXELS // 1_000_000} megapixels are read"
        )
    if any(tile[0] == "bmp_rle" for tile in image.tile):  # Pillow's only decoder in Python: 4 KB took it 27 s
        raise ImageFormatError(f"{name} is a BMP in run lengths, which are not read: save it without")
    most = min(MAX_SCANS, MAX_SCANNED // (width * height))
    if format == "JPEG" and data.count(SCAN) > most and _scans(data) > most:
        raise ImageError(f"{name} is broken: it has more than {most} scans")
    return image, exif


class _TooMuchError(Exception):
    """A file of so many parts that nobody made it for a picture."""


def _bare_jpeg(data: bytes) -> tuple[bytes, bytes]:
    """A JPEG without what lies around its picture, and its EXIF data.

    Pillow's cost for comments, previews and EXIF data is what a hostile file makes it: their square, or 64 KB for each
    of thousands of entries. The pixels depend on none of them.
    """
    kept, exif, at = [data[:2]], b"", 2
    for _ in range(MAX_PARTS):
        marker = MARKER.search(data, at)
        if marker is None or marker[1] in (b"\xd9", b"\xda"):  # its end, or its first scan
            head = b"".join(kept)
            rest = data[marker.start() :] if marker else b""
            if len(head) > MAX_HEAD:
                raise _TooMuchError("its tables are too long")
            return head + rest, exif
        at = _behind(data, marker)
        if marker[1] == b"\xe1" and data.startswith(b"Exif\0\0", marker.end() + 2):
            exif = exif or data[marker.end() + 2 : at]
        # Of the applications' segments JFIF's and Adobe's tell the colours; the last is a comment.
        if marker[1] in (b"\xe0", b"\xee") or not (b"\xe0" <= marker[1] <= b"\xef" or marker[1] == b"\xfe"):
            kept.append(data[marker.start() : at])
    raise _TooMuchError(f"it has more than {MAX_PARTS:,} parts")


def _scans(data: bytes) -> int:
    """Scans of a JPEG up to its end, and no more than can be too many: cameras put films and raw data behind it."""
    at = scans = 0
    for _ in range(MAX_PARTS):
        marker = MARKER.search(data, at)
        if marker is None or marker[1] == b"\xd9":  # the end of the image
            return scans
        scans += marker[1] == b"\xda"
        at = _behind(data, marker)
    return MAX_SCANS + 1


def _behind(data: bytes, marker: re.Match[bytes]) -> int:
    """Where a segment of a JPEG ends."""
    if marker[1] in (b"\x01", b"\xd8"):  # without a length
        return marker.end()
    return marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big"))


def _bare_png(data: bytes) -> tuple[bytes, bytes]:
    """A PNG of its picture's chunks alone, and its EXIF data; see ``_bare_jpeg``."""
    kept, exif, at = [data[:8]], b"", 8
    for _ in range(MAX_PARTS + len(data) // 1024):  # a large picture is cut into many, usually of 8 KB and more
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if kind in CHUNKS:
            kept.append(data[at:end])
        elif kind == b"eXIf":
            exif = exif or data[at + 8 : end - 4]
        if kind == b"IEND" or end >= len(data):
            return b"".join(kept), exif
        at = end
    raise _TooMuchError(f"it has more than {MAX_PARTS:,} parts")


def _bare_gif(data: bytes) -> tuple[bytes, bytes]:
    """A GIF without what lies before its first picture, but for what says how to show that; see ``_bare_jpeg``."""
    colours = int.from_bytes(data[10:11], "big")
    at = 13 + (3 << (colours & 7) + 1 if colours & 128 else 0)
    kept, parts = [data[:at]], 0
    while (block := BLOCK.search(data, at)) and block[0] == b"!":
        at = block.end() + 1
        while size := int.from_bytes(data[at : at + 1], "big"):
            at, parts = at + 1 + size, parts + 1
            if parts > MAX_PARTS:
                raise _TooMuchError(f"it has more than {MAX_PARTS:,} parts")
        at, parts = at + 1, parts + 1
        if data[block.end() : block.end() + 1] == b"\xf9":  # which colour is transparent
            kept.append(data[block.start() : at])
    return b"".join(kept) + (data[block.start() :] if block else b""), b""


BARE: dict[str, Callable[[bytes], tuple[bytes, bytes]]] = {"JPEG": _bare_jpeg, "PNG": _bare_png, "GIF": _bare_gif}


@functools.cache
def _only_our_limit() -> None:
    """Pillow warns of sizes that we refuse anyway. Not by ``catch_warnings``, which threads must not share."""
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def _upright(image: Image.Image, exif: bytes) -> Image.Image:
    """As the camera was held. Broken EXIF data do not spoil a good picture."""
    turn = None
    with contextlib.suppress(KeyError, struct.error):
        turn = TURNS.get(_orientation(exif.removeprefix(b"Exif\0\0")))
    return image if turn is None else image.transpose(turn)


def _orientation(tiff: bytes) -> int:
    """EXIF's orientation alone: the other entries may all name one and the same MB, which Pillow copies for each."""
    order = {b"II": "<", b"MM": ">"}[tiff[:2]]
    (at,) = struct.unpack_from(order + "L", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, at)
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(order + "HH", tiff, entry)
        if tag == 0x112:
            return int(struct.unpack_from(order + ("L" if kind == 4 else "H"), tiff, entry + 8)[0])
    return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGB", image.size, "white")
        colours = image if image.mode == "RGBA" else image.convert("RGBA")
        white.paste(colours, mask=colours)  # what alpha_composite gives, in half the memory
        return white
    return image if image.mode == "RGB" else image.convert("RGB")
