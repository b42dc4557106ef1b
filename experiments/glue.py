"""Convert a finetuned BERT to linear attention (Tables 2 and 5): the score of its GLUE task recovered, with controls.

    python convert_bert.py cola                                    bert-base-uncased; the paper's rows; one GPU
    python convert_bert.py mrpc --model FOLDER --data_dir GLUE     any BERT, RoBERTa or ELECTRA; local TSV files
    python convert_bert.py stsb --arms teacher_finetuned t2r t2r_hh hedgehog --seeds 3
    python convert_bert.py cola --model NAME_OF_A_COLA_MODEL       finetuned already: no teacher is trained

Tasks: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte. Needs requirements-hf.txt. Hours and memory: README.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data import glue
from experiments.ladder import need
from support.cli import UserError, as_user_error, parse, run

need("transformers", "sklearn")
from experiments.finetuned import HELP, Examples, Model, RecoverConfig, recover  # noqa: E402
from hf.linearize import attention_modules, check_plain, is_causal  # noqa: E402
from hf.models import Classifier, Tokenizer, load, read_config, transformers  # noqa: E402

TABLE_5 = {"elu": 28.1, "relu": 39.5, "performer": 24.7, "cosformer": 39.9, "exp": 45.9, "exp2": 50.0}  # CoLA
KIND = transformers.AutoModelForSequenceClassification
HEADS = ("classifier", "pooler")  # what a model that is not finetuned may lack


@dataclass
class BertConfig(RecoverConfig):
    task: str = "cola"  # cola, sst2, mrpc, stsb, qqp, mnli, qnli or rte
    model: str = "bert-base-uncased"  # hub name or folder of an encoder, finetuned on the task or not
    epochs: float = 5.0  # of finetuning, for every arm and for the teacher that is finetuned longer
    pooling: str = "model"  # of a teacher trained here: the model's own way from tokens to outputs, or their mean
    dataset: str = "glue"  # GLUE, from the hub
    data_dir: str = ""  # folder with GLUE's original TSV files, instead of the hub
    block_size: int = 512  # most tokens of an example; a longer one is refused, or with truncate cut
    truncate: bool = False  # cut examples that are longer than block_size

    def check(self) -> None:
        super().check()
        if self.task not in glue.TASKS:
            raise UserError(f"unknown task {self.task!r}: choose one of {', '.join(glue.TASKS)}")
        if self.dataset != "glue":
            raise UserError(f"--dataset takes glue, not {self.dataset!r}: the task comes first")
        if self.pooling not in ("model", "mean"):
            raise UserError(f"--pooling takes model or mean, not {self.pooling!r}")


# ---------------------------------------------------------------- examples


def encode(rows: list[glue.Row], tokenizer, config: BertConfig, split: str) -> list[tuple[list[int], list[int], float]]:
    """(ids, segments, label) of every row, with the special tokens of the model. Raises UserError for one that is too
    long, unless it shall be cut."""
    if not rows:
        return []
    texts = [list(column) for column in zip(*(row.texts for row in rows))]
    found = tokenizer(*texts, truncation=config.truncate, max_length=config.block_size if config.truncate else None,
                      return_token_type_ids=True, verbose=False)  # fmt: skip
    ids = found["input_ids"]
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if len(ids[longest]) > config.block_size:
        raise UserError(f"example {longest} of {split} has {len(ids[longest])} tokens, the model {config.block_size} "
                        "positions or --block_size: cut such examples with --truncate")  # fmt: skip
    return [(i, s, row.label) for i, s, row in zip(ids, found["token_type_ids"], rows)]


def padded(rows: list[tuple[list[int], list[int], float]], pad: int, regression: bool) -> tuple[Tensor, ...]:
    """Rows as (ids, segments, mask), each (B, T), padded on the right, and labels (B,)."""
    T = max(len(ids) for ids, *_ in rows)
    ids, segments, mask = torch.full((len(rows), T), pad), *torch.zeros(2, len(rows), T, dtype=torch.long)
    for i, (tokens, parts, _) in enumerate(rows):
        n = len(tokens)
        ids[i, :n], segments[i, :n], mask[i, :n] = torch.tensor(tokens), torch.tensor(parts), 1
    labels = [label for *_, label in rows]
    return ids, segments, mask, torch.tensor(labels, dtype=torch.float32 if regression else torch.long)


def examples_of(config: BertConfig) -> Examples:
    task, tokenizer = glue.TASKS[config.task], Tokenizer(config.model).hf
    found, order = glue.load(config.task, config.data_dir), label_order(config)
    sets = {split: encode(rows, tokenizer, config, split) for split, rows in found.items()}
    if order:
        sets = {split: [(*row, order[int(label)]) for *row, label in rows] for split, rows in sets.items()}
    regression, pad = not task.labels, tokenizer.pad_token_id or 0

    def scores(labels: np.ndarray, found: np.ndarray) -> dict[str, float]:
        return glue.scores(task, labels, found)

    return Examples(
        train=sets.pop("train"), tests=sets, collate=lambda rows: padded(rows, pad, regression),
        length=lambda row: len(row[0]), scores=scores, regression=regression,
    )  # fmt: skip


# ---------------------------------------------------------------- models


def is_classifier(of_model) -> bool:
    return any("ForSequenceClassification" in kind for kind in of_model.architectures or [])


def label_order(config: BertConfig) -> list[int]:
    """Which output of a finetuned model is which of the task's labels, if these have names (MNLI, QNLI, RTE) and the
    model's outputs, too: many models have an order of their own. []: GLUE's. Raises UserError for other names."""
    names, of_model = glue.TASKS[config.task].labels, read_config(config.model)
    theirs = [str(of_model.id2label[i]).lower() for i in range(len(names))] if is_classifier(of_model) else []
    if names in ((), glue.BINARY) or all(name.startswith("label_") for name in theirs):
        return []
    if set(theirs) != set(names):
        raise UserError(f"{config.model} tells {', '.join(theirs)} apart, and {config.task} {', '.join(names)}: give a "
                        "model of this task")  # fmt: skip
    return [theirs.index(name) for name in names]


def check_encoder(config: BertConfig) -> bool:
    """Whether the model is finetuned on a task of this kind already. Raises UserError for what cannot be converted:
    before the first hour, on the model's shape, without its weights."""
    n_labels, of_model = glue.TASKS[config.task].n_labels, read_config(config.model)
    try:
        with torch.device("meta"):
            model = KIND.from_config(of_model)
    except ValueError as e:
        raise UserError(f"{config.model} is no model that can classify ({str(e).splitlines()[0][:160]}): give a hub "
                        "name or a folder of a BERT-type encoder") from e  # fmt: skip
    with as_user_error():
        modules = attention_modules(model)
        for module in modules:
            check_plain(module)
    if not modules or any(is_causal(module) for module in modules):
        raise UserError(f"{config.model} ({of_model.model_type}) is not an encoder: convert_llama.py takes decoders")
    taught = is_classifier(of_model)
    if taught and of_model.num_labels != n_labels:
        raise UserError(f"{config.model} has a classifier for {of_model.num_labels} labels, and {config.task} has "
                        f"{n_labels}: give one for this task, or an encoder without a classifier")  # fmt: skip
    positions = getattr(of_model, "max_position_embeddings", config.block_size)
    positions -= of_model.pad_token_id + 1 if of_model.model_type == "roberta" else 0  # its first ones are not used
    config.block_size = min(config.block_size, positions)
    if len(Tokenizer(config.model).hf) > model.get_input_embeddings().weight.size(0):
        raise UserError(f"the tokenizer of {config.model} has more tokens than its embeddings: they do not belong "
                        "together")  # fmt: skip
    if not taught and config.pooling == "mean" and of_model.model_type != "bert":
        raise UserError(f"--pooling mean is for BERT: {of_model.model_type} has a classifier of another form")
    return taught


