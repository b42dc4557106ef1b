"""Convert a pretrained decoder (Llama, Mistral, Qwen, SmolLM ...) to linear attention, with LoRA or all parameters.

    python convert_llama.py HuggingFaceTB/SmolLM2-135M                        language modelling on WikiText-2
    python convert_llama.py meta-llama/Llama-2-7b-hf --task dialogue          summaries of SAMSum, as in the paper
    python convert_llama.py FOLDER --arms teacher_finetuned t2r hedgehog --finetune all
    python convert_llama.py FOLDER --stage distil                             no further than this

The paper's four rows are the arms teacher (zero-shot), teacher_finetuned (softmax + LoRA), t2r (T2R + LoRA) and
hedgehog (Hedgehog + LoRA). Needs requirements-hf.txt. Hours and memory: README.
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
from distill import ZeroAttention, map_parameters, sockets
from experiments.ladder import (
    ARMS,
    HELP,
    ConvertConfig,
    Subject,
    groups_of,
    ladder,
    language_modelling,
    map_options,
    need,
    table_perplexity,
    table_rouge,
)
from support.checkpoints import checksum
from support.cli import UserError, as_user_error, parse, run
from support.devices import pick_device, step_seed

need("transformers", "peft", "rouge_score")
from hf.linearize import attention_modules, check_plain, linearize, save_linearized  # noqa: E402
from hf.models import LanguageModel, Tokenizer, load, read_config, transformers  # noqa: E402


@dataclass
class LlamaConfig(ConvertConfig):
    model: str = "HuggingFaceTB/SmolLM2-135M"  # hub name, folder, or .gguf file
    task: str = "lm"  # lm: perplexity; dialogue: summaries and ROUGE
    finetune: str = "lora"  # lora, or all parameters
    weights: str = "float32"  # of the loaded model; bfloat16 halves its memory, and goes with lora
    dataset: str = "wikitext2"  # of lm: as train.py's. Of dialogue: samsum or dialogsum
    lora_r: int = 8  # rank of LoRA's update of q, k, v and o
    lora_alpha: int = 16  # the update is scaled by alpha / r
    lr: float = 1e-3  # peak learning rate of finetuning; with all parameters 1e-4 is a better start
    batch_size: int = 2  # sequences an optimiser step sees
    warmup_steps: int = 20  # linear warm-up, then cosine decay to zero
    eval_interval: int = 50  # steps between validations; the best one's checkpoint is kept
    save_interval: int = 200  # steps between checkpoints
    beta2: float = 0.99  # AdamW's memory of the gradient's square
    # dialogue
    loss_on: str = "summary"  # what finetuning learns to write: the summary, or the text (dialogue and summary)
    test_dialogues: int = 200  # dialogues that ROUGE is measured on, none of them trained on
    new_tokens: int = 64  # longest summary
    examples: int = 3  # summaries to print

    def check(self) -> None:
        super().check()
        if self.task not in ("lm", "dialogue"):
            raise UserError(f"--task takes lm or dialogue, not {self.task!r}")
        if self.task == "dialogue" and any(ARMS[name].kept for name in self.arms):
            raise UserError("--arms worst_heads: heads with softmax have no state to write with, use --task lm")
        if self.loss_on not in ("summary", "text"):
            raise UserError(f"--loss_on takes summary or text, not {self.loss_on!r}")
        if self.finetune not in ("lora", "all"):
            raise UserError(f"--finetune takes lora or all, not {self.finetune!r}")
        if self.weights not in ("float32", "bfloat16") or (self.weights == "bfloat16" and self.finetune == "all"):
            raise UserError(f"--weights takes float32, or with --finetune lora bfloat16, not {self.weights!r}")
        if min(self.lora_r, self.lora_alpha, self.test_dialogues, self.new_tokens) < 1:
            raise UserError("lora_r, lora_alpha, test_dialogues and new_tokens must be at least 1")


# ---------------------------------------------------------------- what finetuning trains


def add_lora(model: nn.Module, config: LlamaConfig) -> list[nn.Parameter]:
    """LoRA (Hu et al., 2022) beside the projections of q, k, v and o, in place; returns its parameters, and leaves
    only them and the feature maps trainable. The control without attention has it beside the MLP's."""
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    if any(type(socket.attend) is ZeroAttention for socket in sockets(model)):
        names = ["gate_proj", "up_proj", "down_proj"]  # those do nothing where attention is zero
    inject_adapter_in_model(LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=names), model)
    for p in map_parameters(model):
        p.requires_grad_()
    added = [p for name, p in model.named_parameters() if "lora_" in name]
    for p in added:
        p.data = p.data.float()  # beside weights in bfloat16, too: small steps would be lost
    return added


