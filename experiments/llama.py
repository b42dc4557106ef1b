"""A pretrained decoder (Llama, Mistral, Qwen, SmolLM ...) converted to linear attention.

    python -m experiments.llama HuggingFaceTB/SmolLM2-135M    WikiText-2, LoRA
    python -m experiments.llama FOLDER --finetune all         all parameters
    python -m experiments.llama FOLDER --task dialogue        summaries of SAMSum
    python -m experiments.llama FOLDER --stage distil         stop after this stage

The paper converts meta-llama/Llama-2-7b-hf with --task dialogue. Its rows are the arms teacher
(zero-shot), teacher_finetuned (softmax + LoRA), t2r (T2R + LoRA) and hedgehog (Hedgehog + LoRA).
Needs requirements-hf.txt.

SmolLM2-135M on a CPU core: 400 steps of distillation and 400 of finetuning take 52 minutes
(results/converting.md). Llama-2 7B needs one A100: about 5 hours for each arm and 67 GB, an
estimate (docs/gpu.md).
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import dialogue
from experiments.ladder import (
    ARMS,
    HELP,
    MAPS,
    TEACHER,
    ConvertConfig,
    Subject,
    groups_of,
    ladder,
    language_modelling,
    table_perplexity,
    table_rouge,
)
from experiments.pretrained import check_shape, check_vocabulary
from hf import linearize, save_linearized
from hf.lora import add_lora, merge_lora
from hf.models import LanguageModel, Tokenizer, load, read_config, transformers
from support.checkpoints import checksum
from support.cli import UserError, as_user_error, parse, run, setting
from support.devices import pick_device, step_seed
from swap import sockets


@dataclass
class LlamaConfig(ConvertConfig):
    model: str = "HuggingFaceTB/SmolLM2-135M"  # hub name, folder, or .gguf file
    task: str = setting("lm", shapes=(MAPS, TEACHER))  # lm: perplexity; dialogue: ROUGE
    weights: str = setting("float32", shapes=(MAPS,))  # float32, or with lora bfloat16: half the memory
    # -- training
    finetune: str = "lora"  # lora, or all parameters
    lora_r: int = 8  # rank of LoRA's update of q, k, v and o
    lora_alpha: int = 16  # the update is scaled by alpha / r
    lr: float = 1e-3  # peak learning rate of finetuning; with all parameters start at 1e-4
    batch_size: int = 2
    warmup_steps: int = 20
    beta2: float = 0.99
    # -- data
    dataset: str = "wikitext2"  # lm: a data set of train.py; dialogue: samsum or dialogsum
    # -- summaries (task dialogue)
    loss_on: str = "summary"  # finetune on the summary, or on the text (dialogue and summary)
    test_dialogues: int = setting(200, may_change=True)  # dialogues that ROUGE is measured on
    new_tokens: int = setting(64, may_change=True)  # tokens of the longest summary
    examples: int = setting(3, may_change=True)  # number of summaries to print
    # -- output
    eval_interval: int = 50
    save_interval: int = 200

    def check(self) -> None:
        super().check()
        takes = {
            "task": ("lm", "dialogue"),
            "loss_on": ("summary", "text"),
            "finetune": ("lora", "all"),
            "weights": ("float32", "bfloat16"),
        }
        for name, (one, other) in takes.items():
            if getattr(self, name) not in (one, other):
                raise UserError(f"--{name} takes {one} or {other}, not {getattr(self, name)!r}")
        if self.weights == "bfloat16" and self.finetune == "all":
            raise UserError("--weights bfloat16 needs --finetune lora: small steps would be lost")
        if self.task == "dialogue" and any(ARMS[name].kept for name in self.arms):
            raise UserError(
                "--arms worst_heads needs --task lm: heads with softmax have no state to write with"
            )
        if min(self.lora_r, self.lora_alpha, self.test_dialogues, self.new_tokens) < 1:
            raise UserError("lora_r, lora_alpha, test_dialogues and new_tokens must be at least 1")


# ---------------------------------------------------------------- models


def trained_groups(model: nn.Module, config: LlamaConfig) -> list[dict]:
    """AdamW's groups: LoRA or all parameters, and the feature maps."""
    if config.finetune == "all":
        return groups_of(model, config)
    return groups_of(model, config, add_lora(model, config.lora_r, config.lora_alpha))


