"""The Long Range Arena's data: every generated label by another way, the official files, padding, one line for
wrong input. The archive here is a tiny one that the tests write."""

import io
import math
import re
import statistics
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import listops, lra, lra_files, pathfinder
from data.lra import TASKS, batch, load_task
from support.cli import UserError

SPLITS = ("train", "dev", "test")


def rows(split) -> list[bytes]:
    return [bytes(row.tolist()) for row in split.tokens]


# ---------------------------------------------------------------- ListOps


def evaluate(text: str) -> int:
    """The value of an expression, from its words alone: brackets become Python's."""
    operators = {"MIN": "min", "MAX": "max", "MED": "median", "SM": "last_digit"}
    words = [w if w.isdigit() else "])," if w == "]" else f"{operators[w[1:]]}([" for w in text.split()]
    names = {
        "median": lambda found: int(statistics.median(found)),
        "last_digit": lambda found: sum(found) % 10,
    }
    return eval(" ".join(w + "," if w.isdigit() else w for w in words), {**names, "min": min, "max": max})[0]


def nested(text: str) -> tuple[list[int], list[tuple[int, bool]]]:
    """(the numbers of arguments, (depth, is it an operator?) of every argument), by a stack over the words."""
    stack, numbers, arguments = [], [], []
    for word in text.split():
        if word == "]":
            numbers.append(stack.pop())
            continue
        if stack:
            stack[-1] += 1
            arguments.append((len(stack) + 1, word.startswith("[")))
        if word.startswith("["):
            stack.append(0)
    assert not stack
    return numbers, arguments


@pytest.fixture(scope="module")
def expressions():
    return load_task("listops", sizes=(800, 200, 200), max_len=100, seed=3)


def test_the_independent_evaluator_knows_the_examples_of_the_paper():
    assert evaluate("[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]") == 5
    assert evaluate("[MED 1 2 ]") == 1 and evaluate("[MED 2 8 ]") == 5 and evaluate("[SM 9 9 9 ]") == 7


def test_every_generated_expression_has_the_value_that_it_says(expressions):
    for split in SPLITS:
        examples = getattr(expressions, split)
        for row, label in zip(examples.tokens, examples.labels.tolist()):
            text = listops.words(row.tolist())
            assert evaluate(text) == label, text
            assert 25 <= len(text.split()) == len(row) <= 100
            assert listops.parse(text) == bytes(row.tolist())


def test_official_expressions_nest_to_depth_10_with_2_to_10_arguments_a_quarter_of_them_operators():
    task = load_task("listops", sizes=(150, 20, 20))
    assert task.max_len == 2_000 and task.vocab_size == 16 and task.n_classes == 10
    texts = [listops.words(row.tolist()) for row in task.train.tokens]
    assert all(500 <= len(text.split()) <= 2_000 for text in texts)
    assert any(len(text.split()) > 1_500 for text in texts) and any(len(text.split()) < 600 for text in texts)
    numbers, arguments = (sum(found, []) for found in zip(*map(nested, texts)))
    assert set(numbers) == set(range(2, 11))
    assert max(depth for depth, _ in arguments) == 10
    assert not any(operator for depth, operator in arguments if depth == 10)
    assert (
        0.22 < np.mean([operator for depth, operator in arguments if depth < 10]) < 0.29
    )  # given the length
    for word in listops.OPERATORS:
        assert 0.22 < sum(text.count(word) for text in texts) / sum(text.count("]") for text in texts) < 0.28


def test_all_classes_occur_in_every_split_and_most_often_0_and_9_as_officially(expressions):
    shares = torch.bincount(expressions.train.labels, minlength=10) / len(expressions.train)
    assert set(shares.argsort()[-2:].tolist()) == {0, 9} and shares.min() > 0.05 and shares.max() < 0.22
    assert all(len(getattr(expressions, split).labels.unique()) == 10 for split in SPLITS)
    counts = torch.bincount(expressions.test.labels)
    assert expressions.chance == counts.max().item() / 200


