"""What lets a run be interrupted and go on: its progress, signals, and a folder in which no two runs are
mixed."""

import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from support.checkpoints import load_checkpoint, restore, save_checkpoint
from support.cli import NotFinite, UserError, as_user_error, tagged
from support.devices import World
from support.earlier import changes
from support.header import RUN, read_header
from support.log import Log
from support.provenance import provenance

# Seconds in which a signal that comes twice counts once: torchrun kills its processes after as many.
GRACE = 30.0


@dataclass
class Progress:
    """How far a run has come. A checkpoint keeps it."""

    step: int = 0  # optimiser steps done
    best: float = math.inf  # the least validation loss
    since: int = 0  # validations since then
    seconds: float = 0.0  # of training, before this process

    def __post_init__(self):
        self.began = time.perf_counter()

    @classmethod
    def of(cls, saved: dict) -> "Progress":
        """From the meta of a checkpoint."""
        return cls(saved["step"], saved["best"], saved.get("since", 0), saved["seconds"])

    def validated(self, loss: float) -> bool:
        """Count a validation. Returns whether it is the best so far."""
        better = loss < self.best
        self.best, self.since = (loss, 0) if better else (self.best, self.since + 1)
        return better

    def enough(self, config: Any) -> bool:
        """Whether the validation loss is at most stop_loss, or has not improved for `patience` validations."""
        return self.best <= config.stop_loss > 0 or 0 < config.patience <= self.since

    def save(self, path: Path, model: nn.Module, optimizer: Optimizer, meta: dict) -> None:
        """Write a checkpoint that a run can go on from. Raises NotFinite if a weight is not finite."""
        if not all(p.isfinite().all() for group in optimizer.param_groups for p in group["params"]):
            raise NotFinite(f"step {self.step}: {broken_group(optimizer)}; nothing was saved; lower --lr")
        seconds = self.seconds + time.perf_counter() - self.began
        progress = dict(step=self.step, best=self.best, since=self.since, seconds=seconds)
        save_checkpoint(path, model, optimizer, **progress, **meta)


def broken_group(optimizer: Optimizer) -> str:
    """Which parameter groups hold numbers that are not finite: the place to look when a loss is NaN."""
    found = []
    for group in optimizer.param_groups:
        for what, tensors in (("weights", group["params"]), ("gradients", [p.grad for p in group["params"]])):
            if any(t is not None and not t.isfinite().all() for t in tensors):
                found.append(f"{what} of the {group['name']}")
    return "not finite: " + (", ".join(found) or "the loss alone")


def require_finite(step: int, loss: Tensor, norm: Tensor, optimizer: Optimizer, out: Path) -> None:
    """Raise NotFinite if a loss or the norm of the gradient is not finite, and say where to look."""
    if not torch.isfinite(loss + norm):
        raise NotFinite(
            f"step {step}: loss {loss.item():.4g}, gradient norm {norm.item():.4g}; {broken_group(optimizer)}. "
            f"Lower --lr or --map_lr_scale; earlier checkpoints in {out} are intact"
        )


class StopSignal:
    """Ctrl-C and SIGTERM as a question: `with StopSignal() as stop: ... if stop.asked: ...`.

    A second Ctrl-C ends the program at once. A second SIGTERM within GRACE seconds does not, nor any signal
    in a job of several processes: schedulers signal the whole job, and torchrun hands the signal on to its
    processes once more. Outside the main thread, where Python allows no handlers, nothing is asked.
    """

    asked = ""

    def __enter__(self) -> "StopSignal":
        main = threading.current_thread() is threading.main_thread()
        self.old = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM) if main}
        return self

    def ask(self, number, frame) -> None:
        patient = number == signal.SIGTERM or os.environ.get("WORLD_SIZE", "1") != "1"
        if not self.asked:
            self.asked, self.since = signal.Signals(number).name, time.monotonic()
            again = "" if patient else " (again: stop at once)"
            print(f"\n{self.asked}: finishing this step, then saving{again}", file=sys.stderr)
        elif not patient or time.monotonic() - self.since > GRACE:
            self.__exit__()
            signal.raise_signal(number)

    def __exit__(self, *error) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


def begin(
    out: Path, model: nn.Module, optimizer: Optimizer, config: Any, world: World, meta: dict
) -> tuple[Progress, Log]:
    """Go on from the last checkpoint in `out` if config.resume is set and there is one, else begin at step 0."""
    say = tqdm.write if world.is_main else lambda _: None
    log, last, progress = Log(out / "log.jsonl"), out / "last.safetensors", Progress()
    resumes = config.resume and last.exists()
    read_header(last, json.dumps(meta), 0)  # what could not be read back is refused now, not when it is saved
    if world.is_main:
        make_writable(out)
    if resumes:
        tensors, saved = load_checkpoint(last, RUN)
        with as_user_error():
            changed = changes(saved["config"], meta["config"])
        check_same_run(saved, changed, config, say)
        restore(tensors, model, optimizer, last)
        progress = Progress.of(saved)
        if not (out / "best.safetensors").exists():  # deleted: the next validation makes one
            progress.best = math.inf
        say(f"resuming {out} at step {progress.step}")
    elif config.resume:
        say(f"nothing to resume in {out}: starting at step 0")
    if world.is_main:
        if not resumes:
            set_aside(out, say)
        header = {"step": progress.step, "seconds_before": progress.seconds, **meta, **provenance()}
        log.start(header, progress.step, say)
    return progress, log


def check_same_run(saved: dict, changed: dict[str, tuple], config: Any, say: Callable) -> None:
    """Refuse to resume with different settings; print permitted changes. The fields of `config` say which
    changes are permitted (may_change)."""
    said = {name: f"{name} {old} -> {value}" for name, (old, value) in changed.items()}
    wrong = [text for name, text in said.items() if not tagged(config, name, "may_change")]
    if saved["step"] > config.max_steps:
        wrong.append(f"{saved['step']} steps, and not {config.max_steps}")
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        made = f" by {saved['command']!r:.200}" if "command" in saved else ""
        raise UserError(
            f"{config.out_dir}{made} was trained with other settings ({', '.join(wrong[:8])}{more}): resume with the "
            "same flags, or start a new run from its weights with --init_from and another --out_dir"
        )
    if "max_steps" in said:
        say(f"changed: {said['max_steps']} (the schedule of the learning rate moves with it)")


def set_aside(out: Path, say: Callable) -> None:
    """A new run in a folder that holds one: the files of the old run move to out/previous, or to previous-2,
    previous-3 ... Nothing that was trained is deleted."""
    names = ("last.safetensors", "best.safetensors", "log.jsonl", "curve.png", "result.json")
    if old := [out / name for name in names if (out / name).exists()]:
        places = (out / f"previous{f'-{i}' if i > 1 else ''}" for i in itertools.count(1))
        previous = next(place for place in places if not place.exists())
        previous.mkdir()
        for path in old:
            path.rename(previous / path.name)
        say(f"{out} held an earlier run: moved it to {previous}")


def make_writable(out: Path) -> None:
    """Make the folder. Raises UserError if nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as e:
        raise UserError(f"cannot write to --out_dir {out} ({e.strerror}): choose another folder") from e
