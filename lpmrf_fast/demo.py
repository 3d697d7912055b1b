"""`lpmrf-fast demo`: one well-known face, degraded and restored, as a picture to show.

The astronaut Eileen Collins, a public-domain portrait that ships inside scikit-image, as does the face detector:
nothing is downloaded. The face is about 180 pixels wide there, so that even the original is soft at 512x512.
"""

import io
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .pipeline import Pipeline
from .restore.encode import write_whole
from .restore.photo import FORMATS

SIZE = 512
DEGRADATION = {
    "kernel_size": 41,
    "sigma_x": 3.0,
    "sigma_y": 3.0,
    "theta": 0.0,
    "r": 6.0,
    "delta": 10.0,
    "q": 60,
    "down": "bicubic",
    "up": "bicubic",
    "noise_seed": 0,
}
"""Blur, reduction to 85x85, noise, JPEG: the same every time. See `lpmrf_fast.training.degradation`."""

# From the detector's box to the field's framing (FFHQ), in units of the box: side of the crop, and its centre from the
# box's. Measured with eyes and mouth of this portrait: half a side is twice the distance of the eyes.
CROP_SIDE = 1.79
CROP_CENTRE = (0.027, -0.076)
LABELS = ("degraded", "posterior mean", "restored", "original")


def make(output: Path, steps: int, seed: int, model: str | None, dtype: str, device: str) -> str:
    """Write `degraded | posterior mean | restored | original` to `output`; returns what to tell the user.

    Raises ImportError where the extra `demo` is missing, OSError where the picture cannot be written, and what loading
    the model raises.
    """
    original, degraded = faces()
    started = time.perf_counter()
    pipeline = Pipeline.from_pretrained(model, dtype=dtype, device=device)
    loaded = time.perf_counter()
    result = pipeline(degraded, num_inference_steps=steps, seed=seed)
    restored = time.perf_counter()
    panels = [Image.fromarray(degraded), result.posterior_means[0], result.images[0], Image.fromarray(original)]
    save(side_by_side(panels, LABELS), output)
    return (
        f"restored one {SIZE}x{SIZE} face in {restored - loaded:.1f} s on {pipeline.device} with {steps} steps"
        f" (and {loaded - started:.1f} s to load the model)\n{' | '.join(LABELS)}: {output}"
    )


def faces() -> tuple[np.ndarray, np.ndarray]:
    """The portrait's face in the field's framing and its degraded version, both (512, 512, 3) uint8 RGB."""
    try:
        import skimage.data
        from skimage.feature import Cascade

        from .training.degradation import degrade
    except ImportError as error:
        raise ImportError(
            f'the demo needs scikit-image and OpenCV ({error}): pip install "lpmrf-fast[demo]"'
        ) from error
    portrait = skimage.data.astronaut()
    cascade = Cascade(skimage.data.lbp_frontal_face_cascade_filename())
    found = cascade.detect_multi_scale(
        img=portrait, scale_factor=1.1, step_ratio=1, min_size=(60, 60), max_size=(250, 250)
    )
    if not found:
        raise RuntimeError("no face found in scikit-image's astronaut; install another scikit-image")
    original = aligned(portrait, max(found, key=lambda box: box["width"]))
    return original, degrade(original, DEGRADATION)


def aligned(image: np.ndarray, box: dict) -> np.ndarray:
    """The square around a detected face that has the field's framing, at 512x512. `box`: r, c, width, height."""
    side = CROP_SIDE * box["width"]
    x = box["c"] + (0.5 + CROP_CENTRE[0]) * box["width"]
    y = box["r"] + (0.5 + CROP_CENTRE[1]) * box["height"]
    square = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
    return np.array(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=square))


def side_by_side(panels: list[Image.Image], labels, gap: int = 8, strip: int = 44) -> Image.Image:
    """Panels of one size in a row on white, each with its label above."""
    width, height = panels[0].size
    sheet = Image.new("RGB", (len(panels) * (width + gap) - gap, height + strip), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(26)
    for i, (panel, label) in enumerate(zip(panels, labels)):
        left = i * (width + gap)
        sheet.paste(panel, (left, strip))
        draw.text((left + width / 2, strip / 2), label, fill="black", font=font, anchor="mm")
    return sheet


def save(picture: Image.Image, output: Path) -> None:
    file = io.BytesIO()
    picture.save(file, FORMATS[output.suffix.lower()], quality=95)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, file.getbuffer())
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"the picture {output} cannot be written ({reason}); choose another -o") from error