@pytest.mark.parametrize("ragged", [False, True])
def test_the_answer_by_the_first_token_is_the_most_frequent_class_of_training(ragged):
    """By hand. In training 3 has the classes 1, 1, 0: the answer is 1. 7 has 2 and 0 once each, and 0 is more
    frequent in all. 5 is new: the most frequent of all is 1."""

    def split(rows, labels):
        rows = [torch.tensor(row, dtype=torch.uint8) for row in rows]
        rows = [row[: 1 + i % 2] for i, row in enumerate(rows)] if ragged else torch.stack(rows)
        return lra_files.Split(rows, torch.tensor(labels))

    train = split([[3, 0], [3, 1], [3, 2], [7, 0], [7, 1], [9, 0]], [1, 1, 0, 2, 0, 1])
    test = split([[3, 7], [7, 3], [5, 3], [3, 3], [9, 9]], [1, 0, 1, 2, 1])
    task = lra.Task("by hand", 3, 11, 2, False, False, train, train, test)
    assert task.by_first_token == 4 / 5 and task.chance == 3 / 5


def test_the_first_operator_alone_says_much_of_an_expression(expressions):
    """MIN has small values, and MAX large ones: this is the accuracy beside which others are read."""
    best = dict.fromkeys(listops.OPERATORS)
    for word in best:
        labels = [
            y
            for row, y in zip(expressions.train.tokens, expressions.train.labels.tolist())
            if listops.words(row[:1]) == word
        ]
        best[word] = statistics.mode(labels)
    said = [best[listops.words(row[:1])] for row in expressions.test.tokens]
    right = sum(a == b for a, b in zip(said, expressions.test.labels.tolist()))
    assert expressions.by_first_token == right / 200 > expressions.chance + 0.05
    assert best["[MIN"] == 0 and best["[MAX"] == 9


@pytest.mark.parametrize("name", ["listops", "pathfinder"])
def test_generated_examples_are_all_different_and_depend_on_the_seed_alone(name, monkeypatch, tmp_path):
    def load(seed):
        return load_task(
            name, seed=seed, sizes=(60, 20, 20), **({"max_len": 60} if name == "listops" else {})
        )

    first = load(0)
    monkeypatch.setattr(data, "PREPARED", tmp_path)  # nothing is prepared there
    again, other = load(0), load(1)
    texts = [row for split in SPLITS for row in rows(getattr(first, split))]
    assert len(texts) == len(set(texts)) == 100
    for split in SPLITS:
        one, two, three = (getattr(task, split) for task in (first, again, other))
        assert rows(one) == rows(two) and one.labels.equal(two.labels)
        assert not set(rows(one)) & set(rows(three))


def test_no_expression_occurs_twice_where_there_are_few():
    task = load_task(
        "listops", sizes=(200, 20, 30), min_len=4, max_len=4
    )  # of 4 operators x 100 pairs of digits
    texts = [row for split in SPLITS for row in rows(getattr(task, split))]
    assert len(texts) == len(set(texts)) == 250


def test_what_is_generated_is_kept_and_made_again_when_something_changes(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "PREPARED", tmp_path)
    asked = dict(sizes=(20, 5, 5), max_len=30)
    first = load_task("listops", **asked)
    with monkeypatch.context() as patch:
        patch.setattr(listops, "generate", None)  # the second call must not generate
        again = load_task("listops", **asked)
    assert rows(first.train) == rows(again.train) and len(list(tmp_path.iterdir())) == 1
    for change in (dict(seed=1), dict(min_len=10), dict(max_len=40), dict(sizes=(20, 5, 6))):
        load_task("listops", **(asked | change))
    assert len(list(tmp_path.iterdir())) == 5
    folder = next(tmp_path.iterdir())
    (folder / "tokens.npy").write_bytes(b"")
    with pytest.raises(UserError, match="damaged.*delete it"):
        for change in ({}, dict(seed=1), dict(min_len=10), dict(max_len=40), dict(sizes=(20, 5, 6))):
            load_task("listops", **(asked | change))


# ---------------------------------------------------------------- Pathfinder


@pytest.fixture(scope="module")
def drawings():
    rng, found = np.random.default_rng(5), []
    for dashes in pathfinder.draw(rng):
        found.append(dashes)
        if sum(map(len, found)) >= 300:
            break
    dashes = np.concatenate(found)
    return pathfinder.marked(dashes, rng.permutation(np.arange(len(dashes)) % 2), rng)


