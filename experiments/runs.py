"""One run of an experiment; and many, side by side in processes of their own: learning rates, then seeds.

Not a command: recall.py and compare.py use it. A finished run is not repeated and an interrupted one goes on, so the
same command continues an experiment. What a run prints goes to output.txt in its folder.
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
from feature_maps import FEATURE_MAPS
from model import GPT, GPTConfig
from support.checkpoints import load_checkpoint, restore, write_json
from support.cli import RunError, as_user_error
from support.devices import World, pick_device
from support.log import Log, provenance
from train import fit


def train_one(config, batch: Callable, evaluate: Callable, final: Callable, tokenizer: str, curve: str) -> dict:
    """Train a new GPT and measure its best checkpoint; the result is in result.json, too.

    config: a GPTConfig and FitConfig in one.     batch(step), evaluate(model): as for fit, which keeps the checkpoint
    with the least evaluate(model)["loss"].     final(model): a dict of what is reported, from data that evaluate does
    not use.     curve: which number of evaluate's is the learning curve.
    """
    began, world, out = time.perf_counter(), World(0, 1, pick_device(config.device)), Path(config.out_dir)
    torch.manual_seed(config.seed)
    with as_user_error():
        fused.use(config.kernel, world.device)
        model = GPT(GPTConfig.of(asdict(config)))
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
    entries = Log(out / "log.jsonl").read()
    points = [e for e in entries if "val_loss" in e]
    result = {
        "config": asdict(config),
        "code": code_of(config),
        **provenance(),
        "parameters": model.num_params(),
        "steps": points[-1]["step"],
        "tokens_per_s": statistics.median(e["tokens_per_s"] for e in entries if "tokens_per_s" in e),
        "dev_loss": min(e["val_loss"] for e in points),
        "final": final(model.eval()),
        "curve": [(e["step"], round(e[f"val_{curve}"], 4)) for e in points],
    }
    seconds = next(e for e in reversed(entries) if "config" in e)["seconds_before"] + time.perf_counter() - began
    result["minutes"] = round(seconds / 60, 2)
    write_json(out / "result.json", result)
    return result


def code_of(config) -> str:
    """The source of the run's feature map: a map that was changed is another one, under the same name."""
    cls = FEATURE_MAPS.get(getattr(config, "attention", ""))
    try:
        return hashlib.sha256(inspect.getsource(cls).encode()).hexdigest()[:16] if cls else ""
    except OSError:  # typed into an interpreter
        return ""


def same_config(a: dict, b: dict, apart: Iterable[str] = ()) -> bool:
    """Whether two configurations train the same: all but where, whether to go on, and the settings `apart`."""
    left_out = dict.fromkeys(["resume", "out_dir", *apart])
    return {**a, **left_out} == {**b, **left_out}


def finished(config, apart: Iterable[str] = ()) -> dict | None:
    """The result of a run that has been made before with the same settings; those in `apart` do not matter to it."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, or not such a file
        result = json.loads((Path(config.out_dir) / "result.json").read_text())
        if same_config(result["config"], asdict(config), apart) and result.get("code", "") in ("", code_of(config)):
            return result
    return None


def log_of(config) -> list[dict]:
    """What an interrupted run has logged; nothing of one that ended, or that had another map of the same name."""
    out = Path(config.out_dir)
    log = [] if (out / "result.json").exists() else Log(out / "log.jsonl").read()
    begun = next((e for e in reversed(log) if "config" in e), {})
    return log if begun.get("code", "") in ("", code_of(config)) else []


def one(work: Callable, config, threads: int) -> dict:
    """work(config) in this process; what it prints goes to a file. A loss that is not finite is a result, too."""
    out = Path(config.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "output.txt", "a") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        torch.set_num_threads(threads)
        try:
            return work(replace(config, resume=bool(log_of(config))))
        except RunError as e:
            result = {"config": asdict(config), "code": code_of(config), **provenance(), "failed": str(e)}
            write_json(out / "result.json", result)
            return result


def end_with_parent() -> None:
    """A worker ends when the command that started it has ended, however it did."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def progress(config) -> tuple[int, str]:
    """(steps done, "loss") of a run that has not ended, from its log."""
    last = next((e for e in reversed(log_of(config)) if "loss" in e), None)
    return (last["step"], f"{last['loss']:.2f}") if last else (0, "-")


def run_all(work: Callable, configs: list, jobs: int, describe: Callable[[dict], str]) -> list[dict]:
    """The result.json of work(config) for every config, each with its own out_dir.

    jobs: how many at a time; 0: one for each core.     describe(result): the line to print when a run ends.
    Raises what work raises, but for RunError (a loss that is not finite): that run's result then has "failed" with
    the reason, and the others go on.
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = min(jobs or cores, len(waiting))
    threads = max(1, cores // jobs)
    spawn = multiprocessing.get_context("spawn")
    before = sum(progress(c)[0] for c in waiting)  # of runs that were interrupted: no part of the speed
    bar = tqdm(total=sum(c.max_steps for c in waiting), initial=before, unit="step", dynamic_ncols=True)
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
                states = [(Path(c.out_dir).name, f.running(), *progress(c)) for f, c in futures.items()]
                losses = (f"{name}: loss {loss}" for name, running, step, loss in states if running and step)
                bar.set_postfix_str(", ".join(losses), False)
                bar.update(max(0, ended + sum(step for *_, step, _ in states) - bar.n))
        except BaseException as e:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(e, KeyboardInterrupt):  # the workers had it, too: fit saves, then they end
                raise KeyboardInterrupt("stopped: the same command goes on from where it was") from e
            raise
    return [results[c.out_dir] for c in configs]


def sweep_and_seeds(
    work: Callable, configs: list, trials: Callable[[Any], list[dict]], seeds: int, jobs: int, describe: Callable,
    loss: Callable, sweep_steps: int = 0,
) -> tuple[list[dict], list[dict]]:  # fmt: skip
    """For each config: every one of its trials with its own seed, then `seeds` seeds of the best of them.

    trials(config): what to change, e.g. [{"lr": 1e-3}, {"lr": 3e-3}]. loss(result): what the best trial has least of;
    it must not be what is reported. sweep_steps: length of the trials; 0: that of the others, and the best one is its
    seed's run. Returns (the trials' results, the results with the best settings).
    """

    def run_of(config, changes: dict, seed: int, steps: int):
        parts = [Path(config.out_dir).name, *(f"{name}{value:g}" for name, value in changes.items()), f"seed{seed}"]
        name = "-".join(parts + ([str(steps)] if steps != config.max_steps else []))
        return replace(config, **changes, seed=seed, max_steps=steps, out_dir=str(Path(config.out_dir).with_name(name)))

    tried = [(c, changes) for c in configs if len(trials(c)) > 1 for changes in trials(c)]
    sweep = run_all(work, [run_of(c, x, c.seed, sweep_steps or c.max_steps) for c, x in tried], jobs, describe)
    best = {c.out_dir: trials(c)[0] for c in configs}
    for config in configs:
        ended = [(loss(r), i) for i, ((c, _), r) in enumerate(zip(tried, sweep)) if c is config and "failed" not in r]
        if ended:
            best[config.out_dir] = tried[min(ended)[1]][1]
    final = [run_of(c, best[c.out_dir], c.seed + i, c.max_steps) for i in range(seeds) for c in configs]
    results = run_all(work, final, jobs, describe)  # one seed of all, then the next
    return sweep, [r for i in range(len(configs)) for r in results[i :: len(configs)]]


def mean_sd(values: list[float], form: str = ".3f") -> str:
    """mean ± standard deviation, the latter if there are several."""
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"
