"""House rules that a reader may rely on: what is defined where, and which way imports go."""

import re

from conftest import ROOT

FILES = {
    p.relative_to(ROOT).as_posix(): p.read_text()
    for p in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("configs/*.py"), *ROOT.glob("kernels/*.py")]
}
ROOMS = """feature_maps kernels window attention model configs common data evaluate train measure bench figures analyze
    runs recall compare sample distill hf hf_models gpt2 convert convert_gpt2 convert_llama
    recover recovery convert_bert convert_vit bench_encoder""".split()


def users_of(pattern: str) -> set[str]:
    return {name for name, text in FILES.items() if re.search(pattern, text, re.MULTILINE)}


def test_one_place_for_each_idea():
    assert users_of(r"(?<!kernel)\.backward\(") == {"train.py"}
    assert users_of(r"save_file\(|safe_open\(|torch\.(load|save)\(") == {"common.py"}
    assert users_of(r"^class \w+\((FeatureMap|Learned)\)") == {"feature_maps.py"}
    assert users_of(r"\bnormalise\(") == {"attention.py", "window.py", "kernels/chunked.py"}
    assert users_of(r"^def normalise\(") == {"kernels/chunked.py"}
    assert users_of(r"scaled_dot_product_attention\(") == {"attention.py"}


def test_imports_go_one_way():
    allowed = {
        "feature_maps": set(), "kernels": set(), "kernels/chunked": {"feature_maps"},
        "kernels/chunked_triton": {"feature_maps"},
        "window": {"feature_maps", "kernels"}, "attention": {"feature_maps", "kernels", "window"}, "figures": set(),
        "measure": {"kernels"}, "model": {"attention", "feature_maps"},
        "common": set(), "data": {"common"}, "evaluate": {"common", "model"},
        "configs": {"common", "model"},
        "analyze": {"attention", "common", "data", "feature_maps", "figures", "model"},
        "runs": {"common", "feature_maps", "kernels", "model", "train"},
        "distill": {
            "attention", "common", "configs", "data", "feature_maps", "figures", "kernels", "model", "runs", "train",
        },
        "hf": {"attention", "common", "distill", "feature_maps", "hf_models"}, "hf_models": {"common"},
        "gpt2": {"attention", "common", "model"},
        "recovery": {"analyze", "convert", "figures", "runs"},
        "recover": {
            "analyze", "common", "convert", "distill", "hf", "kernels", "model", "recovery", "runs",
            "train",
        },
        "convert": {
            "attention", "common", "configs", "data", "distill", "evaluate", "kernels", "model", "runs", "train",
        },
    }  # fmt: skip
    for room, may in allowed.items():
        text = FILES.get(f"{room}.py") or FILES[f"{room}/__init__.py"]
        imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)) & set(ROOMS)
        assert imported <= may, room


def test_no_room_holds_two_ideas():
    long = {name: text.count("\n") for name, text in FILES.items() if text.count("\n") > 360 and "triton" not in name}
    assert not long