def save(model: LanguageModel, folder: Path) -> None:
    """Write a file that hf.load_linearized reads, with LoRA merged into the weights."""
    merge_lora(model.hf)
    if sockets(model.hf):
        save_linearized(model.hf, folder / "linear.safetensors")


def check_model(config: LlamaConfig) -> None:
    """Raise UserError if the model cannot be converted with these settings."""
    model = check_shape(config.model, transformers.AutoModelForCausalLM, "a causal language model")
    tokenizer = Tokenizer(config.model)
    check_vocabulary(config.model, tokenizer, model)
    positions = getattr(model.config, "max_position_embeddings", None) or config.block_size
    if config.block_size > positions:
        raise UserError(f"--block_size {config.block_size}: {config.model} has {positions} positions")
    if config.task == "dialogue" and tokenizer.hf.eos_token_id is None:
        raise UserError(f"the tokenizer of {config.model} has no eos_token, which ends a summary")
    names = [name for name, _ in model.named_modules()]
    if config.finetune == "lora" and not any(name.endswith("q_proj") for name in names):
        raise UserError(
            "LoRA needs the projections q_proj, k_proj, v_proj and o_proj, which this model lacks: "
            "use --finetune all"
        )


# ---------------------------------------------------------------- dialogue summarisation


def prompt_of(text: str) -> str:
    return f"Summarize this dialogue.\n{text}\n---\nSummary:\n"


