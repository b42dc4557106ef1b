"""One run of an experiment, and many runs side by side: over learning rates, then over seeds.

Not a command: recall.py, from_scratch.py and ablations.py use it. Each run has a folder and a
process of its own. What it prints goes to output.txt in the folder. A finished run is not repeated
and an interrupted one goes on, so the same command continues an experiment.
"""

import contextlib
import hashlib
import inspect
import json
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fused
from config import changes
from feature_maps import FEATURE_MAPS
from model import GPT
from support.checkpoints import load_checkpoint, restore, write_json
from support.cli import RunError, as_user_error
from support.devices import World, pick_device
from support.earlier import renewed
from support.log import Log, provenance
from train import fit

# ---------------------------------------------------------------- one run


def train_one(
    config,
    build: Callable[[Any], GPT],
    batch: Callable,
    evaluate: Callable[[GPT], dict],
    final: Callable[[GPT], dict],
    tokenizer: str,
    curve: str,
) -> dict:
    """Train a new model and measure its best checkpoint. The result is also in result.json.

    config: a FitConfig and what `build` takes.
    build(config): the model, with its first weights.
    batch(step), evaluate(model): as for train.fit, which keeps the checkpoint with the least
        evaluate(model)["loss"].
    final(model): the numbers that are reported, from data that `evaluate` does not use.
    curve: which number of evaluate's is the learning curve.
    """
    began, out = time.perf_counter(), Path(config.out_dir)
    world = World(0, 1, pick_device(config.device))
    torch.manual_seed(config.seed)
    with as_user_error():
        fused.use(config.kernel, world.device)
        model = build(config)
    fit(
        model,
        model.param_groups(config.lr, config.weight_decay, config.map_lr_scale),
        batch=batch,
        loss=lambda model, x, y: model(x, y)[1],
        evaluate=evaluate,
        config=config,
        world=world,
        meta={"config": asdict(config), "code": code_of(config), "tokenizer": tokenizer},
    )
    restore(load_checkpoint(out / "best.safetensors")[0], model, path=out)
    log = Log(out / "log.jsonl")
    entries = log.read()
    points = [e for e in entries if "val_loss" in e]
    speeds = [e["tokens_per_s"] for e in entries if "tokens_per_s" in e]
    result = {
        "config": asdict(config),
        "code": code_of(config),
        **provenance(),
        "parameters": model.num_params(),
        "steps": points[-1]["step"],
        "tokens_per_s": statistics.median(speeds),
        "dev_loss": min(e["val_loss"] for e in points),
        "final": final(model.eval()),
        "curve": [(e["step"], round(e[f"val_{curve}"], 4)) for e in points],
        "minutes": round(log.minutes(began), 2),
    }
    write_json(out / "result.json", result)
    return result


# ---------------------------------------------------------------- what has been run before

GONE = {"embd_std": 0.02, "init_std": 0.02}  # settings of earlier versions, as they are today


def code_of(config) -> str:
    """A checksum of the source of the run's feature map: an edited map is another map."""
    cls = FEATURE_MAPS.get(getattr(config, "attention", ""))
    try:
        return hashlib.sha256(inspect.getsource(cls).encode()).hexdigest()[:16] if cls else ""
    except OSError:  # typed into an interpreter
        return ""


def same_config(saved: dict, config: dict, apart: Iterable[str] = ()) -> bool:
    """Whether a saved configuration, perhaps of an earlier version, is today's `config`.

    Settings that do not change the result are left out: out_dir, resume, and those in `apart`.
    Raises ValueError if this version cannot build the saved model."""
    saved = dict(saved)
    if "taps" in config and "conv" in saved:  # the earlier name
        saved["taps"] = saved.pop("conv")
    gone = {name: saved.get(name, value) for name, value in GONE.items() if name not in config}
    differ = set(changes(saved, config)) - {"resume", "out_dir", *apart}
    return not differ and all(value == GONE[name] for name, value in gone.items())


