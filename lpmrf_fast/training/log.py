"""Numbers and pictures of a run: log.jsonl always, TensorBoard or Weights & Biases where wanted."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
from PIL import Image

TRACKERS = ("auto", "none", "tensorboard", "wandb")


class Log:
    """Lines of steps that a resume will take again are removed, so that every step stands in the log once.

    tracker: "auto" is TensorBoard where it is installed. Raises ImportError for one that is asked for and absent.
    """

    def __init__(self, out: Path, config, step: int):
        self.out, self.file = out, out / "log.jsonl"
        if self.file.exists():
            lines = [line for line in self.file.read_text().splitlines() if _step_of(line) <= step]
            self.file.write_text("".join(f"{line}\n" for line in lines))
        tracker = config.tracker
        if tracker == "auto":
            tracker = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
        self.board = self.wandb = None
        if tracker == "tensorboard":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("tracker: tensorboard needs: pip install tensorboard") from error
            self.board = SummaryWriter(out / "tensorboard", purge_step=step + 1)
        elif tracker == "wandb":
            try:
                import wandb
            except ImportError as error:
                raise ImportError("tracker: wandb needs: pip install wandb") from error
            settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "ranges"}
            self.wandb = wandb.init(project="lpmrf-fast", name=out.name, id=out.name, resume="allow", config=settings)

    def write(self, step: int, **numbers: float) -> None:
        with open(self.file, "a") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name.replace("val_", "val/") if "val_" in name else f"train/{name}", value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def picture(self, step: int, pixels: np.ndarray) -> None:
        """(H, W, 3) uint8 → val-STEP.png and the tracker."""
        Image.fromarray(pixels).save(self.out / f"val-{step:06d}.png")
        if self.board:
            self.board.add_image("val", pixels, step, dataformats="HWC")
        if self.wandb:
            import wandb

            self.wandb.log({"val": wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def _step_of(line: str) -> int:
    """A line that a kill cut short counts as later than any."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return 1 << 62
