"""From folders to a table: pairs faces by the stem of their names, runs every metric that can run, names the others.

Faces are read one pair at a time. A metric is a class: what it needs is loaded once, `for_set()` starts a set of
faces, `add` takes a pair (of a face and None where there are no originals), and `result` gives the numbers of the set.
"""

import csv
import json
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from ..devices import default_device
from ..images import SUFFIXES, open_upright, read_rgb
from .metrics import SlicedWasserstein, mmd, psnr, ssim


class Unavailable(Exception):
    """Why a metric cannot run, and what would let it."""


@dataclass(frozen=True)
class Files:
    """Weights that metrics ask for: paths, or `owner/name/file` on the Hugging Face hub."""

    lpips: str | None = None
    inception: str | None = None
    dinov2: str | None = None
    face_detector: str | None = None
    face_embedder: str | None = None

    def get(self, name: str, what: str) -> Path:
        value = getattr(self, name)
        if value is None:
            raise Unavailable(f"give {what}: --{name.replace('_', '-')} FILE")
        if Path(value).is_file():
            return Path(value)
        parts = str(value).split("/")
        if len(parts) > 2 and parts[0] and not Path(parts[0]).exists():
            return _from_hub("/".join(parts[:2]), "/".join(parts[2:]))
        raise Unavailable(f"no file {value}")


