"""Train or finetune a GPT with softmax or linear attention: one loop, `fit`, and one command.

    python train.py                                  a small GPT on Python's standard library, minutes on a CPU
    python train.py wikitext103                      the paper's recipe (Table 1), one GPU
    python train.py --attention softmax              or elu, performer, taylor ...: any feature map
    python train.py --dataset text --data_dir FILE_OR_FOLDER
    python train.py --eval_only --init_from out/stdlib-hedgehog
    torchrun --nproc_per_node=2 train.py             several GPUs, or CPU processes

config.py has the recipes and every setting. Any setting can be given on the command line.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import data
import fused
from config import FitConfig, TrainConfig, read_config
from feature_maps import FEATURE_MAPS
from model import GPT, GPTConfig
from perplexity import perplexity
from support.checkpoints import load_checkpoint, restore
from support.cli import UserError, as_user_error, run
from support.devices import World, join_world, pick_dtype, pieces_of_a_batch, step_seed
from support.log import Watch, report
from support.muon import Muon
from support.resuming import StopSignal, begin, make_writable, require_finite


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
    """The training loop: every script that trains calls it. Returns the last evaluation.

    model: what is saved and evaluated.    groups: the parameters that train, as AdamW's groups with names.
    batch(step): the whole batch of a step on the CPU, tensors of batch_size rows; a function of the step alone.
        Processes and pieces divide the rows, so their number changes nothing (but which units drop out).
    loss(model, *rows): the mean loss of some rows.
    evaluate(model): a dict with "loss"; the checkpoint with the lowest one is kept as the best.
    meta: what checkpoints and log say beside the progress; meta["config"] has everything that was set.

    Stops at max_steps, at a validation loss of stop_loss, or after `patience` validations without a better one.
    Writes last.safetensors, best.safetensors (without frozen parameters) and log.jsonl into out_dir. Raises
    NotFinite when the loss is not finite, and KeyboardInterrupt, after saving, on Ctrl-C.
    """
    out, device = Path(config.out_dir), world.device
    n_pieces = pieces_of_a_batch(config.batch_size, config.grad_accum, world.size)
    bfloat16 = pick_dtype(config.dtype, device) == torch.bfloat16
    model.to(device).train()
    kind = Muon if config.muon else torch.optim.AdamW
    optimizer = kind(groups, betas=(config.beta1, config.beta2), fused=device.type != "mps")
    peak_lrs = [group["lr"] for group in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    progress, log = begin(out, model, optimizer, config, world, meta)
    if config.compile:
        model.compile()
    parallel, watch = world.wrap(model), Watch(log, config, progress.step, world)

    with StopSignal() as stop:
        while progress.step < config.max_steps and not progress.enough(config):
            step, rows = progress.step, batch(progress.step)
            for group, peak in zip(optimizer.param_groups, peak_lrs):
                group["lr"] = peak * lr_factor(step, config)
            torch.manual_seed(step_seed(config.seed, step, world.rank))  # dropout
            total = torch.zeros((), device=device)

            # the step: forward and backward, piece by piece; clip the gradient; update
            for piece, exchange in world.pieces(rows, n_pieces, parallel):
                with exchange:
                    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                        mean_loss = loss(parallel, *piece) / n_pieces
                    mean_loss.backward()
                total += mean_loss.detach()
            norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
            total = world.mean(total)
            require_finite(step + 1, total, norm, optimizer, out)
            torch.nn.utils.clip_grads_with_norm_(params, config.grad_clip or math.inf, norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # beside the step: log, validate, save, stop
            progress.step = done = step + 1
            watch.step(done, total, norm, optimizer.param_groups[0]["lr"], rows[0].numel())
            if done % config.eval_interval == 0 or done == config.max_steps:
                if world.is_main:
                    watch.validation(done, evaluate(model.eval()))
                    model.train()
                    if progress.validated(watch.result["loss"]):
                        progress.save(out / "best.safetensors", model, optimizer, meta)
                progress.best, progress.since = world.shared([progress.best, progress.since])
            stopping = world.mean(torch.tensor(float(bool(stop.asked)), device=device)).item() > 0
            at_end = done == config.max_steps or progress.enough(config)
            if world.is_main and (done % config.save_interval == 0 or at_end or stopping):
                progress.save(out / "last.safetensors", model, optimizer, meta)
            if stopping and not at_end:
                watch.close()
                why = f"stopped by {stop.asked or 'a signal'} after step {done}, saved in {out}"
                raise KeyboardInterrupt(world.is_main * f"{why}: go on with the same command and --resume")
    watch.close()
    return watch.result


# ---------------------------------------------------------------- beside the loop


def lr_factor(step: int, config: FitConfig) -> float:
    """The learning rate of a step as a fraction of its peak: linear warm-up, then cosine to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


