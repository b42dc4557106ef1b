"""One run of an experiment, and many runs side by side: over learning rates, then over seeds.

Not a command: recall.py, from_scratch.py and ablations.py use it. Each run has a folder and a process of its
own, and its output is in output.txt there. A finished run is not repeated and an interrupted one goes on.
"""

import contextlib
import difflib
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import fused
from attention import attentions, make_attention
from feature_maps import FEATURE_MAPS
from support.checkpoints import load_checkpoint, restore, write_json
from support.cli import NotFinite, UserError, as_user_error
from support.devices import World, pick_device, pick_dtype, step_seed
from support.earlier import changes, renewed
from support.log import Log
from support.provenance import provenance
from support.resuming import StopSignal
from train import fit


def train_one(
    config, build: Callable, batch: Callable, evaluate: Callable, final: Callable, tokenizer: str, curve: str
) -> dict:
    """Train the model build(config), and measure its best checkpoint. The result is also in result.json.

    batch(step), evaluate(model): as for train.fit, which keeps the checkpoint with the least "loss". The loss of a
        batch is the second result of model(*batch).
    final(model): the numbers that are reported, from data that `evaluate` does not use.
    curve: which number of evaluate's is the learning curve.
    """
    began, out = time.perf_counter(), Path(config.out_dir)
    world, about = World(0, 1, pick_device(config.device)), identity(config)
    torch.manual_seed(config.seed)
    with as_user_error():
        fused.use(config.kernel, world.device)
        model = build(config)
    groups = model.param_groups(config.lr, config.weight_decay, config.map_lr_scale)
    how = dict(batch=batch, loss=lambda model, *rows: model(*rows)[1], evaluate=evaluate, config=config)
    fit(model, groups, **how, world=world, meta={**about, "tokenizer": tokenizer})
    tensors, saved = load_checkpoint(out / "best.safetensors")
    restore(tensors, model, path=out)
    log = Log(out / "log.jsonl")
    entries = log.read()
    result = {
        **about,
        **provenance(),
        "parameters": model.num_params(),
        "steps": load_checkpoint(out / "last.safetensors")[1]["step"],
        "tokens_per_s": statistics.median([e["tokens_per_s"] for e in entries if "tokens_per_s" in e] or [0]),
        "dev_loss": saved["best"],
        "final": final(model.eval()),
        "curve": [(e["step"], round(e[f"val_{curve}"], 4)) for e in entries if f"val_{curve}" in e],
        "minutes": round(log.minutes(began), 2),
    }
    write_json(out / "result.json", result)
    return result