def models_of(config: BertConfig, taught: bool) -> Model:
    n_labels, tokenizer = glue.TASKS[config.task].n_labels, Tokenizer(config.model)

    def load_classifier(source: str) -> Classifier:
        fresh = () if taught or source != config.model else HEADS
        model = load(source, KIND, new=fresh, num_labels=n_labels)
        return Classifier(model, config.pooling if fresh else "")

    def save(model: nn.Module, folder: Path) -> None:
        model.hf.save_pretrained(folder)
        tokenizer.hf.save_pretrained(folder)

    return Model(load_classifier, save, taught, tokenizer.name)


# ---------------------------------------------------------------- the command


def paper_of(task: str) -> dict[str, float]:
    """What the paper reports for BERT-base, by arm: Table 2, and of CoLA Table 5."""
    found = dict(zip(("teacher", "t2r", "t2r_hh", "hedgehog"), glue.TASKS[task].paper))
    return {arm: x for arm, x in found.items() if x == x} | (TABLE_5 if task == "cola" else {})


def main() -> None:
    with as_user_error():
        config, _ = parse(BertConfig(), sys.argv[1:], f"{__doc__}\n{HELP}", "task")
        config.check()
    config.out_dir = config.out_dir or f"out/{Path(config.model).name}-{config.task}"
    taught = check_encoder(config)
    recover(config, examples_of(config), models_of(config, taught), config.task, paper_of(config.task))


if __name__ == "__main__":
    run(main)
