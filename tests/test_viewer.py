"""The two HTML pages, in a real browser: they load, show the numbers of Python, and need no mouse and no network."""

import base64
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.stats import kendalltau
from tiny import save_encoder

from attention import LinearAttention, linear_weights, softmax_weights
from experiments import attention_page, feature_map_page
from experiments.attention_maps import hugging_face, own_attentions, words
from experiments.browser import Browser, find_browser
from experiments.metrics import entropy, kendall_tau, kl, queries_and_keys
from feature_maps import HedgehogExp, make_feature_map

DOCS = ROOT / "docs"
TEXT = "one two three, two one.\n\tÄ <b>&amp;</b>"


@pytest.fixture(scope="module")
def browser():
    if not find_browser():
        pytest.skip("there is no browser: apt install chromium")
    with Browser() as one:
        yield one


def data_of(path: Path) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)[1])


def unpack(text: str) -> np.ndarray:
    planes = (
        np.frombuffer(zlib.decompress(base64.b85decode(text.replace(",", "<"))), np.uint8)
        .reshape(2, -1)
        .astype(int)
    )
    return planes[0] + 256 * planes[1]


def make(command, folder: Path, out: Path, *flags) -> tuple[Path, str]:
    (out / "text").write_text(TEXT)
    where = ["--text", out / "text", "--html", out / "page.html", "--out_dir", out, "--device", "cpu"]
    code, stdout, stderr = command("experiments.attention_maps", folder, *where, *flags)
    assert code == 0, stderr
    return out / "page.html", stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gpt")


@pytest.fixture
def gpt(train, command, folder) -> Path:
    """The page of a distilled GPT of two layers, whose run is in folder / "pupil". It is made once."""
    if not (folder / "page.html").exists():
        assert train("--n_layer", 2, "--attention", "softmax", "--out_dir", folder / "teacher")[0] == 0
        few = "--max_steps 2 --batch_size 2 --held_out 1 --device cpu --lr 1".split()
        assert command("distill", folder / "teacher", *few, "--out_dir", folder / "pupil")[0] == 0
        make(command, folder / "pupil", folder, "--maps", "elu", "taylor")
    return folder / "page.html"


def weights_of_gpt(folder: Path) -> dict[str, torch.Tensor]:
    """{map: (L, H, T, T)} by attention.py: of the teacher's queries and keys, with the distilled maps."""
    from experiments.attention_maps import AnalyzeConfig, load, tokens_of

    config = AnalyzeConfig(checkpoint=str(folder))
    model, tokenizer = load(config, torch.device("cpu"))
    with torch.no_grad():
        qk = queries_and_keys(model, tokens_of(config, tokenizer, TEXT, model))
        phis = [attend.phi for attend in own_attentions(model)]
        elu = make_feature_map("elu", *qk[0][0].shape[1::2])
        pairs = [(q.double(), k.double(), phi) for (q, k), phi in zip(qk, phis)]
        return {
            "softmax": torch.stack([softmax_weights(q, k)[0] for q, k, _ in pairs]),
            "hedgehog": torch.stack([linear_weights(phi.query(q), phi.key(k))[0] for q, k, phi in pairs]),
            "elu": torch.stack([linear_weights(elu(q), elu(k))[0] for q, k, _ in pairs]),
        }


SHOWN = """[...document.querySelectorAll('[data-map=%s] [data-token]')].map(
    (s) => [Number(s.dataset.weight), Number(getComputedStyle(s).backgroundColor.match(/[\\d.]+/g)[3] ?? 1)])"""


def check_shown(browser, name: str, row: torch.Tensor) -> None:
    """The numbers and the shading of a map's tokens are these weights, to 3 digits."""
    said, alpha = np.array(browser.js(SHOWN % name)).T
    assert np.allclose(said, row, atol=0.00051)
    assert np.allclose(alpha, row.sqrt(), atol=0.01)


