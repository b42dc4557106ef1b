"""Random models and made-up data sets of a few kilobytes, saved in folders as the real ones are."""

import json
from pathlib import Path

import numpy as np
import torch

from model import GPT, GPTConfig

WORDS = "the a cat dog tree sees eats red big small and near".split()
WIDTHS = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.2,
)


def save_byte_tokenizer(folder: Path) -> None:
    """A transformers tokenizer of bytes, in which 256 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>").save_pretrained(folder)


def save_llama(folder: Path) -> Path:
    """A random Llama of bytes, with grouped queries."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257, num_key_value_heads=2, eos_token_id=256, bos_token_id=256, **WIDTHS
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


def save_gpt2(folder: Path) -> Path:
    """A random GPT-2 of 257 tokens."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=96, vocab_size=257)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def save_encoder(folder: Path, kind: str = "BertModel", **changes) -> Path:
    """A random BERT of bytes."""
    import transformers

    torch.manual_seed(0)
    options = dict(vocab_size=258, max_position_embeddings=64, pad_token_id=0, **WIDTHS)
    config = transformers.BertConfig(**{**options, **changes})
    getattr(transformers, kind)(config).save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


def save_vit(folder: Path, classes: int = 2) -> Path:
    """A random ViT for images of 12 x 12 pixels, with the processor that makes them."""
    import transformers

    config = transformers.ViTConfig(
        image_size=12,
        patch_size=4,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=classes,
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 12, "width": 12}).save_pretrained(folder)
    return folder


def save_images(folder: Path) -> Path:
    """Dark cats and bright dogs: train/CLASS/* and validation/CLASS/*."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, n in (("train", 40), ("validation", 6)):
        for kind in ("cat", "dog"):
            (folder / split / kind).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 120, (14, 10, 3)) + (100 if kind == "dog" else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / kind / f"{i}.png")
    return folder


def save_glue(folder: Path) -> Path:
    """Three tasks in GLUE's layout.

    A sentence is acceptable if it has a cat. Two sentences are similar if they are of like length.
    """
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(2, 7))) for _ in range(160)]
    for name in ("CoLA", "MRPC", "STS-B"):
        (folder / name).mkdir(parents=True)
        for file, rows in (("train", texts[:120]), ("dev", texts[120:])):
            apart = [(a, b, abs(len(a.split()) - len(b.split()))) for a, b in zip(rows, reversed(rows))]
            if name == "CoLA":
                lines = [f"x\t{int('cat' in text)}\t\t{text}" for text in rows]
            elif name == "MRPC":
                lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
                lines += [f"{int(n < 2)}\t1\t2\t{a}\t{b}" for a, b, n in apart]
            else:
                lines = [
                    "sentence1\tsentence2\tscore",
                    *(f"{a}\t{b}\t{5 - n}" for a, b, n in apart),
                ]
            (folder / name / f"{file}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def save_dialogues(folder: Path) -> Path:
    """Dialogues on whether a number is even, in one .jsonl and one .json file."""
    folder.mkdir()
    rows = []
    for i in range(300):
        answer = "yes" if i % 2 == 0 else "no"
        text = f"A: is {i} even?\nB: {answer}"
        rows.append({"dialogue": text, "summary": f"{i} is discussed."})
    (folder / "some.train.jsonl").write_text("\n".join(json.dumps(r) for r in rows[:280]))
    (folder / "validation.json").write_text(json.dumps(rows[280:]))
    return folder


def losses_of_training(**settings) -> list[float]:
    """The losses of 30 steps of a tiny GPT on a text that repeats every 7 tokens. settings: fields of GPTConfig."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=20, n_layer=1, n_head=2, n_embd=16, **settings))
    optimizer = torch.optim.AdamW(model.param_groups(1e-2, 0.0, 1.0))
    idx, losses = torch.arange(33).remainder(7).repeat(4, 1), []
    for _ in range(30):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
