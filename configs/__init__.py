"""Named recipes: what each changes of the defaults in train.py's TrainConfig and model.py's GPTConfig.

python train.py RECIPE [--any_field VALUE]
"""

RECIPES: dict[str, dict] = {
    # The first command: a small GPT on the source of Python's standard library, minutes on a laptop.
    "stdlib": dict(),
    # nanoGPT's first run, bytes instead of characters.
    "shakespeare": dict(
        dataset="shakespeare",
        n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2,
        batch_size=64, lr=1e-3, warmup_steps=100, max_steps=5000, eval_interval=250, save_interval=250,
    ),
    # The paper's model and optimiser on 2 million words: a rehearsal of the next one.
    "wikitext2": dict(
        dataset="wikitext2",
        n_layer=12, n_head=12, n_embd=768, block_size=1024, dropout=0.3, bias=True, qk_gain=1.0,
        batch_size=32, grad_accum=4, lr=6e-4, map_lr_scale=1.0, weight_decay=0.01,
        warmup_steps=100, max_steps=1000, eval_interval=100, save_interval=100, eval_tokens=0, prompt=" = ",
    ),
    # Table 1 of the paper: 125M parameters, 1024 tokens, lr 6e-4, weight decay 0.01, AdamW (App. C.2).
    # Batch, epochs and dropout are not in the paper; these are what others use for it: 131,072 tokens a
    # step, 25 epochs of 118M tokens, dropout 0.2.
    "wikitext103": dict(
        dataset="wikitext103",
        n_layer=12, n_head=12, n_embd=768, block_size=1024, dropout=0.2, bias=True, qk_gain=1.0,
        batch_size=128, grad_accum=16, lr=6e-4, map_lr_scale=1.0, weight_decay=0.01,
        warmup_steps=1000, max_steps=22500, eval_interval=500, save_interval=500, eval_tokens=0, prompt=" = ",
    ),
}  # fmt: skip
