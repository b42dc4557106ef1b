"""The log of a run, and the report at the end."""

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from support import plots
from support.checkpoints import load_checkpoint, restore
from support.devices import World, peak_gib
from support.provenance import provenance
from support.writing import write_atomically, write_json


def is_entry(e: Any) -> bool:
    """Whether a line is one that a run has written: a header, or numbers of a step."""
    if not isinstance(e, dict) or type(e.get("step")) is not int or e["step"] < 0:
        return False
    if "config" in e:
        return isinstance(e["config"], dict)
    return all(type(x) in (int, float, list) for x in e.values())


class Log:
    """A run as JSON lines. The first has the configuration and provenance, the others a `step`."""

    def __init__(self, path: Path):
        self.path, self.broken = path, False

    def lines(self) -> Iterator[dict | None]:
        """Each line as an entry; None for one that was edited, or that a kill has cut short."""
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            entry = None
            with contextlib.suppress(ValueError, RecursionError):
                entry = json.loads(line.decode())
            yield entry if is_entry(entry) else None

    def read(self) -> list[dict]:
        return [e for e in self.lines() if e is not None]

    def header(self) -> dict:
        """What the process that runs has logged first. Empty if the log was deleted since."""
        return next((e for e in reversed(self.read()) if "config" in e), {})

    def start(self, header: dict, step: int, say: Callable = print) -> None:
        """Begin a log, or (step > 0) go on with one: what was logged after `step` will come again."""
        lines = list(self.lines()) if step else []
        if None in lines:
            say(f"{self.path} has {lines.count(None)} lines that no run has written whole: left out")
        kept = [e for e in lines if e and e["step"] <= step]
        text = "".join(json.dumps(e) + "\n" for e in [*kept, header])
        write_atomically(self.path, lambda beside: beside.write_text(text))

    def minutes(self, began: float) -> float:
        """How long the run took: before this process, and since `began` (time.perf_counter) in it."""
        return (self.header().get("seconds_before", 0.0) + time.perf_counter() - began) / 60

    def write(self, **entry) -> None:
        """A disk that takes no log does not end a run."""
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps(entry) + "\n")
        except OSError as e:
            if not self.broken:
                tqdm.write(f"cannot write {self.path} ({e.strerror}): the run goes on without a log")
            self.broken = True


class Watch:
    """What the main process of a run shows and logs: a bar, the loss, tokens a second, validations."""

    def __init__(self, log: Log, config: Any, done: int, world: World):
        self.log, self.config, self.shown, self.result = log, config, world.is_main, {}
        self.clock, self.tokens = time.perf_counter(), 0
        options = dict(unit="step", dynamic_ncols=True)
        self.bar = tqdm(total=config.max_steps, initial=done, disable=None if self.shown else True, **options)

    def step(self, done: int, loss: Tensor, norm: Tensor, lr: float, tokens: int) -> None:
        self.bar.update()
        self.tokens += tokens
        if self.shown and (done % self.config.log_interval == 0 or done == self.config.max_steps):
            speed = self.tokens / (time.perf_counter() - self.clock)
            numbers = dict(loss=loss.item(), grad_norm=norm.item(), lr=lr, tokens_per_s=round(speed))
            self.log.write(step=done, **numbers)
            self.bar.set_postfix_str(f"loss {loss.item():.3f}, {speed:,.0f} tokens/s", refresh=False)
            self.clock, self.tokens = time.perf_counter(), 0

    def validation(self, done: int, result: dict) -> None:
        """result["loss_name"] says what the loss is, if it is not that of the text."""
        name = result.pop("loss_name", "validation loss")
        self.result = result
        self.log.write(step=done, **{f"val_{key}": value for key, value in result.items()})
        self.bar.write(f"step {done}: {name} {result['loss']:.4f}")
        self.clock, self.tokens = time.perf_counter(), 0

    def close(self) -> None:
        self.bar.close()


def report(
    config: Any, model: nn.Module, evaluate: Callable[[nn.Module], dict], tokenizer, began: float
) -> None:
    """The end of a run: the curve, result.json, a sample from the best checkpoint, one line of numbers."""
    out, device = Path(config.out_dir), next(model.parameters()).device
    restore(load_checkpoint(out / "best.safetensors")[0], model, path=out / "best.safetensors")
    model.eval()
    final, log = evaluate(model), Log(out / "log.jsonl")
    entries, minutes = log.read(), log.minutes(began)
    result = {
        **(log.header() or {"config": asdict(config), **provenance()}),
        "parameters": model.num_params(),
        "minutes": round(minutes, 2),
        "tokens_per_s": statistics.median([e["tokens_per_s"] for e in entries if "tokens_per_s" in e] or [0]),
        "peak_gib": peak_gib(device),
        "final": final,
        "curve": [(e["step"], round(e["val_loss"], 4)) for e in entries if "val_loss" in e],
    }
    write_json(out / "result.json", result)
    if result["curve"]:  # else it was resumed after it had ended, without its log
        plots.curve(out / "curve.png", result.get("command", ""), [result, *entries])
    prompt = torch.from_numpy(np.asarray(tokenizer.encode_many([config.prompt])[0], np.int64))[None]
    if (n := int(min(config.sample_tokens, model.config.max_length - prompt.size(1)))) > 0:
        generator = torch.Generator(device).manual_seed(config.seed)
        ids = model.generate(prompt.to(device), n, temperature=0.8, generator=generator)
        print(f"--- sample\n{tokenizer.decode_bytes(ids[0].tolist()).decode(errors='replace')}\n---")
    print(
        f"validation loss {final['loss']:.4f} nats per token, {final['bits_per_byte']:.4f} bits per byte, "
        f"{minutes:.1f} minutes, peak memory {result['peak_gib']:.1f} GiB, checkpoint {out / 'best.safetensors'}"
    )
