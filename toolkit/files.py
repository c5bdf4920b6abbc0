"""Files that are written whole or not at all. A leaf: every package may import it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from toolkit.errors import UserError

DAY = 24 * 3600
UNFINISHED = ".*.????????.tmp"  # the names of what ``write_atomic`` has not finished: tempfile's eight characters

T = TypeVar("T")


def write_atomic(path: Path, write: Callable[[Path], T]) -> T:
    """Call ``write`` with a temporary path beside ``path``, flush it to disk, then rename it to ``path``.

    Returns what ``write`` returns. A disk that is full or a folder that cannot be written raises ``UserError``; the
    file that was there is then as it was.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            written = write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
            return written
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise ``UserError`` where the disk is full or ``path`` cannot be written."""
    try:
        yield
    except Exception as error:
        if is_full(error):
            raise UserError(
                f"the disk is full: {path} could not be written; what was there before is kept. "
                "Free some space and try again."
            ) from error
        read_only = getattr(error, "errno", None) == errno.EROFS
        if read_only or isinstance(error, PermissionError | NotADirectoryError | FileExistsError | IsADirectoryError):
            raise UserError(f"cannot write {path}: {getattr(error, 'strerror', error)}") from error
        raise


def is_full(error: Exception) -> bool:
    """Whether the disk is full, or the user's share of it. safetensors says so in an error of its own."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in numbers or any(os.strerror(number) in str(error) for number in numbers)


def remove_stale(folder: Path, pattern: str, seconds: float) -> None:
    """Remove the files and folders of this name that were last changed so long ago: a process that was killed left
    them, or nobody asks for them any more.
    """
    for path in folder.glob(pattern):
        with suppress(OSError):  # of another user, or gone
            if time.time() - path.stat().st_mtime >= seconds:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def locked(folder: Path, refused: type[UserError]) -> Iterator[None]:
    """Keep every other process from writing this folder, or raise ``refused`` where one does."""
    try:
        import fcntl
    except ImportError as error:
        raise refused("training wants Linux, macOS or WSL 2: this system locks files in another way") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise refused(f"cannot write {folder}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise refused(
                f"{folder} is being written by another process ({file.read() or 'unknown'}): "
                "wait for it, or choose another folder."
            ) from error
        except OSError as error:  # some network disks lock nothing
            raise refused(f"cannot lock {folder}: {error.strerror}; choose a folder on another disk") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def one_at_a_time(path: Path, wait: Callable[[], object]) -> Iterator[None]:
    """Let one process in at a time, by a lock on the file ``path``; ``wait`` is called where another one is in.

    Where no file can be written or locked, all are let in.
    """
    with ExitStack() as stack:
        with suppress(ImportError, OSError):  # fcntl: Linux, macOS and WSL 2 have it
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                wait()
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    write_atomic(path, lambda temporary: temporary.write_bytes(content))


def check_writable(path: Path) -> None:
    """Raise ``UserError`` where no file can be written at ``path``: before the long work whose result it will hold."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())  # the others can be made in it
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def check_free(path: Path, force: bool) -> None:
    """Raise ``UserError`` where ``path`` exists, unless ``force``."""
    if path.exists() and not force:
        raise UserError(f"{path} exists: add --force to replace it, or choose another path")