def test_hovering_shows_what_python_computed_and_keys_move(browser, gpt, folder):
    weights = weights_of_gpt(folder / "pupil")
    browser.open(gpt)
    entropies = entropy(weights["softmax"]).mean(-1)
    layer, head = divmod(int(entropies.argmin()), entropies.size(1))  # the spikiest head comes first
    of_maps = [unpack(of_map["entropies"]).reshape(2, 2, -1)[layer, head] for of_map in data_of(gpt)["maps"]]
    half = len(of_maps[0]) // 2  # the later token that is most like the mean comes first
    first = half + int(sum(abs(of_map - of_map.mean()) for of_map in of_maps)[half:].argmin())
    assert browser.js("[at.token, at.key]") == [first, int(weights["softmax"][layer, head, first].argmax())]
    about = browser.js("document.getElementById('about').textContent")
    assert "tokens, each of one byte, of" in about and "its softmax teacher's" in about
    for token in (9, 3, 20):
        browser.hover(f'#text [data-token="{token}"]')
        for name, A in weights.items():
            check_shown(browser, name, A[layer, head, token])
            n = browser.js(f"document.querySelector('[data-map={name}] .number').textContent")
            assert n == f"looks at {entropy(A[layer, head, token]).exp():.1f} tokens"
    for (l, h), cell in ((place, n) for n, place in enumerate(np.ndindex(2, 2))):
        browser.js(f"document.querySelectorAll('#grid button')[{cell}].click()")
        check_shown(browser, "hedgehog", weights["hedgehog"][l, h, 20])
        said = browser.js("document.querySelector('[data-map=hedgehog] p:last-child').textContent")
        of_head = kl(weights["softmax"], weights["hedgehog"])[l, h].mean()
        assert f"KL {of_head:.3f} nats" in said and "Kendall's tau" in said
    browser.hover('[data-map=elu] [data-token="7"]')  # reads a weight under every map, chooses nothing
    for name, A in weights.items():
        assert "token 7, " in (said := browser.js(f"maps.find((m) => m.name === '{name}').ofKey.textContent"))
        assert said.endswith(f"weight {A[1, 1, 20, 7]:.3f}")
    tap = """document.querySelector('[data-map=elu] [data-token="25"]').click()"""  # a later token
    browser.js(tap)
    assert browser.js("maps[0].ofKey.textContent").endswith("comes later, not seen")
    browser.js("document.activeElement.blur()")
    at = "[at.token, at.layer, at.head]"
    assert browser.js(at) == [20, 1, 1]
    for key, shift, wanted in (
        ("ArrowLeft", False, [19, 1, 1]), ("ArrowUp", False, [19, 0, 1]), ("ArrowLeft", True, [19, 0, 0]),
        ("ArrowLeft", True, [19, 0, 0]), ("ArrowDown", False, [19, 1, 0]), ("ArrowRight", False, [20, 1, 0]),
    ):  # fmt: skip
        browser.key(key, shift)
        assert browser.js(at) == wanted
    check_shown(browser, "hedgehog", weights["hedgehog"][1, 0, 20])
    assert browser.errors() == []


def test_the_grid_is_coloured_by_kl_or_entropy_and_tau_is_that_of_the_weights(browser, gpt, folder):
    data = data_of(gpt)
    browser.open(gpt)
    cells = "[...document.querySelectorAll('#grid button')].map((b) => b.title.match(/: ([\\d.]+)/)[1])"
    for measure in ("entropy", "kl"):
        browser.js(f"$('measure').value = '{measure}'; $('measure').dispatchEvent(new Event('change'))")
        wanted = [f"{x:.3f}" for x in np.ravel(data["maps"][1][measure])]
        assert browser.js(cells) == wanted and len(set(wanted)) > 1
    weights, found = weights_of_gpt(folder / "pupil"), data["maps"][1]
    scores = weights["softmax"].clamp(min=1e-300).log()  # a row's q.k, less a constant
    assert np.allclose(found["tau"], kendall_tau(weights["hedgehog"], scores), atol=0.02)


@pytest.mark.parametrize("page", ["attention", "feature_map", "index"])
def test_a_phone_needs_no_sideways_scroll_and_the_console_is_empty(browser, page, tmp_path):
    path = DOCS / f"{page}.html"
    if page == "index":
        path = tmp_path / "index.html"  # it has no script that says when it is ready
        path.write_text(
            (DOCS / "index.html").read_text() + "<script>document.body.dataset.ready = 'yes'</script>"
        )
    for dark in (False, True):
        browser.open(path, 390, 844, dark, touch=True)
        assert browser.js("document.documentElement.scrollWidth") <= 390
    if page == "attention":
        browser.tap('#text [data-token="12"]')
        assert browser.js("at.token") == 12
    assert browser.errors() == []


