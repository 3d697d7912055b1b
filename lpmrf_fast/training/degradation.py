"""Degradations of blind face restoration: what is drawn, and what is done to a picture.

The face literature's: y = up( JPEG_q( down_r( x * k ) + n ) ), `k` a Gaussian kernel, isotropic or anisotropic; `r` the
reduction; `n` Gaussian noise; `q` the JPEG quality; published ranges are those of GFPGAN, DifFace and PMRF. And
Real-ESRGAN's (arXiv 2107.10833): two rounds of blur, resize, noise and JPEG, and a sinc filter.

Drawing and applying are apart, so that a degradation can be written down, repeated and shown. What is drawn becomes a
program of a few operations, which `OnPillow` runs on the CPU and `degradation_torch.OnTorch` on any device.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

try:
    import cv2
except ImportError as error:
    raise ImportError('degrading images needs OpenCV: pip install "lpmrf-fast[train]"') from error

RESIZE = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
}
FACE_RESIZE = ("bicubic", "bilinear")
COLOURS = {"brightness": (0.5, 1.5), "contrast": (0.5, 1.5), "saturation": (0.0, 1.5), "hue": (-0.1, 0.1)}
"""What GFPGAN draws from where it changes colours: factors, and parts of a turn of the hue."""


@dataclass(frozen=True)
class Ranges:
    """What a degradation is drawn from; every pair is uniform.

    sigma: standard deviation of the blur in pixels; r: reduction factor; delta: standard deviation of the noise in
    units of 1/255; q: JPEG quality (integer, both ends included). kernel_size: odd, in pixels. resize: the methods that
    are drawn from for either way: "bicubic", "bilinear" and "area" are antialiased when shrinking; "linear" is OpenCV's
    bilinear one, which is not, to the whole number of pixels below. gray_prob: how often the result is made gray, and
    with gray_original the original with it. shift_prob: how often each channel is shifted by up to `shift` of 255.
    colour_prob: how often brightness, contrast, saturation and hue are changed, in a random order (`COLOURS`).
    """

    sigma: tuple[float, float] = (0.1, 15.0)
    r: tuple[float, float] = (0.8, 32.0)
    delta: tuple[float, float] = (0.0, 20.0)
    q: tuple[int, int] = (30, 100)
    kernel_size: int = 41
    resize: tuple = FACE_RESIZE
    gray_prob: float = 0.0
    gray_original: bool = True
    shift_prob: float = 0.0
    shift: float = 20.0
    colour_prob: float = 0.0

    def check(self) -> None:
        """Raises ValueError, one line, for ranges that cannot be drawn from."""
        _check_pairs(self, sigma=1e-3, r=1e-3, delta=0, q=1)
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        known = (*RESIZE, "linear")
        if not self.resize or not set(self.resize) <= set(known):
            raise ValueError(f"resize must name some of {', '.join(known)}, got {list(self.resize)}")
        for name in ("gray_prob", "shift_prob", "colour_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True)
class TwoStage:
    """Real-ESRGAN's two rounds, with the numbers of its x4plus training options.

    Pairs are uniform, triples of `resize_prob` those of larger, smaller and unchanged. The result is `scale` times
    smaller, and then (ours: restoration keeps the size) brought back to the size of the face by a bicubic resize.
    Kernels are drawn from `kernels` with `kernel_prob`, sizes from 7 to 21; sharpening of the original is left out.
    """

    scale: float = 4.0
    sinc_prob: float = 0.1
    final_sinc_prob: float = 0.8
    kernels: tuple = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
    kernel_prob: tuple = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    generalized_beta: tuple[float, float] = (0.5, 4.0)
    plateau_beta: tuple[float, float] = (1.0, 2.0)
    gray_noise_prob: float = 0.4
    gaussian_noise_prob: float = 0.5
    second_blur_prob: float = 0.8
    sigma: tuple[float, float] = (0.2, 3.0)
    sigma2: tuple[float, float] = (0.2, 1.5)
    resize_prob: tuple[float, float, float] = (0.2, 0.7, 0.1)
    resize_prob2: tuple[float, float, float] = (0.3, 0.4, 0.3)
    resize: tuple[float, float] = (0.15, 1.5)
    resize2: tuple[float, float] = (0.3, 1.2)
    delta: tuple[float, float] = (1.0, 30.0)
    delta2: tuple[float, float] = (1.0, 25.0)
    poisson: tuple[float, float] = (0.05, 3.0)
    poisson2: tuple[float, float] = (0.05, 2.5)
    q: tuple[int, int] = (30, 95)
    q2: tuple[int, int] = (30, 95)

    def check(self) -> None:
        """Raises ValueError, one line, for ranges that cannot be drawn from."""
        _check_pairs(self, sigma=1e-3, sigma2=1e-3, resize=1e-3, resize2=1e-3, q=1, q2=1)
        _check_pairs(self, delta=0, delta2=0, poisson=0, poisson2=0)
        for name in ("kernel_prob", "resize_prob", "resize_prob2"):
            if not math.isclose(sum(getattr(self, name)), 1, abs_tol=1e-6):
                raise ValueError(f"{name} must add up to 1, got {list(getattr(self, name))}")
        if len(self.kernels) != len(self.kernel_prob):
            raise ValueError(f"{len(self.kernels)} kernels need as many kernel_prob, got {len(self.kernel_prob)}")


def _check_pairs(ranges, **least: float) -> None:
    for name, low in least.items():
        a, b = getattr(ranges, name)
        high = 100 if name.startswith("q") else math.inf
        if not low <= a <= b <= high:
            raise ValueError(f"{name} must be two rising numbers between {low:g} and {high}, got {[a, b]}")


PRESETS = {
    "blind-face": Ranges(),
    "difface": Ranges(resize=("linear",), gray_prob=0.01),
    "pmrf": Ranges(resize=("linear",), gray_prob=0.01),
    "gfpgan": Ranges(
        sigma=(0.1, 10.0),
        r=(0.8, 8.0),
        q=(60, 100),
        resize=("linear",),
        gray_prob=0.01,
        gray_original=False,
        shift_prob=0.3,
        colour_prob=0.3,
    ),
    "real-esrgan": TwoStage(),
    "mild": Ranges(sigma=(0.1, 5.0), r=(0.8, 8.0), delta=(0.0, 15.0), q=(40, 100)),
}
"""difface, pmrf, gfpgan: what their training code does (DifFace's swinir_ffhq512.yaml, PMRF's create_degradation.py,
GFPGAN's train_gfpgan_v1.yml). blind-face: the ranges of the first two with antialiased resizes, as much validation data
is made. real-esrgan: two stages. mild: ours, for short trainings."""


def draw(rng: np.random.Generator, ranges: Ranges | TwoStage = PRESETS["blind-face"]) -> dict:
    """Draw one degradation: a dict of numbers, names and lists, JSON-able, that `degrade` takes."""
    if isinstance(ranges, TwoStage):
        return {"program": _draw_two_stages(rng, ranges)}
    isotropic = rng.random() < 0.5
    sigma_x = rng.uniform(*ranges.sigma)
    sigma_y = sigma_x if isotropic else rng.uniform(*ranges.sigma)
    drawn = {
        "kernel": "iso" if isotropic else "aniso",
        "kernel_size": ranges.kernel_size,
        "sigma_x": sigma_x,
        "sigma_y": sigma_y,
        "theta": 0.0 if isotropic else rng.uniform(-np.pi, np.pi),
        "r": rng.uniform(*ranges.r),
        "delta": rng.uniform(*ranges.delta),
        "q": int(rng.integers(ranges.q[0], ranges.q[1] + 1)),
        "down": str(rng.choice(ranges.resize)),
        "up": str(rng.choice(ranges.resize)),
        "noise_seed": int(rng.integers(2**31)),
    }
    colours = []
    if ranges.shift_prob and rng.random() < ranges.shift_prob:
        colours.append(["shift", rng.uniform(-ranges.shift, ranges.shift, 3).tolist()])
    if ranges.gray_prob and rng.random() < ranges.gray_prob:
        colours.append(["gray", None])
        drawn["gray_original"] = ranges.gray_original
    if ranges.colour_prob and rng.random() < ranges.colour_prob:
        names = rng.permutation(list(COLOURS)).tolist()
        colours += [[name, rng.uniform(*COLOURS[name])] for name in names]
    return drawn | ({"colours": colours} if colours else {})


def _draw_two_stages(rng: np.random.Generator, c: TwoStage) -> list:
    program = []

    def add(*operation):
        program.append(list(operation))

    def kernel(sigma) -> dict:
        size = 2 * int(rng.integers(3, 11)) + 1
        if rng.random() < c.sinc_prob:
            return {"kind": "sinc", "size": size, "cutoff": rng.uniform(math.pi / (3 if size < 13 else 5), math.pi)}
        kind = str(rng.choice(c.kernels, p=c.kernel_prob))
        drawn = {"kind": kind.split("_")[0], "size": size, "sigma_x": rng.uniform(*sigma)}
        if kind.endswith("aniso"):
            drawn |= {"sigma_y": rng.uniform(*sigma), "theta": rng.uniform(-math.pi, math.pi)}
        if "_" in kind:
            low, high = c.generalized_beta if kind.startswith("generalized") else c.plateau_beta
            drawn["beta"] = rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)
        return drawn

    def factor(probabilities, limits) -> float:
        way = rng.choice(3, p=probabilities)
        return (rng.uniform(1, limits[1]), rng.uniform(limits[0], 1), 1.0)[way]

    def how() -> str:
        return str(rng.choice(list(RESIZE)))

    def noise(delta, poisson):
        gaussian, gray = rng.random() < c.gaussian_noise_prob, bool(rng.random() < c.gray_noise_prob)
        kind, amount = ("gaussian", delta) if gaussian else ("poisson", poisson)
        add("noise", kind, rng.uniform(*amount), gray, int(rng.integers(2**31)))

    add("blur", kernel(c.sigma))
    add("resize", factor(c.resize_prob, c.resize), how())
    noise(c.delta, c.poisson)
    add("jpeg", int(rng.integers(c.q[0], c.q[1] + 1)))
    if rng.random() < c.second_blur_prob:
        add("blur", kernel(c.sigma2))
    add("resize", factor(c.resize_prob2, c.resize2) / c.scale, how())
    noise(c.delta2, c.poisson2)
    # The last JPEG stands before or behind the last resize and its sinc filter.
    ending = [["resize", 1 / c.scale, how()]]
    if rng.random() < c.final_sinc_prob:
        size = 2 * int(rng.integers(3, 11)) + 1
        ending.append(["blur", {"kind": "sinc", "size": size, "cutoff": rng.uniform(math.pi / 3, math.pi)}])
    jpeg = ["jpeg", int(rng.integers(c.q2[0], c.q2[1] + 1))]
    program += [*ending, jpeg] if rng.random() < 0.5 else [jpeg, *ending]
    add("resize", 1.0, "bicubic")
    return program


def program(params: dict) -> list:
    """The operations of a drawn degradation, in order; factors of `resize` are those of the original's sides."""
    if "program" in params:
        return params["program"]
    kernel = {"kind": "gaussian", "size": params.get("kernel_size", 41), "theta": params.get("theta", 0.0)}
    return [
        ["blur", kernel | {k: params[k] for k in ("sigma_x", "sigma_y")}],
        ["resize", 1 / params["r"], params["down"]],
        ["noise", "gaussian", params["delta"], False, params["noise_seed"]],
        ["jpeg", params["q"]],
        ["resize", 1.0, params["up"]],
        *(["colour", *change] for change in params.get("colours", ())),
    ]


def sides(height: int, width: int, factor: float, how: str) -> tuple[int, int]:
    """The sides of a resized picture, at least one pixel each."""
    whole = math.floor if how == "linear" else round
    if factor < 1:  # a division, as by the reduction r, so that the published numbers round alike
        return tuple(max(1, whole(n / (1 / factor))) for n in (height, width))
    return tuple(max(1, whole(n * factor)) for n in (height, width))


def gaussian_kernel(size: int, sigma_x: float, sigma_y: float, theta: float) -> np.ndarray:
    """A normalised (size, size) Gaussian, float32, its axes turned by `theta` radians."""
    kernel = np.exp(-0.5 * _ellipse(size, sigma_x, sigma_y, theta))
    return (kernel / kernel.sum()).astype(np.float32)


def blur_kernel(
    kind: str, size: int, sigma_x: float = 1.0, sigma_y: float | None = None, theta=0.0, beta=1.0, cutoff=math.pi
) -> np.ndarray:
    """A normalised (size, size) kernel, float32: a Gaussian, one with the exponent beta inside ("generalized"), a
    plateau 1 / (1 + d^beta), or the circular low-pass filter of a cutoff in radians a pixel ("sinc")."""
    if kind == "sinc":
        axis = np.arange(size) - (size - 1) / 2
        radius = np.hypot(*np.meshgrid(axis, axis))
        import torch

        bessel = torch.special.bessel_j1(torch.from_numpy(cutoff * radius)).numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            kernel = np.where(radius > 0, cutoff * bessel / (2 * np.pi * radius), cutoff**2 / (4 * np.pi))
    else:
        distance = _ellipse(size, sigma_x, sigma_x if sigma_y is None else sigma_y, theta)
        kernel = 1 / (1 + distance**beta) if kind == "plateau" else np.exp(-0.5 * distance**beta)
    return (kernel / kernel.sum()).astype(np.float32)


def _ellipse(size: int, sigma_x: float, sigma_y: float, theta: float) -> np.ndarray:
    """Squared distance from the middle in units of the two deviations."""
    axis = np.arange(size) - (size - 1) / 2
    x, y = np.meshgrid(axis, axis)
    c, s = np.cos(theta), np.sin(theta)
    u, v = c * x + s * y, -s * x + c * y
    return (u / sigma_x) ** 2 + (v / sigma_y) ** 2


class OnPillow:
    """The operations on (H, W, 3) float32 of range [0, 255], in OpenCV's order of channels: the noise of a published
    validation set was drawn in it."""

    GRAY = np.float32([0.114, 0.587, 0.299])

    def __init__(self, height: int, width: int):
        self.size = height, width

    def blur(self, x, kernel: dict):
        return cv2.filter2D(x.astype(np.float32), -1, blur_kernel(**kernel), borderType=cv2.BORDER_REFLECT_101)

    def resize(self, x, factor: float, how: str):
        """Antialiased when shrinking, but for "linear"; Pillow resizes float planes exactly."""
        height, width = sides(*self.size, factor, how)
        x = x.astype(np.float32)
        if how == "linear":
            return cv2.resize(x, (width, height), interpolation=cv2.INTER_LINEAR)
        planes = [np.asarray(Image.fromarray(x[..., c]).resize((width, height), RESIZE[how])) for c in range(3)]
        return np.stack(planes, axis=-1)

    def noise(self, x, kind: str, amount: float, gray: bool, seed: int):
        rng = np.random.default_rng(seed)
        shape = (*x.shape[:2], 1) if gray else x.shape
        if kind == "gaussian":
            return x + amount * rng.standard_normal(shape)
        x = np.clip(np.rint(x), 0, 255)
        mean = (x @ self.GRAY)[..., None].round() if gray else x
        levels = 2.0 ** math.ceil(math.log2(len(np.unique(mean))))
        return x + amount * (255 * rng.poisson(mean / 255 * levels) / levels - mean)

    def colour(self, x, kind: str, amount):
        import torch

        from .degradation_torch import colour

        rgb = torch.from_numpy(np.ascontiguousarray(x[..., ::-1].transpose(2, 0, 1), np.float32))
        return colour(rgb, kind, amount).numpy().transpose(1, 2, 0)[..., ::-1]

    def jpeg(self, x, quality: int):
        x = np.clip(np.rint(x), 0, 255).astype(np.uint8)
        _, encoded = cv2.imencode(".jpg", x, [cv2.IMWRITE_JPEG_QUALITY, quality])
        return cv2.imdecode(encoded, cv2.IMREAD_COLOR).astype(np.float32)


def degrade(image: np.ndarray, params: dict) -> np.ndarray:
    """Apply a drawn degradation to an RGB image (H, W, 3) uint8 → the same shape and type.

    The same image and parameters give the same bytes. Raises ValueError for another shape or type.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"degrade: expected an RGB image (H, W, 3) uint8, got {image.shape} {image.dtype}")
    operations = OnPillow(*image.shape[:2])
    x = image[..., ::-1].astype(np.float32)
    for name, *arguments in program(params):
        x = getattr(operations, name)(x, *arguments)
    x = np.clip(np.rint(x), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(x[..., ::-1])


def turned(image: np.ndarray, angle: float, growth: float, right: float, down: float) -> np.ndarray:
    """An image (H, W, 3) turned counter-clockwise by `angle` (radians) and grown by 1 + `growth` about its centre, then
    moved by shares of its sides; what comes in at the edges is its mirror image."""
    height, width = image.shape[:2]
    centre = ((width - 1) / 2, (height - 1) / 2)
    matrix = cv2.getRotationMatrix2D(centre, math.degrees(angle), 1 + growth)
    matrix[:, 2] += right * width, down * height
    image = np.ascontiguousarray(image)
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REFLECT_101)