def traced(dashes: list[tuple[tuple, tuple]], dots: list[tuple]) -> int | None:
    """Follow the curve from the first dot: 1 if its end is the second dot, 0 if not. None: it is not easy, as there
    are two ways on, or the curve seems to have another number of dashes than 14.

    It knows the ends of all dashes in any order, and goes to a dash near the end of the last one whose line meets
    the line of the last one halfway.
    """
    ends = [(a, b) for a, b in dashes] + [(b, a) for a, b in dashes]
    (at,) = [i for i, (a, _) in enumerate(ends) if math.dist(a, dots[0]) < 1e-6]
    for length in range(1, 50):
        (ay, ax), (by, bx) = ends[at]
        corner = (by + (by - ay) / 2, bx + (bx - ax) / 2)
        ways = []
        for i, (a, b) in enumerate(ends):
            if i % len(dashes) == at % len(dashes) or math.dist(a, (by, bx)) > 2.2:
                continue
            meets = (a[0] - (b[0] - a[0]) / 2, a[1] - (b[1] - a[1]) / 2)
            if math.dist(meets, corner) < 0.4 and (b[0] - a[0]) * (by - ay) + (b[1] - a[1]) * (bx - ax) > 0:
                ways.append(i)
        if not ways:
            return int(math.dist((by, bx), dots[1]) < 1e-6) if length == 14 else None
        if len(ways) > 1:
            return None
        at = ways[0]
    return None


def test_labels_are_those_of_the_traced_curve(drawings):
    rng, found = np.random.default_rng(0), []
    for dashes, dots in zip(drawings.dashes, drawings.dots):
        lines = [tuple(map(tuple, dash)) for dash in rng.permutation(dashes[~np.isnan(dashes[:, 0, 0])])]
        lines = [line[::-1] if rng.random() < 0.5 else line for line in lines]
        found.append(traced(lines, [tuple(dot) for dot in dots]))
    easy = [i for i, label in enumerate(found) if label is not None]
    assert len(easy) > 0.9 * len(found)
    assert [found[i] for i in easy] == drawings.labels[easy].tolist()


def test_a_drawing_has_the_dashes_of_the_definition(drawings):
    """Lengths, the inside of the drawing, turns below 90 degrees with the density cos^2, and room around a dash."""
    dashes = drawings.dashes
    lines = dashes[:, :, 1] - dashes[:, :, 0]
    there = ~np.isnan(lines[..., 0])
    assert np.allclose(np.linalg.norm(lines, axis=-1)[there], 2)
    assert dashes[there].min() >= 1 and dashes[there].max() <= 30
    assert there[:, :28].all() and set(there[:, 28:].reshape(-1, 4).sum(1)) == {0, 4}
    assert there[:, 28:].sum() / len(dashes) / 4 > 1  # short curves
    angles = np.arctan2(lines[:, :28, 0], lines[:, :28, 1]).reshape(-1, 2, 14)
    turns = (np.diff(angles, axis=-1) + np.pi) % (2 * np.pi) - np.pi
    assert (
        np.abs(turns).max() <= np.pi / 2 + 1e-9 and 0.4 < turns.std() < 0.75
    )  # cos^2 alone: 0.57; edges bend curves
    assert ((dashes[:, 0, 0] >= 14) & (dashes[:, 0, 0] <= 18)).all()
    assert np.allclose(np.linalg.norm(dashes[:, 0, 0] - dashes[:, 14, 0], axis=-1), 7)

    weights = np.linspace(0, 1, 9)[:, None]
    for drawing in dashes[:40]:
        points = drawing[:, None, 0] * (1 - weights) + drawing[:, None, 1] * weights  # (dashes, 9, 2)
        gaps = np.linalg.norm(points[:, None, :, None] - points[None, :, None], axis=-1).min((-1, -2))
        for i in range(len(drawing)):
            apart = np.delete(gaps[i], [j for j in (i - 1, i, i + 1) if 0 <= j < len(drawing)])
            assert not (apart < 1.1).any()  # 2, but for the cells of the map and a dash's three points


