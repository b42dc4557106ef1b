"""Checkpoints survive everything and are loaded only when whole; seeds, the log and devices."""

import json
import os
import pickle
import random

import pytest
import torch
from safetensors.torch import save_file

from model import GPT, GPTConfig
from support import checkpoints
from support.checkpoints import load_checkpoint, restore, save_checkpoint, unique_tensors
from support.cli import RunError, UserError
from support.devices import pick_device, pick_dtype, step_seed
from support.log import Log, Watch


def small(seed=0, **kwargs):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**dict(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8), **kwargs}))


def trained(seed=0):
    model = small(seed)
    optimizer = torch.optim.AdamW(model.param_groups(1e-2, 0.1, 10.0))
    model(torch.randint(11, (2, 8)), torch.randint(11, (2, 8)))[1].backward()
    optimizer.step()
    return model, optimizer


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_returns_weights_optimiser_and_meta_bitwise(tmp_path):
    model, optimizer = trained()
    save_checkpoint(
        tmp_path / "c.safetensors", model, optimizer, step=7, config={"lr": 0.1}, best=float("inf")
    )
    tensors, meta = load_checkpoint(tmp_path / "c.safetensors")
    assert meta["step"] == 7 and meta["config"] == {"lr": 0.1} and meta["best"] == float("inf")
    other = small(1)
    other_optimizer = torch.optim.AdamW(other.param_groups(1e-2, 0.1, 10.0))
    restore(tensors, other, other_optimizer)
    for (n, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items()):
        assert torch.equal(a, b), n
    for p, q in zip(model.parameters(), other.parameters()):
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, other_optimizer.state[q][key]), key
    assert other.lm_head.weight is other.transformer.wte.weight
    assert sum(t.numel() for n, t in tensors.items() if n.startswith("model.")) == model.num_params()


def test_a_compiled_model_has_the_same_names():
    model = small()
    names = set(unique_tensors(model))
    model.compile()
    assert set(unique_tensors(model)) == names


@pytest.mark.parametrize(
    "wrap", [torch.compile, torch.nn.DataParallel, lambda m: torch.compile(torch.nn.DataParallel(m))]
)
def test_a_wrapped_model_is_saved_and_restored_as_the_model_itself(tmp_path, wrap):
    """torch.compile and DataParallel (as DDP) put _orig_mod. and module. before every name: nanoGPT's old trouble."""
    model, optimizer = trained()
    save_checkpoint(tmp_path / "plain.safetensors", model, optimizer, step=1)
    save_checkpoint(tmp_path / "wrapped.safetensors", wrap(model), optimizer, step=1)
    plain, wrapped = (load_checkpoint(tmp_path / f"{name}.safetensors")[0] for name in ("plain", "wrapped"))
    assert plain.keys() == wrapped.keys() and all(torch.equal(plain[n], wrapped[n]) for n in plain)
    other = small(1)
    other_optimizer = torch.optim.AdamW(other.param_groups(1e-2, 0.1, 10.0))
    restore(wrapped, wrap(other), other_optimizer)
    for (n, p), q in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(p, q), n
        assert torch.equal(optimizer.state[p]["exp_avg"], other_optimizer.state[q]["exp_avg"]), n


def test_what_cannot_be_read_back_does_not_replace_what_can(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, small(0), step=1)
    before = path.read_bytes()
    monkeypatch.setattr(checkpoints, "save_file", lambda tensors, path, header: save_file({}, path, header))
    with pytest.raises(RunError, match="cannot be read back.*intact"):
        save_checkpoint(path, small(1), step=2)
    assert path.read_bytes() == before


def test_every_flipped_bit_and_every_truncation_is_noticed(tmp_path):
    path, bad = tmp_path / "c.safetensors", tmp_path / "bad.safetensors"
    save_checkpoint(path, *trained(), step=100, config={}, best=1.0)
    whole = path.read_bytes()
    places = random.Random(0).sample(range(len(whole)), 300) + list(range(0, 1200, 7))  # the header's too
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 1 << (place % 8)
        bad.write_bytes(broken)
        try:
            tensors, meta = load_checkpoint(bad)
        except UserError:
            continue
        # a space of the padding after the header may become another byte that JSON skips: harmless
        good, good_meta = load_checkpoint(path)
        assert meta == good_meta and all(torch.equal(tensors[n], good[n]) for n in good), place
    for length in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        bad.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a checkpoint of this program, or is damaged"):
            load_checkpoint(bad)


