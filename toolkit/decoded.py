"""Files of images to one array, decoded once and kept in a file of the user's cache. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from export import preprocess
from serve.decode import decode
from toolkit.errors import DataError, ImageError, UserError
from toolkit.files import DAY, UNFINISHED, one_at_a_time, remove_stale, write_atomic, write_bytes
from toolkit.machine import available_cores
from toolkit.progress import say, told

AHEAD = 64  # items that threads work on or have done before they are wanted: enough for many threads
MANY = 1000  # images, whose decoding takes long enough to be told
DIGEST_BYTES = 16  # of each decoded image: enough to tell copies
# Of a process that was killed while it wrote, and of images that nobody asks for any more: seconds since the last use.
STALE = ((UNFINISHED, DAY), ("[0-9a-f]" * 32 + ".*", 30 * DAY))

T = TypeVar("T")
R = TypeVar("R")


def decoded(files: Sequence[Path], side: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The images at the size that the server would make of them, uint8 [N,side,side,3], mapped from a file; and the
    ``pixel_digest`` of each, uint8 [N,16], which is 0 where a file cannot be read.

    The file's name covers paths, sizes and times of all files. Of several processes one decodes. Raises ``DataError``.
    """
    path = cache_folder() / f"{_key(files, side)}.npy"
    known, lock = path.with_suffix(".digests"), path.with_suffix(".lock")
    with one_at_a_time(lock, lambda: say(f"waiting for another process that decodes into {path.parent}")):
        passing = False
        for file in (path, known, lock):
            with contextlib.suppress(OSError):  # of another user, or not there
                os.utime(file)
        if not (path.is_file() and known.is_file()):
            if len(files) >= MANY:
                say(f"decoding {len(files):,} images, once, into {path.parent}")
            for pattern, seconds in STALE:
                remove_stale(path.parent, pattern, seconds)
            try:
                digests, passing = write_atomic(path, partial(_decode_all, files, side))
                write_bytes(known, digests.tobytes())
            except UserError as error:
                raise DataError(
                    f"decoded images cannot be kept in {path.parent} ($TOOLKIT_CACHE names another folder): {error}"
                ) from error
        images = np.load(path, mmap_mode="r")
        digests = np.frombuffer(known.read_bytes(), dtype=np.uint8).reshape(len(files), DIGEST_BYTES)
        if passing:  # then the next time they are decoded again
            known.unlink()
    return images, digests


def pixel_digest(pixels: NDArray[np.uint8]) -> bytes:
    """What tells copies, whatever their formats: 16 bytes of a decoded image uint8 [H,W,3], before it is resized."""
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=DIGEST_BYTES)
    digest.update(pixels.data)
    return digest.digest()


def cache_folder() -> Path:
    """Where decoded images are kept: $TOOLKIT_CACHE, else the user's cache folder."""
    named = os.environ.get("TOOLKIT_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")  # an empty one counts as none
    return (Path(named) if named else home / "distillation-toolkit").expanduser()


def each(work: Callable[[T], R], items: Sequence[T], what: str) -> Iterator[R]:
    """``work`` of each item, in order and by threads, which are enough: Pillow lets go of the GIL. ``what`` as in
    ``told``."""

    def results() -> Iterator[R]:
        pool = ThreadPoolExecutor(available_cores())
        try:
            ahead: deque[Future[R]] = deque()
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) == AHEAD:
                    yield ahead.popleft().result()
            yield from (future.result() for future in ahead)
        finally:
            pool.shutdown(cancel_futures=True)  # what is interrupted need not be finished

    return told(results(), len(items), what)


def _decode_all(files: Sequence[Path], side: int, path: Path) -> tuple[NDArray[np.uint8], bool]:
    """Fill a file of images. Returns the digests, and whether some could not be read for a reason that may pass."""
    digests, any_passing = np.zeros((len(files), DIGEST_BYTES), dtype=np.uint8), False
    images = npy.open_memmap(path, "w+", np.uint8, (len(files), side, side, 3))
    with path.open("r+b") as file:  # a disk that is too small is told now, not as a fault in mapped memory
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        else:  # macOS
            file.seek(images.offset)
            for _ in files:
                file.write(bytes(side * side * 3))
    results = each(partial(_decode, side=side), files, f"decoding {len(files):,} images")
    for row, (image, digest, passing) in enumerate(results):
        any_passing |= passing
        if image is not None:
            images[row], digests[row] = image, np.frombuffer(digest, np.uint8)
    images.flush()
    return digests, any_passing


def _decode(path: Path, side: int) -> tuple[NDArray[np.uint8] | None, bytes, bool]:
    """An image of ``side`` pixels, its digest; if there is none, whether that may pass: it is no fault of the image."""
    try:
        pixels = decode(path.read_bytes(), str(path))  # whole: so the digest is the same for every side
    except OSError:
        return None, b"", os.access(path, os.R_OK)  # else the name of the cache's file tells
    except ImageError:
        return None, b"", False
    return preprocess.fit(pixels, side), pixel_digest(pixels), False


def _key(files: Sequence[Path], side: int) -> str:
    digest = hashlib.sha256(f"{side} nhwc, digests of whole images".encode())
    for path in files:
        try:
            facts = path.stat()
        except OSError as error:
            raise DataError(f"{path} was there a moment ago: {error.strerror}") from error
        known = f" {facts.st_size} {facts.st_mtime_ns}" + ("" if os.access(path, os.R_OK) else " unreadable")
        digest.update(os.fsencode(path.resolve()) + f"{known}\n".encode())  # a name need not be UTF-8
    return digest.hexdigest()[:32]