def test_the_classes_differ_in_nothing_but_the_path(drawings):
    """The same drawing with the other label has the same dashes, and dots at ends of the same two curves."""
    rng = np.random.default_rng(1)
    other = pathfinder.marked(drawings.dashes, 1 - drawings.labels, rng)
    tips = drawings.dashes[:, [0, 13, 14, 27]][np.arange(len(other.labels))[:, None], range(4), [0, 1, 0, 1]]
    for marks in (drawings, other):
        begins = [np.linalg.norm(tips[:, i] - marks.dots[:, 0], axis=-1) < 1e-9 for i in (0, 2)]
        ends = [np.linalg.norm(tips[:, i] - marks.dots[:, 1], axis=-1) < 1e-9 for i in (1, 3)]
        assert (begins[0] ^ begins[1]).all() and (ends[0] ^ ends[1]).all()
        assert ((begins[0] == ends[0]) == marks.labels.astype(bool)).all()
        assert 0.35 < begins[0].mean() < 0.65


def test_pixels_are_those_of_a_loop_over_lines(drawings):
    few = pathfinder.Drawings(drawings.dashes[:1], drawings.dots[:1], drawings.labels[:1])
    images = pathfinder.render(few)
    assert images.shape == (1, 32, 32) and images.dtype == np.uint8 and images.max() == 255
    for dashes, dots, image in zip(few.dashes, few.dots, images):
        for y in range(32):
            for x in range(32):
                light = 0.0
                for i, (a, b) in enumerate(dashes):
                    if np.isnan(a[0]):
                        continue
                    part = np.clip(((y, x) - a) @ (b - a) / 4, 0, 1)
                    distance = math.dist((y, x), a + part * (b - a))
                    bright = 0.75 if i < 28 else 1.0  # distractors are 4/3 as bright as the two long curves
                    light = max(light, bright * min(1, max(0, 0.25 + 0.5 - distance)))
                for dot in dots:
                    light = max(light, min(1, max(0, 1.5 + 0.5 - math.dist((y, x), dot))))
                assert abs(image[y, x] - 255 * light) <= 0.51


def test_half_of_every_split_is_positive_and_rows_are_1024_pixels():
    task = load_task("pathfinder", sizes=(60, 20, 20))
    assert task.max_len == 1_024 and task.vocab_size == 257 and task.n_classes == 2 and task.chance == 0.5
    for split, n in zip(SPLITS, (60, 20, 20)):
        examples = getattr(task, split)
        assert examples.tokens.shape == (n, 1_024) and examples.labels.sum() == n // 2


# ---------------------------------------------------------------- the archive


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def parquet(path, **columns) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture
def archive(tmp_path):
    """All five tasks, as small as they can be."""
    top = tmp_path / "lra_release"
    (top / "listops-1000").mkdir(parents=True)
    for name in ("train", "val", "test"):
        text = (
            "Source\tTarget\r\n( ( ( [MAX 4 ) ( ( ( [MIN 2 ) 3 ) ] ) ) ] )\t4\r\n( ( ( [SM 9 ) 8 ) ] )\t7\r\n"
        )
        (top / f"listops-1000/basic_{name}.tsv").write_text(text, newline="")
    (top / "tsv_data").mkdir()
    for name in ("train", "eval", "test"):
        lines = [f'1.0\tP1\tP2\tthe "first {name}\tnaïve\n', "0.0\tP3\tP4\ta\tbb\n"]
        (top / f"tsv_data/new_aan_pairs.{name}.tsv").write_text("".join(lines), encoding="utf-8")
    hard, rng = top / "pathfinder32/curv_contour_length_14", np.random.default_rng(0)
    (hard / "metadata").mkdir(parents=True)
    for part in range(2):
        (hard / f"imgs/{part}").mkdir(parents=True)
        lines = []
        for i in range(10):
            pixels = rng.integers(0, 256, (32, 32), np.uint8)
            pixels[0, 0] = i % 2
            (hard / f"imgs/{part}/sample_{i}.png").write_bytes(png(pixels))
            lines.append(f"imgs/{part} sample_{i}.png {i} {i % 2} 1.0 14 4 2 0.5 1 1")
        (hard / f"metadata/{part}.npy").write_text("\n".join(lines) + "\n")
    for split, n in (("train", 20), ("test", 6)):
        texts = [f"review {split} {i} è" for i in range(n)]
        parquet(top / f"imdb/{split}.parquet", text=texts, label=[i % 2 for i in range(n)])
        colours = [np.full((32, 32, 3), (10 * (i % 10), 50, 100), np.uint8) for i in range(n)]
        coded = [{"bytes": png(c), "path": None} for c in colours]
        parquet(top / f"cifar10/{split}-00000-of-00001.parquet", img=coded, label=[i % 10 for i in range(n)])
    return top