def test_foreign_and_malicious_files_are_refused_and_nothing_is_executed(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"model": Malicious()}, tmp_path / "evil.safetensors")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Malicious()))
    save_file({"x": torch.ones(2)}, tmp_path / "foreign.safetensors")
    save_file(
        {"x": torch.ones(2)},
        tmp_path / "liar.safetensors",
        {"format": "hedgehog-1", "meta": "{}", "crc32": "0"},
    )
    (tmp_path / "text.safetensors").write_text("hello")
    for name in (
        "evil.safetensors",
        "evil.pt",
        "foreign.safetensors",
        "liar.safetensors",
        "text.safetensors",
        "missing",
    ):
        with pytest.raises(UserError, match="checkpoint"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_weights_that_do_not_fit_are_named(tmp_path):
    save_checkpoint(tmp_path / "c.safetensors", small(), step=0)
    tensors, _ = load_checkpoint(tmp_path / "c.safetensors")
    with pytest.raises(UserError, match=r"wte.weight has shape \(11, 8\), not \(12, 8\)"):
        restore(tensors, small(vocab_size=12))
    with pytest.raises(UserError, match="h.1.ln_1.weight is missing.*and 11 more"):
        restore(tensors, small(n_layer=2))
    with pytest.raises(UserError, match="attend.phi.weight is unknown"):
        restore(tensors, small(attention="elu"))
    model = small()
    with pytest.raises(UserError, match="no optimiser state"):
        restore(tensors, model, torch.optim.AdamW(model.param_groups(1e-2, 0.1, 1.0)))


def test_a_write_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, small(0), step=1)
    before = path.read_bytes()

    def full_disk(tensors, path, header):
        path.write_bytes(b"half of a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full_disk)
    with pytest.raises(RunError, match="No space left on device.*intact"):
        save_checkpoint(path, small(1), step=2)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


# ---------------------------------------------------------------- seeds and the log


def test_the_seed_of_a_step_differs_by_seed_step_and_rank_and_is_always_the_same():
    seeds = {step_seed(s, t, r) for s in range(5) for t in range(50) for r in range(4)}
    assert len(seeds) == 1000 and step_seed(1, 2, 3) == step_seed(1, 2, 3) == 4159356255


def test_a_log_goes_on_after_the_step_that_was_saved_and_skips_half_a_line(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.start({"step": 0, "config": {}}, 0)
    for step in (1, 2, 3):
        log.write(step=step, loss=1.0)
    with open(log.path, "a") as f:
        f.write('{"step": 4, "lo')  # killed here
    log.start({"step": 2, "config": {}}, 2)
    log.write(step=3, loss=2.0)
    assert [(e["step"], e.get("loss")) for e in log.read()] == [
        (0, None),
        (1, 1.0),
        (2, 1.0),
        (2, None),
        (3, 2.0),
    ]
    assert all(json.loads(line) for line in log.path.read_text().splitlines())


EDITED = [
    b"3\n", b"[1]\n", b"null\n", b'"x"\n', b"\xff\xfe bad UTF-8\n", b"{\n", b"[" * 10_000 + b"\n", b'{"loss": 1.0}\n',
    b'{"step": "1", "loss": 1.0}\n', b'{"step": 1, "loss": "low"}\n', b'{"step": 1, "config": 5}\n',
    b'{"step": 1, "val_loss": null}\n', b"9" * 5000 + b"\n", b'{"step": 6, "lo',
]  # fmt: skip


@pytest.mark.parametrize("attention", ["elu", "softmax"])
def test_a_run_goes_on_whatever_was_done_to_its_log(train, tmp_path, attention):
    """A log is only a log: what is readable is kept, what is not is said, and the run ends as it would have."""
    flags = ["--out_dir", tmp_path, "--attention", attention, "--resume", "--max_steps"]
    log = tmp_path / "log.jsonl"
    assert train(*flags, 6)[0] == 0
    lines = log.read_bytes().splitlines(keepends=True)
    changed = [b"".join([lines[0], *EDITED[:-1], *lines[1:], EDITED[-1]]), b"".join(lines[1:]), b"", None]
    for steps, content in enumerate(changed, 7):
        log.unlink() if content is None else log.write_bytes(content)
        code, stdout, stderr = train(*flags, steps)
        assert code == 0 and f"resuming {tmp_path} at step {steps - 1}" in stdout, stderr
        assert (f"has {len(EDITED)} lines that no run has written whole: left out" in stdout) == (steps == 7)
        entries = Log(log).read()
        assert [e for e in entries if "config" in e][-1]["step"] == steps - 1 and entries[-1]["step"] == steps
        assert ({1, 2, 3, 4, 5, 6} <= {e["step"] for e in entries}) == (
            steps < 9
        )  # what was readable is there
        assert len(log.read_bytes().splitlines()) == len(entries)
        assert json.loads((tmp_path / "result.json").read_text())["config"]["attention"] == attention


def test_a_log_that_is_deleted_or_refused_does_not_end_a_run(train, tmp_path, monkeypatch, capsys):
    """In mid-run: the numbers, the picture and the last line are there all the same."""
    original = Watch.step

    def step(watch, done, *args):
        if done == 4:
            watch.log.path.unlink()
            watch.log.path.mkdir()
        if done == 6:
            watch.log.path.rmdir()
        original(watch, done, *args)

    monkeypatch.setattr(Watch, "step", step)
    code, stdout, stderr = train("--out_dir", tmp_path, "--save_interval", 1)
    assert code == 0 and "bits per byte" in stdout.splitlines()[-1], stderr
    assert stdout.count("the run goes on without a log") == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["config"]["attention"] == "hedgehog" and result["final"]["tokens"] == 192


def test_dtype_auto_is_never_float16_and_follows_the_hardware():
    cpu = torch.device("cpu")
    assert pick_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    assert pick_dtype("float32", cpu) is torch.float32
    with pytest.raises(UserError, match="not 'float16'"):
        pick_dtype("float16", cpu)
    with pytest.raises(UserError, match="'cuda:99' is not available"):
        pick_device("cuda:99")
