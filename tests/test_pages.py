"""README and the pages in results/ tell the truth: every number in their text is one of a result,
of a setting, or of the paper. (Their tables are rendered: test_readme.py.)"""

import importlib.util
import json
import re
from functools import cache
from math import exp, log
from statistics import mean, stdev

import pytest
from conftest import ROOT

PAGES = {path.stem: path for path in [ROOT / "README.md", *sorted((ROOT / "results").glob("*.md"))]}
# Numbers in names and references. What is left after these and the checked fragments is an error.
NAMES = r"""
    (?:Tables?|Figs?\.|Eqs?\.|Sec\.)\ [\d, ]+(?:and\ \d+)?
    | WikiText-\d+ | GPT-2 | Llama-2 | T2R(?:-HH)? | 1\+ELU | 1\ \+\ x\ \+\ x²/2
    | ROUGE-[\d/L]+ | SST-2 | SmolLM2(?:-135M)? | A100 | H100 | ViT-B/16 | ImageNet-1k | Qwen\d
    | CIFAR-10 | H3 | ICLR\ 2024 | O\(1\) | exp\(2x\) | [Ss]eed\ 1 | F1 | \#Person\d\# | b?float\d\d | AVX512-BF16
"""


@cache
def read(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def config(name: str, i: int = 0) -> dict:
    return read(name)["runs"][i]["config"]


def sd(values: list[float], form: str = ".0f") -> str:
    return f"{mean(values):{form}} ± {stdev(values):{form}}"


def prose(text: str) -> str:
    """The running text: without tables, code, marks, pictures and the targets of links."""
    text = re.sub(r"<!-- ([\w-]+):.*?<!-- end of \1 -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^\|.*$|^    .*$|`[^`\n]*`|!\[[^\]]*\]\([^)]*\)", "", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return " ".join(text.replace("**", "").split())


# ---------------------------------------------------------------- what the results say


def losses(name: str) -> dict[str, dict[int, float]]:
    """{attention: {seed: loss}}."""
    found: dict[str, dict[int, float]] = {}
    for r in read(name)["runs"]:
        found.setdefault(r["config"]["attention"], {})[r["config"]["seed"]] = r["final"]["loss"]
    return found


def closed(of: dict, prior: str = "elu", measure=float) -> list[float]:
    """% of the gap between `prior` and softmax that Hedgehog closes, seed by seed."""
    x = {name: {seed: measure(loss) for seed, loss in seeds.items()} for name, seeds in of.items()}
    return [100 * (x[prior][s] - x["hedgehog"][s]) / (x[prior][s] - x["softmax"][s]) for s in x["hedgehog"]]


def from_scratch() -> list[str]:
    ours, paper = losses("compare-stdlib"), losses("compare-stdlib-paper")
    a, p = ({name: mean(x.values()) for name, x in of.items()} for of in (ours, paper))
    swept: dict[str, list[float]] = {}
    for line in read("compare-stdlib")["sweep"]:
        name, loss = re.match(
            r"([\w.]+)(?:-map_lr_scale[\d.]+)?-seed1: ([\d.]+)|", line.replace("-lr", "_")
        ).groups()
        swept.setdefault(name, []).append(float(loss))
    slow, fast = sorted(swept["hedgehog_0.004"])  # maps that learn 2.5 and 10 times as fast as the model
    assert fast > max(ours["t2r"][1], ours["performer"][1])
    fast_first, slow_first = sorted(swept["hedgehog_0.002"])
    names = sorted(a, key=a.get)
    largest = max(stdev(x.values()) for x in ours.values())
    assert largest == stdev(ours["taylor"].values()) and names[:2] == ["taylor", "softmax"]
    apart = sorted(a[second] - a[first] for first, second in zip(names[1:], names[2:]))
    assert largest < apart[0]
    features = 1 + 64 + 64 * 65 // 2  # of Taylor's map, D = 64
    c = config("compare-stdlib")
    assert c["n_embd"] // c["n_head"] == 64 and round(features / 128) == 17
    wiki = config("compare-wikitext2")
    ablated = {r["name"]: r["final"]["loss"] for r in read("ablations")["runs"]}
    for name in ("plain exp (Eq. 5)", "a map each for q and k (tie False)", "W random"):
        assert abs(ablated[name] - ablated["as set"]) < 0.01
    assert ablated["those 16 alone"] < ablated["softmax over the last 16 tokens"] < ablated["as set"]
    short = config("ablations")
    rates = {
        name: {r["config"]["lr"] for r in read(name)["runs"]}
        for name in ("compare-stdlib", "compare-stdlib-paper")
    }
    assert all(found == {0.002, 0.004} for found in rates.values()), (
        "an edge of what was tried, for every attention"
    )
    low = {r["config"]["attention"] for r in read("compare-stdlib")["runs"] if r["config"]["lr"] == 0.002}
    assert low == {"softmax"} and len(ours) == 8 and ablated["those 16 alone"] < ablated["as set"]
    assert {len(swept[f"{name}_{lr}"]) for name in ("hedgehog", "t2r") for lr in (0.002, 0.004)} == {2}
    zoo = {name: mean(x.values()) for name, x in losses("compare-stdlib-zoo").items()}
    assert zoo["hyena"] < zoo["h3"] < p["softmax"] - 0.02
    assert max(p[name] for name in ("softmax", "hedgehog", "t2r")) < zoo["aft"] < p["elu"]
    zoos = read("compare-stdlib-zoo")["runs"]
    assert {r["config"]["max_steps"] for r in zoos} == {c["max_steps"]} and len(zoos) == 9
    assert {r["config"]["lr"] for r in zoos} == {0.004}
    first = json.loads((ROOT / "results" / "stdlib-hedgehog-1.json").read_text())
    assert first["config"]["max_steps"] == 6 * short["max_steps"] == 2 * c["max_steps"]
    return [
        f"{first['parameters'] / 1e6:.1f} million parameters",
        "125 million parameters",  # the paper's
        "The paper's 6e-4",
        f"Hedgehog closes {sd(closed(paper))}% of the gap of 1+ELU",
        "the share is 65% in nats",  # render.py computes it
        f"Hedgehog closes {sd(closed(paper, 't2r'))}%",
        f"softmax has 1.554 nats with seed 1, and {paper['softmax'][1]:.3f} in the table above",  # a run by hand
        "equal to a Transformer trained from scratch (18.5, and 18.6 in Table 1)",
        "which it is not in Table 1 (28.2 against 25.6)",
        f"It has {a['taylor']:.3f} nats, softmax {a['softmax']:.3f}",
        f"Taylor has {features:,} features a head here (D = 64), Hedgehog has 128",
        f"Affordable at {c['block_size']} tokens; on long texts it costs 17 times",
        f"{mean(closed(ours)):.0f}% for 1+ELU, {mean(closed(ours, 'performer')):.0f}% for "
        "Performer, "
        f"{sd(closed(ours, 't2r'))}% for T2R",
        f"Hedgehog improves from {p['hedgehog']:.3f} to {a['hedgehog']:.3f} nats, "
        f"T2R from {p['t2r']:.3f} to {a['t2r']:.3f}",
        f"Softmax ({p['softmax']:.3f} without the additions) and 1+ELU ({p['elu']:.3f} without)",
        f"ahead of 1+ELU, by {a['elu'] - a['performer']:.2f} nats",
        f"rate of 0.004, maps that learn 10 times as fast give Hedgehog {fast:.3f} nats",
        f"2.5 times as fast give {slow:.3f}",
        f"At 0.002, which is the first command's rate, 10 times gives {fast_first:.3f} and 2.5 "
        "times "
        f"{slow_first:.3f}",
        "runs of 300 steps",  # the lab log
        f"at most {largest:.3f} nats",
        f"distance to softmax is {a['softmax'] - a['taylor']:.3f} nats",
        f"differs by {apart[0]:.3f} nats or more",
        f"learning rate {short['lr']:g}",
        f"have {short['max_steps']} steps. There, softmax over the last 16 tokens and nothing else has "
        f"{ablated['those 16 alone']:.3f} nats and Hedgehog {ablated['as set']:.3f}",
        f"{short['max_steps']} steps",
        "Seven of the eight attentions ended at 0.004, the upper of the two rates",
        "softmax over the last 16 tokens",
        "those 16 tokens alone",
        "less than 0.01 nats",
        f"the maps learn {short['map_lr_scale']:g} times as fast as the model",
        f"\"Map's learning rate x 3\": 3 times the model's, not {short['map_lr_scale']:g}",
        f"{wiki['max_steps'] * wiki['batch_size'] * wiki['block_size']:,} of GPT-2's tokens",
    ]


def why() -> list[str]:
    accuracy: dict[str, list[float]] = {}
    for r in read("recall")["runs"]:
        accuracy.setdefault(r["config"]["attention"], []).append(100 * r["final"]["accuracy"])
    lines = [
        re.match(r"(\w+), lr ([\d.]+), .*accuracy ([\d.]+)%", line).groups()
        for line in read("recall")["sweep"]
    ]
    swept = {(name, float(lr)): float(percent) for name, lr, percent in lines}
    four = [swept[name, 4e-3] for name in ("relu", "cosformer", "t2r", "performer")]
    long = {r["config"]["attention"]: 100 * r["final"]["accuracy"] for r in read("recall-long")["runs"]}
    stages = read("recall-stages")["runs"][0]
    alone = {r["config"]["attention"]: r["minutes"] for r in read("recall-alone")["runs"]}
    solved = {name for name, x in accuracy.items() if min(x) > 99.5}
    assert solved == {"softmax", "taylor", "hedgehog"} and len(accuracy) == 11
    assert [name for name in accuracy if max(accuracy[name] + [swept[name, 4e-3]]) < 20] == ["elu"]
    performer = sorted(accuracy["performer"])
    assert round(performer[1], 1) == round(performer[2], 1) == 99.4 or performer[2] - performer[1] < 0.1

    def three(name: str) -> str:
        return "{:.0f}, {:.0f} and {:.0f}%".format(*accuracy[name])

    c, zoo = config("recall"), {r["config"]["attention"]: r for r in read("recall-zoo")["runs"]}
    others = {name: r["final"]["accuracy"] for name, r in zoo.items()}
    assert max(others.values()) < 0.9 and others["hyena"] > others["h3"] > others["aft"]
    assert abs(100 * others["aft"] - mean(accuracy["elu"])) < 2
    assert zoo["hyena"]["config"]["lr"] == zoo["h3"]["config"]["lr"] == 4e-3
    assert {r["config"]["max_steps"] for r in zoo.values()} == {c["max_steps"]}
    assert {r["config"]["lr"] for r in read("recall")["runs"]} == {2e-3} == {min(lr for _, lr in swept)}
    return [
        "All eleven attentions ended at 0.002, the lower of the two rates",
        f"from 0.004 to 0.002, ReLU goes from {swept['relu', 4e-3]:.0f} to {swept['relu', 2e-3]:.0f}%",
        "an attention that fails at 0.002",
        f"No other attention does, in {c['max_steps']} steps at these two rates",
        f"ReLU has {swept['relu', 2e-3]:.1f}% and cosFormer {swept['cosformer', 2e-3]:.1f}%",
        "0.001 and 0.0005 were not tried",
        "sequences of 8 tokens",  # experiments.recall's first stage
        f"ends after {c['max_steps']} steps",
        f"is at most {c['stop_loss']:g}",
        "1 is monotonic",
        f"{min(mean(accuracy['relu']), mean(accuracy['cosformer'])):.0f} to "
        f"{max(mean(accuracy['relu']), mean(accuracy['cosformer'])):.0f}% on average, T2R "
        f"{mean(accuracy['t2r']):.0f}%",
        f"Performer reaches {performer[2]:.1f}% with two seeds and {performer[0]:.0f}% with the third",
        f"between {int(min(four))} and {max(four):.0f}%",
        f"Hedgehog reaches only {swept['hedgehog', 4e-3]:.0f}%",
        f"does not solve the task in {c['max_steps']} steps",
        f"{three('exp_t2')} with the three seeds",
        f"Hedgehog with plain exp reaches {three('hedgehog_exp')}",
        f"{config('recall-long')['max_steps']:,} steps the two reach {long['exp_t2']:.1f} and "
        f"{long['hedgehog_exp']:.1f}%",
        f"stages of {stages['config']['stage_steps']} steps instead of {c['stage_steps']}, and "
        f"{stages['config']['max_steps']:,} steps in all, exp(2x) reaches {100 * stages['final']['accuracy']:.1f}%",
        f"{alone['softmax']:.1f} minutes for softmax, {alone['hedgehog']:.1f} for Hedgehog and "
        f"{alone['taylor']:.1f} for Taylor",
        "W = I and b = 0",
        "below x = −1 it grows",
        f"None of the three solves the task in {c['max_steps']} steps",
        "its first 300 of 800 steps took 11 minutes",  # of a run that was stopped
    ]


def ladder(name: str, key: str = "perplexity") -> dict[str, float]:
    return {r["arm"]: r["final"][key] for r in read(name)["runs"]}


def converting() -> list[str]:
    def times(name: str, arm: str) -> float:
        return ladder(name)[arm] / ladder(name)["teacher_finetuned"]

    runs = {r["arm"]: r for r in read("convert-stdlib")["runs"]}
    small, short, long = (
        ladder("convert-stdlib"),
        ladder("convert-smollm2"),
        ladder("convert-smollm2-400"),
    )
    lora, lora100 = ladder("convert-smollm2-lora"), "convert-smollm2-lora-100"
    from400 = ladder("convert-smollm2-lora-400")["hedgehog"] / ladder(lora100)["teacher_finetuned"]
    kl400 = next(r["kl"] for r in read("convert-smollm2-400")["runs"] if r["arm"] == "hedgehog")
    rouge, before, window = (
        ladder(f"convert-smollm2-dialogue{n}", "rouge1") for n in ("", "-150", "-window")
    )
    w, talk = config("convert-smollm2-dialogue-window"), config("convert-smollm2-dialogue-muon")
    talks, by_two = (ladder("convert-smollm2-dialogue-muon", score) for score in ("rouge1", "rouge2"))
    assert talk["batch_size"] == 2 and talk["muon"] and w["batch_size"] == 1
    c, d, e = (
        config("convert-smollm2"),
        config("convert-smollm2-dialogue"),
        config("convert-smollm2-lora"),
    )
    a = config("convert-smollm2-long", 1)
    assert a["distil_steps"] == 2 * c["distil_steps"] and a["max_steps"] == 4 * c["max_steps"]
    random = {r["arm"]: r for r in read("convert-smollm2-random")["runs"]}
    b, kl = random["hedgehog"]["config"], {name: r["kl"] for name, r in random.items()}
    kl_long = next(r["kl"] for r in read("convert-smollm2-long")["runs"] if r["arm"] == "hedgehog")
    minutes = sum(random["hedgehog"]["minutes"].values())
    assert b["batch_size"] == 2 and not b["tie"] and b["map_features"] == 64
    tokens = c["batch_size"] * c["block_size"]
    assert c["eval_stride"] == e["eval_stride"] == 0, "windows do not overlap"
    first = config(lora100, 1)
    assert read(lora100)["runs"][1]["arm"] == "t2r"
    scratch = next(r["config"] for r in read("compare-stdlib")["runs"] if r["config"]["attention"] == "t2r")
    D, shared = 64, 3  # of SmolLM2-135M: head dim, query heads for each key head
    state, token = (
        shared * (2 * D * D + 2 * D) * 4,
        2 * D * 2,
    )  # bytes for each key head: of states, of the cache
    percent = 100 * runs["distilled"]["map_parameters"] / runs["hedgehog"]["parameters"]
    last = {r["arm"]: r for r in read("convert-smollm2-700")["runs"]}
    last, fair = last["hedgehog-x2-untied"], last["teacher_finetuned"]
    settings, of_last = last["config"], sum(last["minutes"].values())
    steps = settings["max_steps"]
    assert (steps, fair["config"]["max_steps"]) == (700, 700) and of_last > 60
    assert fair["final"]["perplexity"] < ladder("convert-smollm2-random")["teacher_finetuned"]
    muon = {r["arm"]: r for r in read("convert-smollm2-muon")["runs"]}
    assert muon["teacher_finetuned"]["final"] == fair["final"]  # the same run
    muon, (columns,) = muon["hedgehog-x1-untied"], read("convert-smollm2-columns")["runs"]
    assert muon["config"]["muon"] and muon["config"]["max_steps"] == steps and "x1" in muon["arm"]
    assert abs(muon["kl"] - last["kl"]) < 2e-3 and last["kl"] == pytest.approx(columns["kl"], abs=1e-3)
    of_muon = sum(muon["minutes"].values())
    of_lora, in_muon = read("convert-smollm2-lora-muon")["runs"], ladder("convert-smollm2-lora-muon")
    assert all(r["config"]["max_steps"] == steps and r["config"]["muon"] for r in of_lora)
    in_lora = config("convert-smollm2-lora-window")
    assert in_lora["max_steps"] == in_lora["distil_steps"] == 100 and in_lora["lr"] == 1e-3
    return [
        "Hedgehog-GPT-2 is at 1.06 (second-hand)",  # 16.7 / 15.8
        "The same with W of 2 D columns and 700 steps",
        f"{last['final']['perplexity'] / fair['final']['perplexity']:.2f} times the teacher, in {of_last:.0f} minutes, "
        f"{last['minutes']['finetune']:.0f} of them for finetuning",
        f"{muon['final']['perplexity'] / fair['final']['perplexity']:.2f} times the teacher, in {of_muon:.0f} minutes "
        "of one core, with half of the state. The aim was 1.5 in 60",
        f"D columns have the KL that 2 D columns had with AdamW, and {kl['hedgehog']:.3f} with AdamW",
        "over the last 64 tokens, 100 steps of LoRA at learning rate 0.001, from maps of 100 steps",
        "The aim was 1.2 for this",
        f"{in_muon['hedgehog-x1-untied'] / in_muon['teacher_finetuned']:.2f} times the teacher, in "
        f"{sum(of_lora[1]['minutes'].values()):.0f} minutes of one core (aim: 1.6)",
        f"it was {times('convert-smollm2-lora', 'hedgehog'):.2f}. What each of these changes brings",
        f"LoRA at {of_lora[1]['config']['lr']:g} ends no higher than all parameters at {settings['lr']:g}",
        f"({in_muon['hedgehog-x1-untied']:.2f} and {muon['final']['perplexity']:.2f}), and the teacher lower "
        f"({in_muon['teacher_finetuned']:.2f} and {fair['final']['perplexity']:.2f})",
        f"So {settings['lr']:g} may be too low for all parameters",
        f"from {small['swap']:.1f} to {small['distilled']:.1f}",
        f"takes {runs['distilled']['minutes']['distil']:.1f} minutes and trains {percent:.0f}% of "
        "the parameters",
        f"ends at {times('convert-stdlib', 'hedgehog'):.2f} times",
        "stored in 4 bits",
        f"{c['distil_steps'] * tokens:,} tokens of distillation and {c['max_steps'] * tokens:,} "
        "of finetuning",
        f"Hedgehog is at {times('convert-smollm2', 'hedgehog'):.2f} times the equally finetuned teacher. "
        f"T2R ends at {short['t2r'] / short['hedgehog']:.1f} times the perplexity",
        "took {:.0f} to {:.0f}% of the time of a finetuning step".format(*of_a_finetuning_step()),
        f"maps learn {a['map_lr_scale']:g} times as fast",
        f"KL is {kl['hedgehog']:.3f} after {b['distil_steps']} steps of distillation, and was "
        f"{kl_long:.3f} after {a['distil_steps']} with W = I",
        f"learning rate {b['distil_lr']:g} in distillation",
        "The aim was 1.5 times the teacher in 60 minutes of one core. "
        f"This is {times('convert-smollm2-random', 'hedgehog'):.2f} in "
        f"{minutes:.0f} minutes",
        f"contexts of {c['block_size']} tokens. The score is from {c['eval_tokens']:,} tokens, in windows of "
        f"{c['block_size']} that",
        f"as large as a bfloat16 cache of {state / token:.0f} tokens",
        f"Its map learned at {c['lr'] * c['map_lr_scale']:g}, the model's rate",
        f"T2R is best with maps that learn {scratch['map_lr_scale']:g} times as fast",
        f"With maps at {e['lr'] * e['map_lr_scale']:.3f} and {e['max_steps'] + e['distil_steps'] // 2} steps its "
        f"perplexity is {lora['t2r']:.1f}; in the shorter run of the next point, with maps at "
        f"{first['lr'] * first['map_lr_scale']:g} and {first['max_steps'] + first['distil_steps'] // 2} steps, it was "
        f"{ladder(lora100)['t2r']:.1f}",
        f"The {d['test_dialogues']} dialogues have one seed",
        f"Its map learned at {d['lr'] * d['map_lr_scale']:g}, as Hedgehog's",
        f"With {config('convert-smollm2-400')['distil_steps']} steps of distillation instead of "
        f"{a['distil_steps']}, "
        f"the same {a['max_steps']} steps of finetuning ended at {long['hedgehog']:.2f}, which is "
        f"{times('convert-smollm2-400', 'hedgehog'):.2f} times the teacher (KL {kl400:.3f}",
        f"With {config('convert-smollm2-300')['distil_steps']} steps of distillation and "
        f"{config('convert-smollm2-300')['max_steps']} of finetuning, in which the maps learned at the "
        f"model's own rate, Hedgehog was at {times('convert-smollm2-300', 'hedgehog'):.2f} times",
        f"LoRA of rank {e['lora_r']} on q, k, v and o at learning rate {e['lr']:g}, with the maps "
        "at "
        f"{e['lr'] * e['map_lr_scale']:.3f}, for {e['max_steps']} steps. T2R has "
        f"{e['max_steps'] + e['distil_steps'] // 2}"
        " steps",
        f"Hedgehog is at {times('convert-smollm2-lora', 'hedgehog'):.2f} times the teacher. T2R, whose map is "
        f"learned in finetuning alone, ends at {lora['t2r'] / lora['hedgehog']:.1f} times the perplexity",
        f"With the maps at {config(lora100)['lr'] * config(lora100)['map_lr_scale']:g}, which is "
        "the rate of "
        f"distillation, {config(lora100)['max_steps']} steps left Hedgehog at "
        f"{times(lora100, 'hedgehog'):.2f} times "
        f"its teacher, T2R-HH at {times(lora100, 't2r_hh'):.2f} and T2R at "
        f"{times(lora100, 't2r'):.2f}",
        f"From the maps of the table above it was {from400:.2f}",
        f"{d['test_dialogues']} dialogues that no stage has trained on, greedy decoding of at "
        f"most {d['new_tokens']}",
        f"LoRA at learning rate {d['lr']:g}, the maps at {d['lr'] * d['map_lr_scale']:g}, one map "
        "each for queries and "
        f"keys, {d['max_steps']} steps; T2R has {d['max_steps'] + d['distil_steps'] // 2}",
        "only 35 of about 230 tokens",  # the lab log
        f"Hedgehog is {rouge['teacher_finetuned'] - rouge['hedgehog']:.1f} points of ROUGE-1 behind softmax",
        "the distance is 3.7 points (second-hand)",  # 51.1 - 47.4
        f"have seen {d['max_steps'] * d['batch_size']} dialogues",
        f"With {config('convert-smollm2-dialogue-150')['max_steps']} steps a stage",
        f"brought the distance to {window['teacher_finetuned'] - window['hedgehog-w64']:.1f} points",
        f"after {w['distil_steps']} steps of distillation and {w['max_steps']} of LoRA, one dialogue a step, "
        f"Hedgehog had {window['hedgehog-w64']:.1f}, softmax {window['teacher_finetuned']:.1f}",
        f"{talks['teacher_finetuned'] - talks['hedgehog-x1-untied-w64']:.1f} points of ROUGE-1 behind softmax "
        f"(aim: 4), and {by_two['teacher_finetuned'] - by_two['hedgehog-x1-untied-w64']:.1f} of ROUGE-2",
        f"two dialogues a step; {talk['distil_steps']} steps of distillation, {talk['max_steps']} of LoRA",
        "With softmax over the last 64 tokens, maps made with Muon",
        "softmax over the last 64 tokens and the map before them",
        f"the distance was {before['teacher_finetuned'] - before['hedgehog']:.1f} points: Hedgehog "
        f"{before['hedgehog']:.1f}, softmax {before['teacher_finetuned']:.1f}, T2R "
        f"{before['t2r']:.1f}, the model "
        f"without finetuning {before['teacher']:.1f}",
    ]


def of_a_finetuning_step() -> tuple[float, float]:
    """The least and the largest % of a finetuning step's time that a step of distillation took."""
    names = [
        "convert-stdlib",
        *(f"convert-smollm2{x}" for x in ("", "-long", "-random", "-lora", "-dialogue")),
    ]
    shares = []
    for r in [r for name in names for r in read(name)["runs"] if {"distil", "finetune"} <= set(r["minutes"])]:
        a_step = {stage: r["minutes"][stage] / r["config"][f"{key}_steps"] for stage, key in STEPS.items()}
        shares.append(100 * a_step["distil"] / a_step["finetune"])
    return min(shares), max(shares)


STEPS = {"distil": "distil", "finetune": "max"}  # a stage of a conversion, and the field of its steps


def scores(name: str, arm: str, metric: str = "") -> dict[int, float]:
    """{seed: score} of an arm."""
    runs = [r for r in read(name)["runs"] if r["arm"] == arm]
    return {
        r["config"]["seed"]: r["final"]["sets"]["validation"][metric] if metric else r["final"]["score"]
        for r in runs
    }


def recovered(name: str, arm: str) -> list[float]:
    fair = scores(name, "teacher_finetuned")
    return [100 * score / fair[seed] for seed, score in scores(name, arm).items()]


def finetuned() -> list[str]:
    def shares(kind: str, skip: str = "") -> tuple[float, float]:
        """Hedgehog's: the mean of the shares, and the share of the means."""
        tasks = [f"{kind}-{task}" for task in ("cola", "mrpc", "sst2", "stsb") if task != skip]
        ours, fair = (
            mean(mean(scores(t, arm).values()) for t in tasks) for arm in ("hedgehog", "teacher_finetuned")
        )
        return mean(mean(recovered(t, "hedgehog")) for t in tasks), 100 * ours / fair

    def of(name: str, arm: str = "hedgehog", form: str = ".0f") -> str:
        """The mean over seeds of what an arm recovers."""
        return f"{mean(recovered(name, arm)):{form}}"

    from experiments.prices_tables import rows_of

    kl = {r["arm"]: r["kl"] for r in read("cola-controls")["runs"]}
    priced = {task: rows_of(read(f"prices-{task}")) for task in ("stsb", "mrpc")}
    kept = {
        task: next(r["test"] for r in rows if r["arm"] == "hedgehog-keep10") for task, rows in priced.items()
    }
    mrpc = {arm: mean(scores("glue-mrpc", arm).values()) for arm in ("t2r_hh", "hedgehog")}
    accuracy = {
        r["arm"]: mean(scores("wide-mrpc", r["arm"], "accuracy").values()) for r in read("wide-mrpc")["runs"]
    }
    behind, error = read("glue-cola")["differences"]["hedgehog"]
    mrpc_kl = next(r["kl"] for r in read("glue-mrpc")["runs"] if r["arm"] == "hedgehog")
    for task in ("cola", "sst2", "stsb", "mrpc"):  # the order that the page speaks of
        x = [mean(scores(f"glue-{task}", arm).values()) for arm in ("t2r", "t2r_hh", "hedgehog")]
        assert (x == sorted(x)) == (task != "mrpc")
    assert scores("glue-cola", "t2r_hh")[1] > scores("glue-cola", "hedgehog")[1]
    arms = "elu relu performer cosformer exp exp2 taylor".split()
    fixed = {r["arm"]: r for r in read("cola-controls")["runs"] if r["arm"] in arms}
    spiky = sorted(fixed, key=lambda arm: fixed[arm]["weights"]["entropy"])
    least = sorted(fixed, key=lambda arm: fixed[arm]["final"]["score"])
    assert set(spiky[:2]) == {"exp2", "performer"} == set(least[1:3]) and least[0] == "elu"
    names = ("glue-mrpc", "glue-sst2", "glue-stsb", "wide-stsb", "wide-mrpc", "wide-sst2")
    rows = {name: config(name)["train_rows"] for name in names}
    assert config("glue-cola")["train_rows"] == config("wide-cola")["train_rows"] == 0  # all
    assert kl["hedgehog_exp"] == pytest.approx(kl["hedgehog"], abs=1e-3)
    before = {
        name: 100 * scores(name, "hedgehog")[1] / scores(teacher, "teacher")[1]
        for name, teacher in [
            ("glue-cola", "cola-controls"),
            *[(f"glue-{t}",) * 2 for t in ("mrpc", "sst2", "stsb")],
        ]
    }
    cola = {arm: scores("cola-controls", arm)[1] for arm in ("hedgehog", "teacher", "teacher_finetuned")}
    assert (
        cola["teacher"] > cola["teacher_finetuned"] and scores("glue-cola", "hedgehog")[1] == cola["hedgehog"]
    )
    floors = {
        name
        for name in names + ("glue-cola", "wide-cola")
        if "zero" in {r["arm"] for r in read(name)["runs"]}
    }
    assert not floors and all(
        "zero" in {r["arm"] for r in read(name)["runs"]} for name in ("cola-controls", "vit-digits")
    )
    teacher_mrpc = mean(scores("wide-mrpc", "teacher_finetuned").values())
    besides = {
        task: (config(f"glue-{task}", 1)["distil_epochs"], config(f"glue-{task}", 1)["epochs"])
        for task in ("cola", "sst2", "mrpc", "stsb")
    }
    assert not any(
        config(name).get("same_time") for name in (*names, "glue-cola", "wide-cola", "cola-controls")
    )
    wide = {r["arm"]: r for r in read("wide-stsb")["runs"] if r["config"]["seed"] == 1}
    trained = {
        arm: sum(wide[arm]["minutes"].get(stage, 0) for stage in ("distil", "finetune"))
        for arm in ("hedgehog", "t2r")
    }
    means = {
        arm: mean(mean(scores(f"wide-{t}", arm).values()) for t in ("cola", "mrpc", "sst2", "stsb"))
        for arm in ("hedgehog", "teacher_finetuned")
    }
    return [
        f"Hedgehog recovers {100 * cola['hedgehog'] / cola['teacher_finetuned']:.1f}% of the equally finetuned "
        f"teacher, but {before['glue-cola']:.1f}% of the teacher before "
        f"({cola['hedgehog']:.1f} of {cola['teacher']:.1f})",
        f"gives {before['glue-mrpc']:.1f}% on MRPC, {before['glue-sst2']:.1f}% on SST-2 and "
        f"{before['glue-stsb']:.1f}% on STS-B",
        f"always answering yes scores {mean(scores('wide-mrpc', 'elu').values()):.1f}, where the teacher of the second "
        f"table has {teacher_mrpc:.1f}",
        f"On SST-2 1+ELU recovers {of('glue-sst2', 'elu')}%",
        "have {:g} epochs of distillation besides {:g} of finetuning on CoLA and SST-2, ".format(
            *besides["cola"]
        )
        + "{:g} besides {:g} on MRPC, and ".format(*besides["mrpc"])
        + "{:g} besides {:g} on STS-B".format(*besides["stsb"]),
        "on STS-B, it is {distil_epochs:g} besides {epochs:g}".format_map(wide["hedgehog"]["config"]),
        f"{trained['hedgehog']:.1f} minutes for Hedgehog, and {trained['t2r']:.1f} for T2R, which ends at "
        f"{wide['t2r']['final']['score']:.1f}",
        "a share of averages like the paper's 99.3%",
        f"{means['hedgehog']:.1f} of {means['teacher_finetuned']:.1f} points",
        "times 100",
        "6 layers with 12 heads of 32 dimensions",  # MiniLM's
        "W is 32 x 32, which gives 64 features a head",
        f"all 8,551 training examples; SST-2 has {rows['glue-sst2']:,} examples",
        f"MRPC has {rows['glue-mrpc']:,} examples and two epochs, STS-B {rows['glue-stsb']:,} "
        "examples and four",
        f"{mrpc['t2r_hh']:.1f} against {mrpc['hedgehog']:.1f}",
        "would score 81.2",
        f"KL {mrpc_kl:.3f}",
        f"Hedgehog recovers {sd(recovered('glue-cola', 'hedgehog'))}% and T2R-HH "
        f"{sd(recovered('glue-cola', 't2r_hh'))}%",
        "The paper's 99.3% is not reached",
        f"Hedgehog recovers {shares('glue')[1]:.0f}% as the share of the averages, which is how the paper computes its "
        f"number, and {shares('glue')[0]:.0f}% as the mean of the shares: "
        f"{of('glue-cola')}% on CoLA ({-behind:.1f} ± {error:.1f} points below the "
        "teacher), "
        f"{of('glue-sst2')}% on SST-2, {of('glue-mrpc')}% on MRPC and {of('glue-stsb')}% on STS-B",
        "MiniLM's heads have 32 dimensions and therefore 64 features, while BERT-base has 128",
        f"batches of {config('stsb-small-batches')['batch_size']} and one map each for queries "
        "and keys reaches "
        f"{of('stsb-small-batches')}%",
        f"With a weaker teacher it was {of('stsb-weak-teacher')}%",
        "W is 32 x 128 and starts random, which gives 256 features a head",
        f"{config('wide-stsb')['batch_size']} examples (CoLA: {config('wide-cola')['batch_size']})",
        f"learning rate {config('wide-stsb')['distil_lr']:g} (the paper: 0.01)",
        f"STS-B {rows['wide-stsb']:,}, MRPC {rows['wide-mrpc']:,} and SST-2 {rows['wide-sst2']:,}",
        f"With 256 features, {shares('wide')[1]:.0f}% is recovered",
        f"The mean of the four shares is {shares('wide')[0]:.0f}%",
        f"{sd(recovered('wide-cola', 'hedgehog'))}% on CoLA, "
        f"{sd(recovered('wide-mrpc', 'hedgehog'), '.1f')}% on MRPC, "
        f"{sd(recovered('wide-sst2', 'hedgehog'), '.1f')}% on SST-2 and "
        f"{sd(recovered('wide-stsb', 'hedgehog'), '.1f')}% on STS-B",
        "the three seeds have {:.0f}, {:.0f} and {:.0f}%".format(*recovered("wide-cola", "hedgehog")),
        f"The other three tasks alone have {shares('wide', skip='cola')[0]:.0f}%",
        "The aim was 97% on every task",
        f"three seeds have {kept['stsb']:.1%} on STS-B and {kept['mrpc']:.1%} on MRPC",
        "and 64 features",
        f"always answering yes has {mean(scores('wide-mrpc', 'elu').values()):.1f}",
        f"the teacher has {accuracy['teacher_finetuned']:.1f} and Hedgehog "
        f"{accuracy['hedgehog']:.1f} with three seeds; "
        f"T2R-HH has {accuracy['t2r_hh']:.1f}, T2R {accuracy['t2r']:.1f} and 1+ELU "
        f"{accuracy['elu']:.1f}",
        "in two of 72 heads",
        f"{sd(recovered('wide-stsb', 'distilled'), '.1f')}% are recovered",
        f"it is {sd(recovered('wide-stsb', 'worst_heads'), '.1f')}%",
        "{} with KL, {} with tau and {} with entropy".format(*rank_correlations()),
        f"Zero attention recovers {of('cola-controls', 'zero')}%, untrained Hedgehog maps "
        f"{of('cola-controls', 'swap')}%",
        f"KL is {kl['hedgehog']:.3f} nats for Hedgehog (with softmax or with plain exp over the "
        "features), "
        f"{kl['t2r_hh']:.3f} for T2R-HH, and {kl['shared']:.3f} for one",
        "the paper's best fixed map (50.0)",
        f"recovers {of('cola-controls', 'elu')}%; in the paper it recovers {28.1 / 58.8:.0%}",
        "in layer 0 of the model",
        "16 patches",
        f"1+ELU recovers {of('vit-digits', 'elu', '.1f')}%",
    ]


def rank_correlations() -> list[str]:
    """Of what CoLA's arms recover with the measures of their weights, as the page writes them."""
    from experiments.finetuned_tables import points
    from experiments.ladder import with_new_names
    from experiments.metrics import rank_correlation

    found = points(with_new_names(read("cola-controls")))
    assert len(found) == 12
    said = []
    for key in ("kl", "tau", "entropy"):
        rho, low, high = rank_correlation(
            [weights[key] for *_, weights in found], [share for _, share, _ in found]
        )
        assert low * high > 0, "the page says that no interval contains zero"
        said.append(f"{rho:+.2f}".replace("-", "−"))
    return said


def speed() -> list[str]:
    import bench

    facts, threads, recipe = read("bench-cpu"), read("bench-threads"), read("bench-recipe")
    c = facts["config"]
    assert c["threads"] == 1 and threads["config"]["threads"] == recipe["config"]["threads"] == 2
    assert all(f["config"]["dtype"] == ["float32", "bfloat16"] for f in (facts, threads, recipe))
    assert {(r["part"], r["contender"]) for r in recipe["rows"]} == {
        ("recipe", "softmax"), ("recipe", "hedgehog")
    }  # fmt: skip
    shortest = min(r["T"] for r in read("bench-encoder")["rows"] if r["part"] == "memory")
    return [
        f"(2 heads where the table says so), {2 * c['head_dim']} features",
        "one of 2 layers, 384 wide, is trained",  # time_model of bench.py
        f"take turns of {bench.STEPS} steps each",
        f"from {shortest} tokens on",
        "from 1K to 1M tokens",
        "Above 1, linear attention is faster",
        f"{c['n_head']} heads of {c['head_dim']} dimensions",
        "within 99 KB",  # fused.resources
        "heads of 64 dimensions and the H100 they spill no registers",  # test_triton.py
        "the gradients of heads of 128 dimensions",
        "below 0.01 at 8,192 tokens and below 0.02 at 102,400",  # test_fused.py
    ]


def readme() -> list[str]:
    first = json.loads((ROOT / "results" / "stdlib-hedgehog-1.json").read_text())["config"]
    seen = first["max_steps"] * first["batch_size"] * first["block_size"]
    analysis = read("analysis")
    entropy = mean(map(mean, analysis["maps"]["elu"]["entropy"]))
    assert entropy > 0.99 * analysis["uniform_entropy"]  # "nearly uniform"
    return [
        "takes 2 to 5 minutes on 2 CPU cores",
        "takes 20 seconds more",
        f"After {seen / 1e6:.1f} million bytes",
        f"distances of up to {first['block_size']} bytes",
        "(2 to 6 minutes)",
        "up to 1M tokens",
        "softmax over the last 64 tokens",  # of the call beside it
        "five sessions of 90 minutes",
    ]


def prices() -> list[str]:
    from experiments.prices_tables import rows_of

    facts = read("prices-stdlib")
    rows = {r["arm"]: r for r in rows_of(facts)}
    lost, state = ({name: r[key] for name, r in rows.items()} for key in ("held_out", "state"))
    most = facts["measured"]["tokens"]
    assert max(abs(lost[name] - 1) for name in ("hedgehog-w64", "softmax-w64")) < 0.01
    assert lost["hedgehog-x4"] < lost["hedgehog-keep10"] and state["hedgehog-x4"] < state["hedgehog-keep10"]
    for columns in ("", "-x0.5", "-x2", "-x4"):
        assert lost[f"hedgehog{columns}-untied"] < lost[f"hedgehog{columns}"]
        assert state[f"hedgehog{columns}-untied"] == state[f"hedgehog{columns}"]
    assert max(set(lost) - {"zero"}, key=lost.get) == "t2r"
    smollm2 = {r["arm"]: r for r in rows_of(read("prices-smollm2"))}
    held, tested = {arm: r["held_out"] for arm, r in smollm2.items()}, smollm2["hedgehog-w64"]["test"]
    assert (
        held["hedgehog"] > held["hedgehog-untied"] > held["hedgehog-x1-untied"] > held["hedgehog-x4-untied"]
    )
    of_task = {r["arm"]: r for r in rows_of(read("prices-stsb"))}
    assert all(abs(of_task["hedgehog-keep10"][of] - 1) < 0.005 for of in ("held_out", "test"))
    assert of_task["t2r"]["test"] == min(r["test"] for arm, r in of_task.items() if arm != "zero")
    mrpc = {r["arm"]: r for r in rows_of(read("prices-mrpc"))}
    assert abs(mrpc["hedgehog-keep10"]["test"] - 1) < 0.005
    assert mrpc["t2r"]["test"] == min(mrpc[arm]["test"] for arm in ("t2r", "hedgehog", "hedgehog-untied"))
    runs = [r for of in ("stsb", "mrpc") for r in read(f"prices-{of}")["runs"]]
    assert all(sum(r["arm"] == arm for r in runs) == 6 for arm in ("teacher_finetuned", "hedgehog-keep10"))
    return [
        f"without any attention {mrpc['zero']['test']:.1%} of it are left",
        f"There two maps have {mrpc['hedgehog-untied']['test']:.1%}, and one has {mrpc['hedgehog']['test']:.1%}",
        "One seed and 408 test examples have a standard error of 1.2 points",  # of the paired difference
        f"after a prompt of {most:,} tokens",
        "Softmax over the last 64 tokens",
        "W of 4 D columns",
        f"to {held['hedgehog-w64']:.2f} times that of SmolLM2 ({tested:.2f} on the test text)",
        f"the window alone has {held['softmax-w64']:.2f} times",
        f"SmolLM2 has {held['hedgehog-x1-untied-w64']:.3f} with both and {held['hedgehog-w64']:.3f} with neither",
        "with 300 and 400 to 700 steps of two sequences in place of 100 and 100 of one, reach 1.43 to 1.58",
        "200 examples choose the checkpoint, and the test set has 1,500 others",
        "the window of 16 alone, T2R, and the window of 64 with kept heads",
    ]


def long_range_arena() -> list[str]:
    from experiments import lra
    from feature_maps import make_feature_map

    def average(name: str) -> float:
        return mean(x for x, task in zip(lra.PAPER[name], lra.ORDER, strict=True) if task != "retrieval")

    features = make_feature_map("performer", 2, 32).feature_dim

    def deviation(percent: float, examples: int) -> float:
        p = percent / 100
        return 100 * (p * (1 - p) / examples) ** 0.5

    text, listops = read("lra-text")["runs"][0]["final"], read("lra-listops")
    of_text = 2**0.5 * deviation(text["accuracy"], text["examples"])  # of a difference
    texts = {r["config"]["attention"]: r["final"]["accuracy"] for r in read("lra-text")["runs"]}
    behind = texts["softmax"] - texts["hedgehog"]
    clear = {name for name, found in texts.items() if texts["softmax"] - found > 2 * of_text}
    assert clear == {"linformer", "nystromformer", "skyformer"}
    assert abs(texts["linformer"] - text["chance"]) < 1
    first = listops["first_token"]  # the accuracy of an answer that reads nothing but the first operator
    of_first = deviation(first, listops["runs"][0]["final"]["examples"])
    reached = {r["config"]["attention"]: r["final"]["accuracy"] for r in listops["runs"]}
    chance = listops["runs"][0]["final"]["chance"]
    assert reached.pop("skyformer") < chance and abs(reached.pop("reformer") - chance) < 2
    assert all(abs(found - first) < 2 * of_first for found in reached.values())
    assert abs(reached["local"] - reached["softmax"]) < of_first
    paper = lra.SETTINGS["paper"]["image"]
    tokens = paper["max_steps"] * paper["batch_size"] * paper["block_size"]
    assert 190 < tokens / paper["block_size"] / 45000 < 210  # epochs
    hours = round(tokens / 45000 / 3600, -1)  # at some 45,000 tokens a second
    far, near = (lra.SETTINGS[setting]["pathfinder"] for setting in ("paper", "ours"))
    assert round(far["max_steps"] * far["batch_size"] / 160000) == 100  # epochs of 160,000 drawings
    of_pathfinder = round(far["max_steps"] * far["batch_size"] * far["block_size"] / 45000 / 3600, -1)
    assert 0.5 < near["max_steps"] * near["batch_size"] / near["sizes"][0] < 1
    return [
        f"1+ELU and Performer have {lra.PAPER['elu'][0]:.0f} and {lra.PAPER['performer'][0]:.0f}%",
        "6 layers of width 512, a learning rate of 0.05",  # of the official base_listops_config.py
        f"Performer has 2 features there, and {features} here",  # and performer_base.py
        f"With {text['examples']:,} test examples the standard error of a difference is {of_text:.1f} points",
        f"Hedgehog is {behind:.1f} points behind softmax, {behind / of_text:.1f} standard errors",
        f"The standard error is {of_first:.1f} points, and all systems but two are within two of them",
        "a window of 32 tokens (Local)",
        "is 1.10 (root mean square) where the tokens are 0.71 and softmax's output is 0.035",  # the lab log
        "it learns like the others: 33.3%",
        "its output is twice as large as softmax's",  # the lab log
        "which before training 14% of the tokens do with the first one",
        "up to the last of the 800 steps",
        "with a standard deviation of 0.02",  # the lab log
        "for at least 400 steps",
        f"Here it is {lra.EMBD_STD}",
        "it has 19% after 500 steps of 16 images, and 20% after 4,000 steps of 4",  # the lab log
        "(aim: 35%)",
        "20,000 reviews for training, of which 2,000 are dev, and 4,000 for the test",
        "takes all 50,000",
        "(14 at 4,000 bytes)",
        f"200 epochs, which here would be some {hours:.0f} hours",
        f"{near['max_steps']:,} steps of {near['batch_size']} drawings, most of one epoch of {near['sizes'][0]:,}",
        f"100 epochs of 160,000 drawings, which here would be some {of_pathfinder:.0f} hours",
        "every (T / 50)-th token",  # block_size of local.py
        "in February 2021",  # issue 20 of the official benchmark
        f"the averages are {average('hedgehog'):.1f} for Hedgehog and {average('softmax'):.1f} for softmax",
    ]


SAID = {
    "README": readme,
    "from_scratch": from_scratch,
    "why": why,
    "converting": converting,
    "finetuned": finetuned,
    "speed": speed,
    "lra": long_range_arena,
    "prices": prices,
}


@pytest.mark.parametrize("page", SAID)
def test_every_number_in_the_text_is_accounted_for(page):
    """What is said is what the results say; and nothing else with a digit is said."""
    text = prose(PAGES[page].read_text())
    for fragment in SAID[page]():
        assert fragment in text, f"{page} should say: {fragment}"
        text = text.replace(fragment, "")
    left = re.sub(NAMES, "", text, flags=re.VERBOSE)
    unchecked = [left[max(0, found.start() - 40) : found.end() + 20] for found in re.finditer(r"\d+", left)]
    assert not unchecked


def test_every_page_is_checked():
    assert set(PAGES) == set(SAID)


def test_hours_and_memory_are_those_of_the_estimates():
    """Rows that were not run say what docs/gpu.md computes."""
    row = r"^\| ([^|]+) \| ([\d.]*) ?\| ([\d.]+) \| ([\d.]*) ?\| ([\d.]+) \| (\d+) \|$"
    rows = re.findall(row, (ROOT / "docs" / "gpu.md").read_text(), re.MULTILINE)
    estimates = {name.split(",")[0]: [float(x or 0) for x in rest] for name, *rest in rows}
    _, hours, _, _, gb = estimates["Table 1"]
    pages = {name: path.read_text() for name, path in PAGES.items()}
    assert f"{hours:.1f} h each, {gb:.0f} GB" in pages["from_scratch"]
    assert f"about {hours:.0f} hours and {gb:.0f} GB each on an A100" in pages["README"]
    distil, train, undistilled, _, gb = estimates["Table 3"]
    assert (
        f"{distil + train:.1f} h for each distilled row, {undistilled:.1f} h for each other row, "
        f"{gb:.0f} GB" in (pages["converting"])
    )
    distil, train, _, _, gb = estimates["Llama-2 7B"]
    assert f"{distil + train:.0f} h for each row, {gb:.0f} GB" in pages["converting"]
    *_, together, gb = estimates["Table 2"]
    assert f"{together:.0f} h, {gb:.0f} GB" in pages["finetuned"]
    *_, together, gb = estimates["ViT-B/16"]
    assert f"{together:.0f} h, and 14 h of CPU cores to read the images, {gb:.0f} GB" in pages["finetuned"]


def test_settings_are_those_of_the_command():
    """from_scratch.md's table of the paper's setting and ours: all that --setting changes, and nothing else."""
    from experiments.from_scratch import SETTINGS, CompareConfig

    rows = re.findall(r"^\| `--(\w+)` \| .* \| (.+) \| (.+) \|$", PAGES["from_scratch"].read_text(), re.M)
    assert {name for name, *_ in rows} == set(SETTINGS["paper"]) - {"map_lr_scale"}  # which one rate leaves
    for name, paper, ours in rows:
        if name == "map_lr_scales":
            assert [float(paper)] == SETTINGS["paper"][name]
            assert ours == "{:g} and {:g} are tried".format(*getattr(CompareConfig(), name))
        else:
            assert (float(paper), float(ours)) == (SETTINGS["paper"][name], getattr(CompareConfig(), name))


def test_the_papers_share_is_that_of_table_1():
    shares = [100 * (f(25.6) - f(20.8)) / (f(25.6) - f(18.6)) for f in (log, float)]
    text = "{:.0f}% of the nats ({:.1f}% of the perplexity)".format(*shares)
    assert text in PAGES["README"].read_text()
    row = "| the paper, WikiText-103 | {:.0f}% | {:.1f}% |".format(*shares)
    assert row in PAGES["from_scratch"].read_text()


def test_gaps_are_closed_as_the_page_says_in_perplexity_too():
    """README's one number is a share of nats; the page has the same in perplexities beside it."""
    text = PAGES["from_scratch"].read_text()
    for name in ("compare-stdlib-paper", "compare-stdlib"):
        of = losses(name)
        assert f"| {sd(closed(of), '.1f')}% | {sd(closed(of, measure=exp), '.1f')}% | 3 |" in text


# ---------------------------------------------------------------- the speed of a GPU, which no result has yet


@pytest.fixture(scope="module")
def render():
    spec = importlib.util.spec_from_file_location("render", ROOT / "results" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_a_gpu() -> dict:
    """A made-up file of bench.py --device cuda: no C++, other parts than on a CPU, and rows that are lost."""
    rows = [
        {
            "part": part, "T": T, "heads": 16, "dtype": dtype, "contender": name, "median": 1e-3 * T / (1 + i),
            "ratio": 1.0 + i, "kv_bytes": 2**20, "state_bytes": 2**19, "tokens_per_s": 1e5 * (1 + i),
        }
        for part in ("forward", "forward-graph", "training", "memory", "decode-graph", "recipe")
        for T in (512, 8192)
        for dtype in ("float32", "bfloat16")
        for i, name in enumerate(["softmax", "hedgehog"] if part == "recipe" else ["softmax", "triton", "torch"])
        if (part, T, dtype, name) != ("forward", 8192, "bfloat16", "triton")
    ]  # fmt: skip
    lost = {"part": "forward", "T": 8192, "heads": 16, "dtype": "bfloat16", "contender": "triton"}
    crossed = {f"{part} {name}": 512 for part in ("forward", "training") for name in ("triton", "torch")}
    return {
        "rows": rows, "failed": [lost | {"error": "RuntimeError: no luck"}], "minutes": 4.2, "commit": "abc",
        "command": "python bench.py --device cuda", "machine": "1 x NVIDIA H100",
        "config": {"dtype": ["float32", "bfloat16"]}, "softmax": {"float32": "efficient", "bfloat16": "flash"},
        "crossover": dict.fromkeys(("float32", "bfloat16"), crossed), "speed": {},
        "check": {"rows": [{"ok": True}, {"ok": False}]},
    }  # fmt: skip


def test_a_file_of_a_gpu_is_shown_beside_the_cpus(render, tmp_path, monkeypatch):
    monkeypatch.setattr(render, "HERE", tmp_path)
    assert "nothing was measured on a GPU" in render.gpu()
    (tmp_path / "bench-gpu-h100.json").write_text(json.dumps(of_a_gpu()))
    text = render.gpu()
    assert "float32: softmax, ms | float32: Hedgehog, Triton | float32: Hedgehog, PyTorch | bfloat16" in text
    assert "| 8,192 | 8,192.00 | 2.00 | 3.00 | 8,192.00 |  | 3.00 |" in text, "what failed is empty"
    assert "- Failed: triton, forward, bfloat16, 8,192 tokens: RuntimeError: no luck" in text
    assert "| **faster from** |  | 512 | 512 |  | 512 | 512 |" in text
    assert "Times softmax, forward, as CUDA graphs" in text and "times the faster of two KV caches" in text
    assert "| steps of training at 512 tokens | 100,000 | 200,000 | 100,000 | 200,000 |" in text
    assert "softmax in PyTorch's efficient and flash kernel" in text and "1 x NVIDIA H100" in text
    assert "fused.check: 1 of 2 cases right" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    for table in "\n".join(text.splitlines()).split("\n\n"):
        widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) <= 1, table
    assert len(lines) > 20
    assert "stopped before its end" in text
    whole = of_a_gpu() | {"speed_after": {}, "minutes": 1.2}
    (tmp_path / "bench-gpu-h100.json").write_text(json.dumps(whole))
    assert "stopped" not in render.gpu() and "1 minute;" in render.gpu()


def test_the_table_of_a_page_is_the_processors_own(render):
    """Features of the processor, the kernel of softmax and both crossovers stand under the tables."""
    facts = read("bench-cpu")
    text = render.speed()
    assert ", ".join(facts["features"]) in text and "softmax in PyTorch's flash kernel" in text
    for dtype, crossed in facts["crossover"].items():
        assert (
            f"Faster than softmax in {dtype}: Hedgehog, C++: forward {render.since(crossed['forward cpp'])}"
            in text
        )


def test_a_softmax_that_is_slower_in_bfloat16_is_named_and_the_faster_one_counts(render):
    """At 128 tokens bfloat16 softmax takes 9 ms, float32 3, Hedgehog 4.5: twice as fast, or 0.67 times."""
    times = {  # tokens: float32 softmax, bfloat16 softmax, bfloat16 C++, in ms
        128: (3.0, 9.0, 4.5),
        256: (10.0, 10.1, 5.0),
        512: (40.0, 20.0, 10.0),
    }
    which = [("float32", "softmax"), ("bfloat16", "softmax"), ("bfloat16", "cpp")]
    rows = [
        {"dtype": dtype, "part": "training", "T": T, "contender": name, "median": ms / 1e3}
        for T, of in times.items()
        for (dtype, name), ms in zip(which, of)
    ]
    (line,) = render.against_the_faster({"rows": rows})
    assert "At 128 tokens it takes 9.00 ms in bfloat16 and 3.00 in float32." in line
    assert "takes 4.50: it has 0.67 times the speed" in line and "At 256" not in line and "At 512" not in line
    assert line.endswith("Hedgehog is faster than softmax in either dtype from 256 tokens on.")
    assert not render.against_the_faster({"rows": rows[3:]})


def test_memory_over_softmaxs_is_said_by_dtype(render):
    mib = {("float32", 512): (10, 9), ("float32", 1024): (20, 10), ("bfloat16", 512): (5, 8)}
    rows = [
        {"dtype": dtype, "part": "memory", "T": T, "contender": name, "median": x}
        for (dtype, T), pair in mib.items()
        for name, x in zip(("softmax", "cpp"), pair)
    ]
    (line,) = render.of_memory({"rows": rows, "config": {"dtype": ["float32", "bfloat16"]}})
    assert "in float32 0.50 to 0.90 times, 0.70 in the median; in bfloat16 1.60 to 1.60" in line
    assert render.of_memory({"rows": [], "config": {"dtype": ["float32"]}}) == []


def test_the_arena_is_compared_on_the_tasks_that_were_run(render, tmp_path, monkeypatch):
    """README's row: Table 6 and ours over the same tasks, without those that are a stand-in."""
    monkeypatch.setattr(render, "HERE", tmp_path)
    assert render.arena_in_short() == "not run"

    def ran(task: str, accuracy: float, stand_in: bool = False) -> None:
        runs = [
            {"config": {"attention": name, "stand_in": stand_in}, "final": {"accuracy": accuracy}}
            for name in ("softmax", "hedgehog", "elu")
        ]
        (tmp_path / f"lra-{task}.json").write_text(json.dumps({"task": task, "runs": runs, "command": ""}))

    ran("retrieval", 90.0, stand_in=True)
    assert render.arena_in_short() == "not run"
    ran("listops", 30.0)
    theirs, ours = render.arena_in_short()
    assert theirs == "softmax 36.37%, Hedgehog 37.15%, 1+ELU 16.13% (listops alone)"
    assert ours == "softmax 30.0%, Hedgehog 30.0%, 1+ELU 30.0% (listops alone; minutes a run)"
    facts = json.loads((tmp_path / "lra-listops.json").read_text()) | {"first_token": 34.45}
    (tmp_path / "lra-listops.json").write_text(json.dumps(facts))
    assert "minutes a run; the first operator alone has 34.5% on listops)" in render.arena_in_short()[1]
    ran("image", 50.0)
    theirs, ours = render.arena_in_short()
    assert "softmax 39.4" in theirs and "softmax 40.0%" in ours  # (36.37 + 42.44) / 2