def test_all_five_tasks_are_read_from_one_folder(archive, capsys):
    tasks = {name: load_task(name, data_dir=str(archive)) for name in TASKS}
    assert "stand-in" not in capsys.readouterr().out
    for name, task in tasks.items():
        assert task.name == name and not task.stand_in and task.pair == (name == "retrieval")
        assert (task.n_classes, task.max_len) == (TASKS[name].n_classes, TASKS[name].max_len)

    one, two = tasks["listops"].dev.tokens  # without the parentheses, with the brackets
    assert listops.words(one.tolist()) == "[MAX 4 [MIN 2 3 ] ]" and listops.words(two.tolist()) == "[SM 9 8 ]"
    assert tasks["listops"].dev.labels.tolist() == [4, 7]

    pairs = tasks["retrieval"].dev
    assert rows(pairs) == [b'the "first eval', b"a"] and pairs.labels.tolist() == [1, 0]
    assert [bytes(text.tolist()).decode() for text in pairs.others] == ["naïve", "bb"]

    sizes = {name: [len(getattr(task, split)) for split in SPLITS] for name, task in tasks.items()}
    assert sizes == {
        "listops": [2, 2, 2], "retrieval": [2, 2, 2], "pathfinder": [16, 2, 2],
        "text": [18, 2, 6], "image": [18, 2, 6],
    }  # fmt: skip
    drawn = [row for split in SPLITS for row in rows(getattr(tasks["pathfinder"], split))]
    labels = torch.cat([getattr(tasks["pathfinder"], split).labels for split in SPLITS])
    assert len(set(drawn)) == 20 and [row[0] for row in drawn] == labels.tolist()

    for split in SPLITS:  # every review and picture with its own label
        reviews, pictures = (getattr(tasks[name], split) for name in ("text", "image"))
        where = "test" if split == "test" else "train"
        for text, label in zip(rows(reviews), reviews.labels.tolist()):
            i = int(re.fullmatch(f"review {where} (\\d+) è", text.decode())[1])
            assert label == i % 2
        grey = (0.299 * 10 * pictures.labels + 0.587 * 50 + 0.114 * 100)[:, None]
        assert (pictures.tokens - grey).abs().max() <= 0.51


def test_the_folder_around_the_archive_is_the_archive_too(archive):
    """It unpacks to lra_release/lra_release."""
    for name in TASKS:
        inside, around = (load_task(name, data_dir=str(folder)) for folder in (archive, archive.parent))
        assert not around.stand_in and rows(around.test) == rows(inside.test)


def test_drawings_that_are_replaced_are_read_again(archive):
    before = load_task("pathfinder", data_dir=str(archive))
    for path in archive.glob("pathfinder32/*/imgs/*/*.png"):
        path.write_bytes(png(np.full((32, 32), 200, np.uint8)))
    after = load_task("pathfinder", data_dir=str(archive))
    assert rows(before.dev) != rows(after.dev) == [b"\xc8" * 1024] * 2


def test_a_broken_picture_and_a_missing_pillow_are_one_line(archive, monkeypatch):
    path = next(archive.glob("pathfinder32/*/imgs/0/*.png"))
    path.write_bytes(path.read_bytes().replace(b"IDAT", b"\0DAT"))
    with pytest.raises(UserError, match=f"cannot read the picture .*{path.name}"):
        load_task("pathfinder", data_dir=str(archive))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match="pip install pillow"):
        load_task("pathfinder", data_dir=str(archive))


