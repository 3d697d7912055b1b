"""Imports go down one staircase: cli → {restore, training, evaluation, backend, convert} → pipeline → engine →
checkpoint → published → {models, flow} → lpmrf_kernels → torch, triton. And nothing anywhere needs torchvision,
basicsr or natten."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Parts of lpmrf_fast by rank; a part imports parts of lower rank only, parts of one rank do not know each other.
STAIRCASE = [
    ["models", "flow", "perceptual", "devices", "images"],
    ["published"],  # how files of others read: names, shapes and configs of the networks
    ["checkpoint"],  # builds the networks that it reads
    ["engine"],
    ["pipeline"],
    ["restore", "training", "evaluation", "backend", "convert"],
    ["demo", "doctor"],  # commands that use several of the parts above
    ["cli"],
    ["__main__"],
]
RANK = {part: rank for rank, parts in enumerate(STAIRCASE) for part in parts}
STRANGERS = {frozenset(("engine", "training"))}  # the trainer uses the networks, not what makes them fast
FORBIDDEN = {"torchvision", "basicsr", "natten"}
EXCEPTIONS = {
    ("lpmrf_fast/doctor.py", "torchvision"): "says whether the one that is installed, if any, fits torch",
    ("kernels/lpmrf_kernels/compile_report.py", "triton"): "drives the compiler itself, in a process of its own",
}
KERNELS_MAY_IMPORT = {"torch", "triton", *sys.stdlib_module_names}


def imports(source: str, package: tuple[str, ...]):
    """(line number, absolute dotted name) of every import; `package` is the file's own package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *filter(None, [node.module])))
            for alias in node.names:
                yield node.lineno, f"{stem}.{alias.name}"


def faults(path: str, source: str) -> list[str]:
    """Each import of this file (path from the root) that goes up, sideways or where it must not, with its line."""
    parts = Path(path).with_suffix("").parts
    if parts[0] == "kernels":
        parts = parts[1:]
    lines = source.splitlines()
    found = []
    for number, name in imports(source, parts[:-1]):
        top, *below = name.split(".")
        reason = None
        if top in FORBIDDEN:
            reason = f"{top} must never be needed"
        elif parts[0] == "lpmrf_kernels" and top not in KERNELS_MAY_IMPORT and top != "lpmrf_kernels":
            reason = f"kernels import torch and triton only, not {top}"
        elif parts[0] == "lpmrf_kernels" and top == "triton" and parts[1] != "_triton":
            reason = "triton is imported by _triton.py only"
        elif parts[0] == top == "lpmrf_fast" and parts[1] != "__init__":
            reason = climbs(parts[1], below[0] if below else "")
        if reason and (path, top) not in EXCEPTIONS:
            found.append(f"{path}:{number}: {lines[number - 1].strip()}    <- {reason}")
    return list(dict.fromkeys(found))


def climbs(importer: str, imported: str) -> str | None:
    if importer == imported:
        return None
    for part in (importer, imported):
        if part not in RANK:
            return f"{part!r} has no place on the staircase; import the module itself, or give it a place in {__name__}"
    if RANK[imported] >= RANK[importer]:
        return f"{importer} stands below or beside {imported}"
    if frozenset((importer, imported)) in STRANGERS:
        return f"{importer} and {imported} do not know each other"
    return None


def sources(*folders):
    return sorted(p.relative_to(ROOT) for folder in folders for p in (ROOT / folder).rglob("*.py"))


def test_every_import_goes_down():
    files = sources("lpmrf_fast", "kernels", "tests")
    assert {"lpmrf_fast/pipeline.py", "kernels/lpmrf_kernels/reference.py"} <= {f.as_posix() for f in files}
    found = [fault for f in files for fault in faults(f.as_posix(), (ROOT / f).read_text())]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "path, line, reason",
    [
        ("lpmrf_fast/models/swinir.py", "from ..pipeline import Pipeline", "models stands below or beside pipeline"),
        ("lpmrf_fast/models/swinir.py", "import lpmrf_fast.flow", "below or beside flow"),
        ("lpmrf_fast/flow.py", "from . import checkpoint", "flow stands below or beside checkpoint"),
        ("lpmrf_fast/published.py", "from .checkpoint import load", "published stands below or beside checkpoint"),
        ("lpmrf_fast/pipeline.py", "    from lpmrf_fast.restore import job", "below or beside restore"),
        ("lpmrf_fast/restore/job.py", "from .. import training", "restore stands below or beside training"),
        ("lpmrf_fast/training/trainer.py", "from ..engine import Engine", "do not know each other"),
        ("lpmrf_fast/restore/job.py", "from lpmrf_fast import LatentPMRFPipeline", "no place on the staircase"),
        ("lpmrf_fast/helpers.py", "from . import flow", "'helpers' has no place"),
        ("lpmrf_fast/doctor.py", "from .cli import main", "doctor stands below or beside cli"),
        ("lpmrf_fast/cli.py", "import torchvision.transforms", "torchvision must never be needed"),
        ("kernels/lpmrf_kernels/euler_step.py", "import numpy as np", "not numpy"),
        ("kernels/lpmrf_kernels/euler_step.py", "from lpmrf_fast import flow", "not lpmrf_fast"),
        ("kernels/lpmrf_kernels/euler_step.py", "import triton.language as tl", "by _triton.py only"),
        ("tests/test_x.py", "from natten import na2d", "natten must never be needed"),
    ],
)
def test_the_offending_line_is_printed(path, line, reason):
    (fault,) = faults(path, f"def f():\n    pass\nif f:\n {line}\n")
    assert fault.startswith(f"{path}:4: {line.strip()}") and reason in fault


@pytest.mark.parametrize(
    "path, line",
    [
        ("lpmrf_fast/__init__.py", "from .pipeline import LatentPMRFPipeline"),
        ("lpmrf_fast/models/swinir.py", "from .config import records_config"),
        ("lpmrf_fast/models/swinir.py", "from lpmrf_kernels import reference"),
        ("lpmrf_fast/restore/job.py", "from .. import checkpoint"),
        ("lpmrf_fast/restore/job.py", "from .files import find"),
        ("lpmrf_fast/training/trainer.py", "from ..models import layers"),
        ("lpmrf_fast/cli.py", "from .restore import job"),
        ("kernels/lpmrf_kernels/_triton.py", "import triton"),
    ],
)
def test_what_goes_down_is_fine(path, line):
    assert faults(path, line) == []


def test_restoring_needs_none_of_the_optional_packages():
    """The public names import where only torch, numpy, safetensors and Pillow are."""
    absent = [*FORBIDDEN, "triton", "huggingface_hub", "cv2", "skimage", "yaml", "ray", "diffusers", "scipy"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent!r}))
from lpmrf_fast.pipeline import LatentPMRFPipeline, PMRFPipeline
from lpmrf_fast import models
import lpmrf_kernels
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)