# ---------------------------------------------------------------- the command: language modelling


def build_model(config: TrainConfig, given: set[str], tokens: data.Tokens) -> GPT:
    """A new GPT, or the one in --init_from. A flag that contradicts the checkpoint is an error."""
    if not config.init_from:
        config.vocab_size = tokens.vocab_size
        with as_user_error():
            return GPT(GPTConfig.of(asdict(config)))
    tensors, saved = load_checkpoint(config.init_from)
    if saved["tokenizer"] != tokens.tokenizer.name:
        raise UserError(
            f"--tokenizer {tokens.tokenizer.name} contradicts {config.init_from}, which was trained on "
            f"{saved['tokenizer']} tokens: leave it out"
        )
    with as_user_error():
        there = GPTConfig.of(saved["config"])
    free = {"dropout"} | ({"block_size"} if there.max_length == math.inf else set())  # they shape no weights
    for name in (f.name for f in fields(GPTConfig)):
        old, new = getattr(there, name), getattr(config, name)
        if name in given and name not in free and new != old:
            raise UserError(f"--{name} {new} contradicts {config.init_from}, which has {old}: leave it out")
        if name not in given or name not in free:
            setattr(config, name, old)
    with as_user_error():
        model = GPT(GPTConfig.of(asdict(config)))
    restore(tensors, model, path=config.init_from)
    data.check_tokenizer(model, tokens.tokenizer)
    return model


def main() -> None:
    config, given = read_config(sys.argv[1:], __doc__)
    began = time.perf_counter()
    world = join_world(config.device)
    say = print if world.is_main else lambda *_: None
    dtype = pick_dtype(config.dtype, world.device)
    if config.eval_only and config.dtype == "auto":
        dtype = torch.float32  # numbers that can be compared between machines
    if world.is_main and not config.eval_only:
        make_writable(Path(config.out_dir))
    if not world.is_main:
        world.wait()  # the main process builds the kernel and prepares the data; the others find them
    with as_user_error():
        fused.use(config.kernel, world.device)
    kernel = f", {fused.describe(world.device)}" if config.attention in FEATURE_MAPS else ""
    tokens = data.prepare(config.dataset, config.data_dir, config.tokenizer, say)
    if world.is_main:
        world.wait()
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
        by_word = f"word perplexity {result['word_perplexity']:.8g}, " * (tokens.tokenizer.name != "bytes")
        say(
            f"{config.init_from} on {config.dataset} {config.eval_split}: token perplexity {result['perplexity']:.4f}, "
            f"{by_word}bits per byte {result['bits_per_byte']:.4f}, loss {result['loss']:.4f} nats "
            f"(context {config.block_size}, stride {stride}, "
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
        groups=model.param_groups(config.lr, config.weight_decay, config.map_lr_scale),
        batch=lambda step: data.batch_of(ids, step, config.batch_size, config.block_size, config.seed),
        loss=lambda model, x, y: model(x, y)[1],
        evaluate=evaluate,
        config=config,
        world=world,
        meta={"config": asdict(config), "tokenizer": tokens.tokenizer.name},
    )
    if world.is_main:
        report(config, model, evaluate, tokens.tokenizer, began)


if __name__ == "__main__":
    try:
        run(main)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