def prompts_of(dialogues: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids. They begin with BOS if the tokenizer begins every text so, as Llama's does."""
    begins = tokenizer.hf("")["input_ids"][:1] == [tokenizer.hf.bos_token_id]
    begin = [tokenizer.hf.bos_token_id] if begins else []
    return [begin + ids for ids in tokenizer.encode_many([prompt_of(text) for text in dialogues])]


def dialogue_summaries(config: LlamaConfig, build) -> Subject:
    """The task of writing the summary after a dialogue.

    Finetuned on dialogues with summaries; greedy summaries of other dialogues are scored by ROUGE.
    """
    tokenizer = Tokenizer(config.model)
    sets = dialogue.load(config.dataset, config.data_dir)
    end, device = tokenizer.hf.eos_token_id, pick_device(config.device)

    def rows_of(pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """(prompt, summary) as token ids, of the pairs that fit into block_size."""
        prompts = prompts_of([d for d, _ in pairs], tokenizer)
        summaries = tokenizer.encode_many([s for _, s in pairs])
        rows = [(p, [*s, end]) for p, s in zip(prompts, summaries)]
        return [(p, s) for p, s in rows if len(p) + len(s) - 1 <= config.block_size]

    rows = rows_of(sets["train"])
    test = (sets.get("test") or sets["validation"])[: config.test_dialogues]
    kept = max(config.held_out, 64)
    if len(rows) < 2 * kept:
        raise UserError(
            f"{len(rows)} of {len(sets['train'])} training dialogues fit into --block_size "
            f"{config.block_size}: raise it, or give more"
        )
    longest = max(map(len, prompts_of([d for d, _ in test], tokenizer))) + config.new_tokens
    positions = getattr(read_config(config.model), "max_position_embeddings", longest)
    if longest > positions:
        raise UserError(
            f"a dialogue to summarize has {longest} tokens with its summary, {config.model} "
            f"{positions} positions: take a model with more, or shorter dialogues"
        )
    print(
        f"{config.dataset}: {len(rows):,} of {len(sets['train']):,} training dialogues fit into "
        f"{config.block_size} tokens; {kept} of them choose checkpoints; ROUGE on {len(test)} "
        "others"
    )
    rows, dev = rows[:-kept], rows[-kept:]

    def batch_of(step: int) -> tuple[Tensor, ...]:
        rng = np.random.default_rng(step_seed(config.seed, step))
        picks = rng.integers(0, len(rows), config.batch_size)
        return padded([rows[i] for i in picks], end, config.loss_on == "text")

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict:
        nats, n = 0.0, 0
        for i in range(0, len(dev), 8):
            x, y, _ = (t.to(device) for t in padded(dev[i : i + 8], end))
            count = int((y >= 0).sum())
            nats, n = nats + model(x, y)[1].item() * count, n + count
        return {"loss": nats / n, "loss_name": "validation loss of the summary"}

    def final(model: nn.Module) -> dict:
        written = summarize(model.hf, tokenizer, [d for d, _ in test], config, device)
        for (d, s), w in list(zip(test, written))[: config.examples]:
            print(f"--- dialogue\n{d}\n--- its summary\n{s}\n--- written\n{w}")
        scores = rouge([s for _, s in test], written)
        return {**scores, "dialogues": len(test), "written": written[:20]}

    return Subject(
        build=build,
        groups=partial(trained_groups, config=config),
        batch=batch_of,
        held_out=[padded([row], end) for row in dev[: config.held_out]],
        forward=lambda model, x, y, mask: model(x, mask=mask),  # Eq. 3 averages over real tokens
        loss=lambda model, x, y, mask: model(x, y)[1],
        evaluate=evaluate,
        final=final,
        save=save,
        tokenizer=tokenizer.name,
        data=checksum({}, repr(rows)),
    )


def padded(
    rows: list[tuple[list[int], list[int]]], pad: int, whole: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(prompt, summary) rows as x, y, mask, each (B, T), padded on the right.

    y is x one token later in the summary (whole: in all of the text), and elsewhere -100, which
    the loss ignores. mask is 1 at real tokens. The loss of a causal model needs no mask, since
    padding comes after all real tokens.
    """
    T = max(len(p) + len(s) for p, s in rows) - 1
    x, y = torch.full((len(rows), T), pad), torch.full((len(rows), T), -100)
    mask = torch.zeros(len(rows), T, dtype=torch.long)
    for i, (p, s) in enumerate(rows):
        ids = torch.tensor(p + s)
        n = len(ids) - 1
        x[i, :n], mask[i, :n] = ids[:-1], 1
        first = 1 if whole else len(p)  # the first token that is learned
        y[i, first - 1 : n] = ids[first:]
    return x, y, mask


@torch.no_grad()
def summarize(
    model: nn.Module, tokenizer: Tokenizer, dialogues: list[str], config: LlamaConfig, device
) -> list[str]:
    """Greedy summaries, 16 dialogues at a time, padded on the left."""
    prompts = prompts_of(dialogues, tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    written, end = [""] * len(prompts), tokenizer.hf.eos_token_id
    for start in tqdm(range(0, len(order), 16), desc="summaries", unit="batch", mininterval=10.0):
        picks = order[start : start + 16]
        T = max(len(prompts[i]) for i in picks)
        gaps = [T - len(prompts[i]) for i in picks]
        x = torch.tensor([[end] * gap + prompts[i] for gap, i in zip(gaps, picks)], device=device)
        mask = torch.tensor([[0] * gap + [1] * (T - gap) for gap in gaps], device=device)
        y = model.generate(
            input_ids=x,
            attention_mask=mask,
            max_new_tokens=config.new_tokens,
            do_sample=False,
            pad_token_id=end,
            eos_token_id=end,
        )
        for i, row in zip(picks, y[:, T:].tolist()):
            row = row[: row.index(end)] if end in row else row
            written[i] = tokenizer.hf.decode(row, skip_special_tokens=True).strip()
    return written


def rouge(references: list[str], written: list[str]) -> dict:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, x 100, with stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(names), use_stemmer=True)
    scores = [scorer.score(r, w) for r, w in zip(references, written)]
    return {name: 100 * float(np.mean([s[name].fmeasure for s in scores])) for name in names}


# ---------------------------------------------------------------- the command


def main() -> None:
    with as_user_error():
        config, given = parse(LlamaConfig(), sys.argv[1:], f"{__doc__}\n{HELP}", "model")
        config.check()
    if config.task == "dialogue" and "dataset" not in given:
        config.dataset = "samsum"
    name = Path(config.model).name.removesuffix(".gguf")
    config.out_dir = config.out_dir or f"out/{name}-{config.dataset}-{config.finetune}"
    config.distil_dir = config.distil_dir or f"out/{name}-{config.dataset}-maps"
    device = pick_device(config.device)

    def build(feature_map: str, **options) -> nn.Module:
        model = load(config.model, dtype=getattr(torch, config.weights))
        with as_user_error():
            if feature_map:
                linearize(model, feature_map, **options)
        return LanguageModel(model).to(device)

    check_model(config)
    if config.task == "dialogue":
        ladder(config, dialogue_summaries(config, build), table_rouge)
    else:
        groups = partial(trained_groups, config=config)
        subject = language_modelling(config, build, groups, save, f"hf:{config.model}")
        ladder(config, subject, table_perplexity)


if __name__ == "__main__":
    run(main)