def finished(config, apart: Iterable[str] = ()) -> dict | None:
    """The result of this run if it was made before; the settings in `apart` do not matter to it."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no file, or not such a file
        result = json.loads((Path(config.out_dir) / "result.json").read_text())
        same_code = result.get("code", "") in ("", code_of(config))
        if same_code and same_config(result["config"], asdict(config), apart):
            return result
    return None


def log_of(config) -> list[dict]:
    """The log of an interrupted run. It is empty for a finished run, and if the feature map has
    been edited since."""
    out = Path(config.out_dir)
    log = [] if (out / "result.json").exists() else Log(out / "log.jsonl").read()
    begun = next((e for e in reversed(log) if "config" in e), {})
    try:
        renewed(begun.get("config", {}))
    except ValueError:  # a model of an earlier version, which this one cannot build
        return []
    return log if begun.get("code", "") in ("", code_of(config)) else []


def progress(config) -> tuple[int, str]:
    """(steps done, the last loss in words) of a run that has not ended, from its log."""
    last = next((e for e in reversed(log_of(config)) if "loss" in e), None)
    return (last["step"], f"{last['loss']:.2f}") if last else (0, "-")


# ---------------------------------------------------------------- many runs


def one(work: Callable, config, threads: int) -> dict:
    """work(config) in this process; what it prints goes to a file.

    A loss that is not finite is a result, too: it has "failed" with the reason."""
    out = Path(config.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    with (
        open(out / "output.txt", "a") as f,
        contextlib.redirect_stdout(f),
        contextlib.redirect_stderr(f),
    ):
        torch.set_num_threads(threads)
        try:
            return work(replace(config, resume=bool(log_of(config))))
        except RunError as e:
            about = {"config": asdict(config), "code": code_of(config)}
            result = {**about, **provenance(), "failed": str(e)}
            write_json(out / "result.json", result)
            return result


def end_with_parent() -> None:
    """End this worker when the command that started it has ended, however it ended."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_all(work: Callable, configs: list, jobs: int, describe: Callable[[dict], str]) -> list[dict]:
    """The results of work(config) for every config. Each config has an out_dir of its own.

    work: a function of a module, since workers import it by name.
    jobs: how many runs at a time; 0: one for each core.
    describe(result): the line to print when a run ends.
    A run whose loss is not finite has a result with "failed", and the others go on. Any other
    exception ends them all.
    """
    results: dict[str, dict] = {}
    for config in configs:
        if (result := finished(config)) is not None:
            results[config.out_dir] = result
    waiting = [c for c in configs if c.out_dir not in results]
    if results:
        print(f"{len(results)} of {len(configs)} runs were made before, with the same settings: kept")
        for result in (r for r in results.values() if "failed" in r):
            print(describe(result))
    if not waiting:
        return [results[c.out_dir] for c in configs]
    affinity = getattr(os, "sched_getaffinity", None)  # Linux: the cores that we may use
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    jobs = min(jobs or cores, len(waiting))
    threads = max(1, cores // jobs)
    spawn = multiprocessing.get_context("spawn")
    before = sum(progress(c)[0] for c in waiting)  # of interrupted runs; the bar's speed is without
    total = sum(c.max_steps for c in waiting)
    bar = tqdm(total=total, initial=before, unit="step", dynamic_ncols=True)
    bar.mininterval = 0.1 if sys.stderr.isatty() else 30.0  # seconds; a log file wants fewer lines
    with bar, ProcessPoolExecutor(jobs, spawn, end_with_parent) as pool:
        futures = {pool.submit(one, work, config, threads): config for config in waiting}
        ended = 0
        try:
            while futures:
                done, _ = wait(futures, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    config = futures.pop(future)
                    results[config.out_dir] = future.result()
                    ended += config.max_steps
                    bar.write(describe(results[config.out_dir]))
                states = [(c, f.running(), *progress(c)) for f, c in futures.items()]
                losses = [
                    f"{Path(c.out_dir).name}: loss {loss}"
                    for c, running, step, loss in states
                    if running and step
                ]
                bar.set_postfix_str(", ".join(losses), refresh=False)
                bar.update(max(0, ended + sum(step for *_, step, _ in states) - bar.n))
        except BaseException as e:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(e, KeyboardInterrupt):  # workers got it as well: fit saves, then they end
                raise KeyboardInterrupt("stopped: the same command goes on from where it was") from e
            raise
    return [results[c.out_dir] for c in configs]


def sweep_and_seeds(
    work: Callable,
    configs: list,
    trials: Callable[[Any], list[dict]],
    seeds: int,
    jobs: int,
    describe: Callable[[dict], str],
    loss: Callable[[dict], float],
    sweep_steps: int = 0,
) -> tuple[list[dict], list[dict]]:
    """For each config: all of its trials with its own seed, then `seeds` seeds of the best trial.

    trials(config): the changes to try, e.g. [{"lr": 1e-3}, {"lr": 3e-3}].
    loss(result): the best trial has the least; it must not be the number that is reported.
    sweep_steps: the length of a trial. 0: that of the other runs, and then the best trial is the
        first seed's run.
    Returns (the results of the trials, the results with the best settings). The folder of a run is
    named after the config's folder, its changes and its seed: elu-lr0.002-seed1.
    """

    def run_of(config, changes: dict, seed: int, steps: int):
        name = run_name(Path(config.out_dir).name, changes, seed)
        if steps != config.max_steps:
            name += f"-{steps}"
        out_dir = str(Path(config.out_dir).with_name(name))
        return replace(config, **changes, seed=seed, max_steps=steps, out_dir=out_dir)

    tried = [(c, changes) for c in configs if len(trials(c)) > 1 for changes in trials(c)]
    short = [run_of(c, changes, c.seed, sweep_steps or c.max_steps) for c, changes in tried]
    sweep = run_all(work, short, jobs, describe)
    best = {c.out_dir: trials(c)[0] for c in configs}
    for config in configs:
        ended = [
            (loss(result), i)
            for i, ((c, _), result) in enumerate(zip(tried, sweep))
            if c is config and "failed" not in result
        ]
        if ended:
            best[config.out_dir] = tried[min(ended)[1]][1]
    # One seed of every config, then the next seed.
    final = [run_of(c, best[c.out_dir], c.seed + i, c.max_steps) for i in range(seeds) for c in configs]
    results = run_all(work, final, jobs, describe)
    return sweep, [r for i in range(len(configs)) for r in results[i :: len(configs)]]


def run_name(name: str, changes: dict, seed: int) -> str:
    """The folder of a run: elu-lr0.002-seed1."""
    return "-".join([name, *(f"{key}{value:g}" for key, value in changes.items()), f"seed{seed}"])
