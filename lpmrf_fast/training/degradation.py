"""The degradation of blind face restoration: y = up( JPEG_q( down_r( x * k ) + n ) ).

`k` is a Gaussian kernel, isotropic or anisotropic; `r` the reduction; `n` Gaussian noise; `q` the JPEG quality. The
published ranges are those of GFPGAN, DifFace and PMRF. Drawing and applying are apart, so that a degradation can be
written down, repeated and shown.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

try:
    import cv2
except ImportError as error:
    raise ImportError('degrading images needs OpenCV: pip install "lpmrf-fast[train]"') from error

RESIZE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Ranges:
    """What a degradation is drawn from; every pair is uniform.

    sigma: standard deviation of the blur in pixels; r: reduction factor; delta: standard deviation of the noise in
    units of 1/255; q: JPEG quality (integer, both ends included). kernel_size: odd, in pixels.
    """

    sigma: tuple[float, float] = (0.1, 15.0)
    r: tuple[float, float] = (0.8, 32.0)
    delta: tuple[float, float] = (0.0, 20.0)
    q: tuple[int, int] = (30, 100)
    kernel_size: int = 41


PRESETS = {
    "blind-face": Ranges(),
    "gfpgan": Ranges(sigma=(0.1, 10.0), r=(0.8, 8.0), delta=(0.0, 20.0), q=(60, 100)),
    "mild": Ranges(sigma=(0.1, 5.0), r=(0.8, 8.0), delta=(0.0, 15.0), q=(40, 100)),
}
"""blind-face: PMRF and DifFace (the full range). gfpgan: GFPGAN. mild: ours, for short trainings."""


def draw(rng: np.random.Generator, ranges: Ranges = PRESETS["blind-face"]) -> dict:
    """Draw one degradation: a dict of numbers and names, JSON-able, that `degrade` takes."""
    isotropic = rng.random() < 0.5
    sigma_x = rng.uniform(*ranges.sigma)
    sigma_y = sigma_x if isotropic else rng.uniform(*ranges.sigma)
    return {
        "kernel": "iso" if isotropic else "aniso",
        "kernel_size": ranges.kernel_size,
        "sigma_x": sigma_x,
        "sigma_y": sigma_y,
        "theta": 0.0 if isotropic else rng.uniform(-np.pi, np.pi),
        "r": rng.uniform(*ranges.r),
        "delta": rng.uniform(*ranges.delta),
        "q": int(rng.integers(ranges.q[0], ranges.q[1] + 1)),
        "down": str(rng.choice(list(RESIZE))),
        "up": str(rng.choice(list(RESIZE))),
        "noise_seed": int(rng.integers(2**31)),
    }


def gaussian_kernel(size: int, sigma_x: float, sigma_y: float, theta: float) -> np.ndarray:
    """A normalised (size, size) Gaussian, float32, its axes turned by `theta` radians."""
    axis = np.arange(size) - (size - 1) / 2
    x, y = np.meshgrid(axis, axis)
    c, s = np.cos(theta), np.sin(theta)
    u, v = c * x + s * y, -s * x + c * y
    kernel = np.exp(-0.5 * ((u / sigma_x) ** 2 + (v / sigma_y) ** 2))
    return (kernel / kernel.sum()).astype(np.float32)


def _resize(x: np.ndarray, size: tuple[int, int], how: str) -> np.ndarray:
    """(H, W, 3) float32 to (width, height), antialiased when shrinking; Pillow resizes float planes exactly."""
    planes = [np.asarray(Image.fromarray(x[..., c]).resize(size, RESIZE[how])) for c in range(x.shape[-1])]
    return np.stack(planes, axis=-1)


def degrade(image: np.ndarray, params: dict) -> np.ndarray:
    """Apply a drawn degradation to an RGB image (H, W, 3) uint8 → the same shape and type.

    The same image and parameters give the same bytes. Raises ValueError for another shape or type.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"degrade: expected an RGB image (H, W, 3) uint8, got {image.shape} {image.dtype}")
    height, width = image.shape[:2]
    kernel = gaussian_kernel(
        params.get("kernel_size", 41), params["sigma_x"], params["sigma_y"], params.get("theta", 0.0)
    )
    # OpenCV's order, BGR, from here to the end: the noise of a published validation set was drawn in it.
    x = image[..., ::-1].astype(np.float32)
    x = cv2.filter2D(x, -1, kernel, borderType=cv2.BORDER_REFLECT_101)
    small = max(1, round(width / params["r"])), max(1, round(height / params["r"]))
    x = _resize(x, small, params["down"])
    noise = np.random.default_rng(params["noise_seed"]).standard_normal(x.shape)
    x = np.clip(np.rint(x + params["delta"] * noise), 0, 255).astype(np.uint8)
    _, encoded = cv2.imencode(".jpg", x, [cv2.IMWRITE_JPEG_QUALITY, params["q"]])
    x = cv2.imdecode(encoded, cv2.IMREAD_COLOR).astype(np.float32)
    x = np.clip(np.rint(_resize(x, (width, height), params["up"])), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(x[..., ::-1])
