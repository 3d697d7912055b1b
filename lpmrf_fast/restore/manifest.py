"""One JSON line per photo in the output folder: what came out of what, how, and what went wrong.

Lines are only appended, whole and at once, so that a killed job leaves a readable file; of several lines with the same
output, the last one counts.
"""

import json
from pathlib import Path

NAME = "manifest.jsonl"


class Manifest:
    """The manifest of an output folder; None: it keeps nothing. Raises OSError where it cannot be written."""

    def __init__(self, folder: Path | None):
        self.settings = {}
        """Output (as written) → settings it was made with, for restored ones."""
        self.file = None
        if folder is None:
            return
        path = folder / NAME
        folder.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                if entry["error"] is None:
                    self.settings[entry["output"]] = entry["settings"]
            except (ValueError, KeyError, TypeError):  # the last line of a killed job, or someone's edit
                continue
        self.file = open(path, "a", encoding="utf-8")
        if text and not text.endswith("\n"):
            self.file.write("\n")

    def write(self, **entry) -> None:
        if self.file is not None:
            self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self.file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.file is not None:
            self.file.close()