def test_dev_is_a_part_of_the_training_set_and_the_seed_decides_which(archive):
    pools = [load_task("text", data_dir=str(archive / "imdb"), seed=seed) for seed in (0, 0, 1)]
    whole = {f"review train {i} è".encode() for i in range(20)}
    for task in pools:
        assert set(rows(task.train)) | set(rows(task.dev)) == whole
        assert not set(rows(task.train)) & set(rows(task.dev))
    assert rows(pools[0].dev) == rows(pools[1].dev) != rows(pools[2].dev)
    few = load_task("text", data_dir=str(archive), sizes=(5, 3, 2))
    assert [len(getattr(few, split)) for split in SPLITS] == [5, 3, 2]
    assert len({*rows(few.train), *rows(few.dev)}) == 8 and all(b"test" in row for row in rows(few.test))


def test_longer_texts_end_at_max_len_and_a_line_says_how_many(archive, capsys):
    task = load_task("text", data_dir=str(archive), max_len=17)
    said = capsys.readouterr().out
    assert max(map(len, rows(task.train))) == task.max_len == 17
    assert "imdb train: 10 of 20 texts are longer than 17 bytes" in said and "imdb test" not in said
    load_task("retrieval", data_dir=str(archive), max_len=5)
    assert "2 of 4 texts are longer than 5 bytes" in capsys.readouterr().out


def test_text_and_image_are_taken_from_the_hub_where_the_archive_has_none(archive, monkeypatch, capsys):
    import datasets

    asked, remedies = [], []
    colours = [{"bytes": png(np.full((32, 32, 3), 7, np.uint8)), "path": None}] * 20
    columns = {"stanfordnlp/imdb": {"text": ["fine"] * 20}, "uoft-cs/cifar10": {"img": colours}}

    def hub(name, remedy):
        asked.append(name)
        remedies.append(remedy)
        found = datasets.Dataset.from_dict({**columns[name], "label": [0] * 20})
        if "img" in found.column_names:
            found = found.cast_column("img", datasets.Image())
        return datasets.DatasetDict(train=found, test=found)

    monkeypatch.setattr(lra_files, "hub", hub)
    assert rows(load_task("text").dev) == [b"fine"] * 2
    assert rows(load_task("image").dev) == [b"\7" * 1024] * 2
    for folder in ("imdb", "cifar10"):
        (archive / folder).rename(archive.parent / folder)
    capsys.readouterr()
    load_task("text", data_dir=str(archive))
    load_task("image", data_dir=str(archive))
    assert asked == ["stanfordnlp/imdb", "uoft-cs/cifar10"] * 2 and all("--data_dir" in r for r in remedies)
    assert capsys.readouterr().out.count("is not in the archive") == 2


# ---------------------------------------------------------------- the stand-in


@pytest.fixture
def wikitext(tmp_path):
    """40 articles, every word of which says where it is from."""
    articles = [
        f" \n = Title {i} = \n \n" + f" w{i} w{i} è w{i} . \n" * 8 + " = = Part = = \n" + f" w{i} end \n" * 20
        for i in range(40)
    ]
    for name in ("train", "valid"):
        (tmp_path / f"wiki.{name}.tokens").write_text("".join(articles), encoding="utf-8")
    return tmp_path


def test_the_stand_in_asks_whether_two_passages_are_from_the_same_article(wikitext, capsys):
    task = load_task("retrieval", data_dir=str(wikitext), max_len=50, sizes=(60, 6, 8))
    assert task.name == "retrieval (stand-in)" and task.stand_in and task.pair and task.chance == 0.5
    assert "stand-in" in capsys.readouterr().out
    used = {}
    for split, n in zip(SPLITS, (60, 6, 8)):
        examples = getattr(task, split)
        assert len(examples) == n and examples.labels.sum() == n // 2
        used[split] = set()
        for one, two, label in zip(
            rows(examples), map(bytes, map(torch.Tensor.tolist, examples.others)), examples.labels
        ):
            sources = [set(re.findall(r"w\d+", text.decode())) for text in (one, two)]
            assert all(len(source) == 1 for source in sources) and (sources[0] == sources[1]) == label
            assert b"Title" not in one + two and b"Part" not in one + two and 25 <= len(one) <= 50
            used[split] |= sources[0] | sources[1]
    assert (
        not used["train"] & used["dev"]
        and not used["dev"] & used["test"]
        and not used["train"] & used["test"]
    )
    with pytest.raises(UserError, match="fewer than 5,000 different dev pairs"):
        load_task("retrieval", data_dir=str(wikitext), max_len=50, sizes=(10, 5_000, 8))