def test_the_browser_test_sees_errors(browser, tmp_path):
    """Otherwise an empty console would prove nothing."""
    page = tmp_path / "broken.html"
    page.write_text("<body data-ready=yes><script>console.error('a'); undefinedFunction()</script></body>")
    browser.open(page)
    assert len(browser.errors()) == 2
    browser.events.clear()


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_models_of_hugging_face_have_a_page(browser, command, llama, tmp_path, kind):
    folder = llama if kind == "decoder" else save_encoder(tmp_path / "bert")
    path, _ = make(command, folder, tmp_path, "--maps", "hedgehog")
    model, idx = hugging_face(str(folder), TEXT, 256)
    causal = kind == "decoder"
    with torch.no_grad():
        q, k = (x.double() for x in queries_and_keys(model, idx)[1])
        phi = make_feature_map("hedgehog", *q.shape[1::2])
        want = {
            "softmax": softmax_weights(q, k, causal=causal),
            "hedgehog": LinearAttention(phi, causal).weights(q, k),
        }
    browser.open(path)
    browser.js("choose({token: 4, layer: 1, head: 2})")
    for name, A in want.items():
        check_shown(browser, name, A[0, 2, 4])
    unseen = browser.js("document.querySelectorAll('[data-map=softmax] .unseen').length")
    assert unseen == (idx.size(1) - 5 if causal else 0)
    shown = browser.js("[...document.querySelectorAll('#text span')].map((s) => s.textContent).join('')")
    assert "one two three, two one.↵\n→\t" in shown and "<b>&amp;</b>" in shown
    assert browser.errors() == []


def test_tokens_are_the_text():
    assert words("bytes", list(b"h \n")) == ["h", " ", "\n"]
    assert words("bytes", list("é".encode())) == ["\ufffd"] * 2
    assert words("recall", [7, 25]) == [" 7", " 25"]


@pytest.mark.parametrize(
    "causal, megabytes",
    [
        pytest.param(True, 2.0, id="decoder"),
        pytest.param(False, 3.1, id="encoder", marks=pytest.mark.slow),
    ],
)
def test_a_page_of_144_heads_is_right_to_3_decimals_and_says_what_does_not_fit_into_2_mb(
    tmp_path, causal, megabytes
):
    """GPT-2's and BERT's numbers of heads, 128 tokens, and flat random weights, which are the worst to compress (q and
    k of size 1.2): two maps of a decoder have room, of an encoder only with less text."""
    torch.manual_seed(0)
    L, H, T = 12, 12, 128
    q, k = 1.2 * torch.randn(2, L, H, T, 8)
    weights = {"softmax": softmax_weights(q, k, causal=causal)}
    for name in ("hedgehog", "elu", "taylor"):
        with torch.no_grad():
            weights[name] = LinearAttention(make_feature_map(name, H, 8), causal).weights(q, k)
    zeros = {key: np.zeros((L, H)).tolist() for key in ("entropy", "kl", "tau")}
    facts = {"maps": dict.fromkeys(weights, zeros), "causal": causal, "command": "c", "commit": "0"}
    path = tmp_path / "page.html"
    said = attention_page.write(path, "about", ["a"] * T, facts, {n: n for n in weights}, weights, False)
    data = data_of(path)
    kept = [entry["name"] for entry in data["maps"]]
    assert kept == ["softmax", "hedgehog"] and "without elu, taylor" in said
    assert path.stat().st_size < 1e6 * megabytes
    assert ("more than 2 MB" in said) == (path.stat().st_size >= attention_page.LIMIT) == (not causal)
    for entry in data["maps"]:
        A = weights[entry["name"]]
        A = A[..., *torch.tril_indices(T, T)] if causal else A
        assert np.abs(unpack(entry["weights"]) / data["steps"] - A.numpy().ravel()).max() <= 0.000501


def test_the_pages_in_docs_are_those_that_the_commands_write():
    assert (DOCS / "feature_map.html").read_text(encoding="utf-8") == feature_map_page.contents()
    example = DOCS / "attention.html"
    assert example.read_text(encoding="utf-8") == attention_page.page("attention", **data_of(example))
    links = re.findall(r'href="([\w.]+)"', (DOCS / "index.html").read_text())
    assert links == ["feature_map.html", "attention.html"]
    assert all((DOCS / link).exists() for link in links)
    picture = DOCS / "figures" / "viewer.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 200_000


# ---------------------------------------------------------------- the second page


def of_page(browser, expression: str) -> np.ndarray:
    return np.array(browser.js(expression))


