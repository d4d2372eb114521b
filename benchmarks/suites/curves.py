"""Images of curves, like those of the CURVES data set.

The true CURVES set (Hinton & Salakhutdinov 2006) was published as a file, its renderer
was not. The generator here is set so that three statistics of the true set, as Martens'
log shows them, come out within 3 %: the sum of the pixel variances (16.9), the
cross-entropy of the best constant (125.5) and the entropy floor (54.1). Errors on it are
on the scale of the published ones, but not equal to them.
"""

import numpy as np

SIDE = 28
"""Pixels along each side of an image."""

PIXELS = SIDE**2

# Set by hand to the three statistics above.
_MARGIN = 4.0  # pixels that the three points keep off the border
_STEP = 0.25  # pixels of arc from one blob of ink to the next
_WIDTH = 0.88  # standard deviation of a blob, in pixels
_GAIN = 0.60  # how fast ink blackens a pixel

_TIMES = 401  # at which a curve's length is measured: it is off by less than 1e-4
_CHUNK = 500  # images drawn at once: some 20 MB of blobs


def entropy_floor(images: np.ndarray) -> float:
    """Compute what the cross-entropy of a perfect model would be.

    Pixels are shades, not bits: no prediction has a cross-entropy below the pixel's own
    binary entropy.

    Returns:
      Nats per image, summed over pixels.
    """
    entropy = -_x_log_x(images) - _x_log_x(1 - images)
    return float(entropy.sum(axis=1, dtype=np.float64).mean())


def curves(cases: int, seed: int = 0) -> np.ndarray:
    """Draw images: a curve through three random points, in ink.

    Three points in the unit square, six numbers, make an image: the quadratic
    through them at t = 0, ½, 1, in blobs of ink at equal arc lengths.

    Returns:
      Shape `[cases, 784]`, float32 in [0, 1].
    """
    (generator,) = np.random.default_rng(seed).spawn(1)
    return _draw(generator.uniform(size=(cases, 3, 2)))


def _draw(points: np.ndarray) -> np.ndarray:
    """Draw images from points in the unit square, `[cases, 3, 2]`."""
    pixels = _MARGIN + points * (SIDE - 1 - 2 * _MARGIN)
    images = np.empty((len(points), PIXELS), np.float32)
    for start in range(0, len(points), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        images[chunk] = _ink(*_blobs(pixels[chunk]))
    return images


def _quadratic(t: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Evaluate each curve at its times: `[cases, times, 2]`."""
    basis = np.stack(
        [2 * (t - 0.5) * (t - 1), -4 * t * (t - 1), 2 * t * (t - 0.5)], axis=-1
    )
    return basis @ points


def _blobs(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place blobs at equal arc lengths along each curve.

    Returns:
      The centres `[cases, blobs, 2]`, and which of them are there: curves differ in
      length, and the shorter ones are filled up.
    """
    times = np.linspace(0, 1, _TIMES)
    path = _quadratic(times, points)
    lengths = np.zeros(path.shape[:2])
    lengths[:, 1:] = np.cumsum(np.linalg.norm(np.diff(path, axis=1), axis=-1), axis=1)
    total = lengths[:, -1:]
    along = _STEP * np.arange(int(total.max() / _STEP) + 1)
    # One interpolation for all curves: each has its own stretch of the axis.
    stretch = (total.max() + 1) * np.arange(len(points))[:, None]
    at = np.interp(
        (np.minimum(along, total) + stretch).ravel(),
        (lengths + stretch).ravel(),
        np.tile(times, len(points)),
    )
    return _quadratic(at.reshape(len(points), -1), points), along <= total


def _ink(centres: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Blacken pixels: 1 − exp(−gain · ink), with ink a sum of Gaussians.

    A Gaussian of the plane is one of the rows times one of the columns, so that a
    sum over blobs is a matrix product, and exponentials are few.
    """
    offsets = centres.astype(np.float32)[..., None] - np.arange(SIDE, dtype=np.float32)
    gaussians = np.exp(-(offsets**2) / np.float32(2 * _WIDTH**2))
    columns, rows = gaussians[:, :, 0], gaussians[:, :, 1] * there[..., None]
    ink = _STEP * (rows.transpose(0, 2, 1) @ columns)
    return -np.expm1(-_GAIN * ink).reshape(len(ink), PIXELS)


def _x_log_x(x: np.ndarray) -> np.ndarray:
    return x * np.log(np.where(x > 0, x, 1))  # 0 log 0 = 0
