"""What a resume needs, on disk: written whole or not at all, checked when read, the last few kept."""

import hashlib
import os
import pickle
import sys
from pathlib import Path

import torch


class Checkpoints:
    """`checkpoint-STEP.pt` in a folder, each with its SHA-256 beside it (in the format of sha256sum)."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """Oldest first. Runs of the first version had one file, last.pt."""
        found = sorted(self.folder.glob("checkpoint-*.pt"))
        return found or sorted(self.folder.glob("last.pt"))

    def save(self, state: dict, step: int) -> Path:
        """Raises OSError where the disk is full or cannot be written; earlier checkpoints stay as they are."""
        path = self.folder / f"checkpoint-{step:08d}.pt"
        part = path.with_suffix(".part")
        try:
            with open(part, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            _digest_file(path).write_text(f"{_digest(part)}  {path.name}\n")
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # torch's writer turns the system's errors into its own
            part.unlink(missing_ok=True)
            last = next((p.name for p in reversed(self.paths())), "none")
            raise OSError(
                f"{path}: cannot be written ({' '.join(str(error).split())[:120]}); make room and start again, the last"
                f" good checkpoint is {last}"
            ) from error
        for stale in self.folder.glob("checkpoint-*.part"):  # of a run that was killed while it saved
            stale.unlink()
        for old in self.paths()[: -self.keep]:
            old.unlink()
            _digest_file(old).unlink(missing_ok=True)
        return path

    def load(self) -> dict | None:
        """The newest one that is whole; damaged ones are set aside with a warning. None where there is none at all.

        Raises ValueError where there are some and none is whole: nobody wants to start from nothing by accident.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                if _digest_file(path).exists() and _digest_file(path).read_text().split()[0] != _digest(path):
                    raise ValueError("its content has changed since it was written")
                return torch.load(path, map_location="cpu", weights_only=True)
            except (OSError, RuntimeError, ValueError, IndexError, EOFError, KeyError, pickle.UnpicklingError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
                print(f"warning: {path} is damaged ({reason}); going back to the one before", file=sys.stderr)
                os.replace(path, path.with_suffix(".damaged"))
        if paths:
            raise ValueError(
                f"{self.folder}: none of {len(paths)} checkpoints is whole; move the folder to start again"
            )
        return None


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".pt.sha256")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
