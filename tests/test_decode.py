"""The decoder: what it reads, and what it refuses with words."""

import contextlib
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin
from served import encoded, png, png_chunk

from serve import decode as module
from serve.decode import FORMATS, MAX_PARTS, MAX_PIXELS, decode, read_image
from toolkit.errors import ImageError, ImageFormatError, ImageSizeError

RED, GREEN = (200, 30, 30), (30, 160, 30)


def _picture() -> Image.Image:
    """12 pixels wide, 8 high: red on the left, green on the right."""
    image = Image.new("RGB", (12, 8), RED)
    image.paste(GREEN, (6, 0, 12, 8))
    return image


def _animated_webp_of(width: int, height: int) -> bytes:
    """One tiny frame on a canvas that is declared to be huge."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return kind + struct.pack("<I", len(body)) + body

    def number(value: int) -> bytes:
        return value.to_bytes(3, "little")

    frame = bytes(6) + number(7) + number(7) + number(10) + b"\0"
    frame += encoded(Image.new("RGB", (8, 8)), "WEBP", lossless=True)[12:]
    body = b"WEBP" + chunk(b"VP8X", bytes([2, 0, 0, 0]) + number(width - 1) + number(height - 1))
    body += chunk(b"ANIM", bytes(6)) + chunk(b"ANMF", frame)
    return chunk(b"RIFF", body)


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("GIF", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 60),  # blurs colours at the edge
        ("JPEG", {"quality": 95, "subsampling": 0}, 12),
        ("MPO", {"quality": 95, "subsampling": 0}, 12),  # what many phones call a JPEG
    ],
)
def test_the_five_formats(format: str, options: dict[str, object], tolerance: int) -> None:
    pixels = decode(encoded(_picture(), format, **options))
    assert pixels.shape == (8, 12, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - np.asarray(_picture())).max() <= tolerance
    pixels[0, 0] = 0  # the caller's own


def test_modes() -> None:
    grey = np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 4)
    as_rgb = np.repeat(grey[..., None], 3, axis=-1)
    assert (decode(encoded(Image.fromarray(grey), "PNG")) == as_rgb).all()
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    assert (decode(encoded(sixteen, "PNG")) == as_rgb).all()
    rows = [b"\0" + (row.astype(">u2") * 257).repeat(3).tobytes() for row in grey]
    assert (decode(png(4, 3, 16, 2, rows)) == as_rgb).all()  # 16 bits a channel of RGB
    assert (decode(encoded(Image.fromarray(grey > 100), "PNG")) == (as_rgb > 100) * 255).all()
    palette = _picture().quantize(8)
    assert (decode(encoded(palette, "PNG")) == np.asarray(_picture())).all()
    cmyk = decode(encoded(_picture().convert("CMYK"), "JPEG", quality=95))
    assert np.abs(cmyk.astype(int) - np.asarray(_picture())).max() <= 16


def test_transparency_lies_on_white() -> None:
    clear = Image.new("RGBA", (2, 1), (*RED, 255))
    clear.putpixel((1, 0), (0, 0, 0, 0))
    for data in (encoded(clear, "PNG"), encoded(clear, "WEBP", lossless=True)):
        assert decode(data).tolist() == [[list(RED), [255, 255, 255]]]
    half = Image.new("LA", (1, 1), (0, 128))
    assert decode(encoded(half, "PNG")).tolist() == [[[127] * 3]]
    index = Image.new("P", (2, 1))
    index.putpalette([*RED, *GREEN])
    index.putpixel((1, 0), 1)
    for format in ("PNG", "GIF"):
        assert decode(encoded(index, format, transparency=1)).tolist() == [[list(RED), [255, 255, 255]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    undo = [
        None,
        Image.Transpose.FLIP_LEFT_RIGHT,
        Image.Transpose.ROTATE_180,
        Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_90,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_270,
    ][orientation - 1]
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8))
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (decode(encoded(stored, "PNG", exif=exif)) == np.asarray(upright)).all()


@pytest.mark.parametrize("kind", ["H", "L"])  # as cameras write it, and as some programs do
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_only_the_orientation_is_read_of_exif(
    format: str, order: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the other entries may name the same MB, which Pillow would copy for each."""
    monkeypatch.setattr("PIL.Image.Exif.load", lambda *_: pytest.fail("Pillow reads EXIF data"))
    entry = order + "HHLHH"
    exif = b"Exif\0\0" + {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "LH", 8, 2)
    orientation = struct.pack(order + "HHL", 0x112, {"H": 3, "L": 4}[kind], 1) + struct.pack(order + kind, 6)
    exif += struct.pack(entry, 0x10F, 2, 2**20, 9, 0) + orientation.ljust(12, b"\0") + bytes(4)
    turned = decode(encoded(_picture(), format, exif=exif, quality=95))
    assert turned.shape == (12, 8, 3)
    assert np.abs(turned.astype(int) - np.rot90(np.asarray(_picture()), -1)).mean() < 8


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_the_orientation_of_xmp_is_not_applied(format: str) -> None:
    xmp = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
    <rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp.decode())
    data = encoded(_picture(), format, **({"pnginfo": text} if format == "PNG" else {"xmp": xmp}))
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size == (8, 12)  # others turn it
    assert decode(data).shape == (8, 12, 3)


