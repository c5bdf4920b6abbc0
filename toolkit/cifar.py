"""The official files of CIFAR-10 and CIFAR-100: found, downloaded, held to their MD5, read.

torchvision, which can read them too, takes as long to import as they take to read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import socket
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toolkit import recipe
from toolkit.errors import DataError
from toolkit.files import DAY, remove_stale
from toolkit.folders import listed

DOWNLOAD_TIMEOUT = 60  # seconds without a byte
ADDRESS = "https://www.cs.toronto.edu/~kriz/"

Part = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images [N,3,32,32] and labels [N]


@dataclass(frozen=True)
class Cifar:
    """One of the two data sets; each file with its MD5."""

    folder: str
    archive: tuple[str, str]
    train: tuple[tuple[str, str], ...]
    test: tuple[tuple[str, str], ...]
    names: tuple[str, str]
    names_key: str
    labels_key: str
    address: str = ADDRESS


CIFARS = {
    "cifar10": Cifar(
        folder="cifar-10-batches-py",
        archive=("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
        train=(
            ("data_batch_1", "c99cafc152244af753f735de768cd75f"),
            ("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
            ("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
            ("data_batch_4", "634d18415352ddfa80567beed471001a"),
            ("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
        ),
        test=(("test_batch", "40351d587109b95175f43aff81a1287e"),),
        names=("batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),
        names_key="label_names",
        labels_key="labels",
    ),
    "cifar100": Cifar(
        folder="cifar-100-python",
        archive=("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
        train=(("train", "16019d7e3df5f24257cddd939b257f8d"),),
        test=(("test", "f0ef6b0ae62326f3e7ffdfab6717acfc"),),
        names=("meta", "7973b15100ade9c7d40fb424638fde48"),
        names_key="fine_label_names",
        labels_key="fine_labels",
    ),
}


def read(name: str, config: recipe.Data) -> tuple[tuple[str, ...], dict[str, Part]]:
    """Class names, and the parts ``train`` and ``test``. Raises ``DataError``."""
    kind = CIFARS[name]
    folder = find(name, config) / kind.folder
    parts = {}
    for part, files in (("train", kind.train), ("test", kind.test)):
        batches = [_unpickled(folder, *file) for file in files]
        images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        parts[part] = images, np.concatenate([batch[kind.labels_key] for batch in batches]).astype(np.int64)
    return tuple(_unpickled(folder, *kind.names)[kind.names_key]), parts


def _unpickled(folder: Path, name: str, md5: str) -> dict:  # type: ignore[type-arg]  # of whatever the file holds
    """A file's content: a pickle, and read only if it is the official one."""
    path = folder / name
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; delete {folder} to download it again") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if (found := hashlib.md5(content).hexdigest()) != md5:
        raise DataError(f"{path} is damaged: its MD5 is {found}, not {md5}; delete {folder} to download it again")
    return pickle.loads(content, encoding="latin1")  # type: ignore[no-any-return]


def places(config_dir: Path | None) -> list[Path]:
    """The folders in which the files may lie, the first one first."""
    named = (config_dir, os.environ.get("TOOLKIT_DATA"), "data")
    return [Path(root).expanduser() for root in named if root]


def find(name: str, config: recipe.Data) -> Path:
    """The first place that holds the files; else they are unpacked or downloaded. Raises ``DataError``."""
    kind, roots = CIFARS[name], places(config.data_dir)
    for root in roots:
        if os.path.isdir(root / kind.folder):  # noqa: PTH112  # also of a place that may not be looked at
            return root
    for root in roots:
        if os.path.isfile(root / kind.archive[0]):  # noqa: PTH113
            _unpack(name, kind, root, download=False)
            return root
    if config.offline:
        raise DataError(
            f"{name} is not in {listed(roots)}, and downloading is off: leave out --offline, or give the "
            f"folder that holds {kind.folder} with --data-dir or $TOOLKIT_DATA"
        )
    _unpack(name, kind, roots[0], download=True)
    return roots[0]


def _unpack(name: str, kind: Cifar, root: Path, download: bool) -> None:
    """Make ``root``'s folder from the archive in it or from the network: whole, or not at all."""
    from torchvision.datasets.utils import calculate_md5, download_url

    filename, md5 = kind.archive
    archive, url = root / filename, kind.address + filename
    if not download and (found := calculate_md5(archive)) != md5:
        raise DataError(f"{archive} is damaged: its MD5 is {found}, not {md5}; delete it to download it again")
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_stale(root, f".{name}-*", DAY)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as temporary:
            if download:
                print(f"downloading {url} to {root}", file=sys.stderr)
                with _socket_timeout(DOWNLOAD_TIMEOUT):  # its progress goes to stderr
                    download_url(url, temporary, filename, md5)
                archive = Path(temporary, filename)
            with tarfile.open(archive) as files:
                files.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.0 to 3.11.3 knows none
                files.extractall(temporary)
            Path(temporary, kind.folder).rename(root / kind.folder)
    except (OSError, HTTPException, RuntimeError, tarfile.TarError) as error:  # RuntimeError: not the official bytes
        if (root / kind.folder).is_dir():  # another process was faster
            return
        what = f"downloading {name} from {url} to {root}" if download else f"unpacking {archive}"
        advice = f"put the official {filename} there" if download else "unpack it where you may write"
        raise DataError(
            f"{what} failed: {error}; {advice}, or give the folder that holds {kind.folder} with --data-dir or "
            "$TOOLKIT_DATA"
        ) from error


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