def merge_lora(model: nn.Module) -> nn.Module:
    """Add LoRA's update to the weights and take the adapters out, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]:
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    return model


def trained_groups(model: nn.Module, config: LlamaConfig) -> list[dict]:
    return groups_of(model, config, add_lora(model, config) if config.finetune == "lora" else None)


def save(model: LanguageModel, folder: Path) -> None:
    """What hf.load_linearized reads."""
    merge_lora(model.hf)
    if sockets(model.hf):
        save_linearized(model.hf, folder / "linear.safetensors")


# ---------------------------------------------------------------- dialogue summarisation


def prompt_of(text: str) -> str:
    return f"Summarize this dialogue.\n{text}\n---\nSummary:\n"


def prompts_of(dialogues: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids, after the model's first token (BOS) if its tokenizer puts one before every text, as Llama's does."""
    begins = tokenizer.hf("")["input_ids"][:1] == [tokenizer.hf.bos_token_id]
    begin = [tokenizer.hf.bos_token_id] if begins else []
    return [begin + ids for ids in tokenizer.encode_many([prompt_of(text) for text in dialogues])]


def dialogue_summaries(config: LlamaConfig, build) -> Subject:
    """Finetuned to write the summary after the dialogue; ROUGE of greedy summaries of dialogues not trained on."""
    tokenizer = Tokenizer(config.model)
    sets = dialogue.load(config.dataset, config.data_dir)
    end, device = tokenizer.hf.eos_token_id, pick_device(config.device)

    def rows_of(pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        prompts = prompts_of([d for d, _ in pairs], tokenizer)
        summaries = tokenizer.encode_many([s for _, s in pairs])
        return [(p, [*s, end]) for p, s in zip(prompts, summaries) if len(p) + len(s) <= config.block_size]

    rows = rows_of(sets["train"])
    test = (sets.get("test") or sets["validation"])[: config.test_dialogues]
    kept = max(config.held_out, 64)
    if len(rows) < 2 * kept:
        raise UserError(f"{len(rows)} of {len(sets['train'])} training dialogues fit into --block_size "
                        f"{config.block_size}: raise it, or give more")  # fmt: skip
    longest = max(map(len, prompts_of([d for d, _ in test], tokenizer))) + config.new_tokens
    if longest > (positions := getattr(read_config(config.model), "max_position_embeddings", longest)):
        raise UserError(f"a dialogue to summarize has {longest} tokens with its summary, {config.model} {positions} "
                        "positions: take a model with more, or shorter dialogues")  # fmt: skip
    print(f"{config.dataset}: {len(rows):,} of {len(sets['train']):,} training dialogues fit into {config.block_size} "
          f"tokens; {kept} of them choose checkpoints; ROUGE on {len(test)} others")  # fmt: skip
    rows, dev = rows[:-kept], rows[-kept:]

    def batch_of(step: int) -> tuple[Tensor, ...]:
        picks = np.random.default_rng(step_seed(config.seed, step)).integers(0, len(rows), config.batch_size)
        return padded([rows[i] for i in picks], end, config.loss_on == "text")

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict:
        nats, n = 0.0, 0
        for i in range(0, len(dev), 8):
            x, y, _ = (t.to(device) for t in padded(dev[i : i + 8], end))
            count = int((y >= 0).sum())
            nats, n = nats + model(x, y)[1].item() * count, n + count
        return {"loss": nats / n}

    def final(model: nn.Module) -> dict:
        written = summarize(model.hf, tokenizer, [d for d, _ in test], config, device)
        for (d, s), w in list(zip(test, written))[: config.examples]:
            print(f"--- dialogue\n{d}\n--- its summary\n{s}\n--- written\n{w}")
        return {**rouge([s for _, s in test], written), "dialogues": len(test), "written": written[:20]}

    return Subject(
        build=build,
        groups=lambda model: trained_groups(model, config),
        batch=batch_of,
        held_out=[padded([row], end) for row in dev[: config.held_out]],
        forward=lambda model, x, y, mask: model(x, mask=mask),  # Eq. 3 is averaged over real tokens
        loss=lambda model, x, y, mask: model(x, y)[1],
        evaluate=evaluate,
        final=final,
        save=save,
        tokenizer=tokenizer.name,
        data=checksum({}, repr(rows)),
    )


def padded(rows: list[tuple[list[int], list[int]]], pad: int, whole: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(prompt, summary) rows as (x, y, mask), (B, T): y is x one token later in the summary (whole: in all of the
    text), and -100 (ignored) elsewhere; mask is 1 at real tokens. Padded on the right, where a causal model's loss
    needs no mask."""
    T = max(len(p) + len(s) for p, s in rows) - 1
    x, y, mask = torch.full((len(rows), T), pad), torch.full((len(rows), T), -100), torch.zeros(len(rows), T).long()
    for i, (p, s) in enumerate(rows):
        ids = torch.tensor(p + s)
        x[i, : len(ids) - 1], mask[i, : len(ids) - 1] = ids[:-1], 1
        first = 1 if whole else len(p)  # that is learned
        y[i, first - 1 : len(ids) - 1] = ids[first:]
    return x, y, mask


@torch.no_grad()
def summarize(model: nn.Module, tokenizer: Tokenizer, dialogues: list[str], config: LlamaConfig, device) -> list[str]:
    """Greedy summaries, 16 dialogues at a time, padded on the left; memory does not grow with linear attention."""
    prompts = prompts_of(dialogues, tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like with like: little padding
    written, end = [""] * len(prompts), tokenizer.hf.eos_token_id
    for start in tqdm(range(0, len(order), 16), desc="summaries", unit="batch", mininterval=10.0):
        picks = order[start : start + 16]
        T = max(len(prompts[i]) for i in picks)
        x = torch.tensor([[end] * (T - len(prompts[i])) + prompts[i] for i in picks], device=device)
        mask = torch.tensor([[0] * (T - len(prompts[i])) + [1] * len(prompts[i]) for i in picks], device=device)
        y = model.generate(input_ids=x, attention_mask=mask, max_new_tokens=config.new_tokens, do_sample=False,
                           pad_token_id=end, eos_token_id=end)  # fmt: skip
        for i, row in zip(picks, y[:, T:].tolist()):
            row = row[: row.index(end)] if end in row else row
            written[i] = tokenizer.hf.decode(row, skip_special_tokens=True).strip()
    return written


def rouge(references: list[str], written: list[str]) -> dict:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, x 100, with stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score(r, w) for r, w in zip(references, written)]
    return {name: 100 * float(np.mean([s[name].fmeasure for s in scores])) for name in ("rouge1", "rouge2", "rougeL")}


# ---------------------------------------------------------------- the command


def check_fits(config: LlamaConfig) -> None:
    """Complain before the first hour, not after it: on the model's shape, without its weights."""
    tokenizer, of_model = Tokenizer(config.model), read_config(config.model)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(of_model)
    except ValueError as e:
        raise UserError(f"{config.model} is no causal language model ({str(e).splitlines()[0][:160]})") from e
    with as_user_error():
        for module in attention_modules(model):
            check_plain(module)
    positions = getattr(of_model, "max_position_embeddings", None) or config.block_size
    if config.block_size > positions:
        raise UserError(f"--block_size {config.block_size}: {config.model} has {positions} positions")
    if tokenizer.vocab_size > model.get_input_embeddings().weight.size(0):
        raise UserError(f"the tokenizer of {config.model} has {tokenizer.vocab_size} tokens, more than its embeddings")
    if config.task == "dialogue" and tokenizer.hf.eos_token_id is None:
        raise UserError(f"the tokenizer of {config.model} has no eos_token, which ends a summary")
    if config.finetune == "lora" and not any(name.endswith("q_proj") for name, _ in model.named_modules()):
        raise UserError("LoRA here goes beside q_proj, k_proj, v_proj and o_proj, which this model has not: use "
                        "--finetune all")  # fmt: skip


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
                linearize(model, feature_map, **map_options(config, feature_map), **options)
        return LanguageModel(model).to(device)

    check_fits(config)
    if config.task == "dialogue":
        ladder(config, dialogue_summaries(config, build), table_rouge)
    else:
        groups = partial(trained_groups, config=config)
        ladder(config, language_modelling(config, build, groups, save, f"hf:{config.model}"), table_perplexity)


if __name__ == "__main__":
    run(main)
