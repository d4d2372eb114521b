"""MNIST from `mnist.npz`, the file that Keras made common.

Its contents are verified, not the file, because archives of the same arrays differ.
"""

import hashlib
import os
import shutil
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.suites.curves import SIDE

FILE = "mnist.npz"
URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"

_CASES = {"train": 60_000, "test": 10_000}
_SHA256 = {
    # Of the values, uint8 in C order and original order. With the bytes of its
    # header before them, each is the well-known checksum of the IDX file.
    "x_train": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
    "y_train": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
    "x_test": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
    "y_test": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
}
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What NumPy raises for files that are cut short, damaged or something else."""


def images(data_dir: str | os.PathLike[str], part: str = "train") -> np.ndarray:
    """Read images, and verify that they are MNIST's.

    Args:
      data_dir: the folder that holds the file.
      part: `"train"`, the 60,000 training images, or `"test"`, the 10,000 others.

    Returns:
      Shape `[cases, 784]`, float32 in [0, 1].

    Raises:
      FileNotFoundError: if the file is missing.
      ValueError: if its contents are not those of MNIST.
    """
    path = Path(data_dir) / FILE
    if missing(data_dir):
        raise FileNotFoundError(missing(data_dir))
    name = f"x_{part}"
    pixels = _arrays(path, str(path), [name])[name]
    return pixels.reshape(len(pixels), -1).astype(np.float32) / np.float32(255)


def missing(data_dir: str | os.PathLike[str]) -> str | None:
    """Say what to do if the file is not there.

    Returns:
      One line, or `None` if the file is there.
    """
    path = Path(data_dir) / FILE
    if path.exists():
        return None
    return (
        f"no {path}: put {FILE} there, give --data-dir the folder that holds it, or add "
        f"--download to fetch {URL}"
    )


def labels(data_dir: str | os.PathLike[str], part: str = "train") -> np.ndarray:
    """Read the digits of the images, and verify them.

    Args:
      data_dir: the folder that holds the file.
      part: `"train"` or `"test"`, as for `images`.

    Returns:
      Shape `[cases]`, int32, from 0 to 9.

    Raises:
      OSError: if there is no such file.
      ValueError: if it does not hold MNIST's labels.
    """
    path, name = Path(data_dir) / FILE, f"y_{part}"
    return _arrays(path, str(path), [name])[name].astype(np.int32)


def _shape(name: str) -> tuple[int, ...]:
    """Return the shape of an array, such as `x_train`."""
    kind, _, part = name.partition("_")
    return (_CASES[part], SIDE, SIDE) if kind == "x" else (_CASES[part],)


def _arrays(path: Path, source: str, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Read and verify some of a file's arrays, which are uint8."""
    arrays = {}
    try:
        # NumPy would leave a file that it opened, and cannot read, to the collector.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            for name in names:
                arrays[name] = archive[name]
    except _UNREADABLE as error:
        raise _not_mnist(source, f"it cannot be read ({error})") from error
    except TypeError as error:  # A lone array, `.npy`, is no archive.
        raise _not_mnist(source, "it is no .npz archive") from error
    for name, array in arrays.items():
        shape = _shape(name)
        if array.shape != shape or array.dtype != np.uint8:
            came = f"{name} is {array.dtype}{list(array.shape)}"
            raise _not_mnist(source, f"{came}, not uint8{list(shape)}")
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        if digest != _SHA256[name]:
            came = f"the values of {name} have sha256 {digest}"
            raise _not_mnist(source, f"{came}, not {_SHA256[name]}")
    return arrays


def _not_mnist(source: str, came: str) -> ValueError:
    return ValueError(
        f"{source} does not hold MNIST: {came}. Remove it, and put an intact {FILE} "
        "in its place or add --download."
    )


def fetch(data_dir: str | os.PathLike[str]) -> None:
    """Fetch the file, verify its contents, and only then give it its name.

    Raises:
      ConnectionError: if it could not be fetched.
      ValueError: if its contents are not those of MNIST.
    """
    path = Path(data_dir) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=FILE, suffix=".part", dir=path.parent)
    part = Path(name)
    try:
        try:
            with (
                os.fdopen(handle, "wb") as file,
                urllib.request.urlopen(URL, timeout=60) as answer,
            ):
                shutil.copyfileobj(answer, file)
        except OSError as error:
            msg = (
                f"Could not fetch {URL} ({error}). Fetch it by other means and put "
                f"it at {path}."
            )
            raise ConnectionError(msg) from error
        _arrays(part, URL, _SHA256)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