# ---------------------------------------------------------------- a batch


def test_batches_are_padded_to_their_longest_row_and_have_every_example_once(expressions):
    split, seen = expressions.dev, []
    for which in torch.arange(len(split)).split(32):
        idx, key_mask, labels = batch(split, which)
        assert idx.dtype == labels.dtype == torch.long and key_mask.dtype == torch.bool
        assert key_mask.sum(1).max() == idx.shape[1] and (idx > 0).equal(key_mask)
        for row, mask, label in zip(idx, key_mask, labels):
            n = int(mask.sum())
            assert mask[:n].all() and row.max() < expressions.vocab_size
            seen.append((bytes((row[:n] - 1).tolist()), int(label)))
    assert seen == list(zip(rows(split), split.labels.tolist())) and idx.shape[0] == 200 % 32
    backwards = torch.arange(len(split)).flip(0)
    assert batch(split, backwards)[2].equal(split.labels.flip(0))


def test_a_batch_of_pairs_has_both_texts_at_one_length(archive):
    task = load_task("retrieval", data_dir=str(archive))
    idx, key_mask, labels = batch(task.test, torch.arange(2))
    assert idx.shape == key_mask.shape == (2, 2, len('the "first test')) and labels.tolist() == [1, 0]
    assert key_mask.sum(-1).tolist() == [[15, 6], [1, 2]] and (idx > 0).equal(key_mask)
    assert bytes((idx[0, 1, :6] - 1).tolist()).decode() == "naïve"


def test_a_batch_of_images_has_no_padding(archive):
    task = load_task("image", data_dir=str(archive))
    idx, key_mask, _ = batch(task.train, torch.arange(4))
    assert idx.shape == (4, 1_024) and key_mask.all() and idx.min() > 0 and idx.max() < task.vocab_size


# ---------------------------------------------------------------- one line for wrong input


