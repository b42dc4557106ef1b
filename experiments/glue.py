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
from experiments.finetuned import HELP, Examples, Model, RecoverConfig, recover
from experiments.ladder import shapes_both
from experiments.pretrained import check_shape, has_head, stacked
from hf.convert import attention_modules, is_causal
from hf.models import Classifier, Tokenizer, load, read_config, transformers
from support.cli import UserError, as_user_error, parse, run

KIND, HEAD = transformers.AutoModelForSequenceClassification, "ForSequenceClassification"
HEADS = ("classifier", "pooler")  # a model that is not finetuned may lack these
TABLE_5 = dict(elu=28.1, relu=39.5, performer=24.7, cosformer=39.9, exp_t1=45.9, exp_t2=50.0)  # CoLA

Row = tuple[list[int], list[int], float]  # token ids, segments, label


@dataclass
class BertConfig(RecoverConfig):
    task: str = shapes_both("cola")  # a task of GLUE, listed above
    model: str = "bert-base-uncased"  # hub name or folder of an encoder, finetuned or not
    pooling: str = shapes_both("model")  # of a new teacher: model, or mean
    # -- training
    epochs: float = 5.0  # epochs of finetuning, for every arm, also the teacher
    # -- data
    dataset: str = "glue"  # always glue in this command
    data_dir: str = ""  # folder with GLUE's original TSV files, instead of the hub
    block_size: int = 512  # most tokens of an example; longer ones need --truncate
    truncate: bool = shapes_both(False)  # cut longer examples at block_size

    def check(self) -> None:
        super().check()
        if self.task not in glue.TASKS:
            raise UserError(f"unknown task {self.task!r}: choose one of {', '.join(glue.TASKS)}")
        if self.dataset != "glue":
            raise UserError(f"--dataset takes glue, not {self.dataset!r}: name the task first")
        if self.pooling not in ("model", "mean"):
            raise UserError(f"--pooling takes model or mean, not {self.pooling!r}")


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


def padded(rows: list[Row], pad: int, regression: bool) -> tuple[Tensor, ...]:
    """Rows as ids, segments and mask, each (B, T), padded on the right, and labels (B,)."""
    ids, segments, labels = zip(*rows)
    ids, mask = stacked(ids, pad)
    dtype = torch.float32 if regression else torch.long
    return ids, stacked(segments, 0)[0], mask, torch.tensor(labels, dtype=dtype)


def examples_of(config: BertConfig) -> Examples:
    task, tokenizer = glue.TASKS[config.task], Tokenizer(config.model).hf
    found, order = glue.load(config.task, config.data_dir), label_order(config)
    sets = {split: encode(rows, tokenizer, config, split) for split, rows in found.items()}
    if order:
        sets = {split: [(*row, order[int(label)]) for *row, label in rows] for split, rows in sets.items()}
    regression, pad = not task.labels, tokenizer.pad_token_id or 0
    return Examples(
        train=sets.pop("train"),
        tests=sets,
        collate=lambda rows: padded(rows, pad, regression),
        length=lambda row: len(row[0]),
        scores=partial(glue.scores, task),
        regression=regression,
    )


def label_order(config: BertConfig) -> list[int]:
    """The output of a finetuned model for each label of the task; [] if GLUE's order is right.

    The order is known where the labels of the task (MNLI, QNLI, RTE) and the outputs of the model have names.
    Raises UserError for other names.
    """
    names, of_model = glue.TASKS[config.task].labels, read_config(config.model)
    theirs = []
    if has_head(of_model, HEAD):
        theirs = [str(of_model.id2label[i]).lower() for i in range(len(names))]
    if names in ((), glue.BINARY) or all(name.startswith("label_") for name in theirs):
        return []
    if set(theirs) != set(names):
        raise UserError(
            f"{config.model} tells {', '.join(theirs)} apart, and {config.task} "
            f"{', '.join(names)}: give a model of this task"
        )
    return [theirs.index(name) for name in names]


def check_encoder(config: BertConfig) -> bool:
    """Whether the model is finetuned on a task of this kind already.

    Lowers config.block_size to the positions of the model. Raises UserError if it cannot be converted.
    """
    model = check_shape(config.model, KIND, "a model that can classify, such as BERT")
    of_model, n_labels = model.config, glue.TASKS[config.task].n_labels
    if any(is_causal(module) for module in attention_modules(model)):
        name = f"{config.model} ({of_model.model_type})"
        raise UserError(f"{name} is not an encoder: python -m experiments.llama converts decoders")
    taught = has_head(of_model, HEAD)
    if taught and of_model.num_labels != n_labels:
        raise UserError(
            f"{config.model} has a classifier for {of_model.num_labels} labels, and {config.task} "
            f"has {n_labels}: give one for this task, or an encoder without a classifier"
        )
    positions = getattr(of_model, "max_position_embeddings", config.block_size)
    if of_model.model_type == "roberta":
        positions -= of_model.pad_token_id + 1  # RoBERTa does not use its first positions
    config.block_size = min(config.block_size, positions)
    if not taught and config.pooling == "mean" and of_model.model_type != "bert":
        raise UserError(f"--pooling mean is for BERT: {of_model.model_type} has a classifier of another form")
    return taught


def models_of(config: BertConfig, taught: bool) -> Model:
    n_labels, tokenizer = glue.TASKS[config.task].n_labels, Tokenizer(config.model)

    def load_classifier(source: str) -> Classifier:
        fresh = () if taught or source != config.model else HEADS
        model = load(source, KIND, new=fresh, num_labels=n_labels)
        return Classifier(model, config.pooling if fresh else "")

    return Model(load_classifier, taught, tokenizer)


def paper_of(task: str) -> dict[str, float]:
    """The paper's scores of BERT-base by arm: Table 2, and for CoLA also Table 5."""
    found = dict(zip(("teacher", "t2r", "t2r_hh", "hedgehog"), glue.TASKS[task].paper))
    known = {arm: score for arm, score in found.items() if score == score}  # not NaN
    return known | (TABLE_5 if task == "cola" else {})


def main() -> None:
    with as_user_error():
        config, _ = parse(BertConfig(), sys.argv[1:], f"{__doc__}\n{HELP}", "task")
        config.check()
    config.out_dir = config.out_dir or f"out/{Path(config.model).name}-{config.task}"
    taught = check_encoder(config)
    recover(config, examples_of(config), models_of(config, taught), config.task, paper_of(config.task))


if __name__ == "__main__":
    run(main)
