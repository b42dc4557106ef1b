"""Tables 2 and 5: a BERT that is finetuned on a task of GLUE, converted to linear attention.

    python -m experiments.glue cola                       every arm: Table 5
    python -m experiments.glue mrpc --data_dir GLUE       local TSV files
    python -m experiments.glue stsb --arms teacher_finetuned hedgehog --seeds 3
    python -m experiments.glue cola --model FOLDER        any BERT, RoBERTa, ELECTRA

Tasks: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte. The rows of Table 2 are
--arms teacher teacher_finetuned t2r t2r_hh hedgehog. A model that is finetuned on the task already is the
teacher as it is. GLUE comes from the hub without --data_dir. Needs requirements-hf.txt.

BERT-base on one A100, estimates (docs/gpu.md): 0.3 hours for every arm of CoLA, 14 hours for the eight tasks
of Table 2, 3 GB. MiniLM on one CPU core: 63 minutes for every arm of CoLA. Results: results/finetuned.md.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data import glue
from experiments.finetuned import HELP, RecoverConfig, Task, recover, split_dev
from experiments.ladder import shapes_both
from experiments.pretrained import check_shape, is_taught, stacked
from hf.kinds import attention_modules, is_causal
from hf.models import Classifier, Tokenizer, load, transformers
from support.cli import UserError, as_user_error, parse, run

KIND = transformers.AutoModelForSequenceClassification
HEADS = ("classifier", "pooler")  # a model that is not finetuned may lack these
TABLE_5 = dict(elu=28.1, relu=39.5, performer=24.7, cosformer=39.9, exp_t1=45.9, exp_t2=50.0)  # CoLA

Row = tuple[list[int], list[int], float]  # token ids, segments, label


@dataclass
class BertConfig(RecoverConfig):
    task: str = shapes_both("cola", choices=glue.TASKS)  # a task of GLUE, listed above
    model: str = "bert-base-uncased"  # hub name or folder of an encoder, finetuned or not
    pooling: str = shapes_both("model", choices=["model", "mean"])  # of a new teacher: model, or mean
    # -- training
    epochs: float = 5.0
    dataset: str = "glue"  # always glue in this command
    data_dir: str = ""  # folder with GLUE's original TSV files, instead of the hub
    block_size: int = 512  # most tokens of an example; longer ones need --truncate
    # -- data
    truncate: bool = shapes_both(False)  # cut longer examples at block_size

    def check(self) -> None:
        super().check()
        if self.dataset != "glue":
            raise UserError(f"--dataset takes glue, not {self.dataset!r}: name the task first")


def encode(rows: list[glue.Row], tokenizer, config: BertConfig, split: str) -> list[Row]:
    """Rows as token ids, with special tokens. Raises UserError for one that is too long and not to be cut."""
    texts = [list(column) for column in zip(*(row.texts for row in rows))]
    limit = dict(truncation=config.truncate, max_length=config.block_size)
    found = tokenizer(*texts, return_token_type_ids=True, verbose=False, **limit)
    ids, segments = found["input_ids"], found["token_type_ids"]
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if len(ids[longest]) > config.block_size:
        raise UserError(
            f"example {longest} of {split} has {len(ids[longest])} tokens, and --block_size or the "
            f"model's positions are {config.block_size}: cut such examples with --truncate"
        )
    return [(i, s, row.label) for i, s, row in zip(ids, segments, rows)]


def padded(rows: list[Row], pad: int) -> tuple[Tensor, ...]:
    """Rows as ids, segments and mask, each (B, T), padded on the right, and labels (B,)."""
    ids, segments, labels = zip(*rows)
    ids, mask = stacked(ids, pad)
    return ids, stacked(segments, 0)[0], mask, torch.tensor(labels)  # STS-B's are float32


def task_of(config: BertConfig) -> Task:
    """The examples of config.task, and its models. Raises UserError for models that do not fit the task.

    Lowers config.block_size to the positions of the model.
    """
    task = glue.TASKS[config.task]
    n_labels = len(task.labels) or 1  # one output is a regression
    model = check_shape(config.model, KIND, "a model that can classify, such as BERT")
    of_model, kind = model.config, model.config.model_type
    if any(is_causal(module) for module in attention_modules(model)):
        where = "python -m experiments.llama converts decoders"
        raise UserError(f"{config.model} ({kind}) is not an encoder: {where}")
    taught = is_taught(of_model, KIND, n_labels, config.task)
    if not taught and config.pooling == "mean" and kind != "bert":
        raise UserError(f"--pooling mean is for BERT: {kind} has a classifier of another form")
    positions = getattr(of_model, "max_position_embeddings", config.block_size)
    if kind == "roberta":
        positions -= of_model.pad_token_id + 1  # RoBERTa does not use its first positions
    config.block_size = min(config.block_size, positions)

    found, tokenizer = glue.load(config.task, config.data_dir), Tokenizer(config.model)
    sets = {split: encode(rows, tokenizer.hf, config, split) for split, rows in found.items()}
    if taught and task.labels not in ((), glue.BINARY):
        order = label_order(config, [str(of_model.id2label[i]).lower() for i in range(n_labels)])
        sets = {split: [(*row, order[label]) for *row, label in rows] for split, rows in sets.items()}

    def load_classifier(source, new):
        model = load(source, KIND, new=HEADS if new else (), num_labels=n_labels)
        return Classifier(model, config.pooling if new else "")

    return Task(
        *split_dev(sets.pop("train"), config),
        tests=sets,
        collate=partial(padded, pad=tokenizer.hf.pad_token_id or 0),
        scores=partial(glue.scores, task),
        load=load_classifier,
        taught=taught,
        tokenizer=tokenizer,
        length=lambda row: len(row[0]),
    )


def label_order(config: BertConfig, theirs: list[str]) -> list[int]:
    """The output of a finetuned model, which names them, for each label of the task, which have names, too.

    Raises UserError for other names.
    """
    names = glue.TASKS[config.task].labels
    if all(name.startswith("label_") for name in theirs):
        return list(range(len(names)))  # names by default: the order of GLUE
    if set(theirs) != set(names):
        raise UserError(
            f"{config.model} tells {', '.join(theirs)} apart, and {config.task} "
            f"{', '.join(names)}: give a model of this task"
        )
    return [theirs.index(name) for name in names]


def paper_of(task: str) -> dict[str, float]:
    """The paper's scores of BERT-base by arm: Table 2, and for CoLA also Table 5."""
    found = zip(("teacher", "t2r", "t2r_hh", "hedgehog"), glue.TASKS[task].paper)
    return {arm: score for arm, score in found if score} | (TABLE_5 if task == "cola" else {})


def main() -> None:
    with as_user_error():
        config, _ = parse(BertConfig(), sys.argv[1:], f"{__doc__}\n{HELP}", "task")
        config.check()
    config.out_dir = config.out_dir or f"out/{Path(config.model).name}-{config.task}"
    recover(config, task_of(config), config.task, paper_of(config.task))


if __name__ == "__main__":
    run(main)
