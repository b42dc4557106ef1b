"""Pathfinder-32 (Linsley et al., 2018; Tay et al., 2020, Sec. 2.2.5), drawn here from its definition.

A drawing has two long dashed curves, a few short ones, and two dots. One dot is at the beginning of a long curve. The
other is at the end of the same curve (label 1), or of the other long curve (label 0). So the classes differ in nothing
but the path. The numbers below are those of the benchmark's hard form, curv_contour_length_14.

    next pivot = pivot + 4 (cos a, sin a),  a = last angle + turn,  density of the turn: 2/pi cos^2(turn), below 90 deg
    dash       = from 1 to 3 pixels behind a pivot, so dashes of a curve are 2 pixels long and about 2 apart

Every other dash is at least 2 pixels away. A curve that has no way to go on is given up: long ones with their drawing,
short ones after four attempts. What differs from the published program: places are real numbers, not whole pixels, and
lines get grey edges by a formula, not by scaling down a larger drawing.
"""

if __name__ == "__main__":
    import not_a_command  # noqa: F401

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

SIZE, PADDING = 32, 1  # pixels; a pixel's centre is at whole numbers, 0 to 31
DASH, MARGIN = 2, 1  # the length of a dash, and the space before and behind it
LENGTH = 14  # dashes of a long curve: "contour length"
SHORT, DISTRACTORS, ATTEMPTS = 4, 5, 4  # dashes of a short curve; how many curves; attempts at each
CENTRE, APART = (
    (14.0, 18.0),
    7.0,
)  # where the first long curve begins, in x and y; how far away the second one
THICKNESS, BRIGHTNESS, RADIUS = 0.5, 0.75, 1.5  # of a dash; of a dash; of a dot, which has brightness 1
TURNS = 4  # turns that are drawn at a time; the first that has room is taken
BACK = 8  # a long curve without room goes back by fewer dashes than this, at random
POOL = 1_000  # drawings that are made side by side
FAR = 1e3  # a place where no dash is near

ANGLES = np.linspace(-np.pi / 2, np.pi / 2, 1001)
CUMULATIVE = 0.5 + (ANGLES + np.sin(2 * ANGLES) / 2) / np.pi  # the integral of 2/pi cos^2


@dataclass
class Drawings:
    """dashes: (N, dashes, 2, 2), both ends as (y, x), NaN where a short curve found no room. The long curves come
    first: their dashes take turns. dots: (N, 2, 2). labels: (N,), 1 if the dots are on one curve."""

    dashes: np.ndarray
    dots: np.ndarray
    labels: np.ndarray


def unit(angle: np.ndarray) -> np.ndarray:
    """(...) -> (..., 2), a step of one pixel as (y, x)."""
    return np.stack([np.sin(angle), np.cos(angle)], -1)