def _from_hub(repository: str, file: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise Unavailable(f'no file {repository}/{file}; the hub needs: pip install "lpmrf-fast[hub]"') from None
    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # its error classes differ between versions and network libraries
        raise Unavailable(f"no file {repository}/{file}, here or on the hub ({type(error).__name__})") from None


# ---- metrics


@dataclass(frozen=True)
class Given:
    """What there is to score, for a metric to say whether it can."""

    files: Files
    device: torch.device
    count: int
    """Faces of a set."""
    shape: tuple[int, int] | None
    """Their height and width, if these are the same for all."""
    originals: bool
    real: list[Path]
    """Real faces that are nobody's originals."""
    problems: list[str]
    """Takes a line for each of them that cannot be read."""


class Metric:
    """`better`: by name of each number, "higher" or "lower". `digits`: how many the table shows."""

    better: dict[str, str]
    digits, note = 3, ""
    paired = True
    """Whether it compares each face with its original."""

    def __init__(self, given: Given):
        """Load what is needed. Raises Unavailable, ImportError or ValueError with the reason why it cannot run."""

    def for_set(self):
        raise NotImplementedError


class OfEachFace(Metric):
    """A number for every pair, and its mean; faces without one (nan: no landmarks found) are left out of it."""

    def for_set(self):
        return _EachFace(next(iter(self.better)), self.score)

    def score(self, x: Tensor, y: Tensor) -> float:
        raise NotImplementedError


class _EachFace:
    def __init__(self, name, score):
        self.name, self.score, self.values = name, score, []

    def add(self, x, y):
        self.values.append(float(self.score(x, y)))

    def result(self):
        values = [v for v in self.values if not math.isnan(v)]
        return {self.name: sum(values) / len(values) if values else math.nan}


class PSNR(OfEachFace):
    better, digits = {"PSNR dB": "higher"}, 2
    score = staticmethod(psnr)


class SSIM(OfEachFace):
    better, digits = {"SSIM": "higher"}, 4
    score = staticmethod(ssim)


class LearnedDistance(OfEachFace):
    better, digits = {"LPIPS": "lower"}, 4
    SMALLEST = 32
    """Pixels: of less nothing is left behind the networks' pools."""

    def __init__(self, given):
        from ..perceptual import LPIPS

        path = given.files.get("lpips", "torchvision's AlexNet (the field's choice) or VGG16")
        self.network, self.device = LPIPS(path).to(given.device), given.device
        self.note = f"{self.network.net}, version 0.1"

    @torch.inference_mode()
    def score(self, x, y):
        if min(x.shape[-2:]) < self.SMALLEST:
            return math.nan
        return self.network(x.to(self.device) * 2 - 1, y.to(self.device) * 2 - 1)


class NIQE(OfEachFace):
    better, paired = {"NIQE": "lower"}, False

    def __init__(self, given):
        try:
            import pyiqa
        except ModuleNotFoundError as error:
            raise Unavailable(f"needs pyiqa ({error.name} is not installed)") from None
        except Exception as error:  # a torchvision that does not fit torch breaks it while it is imported
            raise Unavailable(f"needs pyiqa, which does not import ({type(error).__name__})") from None
        try:
            self.network = pyiqa.create_metric("niqe", device=given.device)
        except Exception as error:  # it downloads its parameters
            raise Unavailable(f"pyiqa cannot make it ({type(error).__name__})") from None
        self.note = f"pyiqa {getattr(pyiqa, '__version__', '')}".strip()

    def score(self, x, y):
        return self.network(x)


class _Faces(OfEachFace):
    """Remembers what it saw in the last reference, which comes once with every set."""

    def __init__(self, given):
        from .faces import Detector

        self.detector = Detector(given.files.get("face_detector", "a YuNet ONNX file"))
        self.last = None, None

    def of_reference(self, y: Tensor, see: Callable):
        if self.last[0] is not y:
            self.last = y, see(_pixels(y))
        return self.last[1]


class LandmarkDistance(_Faces):
    better, digits = {"LMD px": "lower"}, 2
    note = "YuNet's five landmarks; papers often use 98 of another network"

    def score(self, x, y):
        from .faces import landmark_distance

        a, b = self.detector(_pixels(x)), self.of_reference(y, self.detector)
        return math.nan if a is None or b is None else landmark_distance(a, b)


class IdentityDistance(_Faces):
    """Angle between embeddings; both faces are cut by the reference's landmarks."""

    better, digits = {"Deg": "lower"}, 2

    def __init__(self, given):
        from .faces import Embedder, expected_landmarks

        self.embed = Embedder(given.files.get("face_embedder", "an ArcFace ONNX file"))
        if given.files.face_detector:
            super().__init__(given)
            self.note = "cut by the detector's landmarks of the reference"
        else:
            self.detector, self.last = expected_landmarks, (None, None)
            self.note = "cut by the landmarks that aligned faces have"

    def score(self, x, y):
        from .faces import angle

        def see(image):
            landmarks = self.detector(image)
            return None if landmarks is None else (landmarks, self.embed(image, landmarks))

        reference = self.of_reference(y, see)
        return math.nan if reference is None else angle(self.embed(_pixels(x), reference[0]), reference[1])


class SWD(Metric):
    better, digits = {"SWD": "lower"}, 1
    note = "mean over the levels of a Laplacian pyramid"

    def __init__(self, given):
        if given.shape is None:
            raise Unavailable("the faces have several sizes")
        if min(given.shape) < 16:
            raise Unavailable(f"the faces are smaller than 16 pixels: {given.shape[1]}x{given.shape[0]}")
        # Above 4096 faces fewer patches of each, so that those of a set stay below 4 GB.
        self.arguments = given.count, given.shape, max(1, min(128, 2**19 // given.count))

    def for_set(self):
        return _Sliced(*self.arguments)


class _Sliced(SlicedWasserstein):
    def result(self):
        levels = super().result()
        return {"SWD": sum(levels.values()) / len(levels)} | {f"SWD {size}": v for size, v in levels.items()}


class _OfFeatures(Metric):
    """Distances between the features of a set and those of real faces: of the originals, or of others if given."""

    paired = False

    def load(self, network: torch.nn.Module, given: Given):
        if given.count < 2:
            raise Unavailable("needs at least 2 faces")
        self.network, self.device, self.last = network.to(given.device).eval(), given.device, (None, None)
        self.real, self.note = None, f"against the {given.count} originals"
        if given.real:
            self.real = torch.cat(list(self._read(given)))
            self.note = f"against {len(self.real)} real faces"

    def _read(self, given):
        for path in tqdm(given.real, desc="real faces", unit="face", disable=None):
            try:
                yield self.features(_tensor(path))
            except ValueError as error:
                if f"{error}" not in given.problems:
                    given.problems.append(f"{error}")

    def features(self, x):
        with torch.inference_mode():
            return self.network(x.to(self.device)).cpu().double()

    def for_set(self):
        return _Features(self)

    def of_reference(self, y):
        if self.last[0] is not y:
            self.last = y, self.features(y)
        return self.last[1]


class _Features:
    def __init__(self, metric):
        self.metric, self.own, self.originals = metric, [], []

    def add(self, x, y):
        self.own.append(self.metric.features(x))
        if self.metric.real is None:
            self.originals.append(self.metric.of_reference(y))

    def result(self):
        real = torch.cat(self.originals) if self.metric.real is None else self.metric.real
        return self.metric.distances(torch.cat(self.own), real)


class InceptionDistances(_OfFeatures):
    """FID and KID by torchmetrics, on features that are computed once for both."""

    better, digits = {"FID": "lower", "KID x1000": "lower"}, 2

    def __init__(self, given):
        from .networks import Inception

        path = given.files.get("inception", "the FID's Inception (pt_inception-2015-12-05-*.pth)")
        try:
            import torchmetrics  # noqa: F401
        except ImportError:
            raise Unavailable('pip install "lpmrf-fast[eval]"') from None
        self.load(Inception(path), given)
        self.note += ", resized bilinearly to 299x299"

    @staticmethod
    def distances(a: Tensor, b: Tensor) -> dict[str, float]:
        """Of features (N, D) and (M, D). KID: cubic kernel over up to 1000 faces, 100 draws where there are more."""
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        given = torch.nn.Identity()
        given.num_features = a.shape[1]
        size = min(1000, len(a), len(b))
        fid = FrechetInceptionDistance(feature=given)
        kid = KernelInceptionDistance(feature=given, subset_size=size, subsets=100 if max(len(a), len(b)) > size else 1)
        for metric in (fid, kid):
            metric.set_dtype(torch.float64)
            metric.update(b, real=True)
            metric.update(a, real=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return {"FID": float(fid.compute()), "KID x1000": 1000 * float(kid.compute()[0])}


class DINOv2Distance(_OfFeatures):
    better = {"MMD": "lower"}

    def __init__(self, given):
        from .networks import DINOv2

        self.load(DINOv2(given.files.get("dinov2", "an official DINOv2 state dict")), given)
        self.note += "; DINOv2 class tokens at 224x224, Gaussian kernel of width 10, x1000"

    @staticmethod
    def distances(a, b):
        return {"MMD": mmd(a, b)}


METRICS = (
    *(PSNR, SSIM, LearnedDistance, SWD, InceptionDistances, DINOv2Distance),
    *(NIQE, IdentityDistance, LandmarkDistance),
)


# ---- the report


@dataclass
class Report:
    """Scores of each set ({"restored": {"PSNR dB": 25.1, ...}, "degraded": ...}) and all that they depend on."""

    scores: dict[str, dict[str, float]]
    faces: dict[str, dict[str, dict[str, float]]]
    """set → stem → metric → value"""
    better: dict[str, str] = field(default_factory=dict)
    digits: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """metric → why it did not run"""
    problems: list[str] = field(default_factory=list)
    """one line for every file that has no partner, another size or cannot be read"""
    settings: dict = field(default_factory=dict)

    def __str__(self) -> str:
        head = [f"{name} {'↑' if way == 'higher' else '↓'}" for name, way in self.better.items()]
        rows = [[_cell(values[n], self.digits[n]) for n in self.better] for values in self.scores.values()]
        widths = [max(map(len, column)) for column in zip(head, *rows)]
        first = max(map(len, self.scores))
        lines = ["  ".join([" " * first, *(h.rjust(w) for h, w in zip(head, widths))])]
        for name, row in zip(self.scores, rows):
            lines.append("  ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(row, widths))]))
        lines.append(f"{self.settings['count']} faces")
        lines += [f"{name}: {note}" for name, note in self.notes.items()]
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)

    def json(self) -> str:
        report = {
            "scores": self.scores,
            "better": self.better,
            "notes": self.notes,
            "skipped": self.skipped,
            "problems": self.problems,
            "settings": self.settings,
            "faces": self.faces,
        }
        return json.dumps(_finite(report), indent=1, ensure_ascii=False) + "\n"

    def write_csv(self, path) -> None:
        """One row a face and set."""
        names = sorted({n for faces in self.faces.values() for values in faces.values() for n in values})
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["set", "face", *names])
            for which, faces in self.faces.items():
                table.writerows([which, stem, *(values.get(n, "") for n in names)] for stem, values in faces.items())


def _cell(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _finite(value):
    """JSON has no infinity: the PSNR of equal images is "inf"."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else str(value)
    return value


def evaluate(
    restored,
    reference=None,
    degraded=None,
    files: Files | None = None,
    device="auto",
    limit=None,
    sheet=None,
    real=None,
) -> Report:
    """Score a folder of restored faces, and of degraded ones where given, against the originals or against real faces.

    reference: folder of the originals. Files pair up by stem; those without a partner, of another size or unreadable
    are left out and named in `problems`. real: folder of real faces, searched recursively, for the distances between
    sets (FID, KID, MMD), which have no partners: such as FFHQ for photos whose originals nobody has. limit: only the
    first faces, by name. sheet: where to put a picture of up to 8 faces, from the worst PSNR to the best, or of the
    first ones. Raises ValueError where no face is left, or neither originals nor real faces are given.
    """
    if reference is None and real is None:
        raise ValueError("nothing to compare with; give the originals (reference), real faces (real) or both")
    device = default_device(device)
    folders = {"degraded": degraded, "restored": restored} if degraded else {"restored": restored}
    faces, shapes, problems = _paired(folders, reference, limit)
    if not faces:
        why = f": {problems[0]}" if problems else ""
        if reference is None:
            raise ValueError(f"no face in {restored}{why}")
        raise ValueError(f"no face of {restored} has a partner in {reference}; files pair up by stem{why}")
    others = [] if real is None else sorted(p for p in Path(real).rglob("*") if p.suffix.lower() in SUFFIXES)
    if real is not None and len(others) < 2:
        raise ValueError(f"{real}: expected at least 2 real faces, found {len(others)}")
    shape = shapes[0] if len(set(shapes)) == 1 else None
    given = Given(files or Files(), device, len(faces), shape, reference is not None, others, problems)
    report = Report({}, {name: {} for name in folders})
    running = []
    for metric in METRICS:
        try:
            if metric.paired and not given.originals:
                raise Unavailable("needs the originals: --reference DIR")
            made = metric(given)
        except (Unavailable, ValueError, ImportError) as reason:
            report.skipped |= dict.fromkeys(metric.better, " ".join(str(reason).split()))
            continue
        running.append((made, {name: made.for_set() for name in folders}))
        report.better |= metric.better
        report.digits |= dict.fromkeys(metric.better, metric.digits)
        if made.note:
            report.notes[", ".join(metric.better)] = made.note

    for stem, paths in tqdm(faces.items(), desc="evaluate", unit="face", disable=None):
        try:
            y, *images = (path and _tensor(path) for path in paths)
        except ValueError as error:
            problems.append(f"{error}; the face {stem} is left out")
            continue
        for name, x in zip(folders, images):
            values = report.faces[name][stem] = {}
            for _, sets in running:
                sets[name].add(x, y)
                if isinstance(sets[name], _EachFace):
                    values[sets[name].name] = sets[name].values[-1]
    if not report.faces["restored"]:
        raise ValueError(f"no face of {restored} could be read: {problems[-1]}")
    for name in folders:
        report.scores[name] = {k: v for _, sets in running for k, v in sets[name].result().items()}
    report.problems = problems
    report.settings = {
        "restored": str(restored),
        "reference": str(reference) if reference else None,
        "degraded": str(degraded) if degraded else None,
        "real": str(real) if real else None,
        "count": len(report.faces["restored"]),
        "weights": {k: str(v) for k, v in vars(files or Files()).items() if v},
        "versions": _versions(),
        "device": str(device),
    }
    if sheet:
        _sheet(report, faces, folders).save(sheet)
    return report


def _paired(folders: dict, reference, limit) -> tuple[dict[str, list[Path]], list, list[str]]:
    """stem → [original or None, one path a set], their (height, width), and a line for each file that is left out."""
    problems, listed = [], {}
    for name, folder in (({"reference": reference} if reference else {}) | folders).items():
        listed[name] = {}
        for path in sorted(Path(folder).iterdir()):
            if path.suffix.lower() in SUFFIXES:
                if path.stem in listed[name]:
                    problems.append(f"{path}: {listed[name][path.stem].name} has the same stem")
                else:
                    listed[name][path.stem] = path
    faces, shapes = {}, []
    for stem in sorted(set().union(*listed.values())):
        paths = [listed[name].get(stem) for name in listed]
        if None in paths:
            there = next(p for p in paths if p)
            missing = ", ".join(name for name, p in zip(listed, paths) if p is None)
            problems.append(f"{there}: no partner of this stem among {missing}")
            continue
        try:
            sizes = [_size(path) for path in paths]
        except ValueError as error:
            problems.append(f"{error}; the face {stem} is left out")
            continue
        if len(set(sizes)) > 1:
            said = ", ".join(f"{name} {w}x{h}" for name, (w, h) in zip(listed, sizes))
            problems.append(f"{stem}: sizes differ ({said})")
        elif reference and min(sizes[0]) < 11:
            problems.append(f"{stem}: smaller than 11 pixels, the window of SSIM")
        elif limit is None or len(faces) < limit:
            faces[stem] = paths if reference else [None, *paths]
            shapes.append(sizes[0][::-1])
    return faces, shapes, problems


def _size(path: Path) -> tuple[int, int]:
    """Width and height. Raises ValueError with the file's name for what is no picture."""
    try:
        with open_upright(path) as image:
            return image.size
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _tensor(path: Path) -> Tensor:
    """(1, 3, H, W) float32 in [0, 1]. Raises ValueError with the file's name."""
    try:
        pixels = np.array(read_rgb(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float().div(255)


def _pixels(x: Tensor) -> np.ndarray:
    """(1, 3, H, W) in [0, 1] → (H, W, 3) uint8."""
    return x[0].mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()


def _sheet(report: Report, faces: dict, folders: dict, most: int = 8, side: int = 256) -> Image.Image:
    """One row a face: its sets and the original; evenly spaced from the worst PSNR to the best, so not picked.

    Without originals evenly spaced by name.
    """
    own = report.faces["restored"]
    ranked = sorted(own, key=lambda stem: own[stem].get("PSNR dB", 0.0))
    chosen = [ranked[round(i)] for i in np.linspace(0, len(ranked) - 1, min(most, len(ranked)))]
    columns, line = [*folders, *(["reference"] if report.settings["reference"] else [])], 18
    picture = Image.new("RGB", (side * len(columns), (side + line) * len(chosen)), "white")
    draw = ImageDraw.Draw(picture)
    for row, stem in enumerate(chosen):
        top = row * (side + line)
        for column, (name, path) in enumerate(zip(columns, [*faces[stem][1:], faces[stem][0]])):
            psnr = report.faces.get(name, {}).get(stem, {}).get("PSNR dB")
            score = f"  {stem}" if psnr is None else f"  {psnr:.2f} dB"
            draw.text((column * side + 4, top + 3), name + score, fill="black")
            shown = read_rgb(path).resize((side, side), Image.Resampling.LANCZOS)
            picture.paste(shown, (column * side, top + line))
    return picture


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("lpmrf-fast", "torchmetrics", "opencv-python-headless", "onnxruntime", "pyiqa"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
