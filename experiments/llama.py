"""A pretrained decoder (Llama, Mistral, Qwen, SmolLM ...) converted to linear attention.

    python -m experiments.llama HuggingFaceTB/SmolLM2-135M    WikiText-2, LoRA
    python -m experiments.llama FOLDER --finetune all         all parameters
    python -m experiments.llama FOLDER --task dialogue        summaries of SAMSum
    python -m experiments.llama FOLDER --stage distil         stop after this stage

The paper converts meta-llama/Llama-2-7b-hf with --task dialogue. Its rows are the arms teacher (zero-shot),
teacher_finetuned (softmax + LoRA), t2r (T2R + LoRA) and hedgehog (Hedgehog + LoRA). Needs
requirements-hf.txt.

SmolLM2-135M on a CPU core: 400 steps of distillation and 400 of finetuning take 52 minutes
(results/converting.md). Llama-2 7B needs one A100: about 5 hours for each arm and 67 GB, an estimate
(docs/gpu.md).
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from config import may_change
from data import dialogue
from experiments import ladder
from experiments.ladder import ConvertConfig, Subject, shapes_both, shapes_maps
from experiments.pretrained import build, by_length, check_shape, save, stacked
from hf.lora import add_lora
from hf.models import LanguageModel, Tokenizer, load, transformers
from support.checkpoints import checksum
from support.cli import UserError, as_user_error, parse, run, setting
from support.devices import pick_device, step_seed


@dataclass
class LlamaConfig(ConvertConfig):
    model: str = "HuggingFaceTB/SmolLM2-135M"  # hub name, folder, or .gguf file
    task: str = shapes_both("lm", choices=["lm", "dialogue"])  # lm: perplexity; dialogue: ROUGE
    dataset: str = "wikitext2"  # lm: a data set of train.py; dialogue: samsum or dialogsum
    lr: float = 1e-3  # peak learning rate of finetuning; with all parameters start at 1e-4
    batch_size: int = 2
    warmup_steps: int = 20
    beta2: float = 0.99
    eval_interval: int = 50
    # -- training
    weights: str = shapes_maps("float32", choices=["float32", "bfloat16"])  # bfloat16 (lora): half the memory
    finetune: str = setting("lora", choices=["lora", "all"])  # lora, or all parameters
    lora_r: int = 8  # rank of LoRA's update of q, k, v and o
    lora_alpha: int = 16  # the update is scaled by alpha / r
    # -- summaries (task dialogue)
    loss_on: str = setting("summary", choices=["summary", "text"])  # loss on it; text: dialogue and summary
    test_dialogues: int = may_change(200)  # dialogues that ROUGE is measured on
    new_tokens: int = may_change(64)  # tokens of the longest summary
    examples: int = may_change(3, least=0)  # number of summaries to print

    def check(self) -> None:
        super().check()
        if self.weights == "bfloat16" and self.finetune == "all":
            raise UserError("--weights bfloat16 needs --finetune lora: small steps would be lost")


def trained_groups(model: nn.Module, config: LlamaConfig) -> list[dict]:
    """AdamW's groups: LoRA or all parameters, and the feature maps."""
    lora = None if config.finetune == "all" else add_lora(model, config.lora_r, config.lora_alpha)
    return ladder.groups_of(model, config, lora)


def positions_of(config: LlamaConfig) -> int:
    """How many positions the model has. Raises UserError if it cannot be converted with these settings."""
    model = check_shape(config.model, transformers.AutoModelForCausalLM, "a causal language model")
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    if config.block_size > positions:
        raise UserError(f"--block_size {config.block_size}: {config.model} has {positions} positions")
    names = [name for name, _ in model.named_modules()]
    if config.finetune == "lora" and not any(name.endswith("q_proj") for name in names):
        lacks = "LoRA needs the projections q_proj, k_proj, v_proj and o_proj, which this model lacks"
        raise UserError(f"{lacks}: use --finetune all")
    return positions


# ---------------------------------------------------------------- dialogue summarisation


def prompt_of(text: str) -> str:
    return f"Summarize this dialogue.\n{text}\n---\nSummary:\n"