def along(pivot: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Three points of the dash behind a pivot: both ends and the middle. (..., 2), (...) -> (..., 3, 2)"""
    distance = MARGIN + DASH * np.array([0, 0.5, 1])
    return pivot[..., None, :] + distance[:, None] * unit(angle)[..., None, :]


def has_room(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which dashes (N, K, 3, 2) are inside the drawing and 2 pixels away from the others (N, M, 3, 2): (N, K)."""
    inside = ((points >= PADDING) & (points <= SIZE - 1 - PADDING)).all((-1, -2))
    n, k, m = *points.shape[:2], others.shape[1]
    p, q = (a.astype(np.float32).reshape(n, 3 * a.shape[1], 2) for a in (points, others))
    squares = (p**2).sum(-1)[:, :, None] + (q**2).sum(-1)[:, None] - 2 * p @ q.transpose(0, 2, 1)
    return inside & (squares.reshape(n, k, 9 * m).min(-1) >= (2 * MARGIN) ** 2)


def begun(pivots, angles, others) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of candidates (N, K) the first that has room: its pivot, its angle, its points, and whether there is one."""
    points = along(pivots, angles)
    room, rows = has_room(points, others), np.arange(len(points))
    which = room.argmax(1)
    return pivots[rows, which], angles[rows, which], points[rows, which], room.any(1)


def continued(pivot, angle, others, rng: np.random.Generator):
    """The same for a dash that follows the one at pivot (N, 2) with angle (N,)."""
    turned = angle[:, None] + np.interp(rng.random((len(angle), TURNS)), CUMULATIVE, ANGLES)
    pivots = (pivot + (DASH + 2 * MARGIN) * unit(angle))[:, None].repeat(TURNS, 1)
    return begun(pivots, turned, others)


def long_curves(rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Without end: points (n, 2 LENGTH, 3, 2) of finished pairs of long curves, whose dashes take turns.

    POOL pairs grow side by side. Each is at a step of its own. A finished pair makes room for a new one.
    """
    total, rows = 2 * LENGTH, np.arange(POOL)
    points = np.full((POOL, total, 3, 2), FAR)
    pivots, angles, step = np.zeros((POOL, total, 2)), np.zeros((POOL, total)), np.zeros(POOL, int)
    while True:
        points[np.arange(total) >= step[:, None]] = FAR  # what a curve went back by
        last = np.maximum(step - 2, 0)  # of the same curve: the next dash may be near it
        others = points.copy()
        others[rows, last] = FAR
        pivot, angle, found, ok = continued(pivots[rows, last], angles[rows, last], others, rng)

        new = step < 2  # the first dash of a curve, anywhere in the centre, or 7 pixels from the other one's
        way = rng.uniform(0, 2 * np.pi, (2, POOL))
        tail = np.where(
            step[:, None], points[:, 0, 0] + APART * unit(way[0]), rng.uniform(*CENTRE, (POOL, 2))
        )
        at = (tail - MARGIN * unit(way[1]))[:, None]
        first = begun(at, way[1][:, None], np.where((step == 1)[:, None, None, None], points, FAR))
        pivot, angle, found = (
            np.where(new.reshape(-1, *[1] * (a.ndim - 1)), b, a) for a, b in zip((pivot, angle, found), first)
        )
        ok = np.where(new, first[3], ok)

        pivots[rows, step], angles[rows, step] = pivot, angle
        points[rows, step] = np.where(ok[:, None, None], found, FAR)
        back = np.maximum(step - rng.integers(0, BACK, POOL), 0)
        step = np.where(ok, step + 1, back)
        if (done := step == total).any():
            yield points[done]
            step[done] = 0


def short_curves(others: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A short curve in the room that is left by the others (N, M, 3, 2): points (N, SHORT, 3, 2), FAR if none."""
    curves = np.full((len(others), SHORT, 3, 2), FAR)
    for _ in range(ATTEMPTS):
        todo = np.flatnonzero(curves[:, 0, 0, 0] == FAR)
        pivots = rng.uniform(0, SIZE - 1, (len(todo), TURNS, 2))
        angles = rng.uniform(0, 2 * np.pi, (len(todo), TURNS))
        pivot, angle, dash, ok = begun(pivots, angles, others[todo])
        dashes = [dash]
        for _ in range(SHORT - 1):
            todo, pivot, angle, dashes = todo[ok], pivot[ok], angle[ok], [dash[ok] for dash in dashes]
            near = np.concatenate([others[todo], *(dash[:, None] for dash in dashes[:-1])], 1)
            pivot, angle, dash, ok = continued(pivot, angle, near, rng)
            dashes.append(dash)
        curves[todo[ok]] = np.stack(dashes, 1)[ok]
    return curves


def draw(rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Without end: dashes (n, dashes, 2, 2) of drawings, as in Drawings."""
    for points in long_curves(rng):
        for _ in range(DISTRACTORS):
            points = np.concatenate([points, short_curves(points, rng)], 1)
        yield np.where(points == FAR, np.nan, points)[:, :, [0, 2]]


def marked(dashes: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Drawings:
    """With two dots: at the beginning of a long curve, and at the end of the same one where the label is 1."""
    rows, begins = np.arange(len(labels)), rng.integers(0, 2, len(labels))  # the curve of the first dot
    ends = np.where(labels == 1, begins, 1 - begins)
    dots = [dashes[rows, begins, 0], dashes[rows, 2 * LENGTH - 2 + ends, 1]]
    return Drawings(dashes, np.stack(dots, 1), labels)


def render(drawings: Drawings) -> np.ndarray:
    """Grey pixels (N, 32, 32), uint8. A pixel is as bright as its distance to the nearest line allows."""
    n = len(drawings.labels)
    image = np.zeros((n, SIZE, SIZE), np.float32)
    offsets = np.mgrid[-3:4, -3:4].reshape(2, -1).T
    rows = np.arange(n)[:, None]

    def add(middle: np.ndarray, distance, width: float, brightness: float) -> None:
        pixels = np.clip(
            np.rint(np.nan_to_num(middle)).astype(int)[:, None] + offsets, 0, SIZE - 1
        )  # (N, 49, 2)
        light = brightness * np.clip(width + 0.5 - np.nan_to_num(distance(pixels), nan=9.0), 0, 1)
        y, x = pixels[..., 0], pixels[..., 1]
        image[rows, y, x] = np.maximum(image[rows, y, x], light)

    def to_segment(a: np.ndarray, b: np.ndarray):
        def distance(pixels: np.ndarray) -> np.ndarray:
            line = (b - a)[:, None]
            part = ((pixels - a[:, None]) * line).sum(-1, keepdims=True) / DASH**2
            return np.linalg.norm(pixels - a[:, None] - np.clip(part, 0, 1) * line, axis=-1)

        return distance

    for i in range(drawings.dashes.shape[1]):
        a, b = drawings.dashes[:, i, 0], drawings.dashes[:, i, 1]
        add((a + b) / 2, to_segment(a, b), THICKNESS / 2, BRIGHTNESS)
    for i in range(2):
        dot = drawings.dots[:, i]
        add(dot, lambda pixels, dot=dot: np.linalg.norm(pixels - dot[:, None], axis=-1), RADIUS, 1.0)
    return np.rint(255 * image).astype(np.uint8)


def generate(sizes: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Drawings for several splits, one after the other: pixels (N, 1024), uint8, and labels (N,), with a bar.

    Half of every split is positive (of an odd number, one more is negative).
    """
    rng = np.random.default_rng(seed)
    labels = np.concatenate([rng.permutation(np.arange(n) % 2) for n in sizes])
    pixels, done = np.empty((len(labels), SIZE * SIZE), np.uint8), 0
    with tqdm(total=len(labels), desc="pathfinder", unit="drawing") as bar:
        for dashes in draw(rng):
            part = labels[done : done + len(dashes)]
            image = render(marked(dashes[: len(part)], part, rng))
            pixels[done : done + len(part)] = image.reshape(len(part), -1)
            done += len(part)
            bar.update(len(part))
            if done == len(labels):
                return pixels, labels