def test_the_javascript_of_the_second_page_is_feature_maps_py(browser):
    browser.open(DOCS / "feature_map.html")
    keys = torch.tensor(browser.js("keys"), dtype=torch.float64)[None, None]
    torch.manual_seed(0)
    for t, q in ((0.3, [2.2, 1.2]), (2.1, [-1.7, 0.4]), (1.0, [0.0, -3.0])):
        W, b = torch.randn(2, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
        query = torch.tensor(q, dtype=torch.float64)[None, None, None]
        maps = {"elu": make_feature_map("elu", 1, 2), "exp": make_feature_map("exp_t1", 1, 2, t=t)}
        for form in ("hedgehog", "hedgehog_exp"):
            maps[form] = make_feature_map(form, 1, 2, n_features=4, init="random").double()
            maps[form].weight.data, maps[form].bias.data = W[None], b[None, None]
        for name, phi in maps.items():
            numbers = json.dumps({"t": t, "W": W.tolist(), "b": b.tolist(), "form": name})
            in_page = "hedgehog" if name.startswith("hedgehog") else name
            with torch.no_grad():
                features, A = phi(keys)[0, 0], linear_weights(phi(query), phi(keys), causal=False)[0, 0, 0]
            assert np.allclose(
                of_page(browser, f"keys.map((k) => phi.{in_page}(k, {numbers}))"), features, rtol=1e-9
            )
            assert np.allclose(of_page(browser, f"weights('{in_page}', {q}, {numbers})"), A, rtol=1e-9)
            tau = kendalltau(A, (query @ keys.mT)[0, 0, 0]).statistic
            found = browser.js(f"tau(weights('{in_page}', {q}, {numbers}), keys.map((k) => dot({q}, k)))")
            assert found == pytest.approx(tau, abs=1e-9)
            found = browser.js(f"entropy(weights('{in_page}', {q}, {numbers}))")
            assert found == pytest.approx(entropy(A).item(), abs=1e-9)
        A = softmax_weights(query, keys, causal=False)[0, 0, 0]
        assert np.allclose(of_page(browser, f"weights('softmax', {q})"), A, rtol=1e-9)


def test_learning_lowers_eq_3_and_the_loss_is_that_of_python(browser):
    browser.open(DOCS / "feature_map.html")
    before, after, least = browser.js("[loss(start), loss(now), sum(teachers.map(entropy)) / keys.length]")
    assert least < after < least + 0.5 * (before - least)
    with torch.no_grad():
        keys = torch.tensor(browser.js("keys"), dtype=torch.float64)[None, None]
        phi = HedgehogExp(1, 2, n_features=4, init="random").double()
        phi.weight.data = torch.tensor(browser.js("[now.W]"), dtype=torch.float64)
        phi.bias.data = torch.tensor(browser.js("[[now.b]]"), dtype=torch.float64)
        A, B = softmax_weights(keys, keys, causal=False), LinearAttention(phi, False).weights(keys, keys)
    assert after == pytest.approx((kl(A, B) + entropy(A)).mean().item(), abs=1e-6)


def test_the_query_is_dragged_by_mouse_finger_and_keys_and_symbols_light_up(browser):
    page = DOCS / "feature_map.html"
    browser.open(page, 1200, 900)
    start, lit = (
        browser.js("start.q"),
        "[...document.querySelectorAll('.moved')].map((s) => s.dataset.symbol)",
    )
    handle = browser.centre("[data-map=elu] .handle")
    browser.drag(handle, (handle[0] - 60, handle[1] - 40))
    q = browser.js("now.q")
    assert q[0] < start[0] - 0.5 and q[1] > start[1] + 0.3
    assert set(browser.js(lit)) == {"q"}
    browser.js("document.querySelector('[data-map=softmax] .plane').focus()")
    browser.key("ArrowLeft")
    assert browser.js("now.q") == pytest.approx([q[0] - 0.1, q[1]])
    for name, symbol in (("t", "t"), ("W12", "W"), ("b3", "b")):
        browser.js("document.querySelectorAll('.moved').forEach((s) => s.classList.remove('moved'))")
        browser.js(f"document.querySelector('input[data-name={name}]').focus()")
        old = browser.js("weights(now.form ? 'hedgehog' : '', now.q, now).concat(weights('exp', now.q, now))")
        browser.key("ArrowRight")
        new = browser.js("weights(now.form ? 'hedgehog' : '', now.q, now).concat(weights('exp', now.q, now))")
        assert not np.allclose(old, new) and set(browser.js(lit)) == {symbol}, name
    browser.open(page, 390, 844, touch=True)
    x, y = browser.centre("[data-map=elu] .handle")
    point = [{"x": x, "y": y}], [{"x": x - 30, "y": y}]
    browser("Input.dispatchTouchEvent", type="touchStart", touchPoints=point[0])
    browser("Input.dispatchTouchEvent", type="touchMove", touchPoints=point[1])
    browser("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert browser.js("now.q")[0] < start[0] - 0.5
    assert browser.errors() == []


def test_spikiness_and_monotonicity_are_seen_at_once(browser):
    """What the page says above its pictures is true of the numbers that it opens with."""
    browser.open(DOCS / "feature_map.html")
    scores = "keys.map((k) => dot(now.q, k))"
    seen = browser.js(
        f"NAMES.map((n) => [Math.exp(entropy(weights(n, now.q, now))), tau(weights(n, now.q, now), {scores})])"
    )
    (soft, one), (elu, _), (exp, low), (hedgehog, tau) = seen
    assert one == 1 and low < 0.7 and tau > 0.8
    assert soft < 9 and exp < 9 and hedgehog < 12 and elu > 17