def test_broken_exif_does_not_spoil_a_picture() -> None:
    data = encoded(_picture(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert (decode(data) == np.asarray(_picture())).all()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in (RED, GREEN, (0, 0, 0))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **options)
    assert (decode(data) == RED).all()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'


@pytest.mark.parametrize(
    "data",
    [
        *(encoded(_picture(), format) for format in ("TIFF", "ICO", "PPM", "TGA", "PDF")),
        b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + b"\0" * 50,
        SVG,
        b"hello",
        b"\0" * 1000,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
)
def test_other_formats_are_refused_by_content(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cat.png"  # whatever it is called
    path.write_bytes(data)
    with pytest.raises(ImageFormatError, match=r"cat\.png is not a PNG, JPEG, WebP, GIF or BMP image"):
        read_image(path)


@pytest.mark.parametrize("start", [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"GIF89a", b"BM"])
def test_what_only_begins_as_an_image_is_broken(start: bytes) -> None:
    for data in (start, start + b"\0" * 1000):
        with pytest.raises(ImageError, match="the image is broken") as caught:
            decode(data)
        assert type(caught.value) is ImageError


def test_empty_and_missing(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="the image is empty"):
        decode(b"")
    with pytest.raises(ImageError, match=r"none\.png cannot be read: No such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="This picture cannot be read: Is a directory"):
        read_image(tmp_path, "This picture")


@pytest.mark.parametrize("format", FORMATS)
def test_cut_short(format: str) -> None:
    data = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), format)
    for length in (len(data) // 2, len(data) - 100):
        with pytest.raises(ImageError, match=r"broken|cut short"):
            decode(data[:length])


def _bmp_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (1, 1)), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def _gif_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("L", (1, 1)), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        png(10_000, 5_001, 8, 2, []),  # a little over the line
        png(13_000, 13_000, 8, 2, []),  # between ours and Pillow's limit
        png(2**31 - 1, 2**31 - 1, 8, 2, []),
        _bmp_of(20_000, 20_000),
        _gif_of(65_535, 65_535),
        _animated_webp_of(16_000, 16_000),
        _animated_webp_of(8_000, 8_000),
    ],
)
def test_more_than_50_megapixels_are_not_even_decoded(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    with pytest.raises(ImageSizeError, match="at most 50 megapixels"):
        decode(data)


def test_50_megapixels_are_allowed_of_any_shape() -> None:
    assert MAX_PIXELS == 50_000_000
    assert decode(encoded(np.zeros((1, 60_000, 3), np.uint8))).shape == (1, 60_000, 3)
    with pytest.raises(ImageError, match="broken or cut short"):  # past the size check, on to the pixels
        decode(png(10_000, 5_000, 8, 0, []))


def test_a_jpeg_of_very_many_scans_is_refused_before_its_pixels() -> None:
    good = encoded(_picture(), "JPEG", progressive=True)
    scans = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\x55" * 200
    with pytest.raises(ImageError, match="more than 200 scans"):
        decode(good[:-2] + scans + good[-2:])
    with pytest.raises(ImageError, match="more than 200 scans"):  # so many that nobody counts them
        decode(good[:-2] + b"\xff\xe1\x00\x02" * 10_000 + scans + good[-2:])
    assert np.array_equal(decode(good + scans), decode(good))  # a film behind the picture, as phones put it there


def test_a_large_jpeg_has_fewer_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goes over all pixels; what a progressive JPEG usually has is always allowed."""
    good = encoded(_picture(), "JPEG", progressive=True)
    monkeypatch.setattr(module, "MAX_SCANNED", 12 * 12 * 8)
    assert np.array_equal(decode(good), np.asarray(Image.open(io.BytesIO(good))))
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\x55"
    with pytest.raises(ImageError, match="broken: it has more than 12 scans"):
        decode(good[:-2] + 12 * scan + good[-2:])
    assert module.MAX_SCANS * 1_000_000 <= 12 * MAX_PIXELS


@pytest.mark.parametrize(
    ("cores", "gigabytes", "processes", "expected"), [(4, 64, 1, 8), (4, 3.9, 1, 3), (4, 64, 2, 4), (4, 0.5, 4, 1)]
)
def test_as_many_pictures_are_decoded_at_once_as_the_machine_bears(
    cores: int, gigabytes: float, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_cores", lambda: cores)
    monkeypatch.setattr(module, "total_memory", lambda: int(gigabytes * 2**30))
    turns = module.turns(processes)
    assert [turns.acquire(blocking=False) for _ in range(expected + 1)] == [True] * expected + [False]


@pytest.mark.parametrize(
    ("format", "head", "part"),
    [
        ("JPEG", 2, b"\xff\xe1\x00\x02"),
        ("JPEG", 2, b"\xff\xfe\x00\x05abc"),
        ("PNG", 33, png_chunk(b"teXt", b"")),
        ("GIF", 13 + 3 * 4, b"!\xfe\x01a\x00"),
    ],
)
def test_comments_do_not_reach_pillow_and_are_not_endless(
    format: str, head: int, part: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = encoded(_picture().quantize(4) if format == "GIF" else _picture(), format)
    expected, opened, given = decode(good), Image.open, []
    monkeypatch.setattr("PIL.Image.open", lambda file, **options: given.append(file) or opened(file, **options))
    assert np.array_equal(decode(good[:head] + 1000 * part + good[head:]), expected)
    assert len(given[0].getvalue()) <= len(good)
    with pytest.raises(ImageError, match="broken: it has more than 10,000 parts"):
        decode(good[:head] + 2 * MAX_PARTS * part + good[head:])
    if format == "PNG":
        with pytest.raises(ImageError, match="more than 10,000 parts"):
            decode(good[:-12] + 2 * MAX_PARTS * part + good[-12:])


def test_jpegs_of_endless_heads() -> None:
    good = encoded(_picture(), "JPEG")
    padded = good[:2] + b"\xff" * 1_000_000 + b"\x00" + good[2:]
    assert np.array_equal(decode(padded), decode(good))
    tables = b"\xff\xdb" + struct.pack(">H", 2 + 65 * 1000) + bytes(65 * 1000)
    with pytest.raises(ImageError, match="its tables are too long"):
        decode(good[:2] + 20 * tables + good[2:])


def test_a_bmp_in_run_lengths_is_refused() -> None:
    """Pillow fills up lines pixel by pixel, in Python."""
    lines = b"\x01\x05\x00\x00" * 700
    header = struct.pack("<IiiHHIIiiII", 40, 65_000, 700, 1, 8, 1, len(lines), 0, 0, 256, 0)
    data = b"BM" + struct.pack("<IHHI", 1078 + len(lines), 0, 0, 1078) + header + bytes(1024) + lines
    with pytest.raises(ImageFormatError, match="is a BMP in run lengths"):
        decode(data)


def _answers(data: bytes) -> None:
    """A picture or an ``ImageError``; every other exception fails the test."""
    with contextlib.suppress(ImageError):
        pixels = decode(data)
        assert pixels.dtype == np.uint8
        assert pixels.shape[2:] == (3,)


GOOD = [encoded(_picture(), format) for format in FORMATS]


@given(st.sampled_from([b"", *(data[:16] for data in GOOD)]), st.binary(max_size=300))
def test_any_bytes_get_an_answer(start: bytes, rest: bytes) -> None:
    _answers(start + rest)


@given(st.sampled_from(GOOD), st.data())
def test_damaged_pictures_get_an_answer(good: bytes, data: st.DataObject) -> None:
    damaged = bytearray(good)
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), min_size=1, max_size=6)
    ):
        damaged[place] = value
    _answers(bytes(damaged[: data.draw(st.integers(1, len(good)))]))
