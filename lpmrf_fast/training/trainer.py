"""One loop for all stages: batches, autocast, AdamW or Muon, EMA, checkpoints that resume, progress with an ETA.

One process or many (`accelerate launch` or `torchrun`): sample n of the run, its degradation, noise and time are the
same however many processes share a step. Everything random follows from (seed, step), so that a run that was stopped
anywhere ends with the weights of one that was not.
"""

import contextlib
import math
import os
import resource
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

try:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs
except ImportError as error:
    raise ImportError('training needs accelerate: pip install "lpmrf-fast[train]"') from error

from ..checkpoint import CheckpointError, save_model
from ..devices import default_device
from .checkpoints import Checkpoints
from .config import ConfigError, TrainConfig
from .data import batches
from .log import Log
from .optimizers import build_optimizers
from .recompute import recompute
from .sharding import gathered, shard, share_out, whole
from .stages import STAGES, Draws


class Stopped(SystemExit):
    """SIGTERM came: all is saved, and the same command goes on. Exit status 143, as shells have it."""


def learning_rate(step: int, config: TrainConfig) -> float:
    """Factor on the peak at a step.

    Linear warm-up from `warmup_from`; then constant, or a cosine from 1 to lr_min over `cycle` steps (timm's with its
    prefix), or trapezoid: constant, and linear to zero over the last `decay` share of the steps.
    """
    c = config
    rising = c.warmup_from + (1 - c.warmup_from) * (step + 1) / max(1, c.warmup)
    if c.schedule == "trapezoid":
        return min(1.0, rising, max(0.0, (c.steps - step) / max(1, round(c.decay * c.steps))))
    if rising < 1 or c.schedule == "constant":
        return min(1.0, rising)
    low, past = c.lr_min / c.lr, min(1.0, max(0, step - c.warmup) / (c.cycle or max(1, c.steps - c.warmup)))
    return low + (1 - low) * (1 + math.cos(math.pi * past)) / 2


def start_accelerator(device: str) -> tuple[Accelerator, torch.device]:
    """The processes of this run, and this one's device ("auto", "cpu", "cuda:1", ...).

    Raises DeviceError for a device that is not here.
    """
    found = default_device(device)
    if "WORLD_SIZE" not in os.environ:
        # Its state is one a process, and another run of this process may ask for another device.
        AcceleratorState._reset_state(reset_partial_state=True)
    # Autocast is ours, in the one place that every stage shares.
    # One process may compute the latent cache for hours while the others wait for it.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[patient])
    if accelerator.num_processes > 1 or device == "auto":
        return accelerator, accelerator.device
    return accelerator, found


class Objective(nn.Module):
    """A network and what is minimised with it: the module whose `forward` the processes synchronise."""

    def __init__(self, network: nn.Module, loss):
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, *args):
        return self.loss(*args)


