"""Train or finetune a GPT with softmax or linear attention: one loop, `fit`, and one command.

    python train.py                                  a small GPT on Python's standard library, minutes on a CPU
    python train.py wikitext103                      the paper's recipe (Table 1), one GPU
    python train.py --attention softmax              or elu, performer, taylor ...: any feature map
    python train.py --dataset text --data_dir FILE_OR_FOLDER
    python train.py --eval_only --init_from out/stdlib-hedgehog
    torchrun --nproc_per_node=2 train.py             several GPUs, or CPU processes

Recipes and fields are in configs/__init__.py; any field can be overridden on the command line.
"""

import contextlib
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import fused
from config import FitConfig, TrainConfig, read_config
from feature_maps import FEATURE_MAPS
from model import GPT, GPTConfig
from perplexity import perplexity, report
from support.checkpoints import load_checkpoint, restore, save_checkpoint
from support.cli import RunError, UserError, as_user_error, run
from support.devices import World, join_world, pick_dtype, step_seed
from support.log import Log, provenance


def lr_factor(step: int, config: FitConfig) -> float:
    """The learning rate of a step as a fraction of its peak: linear warm-up, then cosine to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def broken_group(optimizer: torch.optim.Optimizer) -> str:
    """Which parameter groups hold numbers that are not finite: the place to look when a loss is NaN."""
    found = []
    for group in optimizer.param_groups:
        for what, tensors in (("weights", group["params"]), ("gradients", [p.grad for p in group["params"]])):
            if any(t is not None and not t.isfinite().all() for t in tensors):
                found.append(f"{what} of the {group['name']}")
    return "not finite: " + (", ".join(found) or "the loss alone")


class StopSignal:
    """Ctrl-C and SIGTERM as a question: `with stop: ... if stop.asked: ...`. The second ends the program."""

    asked = ""

    def __enter__(self) -> "StopSignal":
        self.old = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame) -> None:
        self.asked = signal.Signals(number).name
        print(f"\n{self.asked}: finishing this step, then saving (again: stop at once)", file=sys.stderr)
        self.restore()

    def __exit__(self, *error) -> None:
        self.restore()

    def restore(self) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


# What a resumed run may set otherwise than the run that was interrupted.
MAY_CHANGE = """max_steps stop_loss patience grad_accum eval_interval save_interval log_interval device out_dir resume
    kernel compile data_dir eval_tokens sample_tokens prompt init_from eval_only eval_split eval_stride
    test_dialogues new_tokens examples""".split()


def fit(
    model: nn.Module,
    groups: list[dict],
    batch: Callable[[int], tuple[Tensor, ...]],
    loss: Callable[..., Tensor],
    evaluate: Callable[[nn.Module], dict],
    config: FitConfig,
    world: World,
    meta: dict,
) -> dict:
    """The training loop: every script of this repository that trains, trains here.

    model: what is saved and evaluated.     groups: which parameters train; AdamW's groups, with names.
    batch(step): the whole batch of a step on the CPU, tensors of batch_size rows, or of a multiple: a function
        of the step alone. Ranks and accumulation steps take their rows of it, so that their number changes
        nothing (but which units drop out, where there is dropout).
    loss(model, *rows): mean loss of some rows.     evaluate(model): a dict with "loss", lower is better.
    meta: what checkpoints and log shall say, with meta["config"] a dict of everything that was set.

    Stops at max_steps, once the validation loss is at most stop_loss, or after `patience` validations without a better
    one. Writes last.safetensors, best.safetensors (without frozen parameters) and log.jsonl into out_dir. Returns the
    last evaluation. Raises RunError when the loss is not finite, and KeyboardInterrupt, after saving, on Ctrl-C.
    """
    n_pieces = max(1, config.grad_accum // world.size)  # on each device
    if config.batch_size % (world.size * n_pieces) or (config.grad_accum > 1 and config.grad_accum % world.size):
        raise UserError(
            f"batch_size ({config.batch_size}) must be divisible by grad_accum ({config.grad_accum}) and by the "
            f"number of processes ({world.size}), and grad_accum by the latter"
        )
    out, is_main, device = Path(config.out_dir), world.rank == 0, world.device
    say = tqdm.write if is_main else lambda _: None
    if is_main:  # one process alone writes
        make_writable(out)
    dtype = pick_dtype(config.dtype, device)
    model.to(device)
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=device.type != "mps")
    peak_lrs = [group["lr"] for group in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    start, best, since, seconds, log = 0, math.inf, 0, 0.0, Log(out / "log.jsonl")
    if config.resume and (out / "last.safetensors").exists():
        tensors, saved = load_checkpoint(out / "last.safetensors")
        check_same_run(saved, meta, out, say)
        restore(tensors, model, optimizer, out / "last.safetensors")
        start, best, since, seconds = saved["step"], saved["best"], saved.get("since", 0), saved["seconds"]
        say(f"resuming {out} at step {start}")
    elif config.resume:
        say(f"nothing to resume in {out}: starting at step 0")
    if is_main:
        if not start:
            set_aside(out, say)
        log.start({"step": start, "seconds_before": seconds, **meta, **provenance()}, start)
    if config.compile:
        model.compile()
    ddp = DistributedDataParallel(model) if world.size > 1 else None

    def save(name: str, step: int) -> None:
        if not all(p.isfinite().all() for p in params):
            raise RunError(f"step {step}: {broken_group(optimizer)}; nothing was saved; lower --lr")
        spent = seconds + time.perf_counter() - began
        save_checkpoint(out / name, model, optimizer, step=step, best=best, since=since, seconds=spent, **meta)

    def enough() -> bool:
        return best <= config.stop_loss > 0 or 0 < config.patience <= since

    result, stop, tokens = {}, StopSignal(), 0
    began = clock = time.perf_counter()
    bar = tqdm(total=config.max_steps, initial=start, unit="step", disable=not is_main, dynamic_ncols=True)
    bar.mininterval = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log file wants fewer lines
    model.train()
    with stop:
        for step in range(start, config.max_steps):
            if enough():
                break
            for group, peak in zip(optimizer.param_groups, peak_lrs):
                group["lr"] = peak * lr_factor(step, config)
            torch.manual_seed(step_seed(config.seed, step, world.rank))  # dropout
            mine = [t.chunk(world.size)[world.rank] for t in batch(step)]
            pieces = list(zip(*(t.chunk(n_pieces) for t in mine)))
            tokens += mine[0].numel() * world.size
            total = torch.zeros((), device=device)
            for i, piece in enumerate(pieces):
                piece = [t.to(device, non_blocking=True) for t in piece]
                quiet = ddp is not None and i < len(pieces) - 1  # ranks exchange gradients once a step
                with ddp.no_sync() if quiet else contextlib.nullcontext():
                    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                        piece_loss = loss(ddp or model, *piece) / len(pieces)
                    piece_loss.backward()
                total += piece_loss.detach()
            norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
            asked = torch.tensor(float(bool(stop.asked)), device=device)
            if ddp is not None:
                dist.all_reduce(total)
                total /= world.size
                dist.all_reduce(asked)
            if not torch.isfinite(total + norm):
                raise RunError(
                    f"step {step + 1}: loss {total.item():.4g}, gradient norm {norm.item():.4g}; "
                    f"{broken_group(optimizer)}. Lower --lr or --map_lr_scale; earlier checkpoints in {out} are intact"
                )
            torch.nn.utils.clip_grads_with_norm_(params, config.grad_clip or math.inf, norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            bar.update()
            if is_main and (done % config.log_interval == 0 or done == config.max_steps):
                now = time.perf_counter()
                speed, clock, tokens, lr = tokens / (now - clock), now, 0, optimizer.param_groups[0]["lr"]
                log.write(step=done, loss=total.item(), grad_norm=norm.item(), lr=lr, tokens_per_s=round(speed))
                bar.set_postfix_str(f"loss {total.item():.3f}, {speed:,.0f} tokens/s", refresh=False)
            if is_main and (done % config.eval_interval == 0 or done == config.max_steps):
                model.eval()
                result = evaluate(model)
                model.train()
                log.write(step=done, **{f"val_{key}": value for key, value in result.items()})
                bar.write(f"step {done}: validation loss {result['loss']:.4f}")
                best, since = (result["loss"], 0) if result["loss"] < best else (best, since + 1)
                if not since:
                    save("best.safetensors", done)
                clock, tokens = time.perf_counter(), 0
            if ddp is not None and done % config.eval_interval == 0:
                shared = [best, since]
                dist.broadcast_object_list(shared)  # rank 0 alone evaluates; all stop together
                best, since = shared
            stopping, last = bool(asked.item()), done == config.max_steps or enough()
            if is_main and (done % config.save_interval == 0 or last or stopping):
                save("last.safetensors", done)
            if stopping and not last:
                bar.close()
                why = f"stopped by {stop.asked or 'a signal'} after step {done}, saved in {out}"
                raise KeyboardInterrupt(f"{why}: go on with the same command and --resume" if is_main else "")
    bar.close()
    return result


def set_aside(out: Path, say: Callable) -> None:
    """A new run in a folder that holds one: the old files go to out/previous, and nothing is mixed."""
    names = ("last.safetensors", "best.safetensors", "log.jsonl", "curve.png", "result.json")
    if old := [out / name for name in names if (out / name).exists()]:
        shutil.rmtree(out / "previous", ignore_errors=True)
        (out / "previous").mkdir()
        for path in old:
            path.rename(out / "previous" / path.name)
        say(f"{out} held an earlier run: moved it to {out / 'previous'}")


def make_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as e:
        raise UserError(f"cannot write to --out_dir {out} ({e.strerror}): choose another folder") from e


def check_same_run(saved: dict, meta: dict, out: Path, say: Callable) -> None:
    """A resumed run must be the run that was interrupted; what may differ is said aloud."""
    old, new = saved.get("config", {}), meta["config"]
    changed = {name: f"{name} {old.get(name)} -> {new.get(name)}" for name in new if old.get(name) != new.get(name)}
    wrong = [text for name, text in changed.items() if name not in MAY_CHANGE]
    if saved["step"] > new.get("max_steps", math.inf):
        wrong.append(f"{saved['step']} steps, and not {new['max_steps']}")
    if wrong:
        raise UserError(f"{out} was trained with other settings ({', '.join(wrong)}): resume with the same flags, or "
                        "start a new run from its weights with --init_from and another --out_dir")  # fmt: skip
    if "max_steps" in changed:
        say(f"changed: {changed['max_steps']} (the learning rate's schedule moves with it)")


# ---------------------------------------------------------------- language modelling


def build_model(config: TrainConfig, given: set[str], tokens: data.Tokens) -> GPT:
    """A new GPT, or the one in --init_from. A flag that contradicts the checkpoint is an error."""
    if not config.init_from:
        config.vocab_size = tokens.vocab_size
        with as_user_error():
            return GPT(GPTConfig.of(asdict(config)))
    tensors, saved = load_checkpoint(config.init_from)
    if saved["tokenizer"] != tokens.tokenizer.name:
        raise UserError(f"--tokenizer {tokens.tokenizer.name} contradicts {config.init_from}, which was trained on "
                        f"{saved['tokenizer']} tokens: leave it out")  # fmt: skip
    with as_user_error():
        unbounded = GPTConfig.of(saved["config"]).max_length == math.inf  # the block size shapes no weights
    free = {"dropout", "block_size"} if unbounded else {"dropout"}
    for field in fields(GPTConfig):
        there, here = saved["config"][field.name], getattr(config, field.name)
        if field.name in given and field.name not in free and here != there:
            raise UserError(f"--{field.name} {here} contradicts {config.init_from}, which has {there}: leave it out")
        if field.name not in given or field.name not in free:
            setattr(config, field.name, there)
    with as_user_error():
        model = GPT(GPTConfig.of(asdict(config)))
    restore(tensors, model, path=config.init_from)
    return model


def main() -> None:
    config, given = read_config(sys.argv[1:], __doc__)
    began = time.perf_counter()
    world = join_world(config.device)
    is_main, dtype = world.rank == 0, pick_dtype(config.dtype, world.device)
    if config.eval_only and config.dtype == "auto":
        dtype = torch.float32  # numbers to compare between machines
    if is_main and not config.eval_only:
        make_writable(Path(config.out_dir))
    say = print if is_main else lambda *_: None
    if not is_main:
        dist.barrier()  # rank 0 prepares kernel and data, the others find them prepared
    with as_user_error():
        fused.use(config.kernel, world.device)
    kernel = f", {fused.describe(world.device)}" if config.attention in FEATURE_MAPS else ""
    tokens = data.prepare(config.dataset, config.data_dir, config.tokenizer, say)
    if is_main and world.size > 1:
        dist.barrier()
    torch.manual_seed(config.seed)
    model = build_model(config, given, tokens)
    stride = config.eval_stride or config.block_size
    if stride > config.block_size:
        raise UserError(f"eval_stride ({stride}) must not exceed block_size ({config.block_size})")

    def evaluate(model: nn.Module) -> dict:
        ids = tokens.split(config.eval_split if config.eval_only else "validation", config.block_size)
        limit = 0 if config.eval_only else config.eval_tokens
        return perplexity(model, ids, tokens.tokenizer, config.block_size, stride, limit, dtype)

    if config.eval_only:
        result = evaluate(model.to(world.device).eval())
        say(
            f"{config.init_from} on {config.dataset} {config.eval_split}: token perplexity {result['perplexity']:.4f}, "
            f"word perplexity {result['word_perplexity']:.8g}, bits per byte {result['bits_per_byte']:.4f}, "
            f"loss {result['loss']:.4f} nats (context {config.block_size}, stride {stride}, "
            f"{result['tokens']:,} tokens, {result['words']:,} words, {result['bytes']:,} bytes)"
        )
        return

    ids = tokens.split("train", config.block_size)
    tokens.split("validation", config.block_size)  # complain now, not after the first 200 steps
    say(
        f"{config.attention} attention, {model.num_params():,} parameters, on {config.dataset} ({len(ids):,} "
        f"tokens, {tokens.tokenizer.name}), {world.size} x {world.device.type}, "
        f"{str(dtype).removeprefix('torch.')}{kernel}, out_dir {config.out_dir}"
    )
    fit(
        model,
        model.param_groups(config.lr, config.weight_decay, config.map_lr_scale),
        batch=lambda step: data.batch_of(ids, step, config.batch_size, config.block_size, config.seed),
        loss=lambda model, x, y: model(x, y)[1],
        evaluate=evaluate,
        config=config,
        world=world,
        meta={"config": asdict(config), "tokenizer": tokens.tokenizer.name},
    )
    if is_main:
        report(config, model, evaluate, tokens.tokenizer, began)


if __name__ == "__main__":
    try:
        run(main)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
