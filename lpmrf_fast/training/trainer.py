"""One loop for all stages: batches, autocast, AdamW, EMA, checkpoints that resume, progress with an ETA."""

import json
import os
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..checkpoint import save_model
from .config import TrainConfig
from .data import batches
from .stages import STAGES


def learning_rate(step: int, config: TrainConfig) -> float:
    """Factor on the peak: linear warm-up, constant, linear to zero over the last `decay` share of the steps."""
    falling = max(1, round(config.decay * config.steps))
    return min(1.0, (step + 1) / max(1, config.warmup), max(0.0, (config.steps - step) / falling))


class Trainer:
    """Trains one stage in `config.out`; calling `fit` again continues from the last checkpoint.

    The folder then holds `model/` (EMA weights with their config), `last.pt` (all that a resume needs), `log.jsonl`
    and `val-*.png`.
    """

    def __init__(self, stage: str, config: TrainConfig):
        self.config = config
        name = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(name)
        self.out = Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        self.stage = STAGES[stage](config, self.device)
        self.model = self.stage.model
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.ema.requires_grad_(False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        decayed = [p for p in trained if p.dim() > 1]
        others = [p for p in trained if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
            lr=config.lr,
            betas=tuple(config.betas),
            weight_decay=config.weight_decay,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: learning_rate(s, config))
        self.critic_optimizer = None
        if self.stage.critic is not None:
            # Without momentum, as usual for critics: what it judges moves with every step.
            self.critic_optimizer = torch.optim.AdamW(self.stage.critic.parameters(), config.lr, betas=(0.0, 0.99))
        self.step = 0
        self._resume()

    def _resume(self):
        file = self.out / "last.pt"
        if not file.exists():
            return
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic_optimizer:
            self.stage.critic.load_state_dict(state["critic"])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.step = state["step"]
        self.scheduler.last_epoch = self.step
        for group, factor in zip(self.optimizer.param_groups, self.scheduler.lr_lambdas):
            group["lr"] = self.config.lr * factor(self.step)
        print(f"resuming {self.out} at step {self.step}", file=sys.stderr)

    def save(self):
        """Write `last.pt` and `model/`, each whole or not at all."""
        partial = self.out / "last.tmp"
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        if self.critic_optimizer:
            state["critic"] = self.stage.critic.state_dict()
            state["critic_optimizer"] = self.critic_optimizer.state_dict()
        torch.save(state, partial)
        os.replace(partial, self.out / "last.pt")
        save_model(self.out / "model", self.ema.module)

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def log(self, **entry):
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": self.step, **entry}) + "\n")

    def fit(self):
        """Run the remaining steps. Raises FloatingPointError, checkpoint kept, when the loss is not finite."""
        c = self.config
        if self.step >= c.steps:
            print(f"{self.out}: all {c.steps} steps are done", file=sys.stderr)
            return
        data = self.stage.dataset(c.steps * c.batch_size)
        validation = self.stage.validation()
        started, first, sums, counted = time.monotonic(), self.step, {}, 0
        for batch in batches(data, c.batch_size, c.workers, self.step):
            batch = batch.to(self.device) if torch.is_tensor(batch) else [b.to(self.device) for b in batch]
            # Noise and times follow from (seed, step), so that a resumed run draws what an unbroken one would.
            generator = torch.Generator().manual_seed(c.seed * 1_000_003 + self.step)
            with self._autocast():
                loss, terms = self.stage.loss(batch, generator)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"{self.out}: loss is {float(loss)} at step {self.step}; lower lr and start again, the last"
                    " checkpoint is kept"
                )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.grad_clip)
            self.optimizer.step()
            self.scheduler.step()
            if self.critic_optimizer:
                with self._autocast():
                    terms["critic"] = self.stage.critic_loss()
                self.critic_optimizer.zero_grad(set_to_none=True)
                terms["critic"].backward()
                self.critic_optimizer.step()
            self.ema.update_parameters(self.model)
            self.step += 1
            counted += 1
            for key, value in {**terms, "grad_norm": norm}.items():
                sums[key] = sums.get(key, 0.0) + value.detach()
            if self.step % c.log_every == 0 or self.step == c.steps:
                means = {k: float(v) / counted for k, v in sums.items()}
                sums, counted = {}, 0
                self._report(means, started, first)
            if self.step == c.steps:
                with self._autocast():
                    self.stage.finish(self.ema.module)
            if self.step % c.save_every == 0 or self.step == c.steps:
                self.save()
            if validation is not None and (self.step % c.val_every == 0 or self.step == c.steps):
                self.validate(*validation)

    def _report(self, means, started, first):
        rate = (self.step - first) / (time.monotonic() - started)
        left = (self.config.steps - self.step) / rate
        lr = self.optimizer.param_groups[0]["lr"]
        self.log(**means, lr=lr, steps_per_second=rate)
        terms = " ".join(f"{k} {v:.4g}" for k, v in means.items())
        clock = f"{int(left // 3600)}:{int(left // 60) % 60:02d}:{int(left) % 60:02d}"
        print(f"step {self.step}/{self.config.steps}  {terms}  {rate:.2f} steps/s  ETA {clock}", flush=True)

    @torch.no_grad()
    def validate(self, clean, degraded):
        """Score the EMA weights on the validation faces, log it, and write a picture with one row a stage."""
        model = self.ema.module.eval()
        with self._autocast():
            scores, rows = self.stage.judge(model, clean.to(self.device), degraded.to(self.device))
        self.log(**{f"val_{k}": v for k, v in scores.items()})
        print("  val  " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()), flush=True)
        grid = torch.cat([torch.cat(list(row[:6].cpu()), dim=-1) for row in rows], dim=-2)
        pixels = grid.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(self.out / f"val-{self.step:06d}.png")
