"""Which file each photo becomes. Nothing is read or written here."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .find import Source
from .photo import FORMATS


@dataclass(frozen=True)
class Task:
    """One photo and its outputs."""

    path: Path
    output: Path
    posterior_mean: Path | None = None
    refused: str | None = None
    """Why its output cannot be written, where that is known before it is read."""

    @property
    def outputs(self) -> list[Path]:
        return [path for path in (self.output, self.posterior_mean) if path is not None]


def names_a_file(output: Path) -> bool:
    """Whether an output path means one file, not a folder: it has the suffix of an image and is no folder."""
    return output.suffix.lower() in FORMATS and not output.is_dir()


def beside(output: Path) -> Path:
    """Where the posterior means go: `out` → `out-posterior-mean`, `face.png` → `face-posterior-mean.png`."""
    if output.name in ("", ".."):  # `.` and `..` have no name to extend
        output = Path(os.path.abspath(output))
    if names_a_file(output):
        return output.with_name(f"{output.stem}-posterior-mean{output.suffix}")
    return output.with_name(f"{output.name}-posterior-mean")


def plan(sources: Sequence[Source], output: Path, ext: str = "auto", posterior_mean: Path | None = None) -> list[Task]:
    """The tasks, in order: the tree of the sources below `output`, and again below `posterior_mean` where given.

    ext: "auto" keeps the name, with .png added where it has no suffix that can be written; else the new suffix.
    Two photos never share an output, and no photo is its own.
    """
    if names_a_file(output):
        places = [Path()] * len(sources)
    else:
        places = [_named(source.relative, ext) for source in sources]
    tasks, taken = [], {}
    for source, place in zip(sources, places):
        task = Task(source.path, output / place, posterior_mean and posterior_mean / place)
        key = os.path.normcase(os.path.abspath(task.output))
        refused = None
        if any(_same(source.path, path) for path in task.outputs):
            refused = "its output would overwrite the photo itself; choose another -o"
        elif key in taken:
            refused = f"its output {task.output} is already that of {taken[key]}; restore it with another -o"
        taken.setdefault(key, source.path)
        tasks.append(Task(task.path, task.output, task.posterior_mean, refused))
    return tasks


def _named(relative: Path, ext: str) -> Path:
    if ext != "auto":
        known = relative.suffix.lower() in FORMATS
        return relative.with_suffix(f".{ext}") if known else relative.with_name(f"{relative.name}.{ext}")
    return relative if relative.suffix.lower() in FORMATS else relative.with_name(relative.name + ".png")


def _same(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False