WRONG = {
    "unknown task": ("listop", {}, "unknown task 'listop': choose one of listops, text"),
    "no folder": ("listops", dict(data_dir="nowhere"), "nowhere is not a folder"),
    "sizes": ("listops", dict(sizes=(5, 0, 1)), "three numbers"),
    "pixels": ("pathfinder", dict(max_len=100), "1,024 tokens"),
    "lengths": ("listops", dict(max_len=20, min_len=30), "30 to 20 tokens"),
    "no such length": ("listops", dict(max_len=3), "the shortest expression has 4"),
    "no length": ("text", dict(max_len=0), "at least 1, not 0"),
    "min_len": ("text", dict(min_len=30), "min_len"),
    "too many": ("listops", dict(sizes=(9_000, 1, 1), min_len=4, max_len=4), "ask for fewer"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_one_line(case):
    name, asked, says = WRONG[case]
    with pytest.raises(UserError, match=re.escape(says)):
        load_task(name, **asked)


VAL, EVAL, HARD = (
    "listops-1000/basic_val.tsv",
    "tsv_data/new_aan_pairs.eval.tsv",
    "pathfinder32/curv_contour_length_14",
)
REVIEWS, PICTURES = "imdb/test.parquet", "cifar10/test-00000-of-00001.parquet"
NO_TEXT = "the test set of stanfordnlp/imdb is without the column text"
DAMAGED = [  # task, file, what is there instead (None: nothing; a dictionary: a table), what the line says
    ("listops", VAL, None, "cannot read"),
    ("listops", VAL, b"a\tb\n", "Source and Target"),
    ("listops", VAL, b"Source\tTarget\n[MOD 1 2 ]\t3\n", "line 2: '[MOD' is no word"),
    ("listops", VAL, b"Source\tTarget\n[MIN 1 2 ]\t11\n", "line 2: the label '11' is not 0 to 9"),
    ("listops", VAL, b"Source\tTarget\n[MIN 1 2 ]\n", "line 2 has 1 columns"),
    ("listops", VAL, b"Source\tTarget\n", "holds no examples"),
    ("retrieval", EVAL, None, "cannot read"),
    ("retrieval", EVAL, b"1.0\ta\tb\ttext\n", "line 1 has 4 columns, not label, id1, id2, text1, text2"),
    ("retrieval", EVAL, b"yes\ta\tb\tx\ty\n", "line 1: the label 'yes' is not 0 to 1"),
    ("retrieval", EVAL, b"\xff\n", "not UTF-8"),
    ("pathfinder", f"{HARD}/imgs/1/sample_3.png", None, "cannot read the picture"),
    ("pathfinder", f"{HARD}/imgs/1/sample_3.png", png(np.zeros((8, 9), np.uint8)), "9 x 8 pixels, not 32 x 32"),
    ("pathfinder", f"{HARD}/metadata/0.npy", b"imgs/0 a.png\n", "line 1 has 2 columns"),
    ("pathfinder", f"{HARD}/metadata/0.npy", b"\x93NUMPY", "it is damaged"),
    ("text", REVIEWS, None, "has no test*.parquet"),
    ("text", REVIEWS, b"no", "not a parquet file"),
    ("text", REVIEWS, {"review": ["a"], "label": [0]}, NO_TEXT),
    ("text", REVIEWS, {"text": ["a"], "label": [-1]}, "row 0: the label '-1' is not 0 to 1"),
    ("image", PICTURES, {"img": [1], "label": [0]}, "row 0 has no coded picture"),
    ("image", PICTURES, {"img": [{"bytes": b"no", "path": ""}], "label": [0]}, "cannot read the picture"),
]  # fmt: skip


@pytest.mark.parametrize("name, file, content, says", DAMAGED)
def test_damaged_files_are_one_line(name, file, content, says, archive):
    (archive / file).unlink()
    if isinstance(content, dict):
        parquet(archive / file, **content)
    elif content is not None:
        (archive / file).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_task(name, data_dir=str(archive))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_more_examples_than_there_are_is_an_error_and_not_a_smaller_set(archive):
    for name, sizes, says in (
        ("text", (19, 2, 2), "18 train"), ("text", (3, 20, 2), "dev is taken from the 20"),
        ("image", (3, 2, 7), "6 test examples, and 7"), ("listops", (3, 1, 1), "2 train"),
        ("pathfinder", (17, 2, 2), "16 train"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            load_task(name, data_dir=str(archive), sizes=sizes)


def test_an_expression_is_never_cut(archive):
    with pytest.raises(UserError, match="line 2 has 7 tokens: raise max_len .--block_size., which is 6"):
        load_task("listops", data_dir=str(archive), max_len=6)


def test_a_folder_without_the_task_is_an_error_that_names_its_files(tmp_path):
    for name, says in (
        ("listops", "basic_train.tsv"), ("pathfinder", "metadata"), ("text", "train*.parquet"),
        ("image", "train*.parquet"), ("retrieval", "tsv_data"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=re.escape(says)):
            load_task(name, data_dir=str(tmp_path))


def test_empty_texts_are_left_out_with_a_line(archive, capsys):
    parquet(archive / "imdb/test.parquet", text=["fine", "", "bad"], label=[1, 0, 0])
    assert rows(load_task("text", data_dir=str(archive)).test) == [b"fine", b"bad"]
    assert "imdb test: 1 of 3 examples have an empty text" in capsys.readouterr().out


def test_the_forms_are_those_of_the_benchmark():
    assert (
        lra.TASKS["listops"].sizes == (96_000, 2_000, 2_000) and lra.TASKS["pathfinder"].sizes[0] == 160_000
    )
    assert {name: form.max_len for name, form in TASKS.items()} == {
        "listops": 2_000, "text": 4_000, "retrieval": 4_000, "image": 1_024, "pathfinder": 1_024,
    }  # fmt: skip