def prompts_of(dialogues: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids. They begin with BOS if the tokenizer begins every text so, as Llama's does."""
    bos = [tokenizer.hf.bos_token_id]
    begin = bos if tokenizer.hf("")["input_ids"][:1] == bos else []
    return [begin + ids for ids in tokenizer.encode_many([prompt_of(text) for text in dialogues])]


def dialogue_summaries(config: LlamaConfig, build: Callable, positions: int) -> Subject:
    """The task of writing the summary after a dialogue; greedy summaries are scored by ROUGE."""
    tokenizer, device = Tokenizer(config.model), pick_device(config.device)
    if (end := tokenizer.hf.eos_token_id) is None:
        raise UserError(f"the tokenizer of {config.model} has no eos_token, which ends a summary")
    sets = dialogue.load(config.dataset, config.data_dir)
    dialogues, summaries = map(list, zip(*sets["train"]))
    pairs = zip(prompts_of(dialogues, tokenizer), tokenizer.encode_many(summaries))
    rows = [(p, [*s, end]) for p, s in pairs if len(p) + len(s) <= config.block_size]
    test = (sets.get("test") or sets["validation"])[: config.test_dialogues]
    asked, wanted = map(list, zip(*test))
    kept = max(config.held_out, 64)
    if len(rows) < 2 * kept:
        raise UserError(
            f"{len(rows)} of {len(dialogues)} training dialogues fit into --block_size {config.block_size}: "
            "raise it, or give more"
        )
    longest = max(map(len, prompts_of(asked, tokenizer))) + config.new_tokens
    if longest > positions:
        raise UserError(
            f"a dialogue to summarize has {longest} tokens with its summary, {config.model} "
            f"{positions} positions: take a model with more, or shorter dialogues"
        )
    print(
        f"{config.dataset}: {len(rows):,} of {len(dialogues):,} training dialogues fit into "
        f"{config.block_size} tokens; {kept} of them choose checkpoints; ROUGE on {len(test)} others"
    )
    rows, dev = rows[:-kept], rows[-kept:]

    def batch_of(step):
        rng = np.random.default_rng(step_seed(config.seed, step))
        picks = rng.integers(0, len(rows), config.batch_size)
        return padded([rows[i] for i in picks], end, config.loss_on == "text")

    @torch.no_grad()
    def evaluate(model):
        nats, n = 0.0, 0
        for i in range(0, len(dev), 8):
            x, y, _ = (t.to(device) for t in padded(dev[i : i + 8], end))
            count = int((y >= 0).sum())
            nats, n = nats + model(x, y)[1].item() * count, n + count
        return {"loss": nats / n, "loss_name": "validation loss of the summary"}

    def final(model):
        written = summarize(model.hf, tokenizer, asked, config, device)
        for (d, s), w in zip(test[: config.examples], written):
            print(f"--- dialogue\n{d}\n--- its summary\n{s}\n--- written\n{w}")
        return {**rouge(wanted, written), "dialogues": len(test), "written": written[:20]}

    return Subject(
        build=build,
        groups=trained_groups,
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


def padded(rows: list[tuple], pad: int, whole: bool = False) -> tuple[Tensor, ...]:
    """(prompt, summary) rows as x, y, mask, each (B, T), padded on the right.

    y is x one token later in the summary (whole: in all of the text). Elsewhere it is -100, which the loss
    ignores. mask is 1 at real tokens; the loss of a causal model needs none, since padding comes last.
    """
    firsts = [1 if whole else len(p) for p, _ in rows]  # the first token that is learned
    texts = [p + s for p, s in rows]
    x, mask = stacked([ids[:-1] for ids in texts], pad)
    y, _ = stacked([[-100] * (first - 1) + ids[first:] for first, ids in zip(firsts, texts)], -100)
    return x, y, mask


@torch.no_grad()
def summarize(
    model: nn.Module, tokenizer: Tokenizer, dialogues: list[str], config: LlamaConfig, device
) -> list[str]:
    """Greedy summaries, 16 dialogues at a time, padded on the left."""
    prompts, end = prompts_of(dialogues, tokenizer), tokenizer.hf.eos_token_id
    written = [""] * len(prompts)
    how = dict(max_new_tokens=config.new_tokens, do_sample=False, pad_token_id=end, eos_token_id=end)
    for picks in by_length(prompts, len, 16, "summaries"):
        x, mask = stacked([prompts[i] for i in picks], end, "left")
        y = model.generate(input_ids=x.to(device), attention_mask=mask.to(device), **how)
        for i, row in zip(picks, y[:, x.size(1) :].tolist()):
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


def subject_of(config: LlamaConfig) -> Subject:
    """What the ladder needs to know. Names the folders in config that have no name yet."""
    name = f"out/{Path(config.model).name.removesuffix('.gguf')}-{config.dataset}"
    config.out_dir = config.out_dir or f"{name}-{config.finetune}"
    config.distil_dir = config.distil_dir or f"{name}-maps"
    positions = positions_of(config)

    def build_with(feature_map, **options):
        model = LanguageModel(load(config.model, dtype=getattr(torch, config.weights)))
        return build(model, pick_device(config.device), feature_map, **options)

    if config.task == "dialogue":
        return dialogue_summaries(config, build_with, positions)
    return ladder.language_modelling(config, build_with, trained_groups, save, f"hf:{config.model}")


def main() -> None:
    with as_user_error():
        config, given = parse(LlamaConfig(), sys.argv[1:], f"{__doc__}\n{ladder.HELP}", "model")
        config.check()
    if config.task == "dialogue" and "dataset" not in given:
        config.dataset = "samsum"
    table = ladder.table_rouge if config.task == "dialogue" else ladder.table_perplexity
    ladder.ladder(config, subject_of(config), table)


if __name__ == "__main__":
    run(main)