def batches_of(rows: list, length: Callable, size: int, seed: int) -> Callable[[int], list]:
    """batch(step): the examples of a step.

    Every epoch has its own order and sees every example once, except fewer than `size` that are left over.
    Examples of a batch have similar lengths, so that little of it is padding.
    """
    per_epoch = len(rows) // size

    @lru_cache(2)
    def epoch(n: int) -> np.ndarray:
        rng = np.random.default_rng(step_seed(seed, n))
        order = rng.permutation(len(rows))[: per_epoch * size]
        pools = np.array_split(order, -(-per_epoch // 32))  # of about 32 batches each
        pools = [sorted(pool, key=lambda i: length(rows[i])) for pool in pools]
        return rng.permutation(np.concatenate(pools).reshape(per_epoch, size))

    return lambda step: [rows[i] for i in epoch(step // per_epoch)[step % per_epoch]]


GONE = {"embd_std": 0.02, "init_std": 0.02}  # settings of earlier versions, as they are today


def code_of(config) -> str:
    """A checksum of the feature map's source: an edited map is another map."""
    with contextlib.suppress(OSError, TypeError):  # typed into an interpreter; no feature map
        source = inspect.getsource(FEATURE_MAPS.get(getattr(config, "attention", "")))
        return hashlib.sha256(source.encode()).hexdigest()[:16]
    return ""


def identity(config) -> dict:
    return {"config": asdict(config), "code": code_of(config)}


def differences(saved: dict, config: dict, apart: Iterable[str] = ()) -> dict[str, tuple]:
    """{setting: (saved, in config)} of those that differ, but for `apart`. The saved ones may be of an earlier
    version. Raises ValueError if this version cannot build the saved model."""
    saved, config = GONE | saved, GONE | config
    if "taps" in config and "conv" in saved:  # the earlier name
        saved["taps"] = saved.pop("conv")
    found = changes(saved, config)
    return {name: pair for name, pair in found.items() if name not in {"resume", "out_dir", *apart}}


def finished(config, apart: Iterable[str] = (), say: Callable = lambda line: None) -> dict | None:
    """The result of this run if it was made before; settings `apart` do not matter to it.

    say(line): called if there is a result, but not of this run."""
    path = Path(config.out_dir) / "result.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        other = differences(result["config"], asdict(config), apart)
        why = ", ".join(f"{name} was {old}, is {new}" for name, (old, new) in other.items())
        if not other and result.get("code", "") in ("", code_of(config)):
            return result
    except (OSError, ValueError, KeyError, TypeError) as e:  # half a file, or not such a file
        why = f"its result cannot be used ({type(e).__name__}: {e})"
    say(f"{config.out_dir} is made again: {why or 'the code of its feature map has changed'}")
    return None


def log_of(config) -> list[dict]:
    """The log of an interrupted run. Empty if it has ended, or the feature map was edited since."""
    out = Path(config.out_dir)
    log = [] if (out / "result.json").exists() else Log(out / "log.jsonl").read()
    begun = next((e for e in reversed(log) if "config" in e), {})
    try:
        renewed(begun.get("config", {}))
    except ValueError:  # a model of an earlier version, which this one cannot build
        return []
    return log if begun.get("code", "") in ("", code_of(config)) else []


def progress(config) -> tuple[int, str]:
    """(steps done, the last loss in words) of a run that has not ended."""
    last = next((e for e in reversed(log_of(config)) if "loss" in e), None)
    return (last["step"], f"{last['loss']:.2f}") if last else (0, "-")


def check_names(flag: str, given: list[str], known: Iterable[str]) -> None:
    known = list(known)
    if unknown := sorted(set(given) - set(known)):
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"--{flag} takes {', '.join(known)}, not {', '.join(unknown)}{hint}")


def check_attentions(config, causal: bool = True) -> None:
    """Raise UserError unless every one of config.attentions is known, takes config.options and has this
    direction."""
    check_names("attentions", config.attentions, attentions())
    options = {"max_len": config.block_size, **config.options}
    for name in config.attentions:
        try:
            with as_user_error():
                make_attention(name, config.n_head, config.n_embd // config.n_head, causal=causal, **options)
        except (TypeError, RuntimeError) as e:  # a value of a type that it does not take
            raise UserError(f"options {config.options} do not fit {name}: {e}") from e


STOPPED = []  # in a worker: what stopped it


def one(work: Callable, config, threads: int) -> dict:
    """work(config), with its output in a file. A loss that is not finite is a result, too. A worker that was
    stopped begins nothing more, though the pool hands it the next run."""
    if STOPPED:
        raise KeyboardInterrupt
    out = Path(config.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    with open(out / "output.txt", "a") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        try:
            return work(replace(config, resume=bool(log_of(config))))
        except NotFinite as e:
            result = {**identity(config), **provenance(), "failed": str(e)}
            write_json(out / "result.json", result)
            return result
        except (KeyboardInterrupt, SystemExit) as e:
            STOPPED.append(e)
            raise


def check_machine(config) -> None:
    """Raise UserError for a device, a number format or a kernel that is not there, before processes start."""
    with as_user_error():
        device = pick_device(config.device)
        pick_dtype(config.dtype, device)
        fused.use(config.kernel, device)


def end_with_parent() -> None:
    """End this worker when the command that started it ends, even by kill -9; after SIGTERM as after any end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # fit has its own handler

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def told(result: dict, said: str | Callable[[dict], str]) -> str:
    """The line about a run that has ended: `said` filled in with its numbers, or said(result)."""
    text = result.get("failed") or (said.format_map(result) if isinstance(said, str) else said(result))
    return f"{Path(result['config']['out_dir']).name}: {text}"


def run_all(work: Callable, configs: list, jobs: int, said: str | Callable) -> list[dict]:
    """The results of work(config) for every config, each with an out_dir of its own.

    work is imported by name. jobs: how many runs at a time; 0: one for each core. said: what to print when a
    run ends, e.g. "loss {final[loss]}", or a function of the result. A run whose loss is not finite has
    "failed"; other errors end all.
    """
    results = {c.out_dir: result for c in configs if (result := finished(c, say=print))}
    waiting = [c for c in configs if c.out_dir not in results]
    if results:
        print(f"{len(results)} of {len(configs)} runs were made before, with the same settings: kept")
    for result in results.values():
        if "failed" in result:
            print(told(result, said))
    if not waiting:
        return [results[c.out_dir] for c in configs]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = min(jobs or cores, len(waiting))
    threads = max(1, cores // jobs)
    spawn = multiprocessing.get_context("spawn")
    before = sum(progress(c)[0] for c in waiting)  # of interrupted runs; the bar's speed is without
    total = sum(c.max_steps for c in waiting)
    bar = tqdm(total=total, initial=before, unit="step", dynamic_ncols=True, disable=None)
    with bar, StopSignal() as stop, ProcessPoolExecutor(jobs, spawn, end_with_parent) as pool:
        futures = {pool.submit(one, work, config, threads): config for config in waiting}
        try:
            while futures:
                for future in wait(futures, timeout=1.0, return_when=FIRST_COMPLETED).done:
                    config = futures.pop(future)
                    results[config.out_dir] = future.result()
                    bar.write(told(results[config.out_dir], said))
                steps, losses = total, []
                for future, config in futures.items():
                    step, loss = progress(config)
                    steps -= config.max_steps - step
                    if step and future.running():
                        losses.append(f"{Path(config.out_dir).name}: loss {loss}")
                bar.set_postfix_str(", ".join(losses), refresh=False)
                bar.update(max(0, steps - bar.n))
                if stop.asked:
                    raise KeyboardInterrupt
        except BaseException as e:
            for future in futures:
                future.cancel()
            for worker in multiprocessing.active_children():
                worker.terminate()  # SIGTERM: fit saves, then the worker ends
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(e, (KeyboardInterrupt, SystemExit)):  # SystemExit: of a worker outside of fit
                raise KeyboardInterrupt("stopped: the same command goes on from where it was") from e
            raise
    return [results[c.out_dir] for c in configs]


def sweep_and_seeds(
    work: Callable,
    configs: list,
    trials: Callable,
    seeds: int,
    jobs: int,
    said: str | Callable,
    sweep_steps: int = 0,
) -> dict[str, list]:
    """For each config: all trials(config) with its own seed, then `seeds` seeds of the best trial.

    A trial is a change to try, e.g. {"lr": 1e-3}; the best one has the least "dev_loss", which must not be
    the number that is reported. sweep_steps: the length of a trial; 0: that of the other runs.
    Returns {"runs": results with the best settings, "sweep": a line about each trial}."""

    def run_of(config, changed: dict, seed: int, steps: int):  # in a folder like elu-lr0.002-seed1
        words = [config.out_dir, *(f"{key}{value:g}" for key, value in changed.items()), f"seed{seed}"]
        words += [str(steps)] if steps != config.max_steps else []
        return replace(config, **changed, seed=seed, max_steps=steps, out_dir="-".join(words))

    tried = [(c, trial) for c in configs if len(trials(c)) > 1 for trial in trials(c)]
    short = [run_of(c, trial, c.seed, sweep_steps or c.max_steps) for c, trial in tried]
    sweep = run_all(work, short, jobs, said)
    ranked = sorted(zip(tried, sweep), key=lambda pair: pair[1].get("dev_loss", math.inf))
    best = {c.out_dir: trial for (c, trial), _ in reversed(ranked)}  # the least loss comes last, and stays
    settings = [(c, best.get(c.out_dir, trials(c)[0])) for c in configs]
    final = [run_of(c, trial, c.seed + i, c.max_steps) for i in range(seeds) for c, trial in settings]
    results = run_all(work, final, jobs, said)  # one seed of every config, then the next seed
    runs = [r for i in range(len(configs)) for r in results[i :: len(configs)]]
    return {"runs": runs, "sweep": [told(r, said) for r in sweep]}


def conclude(path: Path, facts: dict, text: str, picture: str, began: float) -> None:
    """Write the results of many runs to `path`, print their table, and say where everything is."""
    minutes = round((time.perf_counter() - began) / 60, 1)
    write_json(path, facts | {"minutes": minutes})
    files = ", ".join(filter(None, [path.name, picture]))
    folder = Path(facts["runs"][0]["config"]["out_dir"]).name
    written = f"written to {path.parent}: {files}, and a folder for each run: {folder} ..."
    print(f"{text}\n{minutes:.1f} minutes; {written}")