class Trainer:
    """Trains one stage in `config.out`; calling `fit` again continues from the last checkpoint.

    The folder then holds `model/` (EMA weights with their config), the last checkpoints (all that a resume needs),
    `log.jsonl`, `tensorboard/` and `val-*.png`.
    """

    def __init__(self, stage: str, config: TrainConfig):
        self.config = config
        self.accelerator, self.device = start_accelerator(config.device)
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        if config.batch_size % (self.processes * config.accumulate):
            raise ConfigError(
                f"batch_size {config.batch_size} must be a multiple of {self.processes} processes x"
                f" {config.accumulate} accumulated parts"
            )
        self.out = Path(config.out)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out: {self.out} cannot be a folder ({error.strerror})") from None
        self.checkpoints = Checkpoints(self.out, config.keep)
        torch.manual_seed(config.seed)
        self.stage = STAGES[stage](config, self.device)
        self.model = self.stage.model
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.ema.requires_grad_(False)
        state = self._read()
        if config.activation_checkpointing:
            recompute(self.model)
        self.sharded = config.fsdp and self.processes > 1
        if self.sharded:
            for network in (self.model, self.ema.module):
                shard(network, self.device, self.processes)
        self.optimizers = build_optimizers(self.model, config)
        self.schedulers = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate(s, config))
            for optimizer in self.optimizers.values()
        ]
        self.critic_optimizer = None
        if self.stage.critic is not None:
            # Without momentum, as usual for critics: what it judges moves with every step.
            self.critic_optimizer = torch.optim.AdamW(self.stage.critic.parameters(), config.lr, betas=(0.0, 0.99))
        self.step, self.stopping = 0, False
        self.taken = torch.zeros(()), None  # gradient norm and batch of the last step
        if state is not None:
            self._resume(state)
        if config.compile:
            self.stage.compile()
        prepare = self.accelerator.prepare_model if self.processes > 1 and not self.sharded else lambda module: module
        self.objective = prepare(Objective(self.model, lambda *args: self.stage.loss(*args)))
        if self.critic_optimizer:
            self.critic_objective = prepare(Objective(self.stage.critic, lambda: self.stage.critic_loss()))
        self.log = Log(self.out, config, self.step) if self.rank == 0 else None

    # ---- checkpoints

    def _read(self) -> dict | None:
        """The last good checkpoint, its networks loaded: the rest waits for the optimisers."""
        state = self.checkpoints.load()
        if state is not None:
            with self._of_other_settings():
                _fits(state["model"], self.model)
                self.model.load_state_dict(state["model"])
                self.ema.load_state_dict(state["ema"])
                if self.stage.critic is not None:
                    self.stage.critic.load_state_dict(state["critic"])
        return state

    def _resume(self, state: dict):
        with self._of_other_settings():
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(share_out(state[name], optimizer))
            if self.critic_optimizer:
                self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.step = state["step"]
        for scheduler in self.schedulers:
            scheduler.last_epoch = self.step
            for group in scheduler.optimizer.param_groups:
                group["lr"] = self.config.lr * learning_rate(self.step, self.config)
        if self.rank == 0:
            print(f"resuming {self.out} at step {self.step}", file=sys.stderr)

    @contextlib.contextmanager
    def _of_other_settings(self):
        try:
            yield
        except (ValueError, KeyError, IndexError, RuntimeError) as error:
            raise ConfigError(
                f"{self.out}: its checkpoint is of other settings ({' '.join(str(error).split())[:200]}); give another"
                " `out`, or the settings that it was started with"
            ) from None

    def save(self):
        """Write `model/` and the checkpoint, each whole or not at all.

        In this order: a kill in between repeats some steps, and never leaves an old `model/` beside a finished run.
        Raises FloatingPointError where the last step's gradient was not finite: a finite loss does not tell, the next
        one would, and to look at every gradient would make the host wait for the GPU.
        """
        norm, batch = self.taken
        if self._any(not torch.isfinite(norm)):
            self._diverged("gradient norm", norm, batch)
        state = {
            "model": gathered(self.model.state_dict()),
            "ema": gathered(self.ema.state_dict()),
            "step": self.step,
            **{name: gathered(optimizer.state_dict()) for name, optimizer in self.optimizers.items()},
        }
        if self.critic_optimizer:
            state["critic"] = self.stage.critic.state_dict()
            state["critic_optimizer"] = self.critic_optimizer.state_dict()
        model = whole(self.ema.module)
        if self.rank == 0:
            try:
                save_model(self.out / "model", model)
            except CheckpointError as error:
                last = next((p.name for p in reversed(self.checkpoints.paths())), "none")
                raise OSError(f"{error}; make room and start again, the last good checkpoint is {last}") from error
            self.checkpoints.save(state, self.step)
        self.saved = self.step

    # ---- the loop

    def close(self):
        """Take leave of the other processes, where there are some: one that just exits may abort in its own threads."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def fit(self):
        """Run the remaining steps.

        Raises FloatingPointError where the loss is not finite, the batch saved and checkpoints kept; Stopped after
        SIGTERM, with everything saved; RuntimeError where a data worker died.
        """
        c = self.config
        if self.step >= c.steps:
            print(f"{self.out}: all {c.steps} steps are done", file=sys.stderr)
            return
        with self.accelerator.main_process_first():  # it computes the latent cache, the others read it
            data = self.stage.dataset(c.steps * c.batch_size)
        # Sharded, a network runs in all processes or in none.
        validation = self.stage.validation() if self.rank == 0 or self.sharded else None
        self.saved = self.step
        clock = _Clock(self.step)
        loader = iter(
            batches(
                data,
                c.batch_size,
                c.workers,
                self.step,
                share=(self.rank, self.processes, c.accumulate),
                pin_memory=self.device.type == "cuda",
            )
        )
        with self._signals():
            while self.step < c.steps:
                terms = self._step(loader, clock)
                clock.add(terms)
                done = self.step == c.steps
                if self.step % c.log_every == 0 or done:
                    self._report(clock)
                if done:
                    with self._autocast():
                        self.stage.finish(self.ema.module)
                if self.step % c.save_every == 0 or done:
                    self.save()
                if validation is not None and (self.step % c.val_every == 0 or done):
                    self.validate(*validation)
                if self._any(self.stopping) and not done:
                    self._stop()
            del loader
        if self.log:
            self.log.close()
        self.accelerator.wait_for_everyone()

    def _step(self, loader, clock) -> dict:
        """One step of the optimisers; returns the terms of the loss."""
        c, sums = self.config, {}
        optimizers = [*self.optimizers.values(), *([self.critic_optimizer] if self.critic_optimizer else [])]
        for network in (self.model, *([self.stage.critic] if self.critic_optimizer else [])):
            network.zero_grad(set_to_none=True)
        for part in range(c.accumulate):
            batch = self._fetch(loader, clock)
            # Noise and times follow from (seed, step), so that a resumed run draws what an unbroken one would.
            share = part * self.processes + self.rank
            torch.manual_seed(c.seed * 1_000_003 + self.step * 1_009 + share)  # dropout's
            size = c.batch_size // (self.processes * c.accumulate)
            drawn = range(share * size, (share + 1) * size)
            draws = Draws((c.seed, self.step), drawn, c.batch_size, self.device)
            with self._synchronised(self.objective, part):
                with self._autocast():
                    batch = self.stage.prepare(batch)
                    loss, terms = self.objective(batch, draws)
                if self._any(not torch.isfinite(loss)):
                    self._diverged("loss", loss, batch)
                (loss / c.accumulate).backward()
            if self.critic_optimizer:
                with self._synchronised(self.critic_objective, part):
                    with self._autocast():
                        terms["critic"] = self.critic_objective()
                    (terms["critic"] / c.accumulate).backward()
            for key, value in terms.items():
                sums[key] = sums.get(key, 0.0) + value.detach() / c.accumulate
        sums["grad_norm"] = gathered(nn.utils.clip_grad_norm_(self.model.parameters(), c.grad_clip))
        for optimizer in optimizers:
            optimizer.step()
        for scheduler in self.schedulers:
            scheduler.step()
        self.ema.update_parameters(self.model)
        self.step += 1
        self.taken = sums["grad_norm"], batch
        return sums

    def _fetch(self, loader, clock):
        """The next batch on the device; a data worker that failed or died is one clear error."""
        started = time.monotonic()
        try:
            batch = next(loader)
        except Exception as error:
            if self.stopping:  # the signal went to the workers as well
                self._stop()
            said = str(error).strip().splitlines() or [type(error).__name__]
            if "in DataLoader worker process" in str(error):
                raise RuntimeError(f"{self.out}: a data worker failed: {said[-1]}") from error
            # What a worker raises comes with its name; of one that died while it sent, a broken connection is left.
            if "DataLoader worker" in str(error) or (self.config.workers and isinstance(error, (EOFError, OSError))):
                raise RuntimeError(
                    f"{self.out}: a data worker died ({said[0]}); where memory ran out, fewer `workers` help; the same"
                    f" command goes on from step {self.saved}"
                ) from error
            raise
        clock.waited += time.monotonic() - started
        return _to(batch, self.device)

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _synchronised(self, objective, part: int):
        """Gradients are exchanged once a step, with its last part."""
        if part == self.config.accumulate - 1:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(objective)

    def _any(self, flag) -> bool:
        """Whether it is so in any process."""
        if self.processes == 1:
            return bool(flag)
        flags = torch.tensor(float(flag), device=self.device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        return bool(flags)

    def _diverged(self, what: str, value, batch):
        file = self.out / ("nan-batch.pt" if self.processes == 1 else f"nan-batch-{self.rank}.pt")
        torch.save({"batch": _to(batch, "cpu"), "step": self.step, what: float(value)}, file)
        raise FloatingPointError(
            f"{self.out}: {what} is {float(value)} at step {self.step}; its batch is in {file.name}, the checkpoint of"
            f" step {self.saved} is kept; lower lr and start again"
        )

    # ---- stopping

    @contextlib.contextmanager
    def _signals(self):
        """Nothing interrupts a step or a save: SIGTERM only raises a flag meanwhile, and a data worker's death, for
        which the loader's own handler would raise anywhere, is seen where the next batch is fetched."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def flag(*_):
            self.stopping = True

        handlers = {signal.SIGTERM: flag, signal.SIGCHLD: signal.SIG_DFL}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self):
        if self.saved != self.step:
            self.save()
        if self.log:
            self.log.close()
            print(f"{self.out}: stopped at step {self.step}, all saved; the same command goes on", file=sys.stderr)
        raise Stopped(143)

    # ---- reporting

    def _report(self, clock):
        terms, speed = clock.read(self.step, self.config.batch_size)
        if self.processes > 1:  # each knows the terms of its own part
            means = torch.tensor(list(terms.values()), device=self.device)
            torch.distributed.all_reduce(means)
            terms = dict(zip(terms, (means / self.processes).tolist()))
        if self.rank:
            return
        left = (self.config.steps - self.step) / speed["steps_per_second"]
        self.log.write(self.step, **terms, lr=self.schedulers[0].get_last_lr()[0], **speed, memory_gb=self._memory())
        said = " ".join(f"{k} {v:.4g}" for k, v in terms.items())
        eta = f"{int(left // 3600)}:{int(left // 60) % 60:02d}:{int(left) % 60:02d}"
        pace = f"{speed['steps_per_second']:.2f} steps/s  waiting {speed['loader_wait']:.0%}"
        print(f"step {self.step}/{self.config.steps}  {said}  {pace}  ETA {eta}", flush=True)

    def _memory(self) -> float:
        """Peak in GB: of the GPU, or of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9

    @torch.no_grad()
    def validate(self, clean, degraded):
        """Score the EMA weights on the validation faces, log it, and write a picture with one row a stage."""
        model = self.ema.module.eval()
        with self._autocast():
            scores, rows = self.stage.judge(model, clean.to(self.device), degraded.to(self.device))
        if self.rank:
            return
        self.log.write(self.step, **{f"val_{k}": v for k, v in scores.items()})
        print("  val  " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()), flush=True)
        grid = torch.cat([torch.cat(list(row[:6].cpu()), dim=-1) for row in rows], dim=-2)
        self.log.picture(self.step, grid.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy())


class _Clock:
    """Means of the terms and the pace since the last report."""

    def __init__(self, step: int):
        self.began, self.first = time.monotonic(), step
        self.clear(step)

    def clear(self, step: int):
        self.started, self.at, self.sums, self.waited = time.monotonic(), step, {}, 0.0

    def add(self, terms: dict):
        for key, value in terms.items():
            self.sums[key] = self.sums.get(key, 0.0) + value

    def read(self, step: int, batch_size: int) -> tuple[dict, dict]:
        terms = {key: float(value) / (step - self.at) for key, value in self.sums.items()}
        now = time.monotonic()
        speed = {
            "steps_per_second": (step - self.first) / (now - self.began),
            "images_per_second": (step - self.at) * batch_size / (now - self.started),
            "loader_wait": self.waited / (now - self.started),
        }
        self.clear(step)
        return terms, speed


def _to(batch, device):
    """Tensors in (lists of) batches; what is no tensor stays as it is."""
    if torch.is_tensor(batch):
        return batch.to(device, non_blocking=True)
    return [_to(part, device) for part in batch] if isinstance(batch, (list, tuple)) else batch


def _fits(state: dict, model: nn.Module) -> None:
    """Raises ValueError naming the first few tensors that differ: torch's own message has a line for each."""
    there, here = ({k: tuple(v.shape) for k, v in s.items()} for s in (state, model.state_dict()))
    other = [
        f"{k} {there.get(k, 'absent')} there, {here.get(k, 'absent')} here"
        for k in sorted({*there, *here})
        if there.get(k) != here.get(k)
    ]
    if other:
        raise ValueError("; ".join(other[:2]) + (f"; and {len(other) - 2} more" if len(other) > 2 else ""))
