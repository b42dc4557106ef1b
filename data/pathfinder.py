"""Pathfinder-32 (Linsley et al., 2018; Tay et al., 2020, Sec. 2.2.5), drawn here from its definition.

A drawing has two long dashed curves, a few short ones, and two dots. One dot is at the beginning of a long
curve. The other is at the end of the same curve (label 1), or of the other long curve (label 0). So the classes
differ in nothing but the path. The numbers are those of the benchmark's hard form, curv_contour_length_14.

    next pivot = pivot + 4 (cos a, sin a)
    a          = last angle + turn, where a turn below 90 degrees has the density 2/pi cos^2(turn)
    dash       = from 1 to 3 pixels behind a pivot, so dashes of a curve are 2 pixels long and about 2 apart

Every other dash is about 2 pixels away, or more. Dashes of short curves are 4/3 as bright: the published settings
multiply only those of long curves by 0.75. This differs from the published program in three ways. A long
curve that has no way to go on goes back a few dashes; there, the drawing is begun again. Places are real numbers,
not whole pixels. Lines get grey edges by a formula, not by scaling down a larger drawing.
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
THICKNESS, RADIUS = 0.5, 1.5  # of a dash; of a dot, which has brightness 1
BRIGHTNESS = 0.75, 1.0  # of a dash of a long curve, and of a short one: contrasts of 1.5 and 2 officially
TURNS = 12  # directions that are drawn at a time; the first that has room is taken
BACK = 3  # a long curve without room goes back by fewer dashes than this, at random;
AGAIN, ANEW = 0.05, 0.01  # or to its beginning; or the drawing is begun again (probabilities)
POOL = 300  # drawings that are made side by side

LONG = 2 * LENGTH
TOTAL = LONG + SHORT * DISTRACTORS  # dashes of a drawing
BEGINS = np.r_[0:LONG:LENGTH, LONG:TOTAL:SHORT]
BEGIN = np.repeat(BEGINS, np.diff([*BEGINS, TOTAL]))  # of the curve to which a dash belongs
ANGLES = np.linspace(-np.pi / 2, np.pi / 2, 1001)
CUMULATIVE = 0.5 + (ANGLES + np.sin(2 * ANGLES) / 2) / np.pi  # the integral of 2/pi cos^2
CELLS = 2  # cells of the map, a pixel
WIDTH = (SIZE + 4 * MARGIN) * CELLS  # of the map: around a dash at the edge there are cells, too
REACH = np.mgrid[-4:5, -4:5].reshape(2, -1)  # cells around a point that are nearer than 2 pixels
REACH = (REACH * [[WIDTH], [1]]).sum(0)[(REACH**2).sum(0) < (2 * MARGIN * CELLS) ** 2]
WINDOW = np.mgrid[-2:3, -2:3].reshape(2, -1).T  # pixels around the middle of a line that it may reach
FREE = 255  # of the map: no dash is near


@dataclass
class Drawings:
    """dashes: (N, TOTAL, 2, 2), both ends as (y, x), curve after curve; the first two are the long ones. NaN
    where a short curve found no room. dots: (N, 2, 2). labels: (N,), 1 if the dots are on one curve."""

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


def cells_of(rows: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Where the points (n, ..., 2) of the drawings `rows` (n,) are in the map, as one number: (n, ...)."""
    y, x = np.moveaxis(np.rint((points + 2 * MARGIN) * CELLS).astype(int), -1, 0)
    return rows.reshape(-1, *[1] * (y.ndim - 1)) * WIDTH**2 + y * WIDTH + x


def has_room(nearest: np.ndarray, points: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Which dashes (N, K, 3, 2) are inside the drawing, can go on there, and are 2 pixels away from its first
    `before` (N,) dashes: (N, K). nearest: (N, WIDTH, WIDTH), the first dash that is near a cell."""
    tail, after = points[:, :, 0], points[:, :, 2] + (points[:, :, 2] - points[:, :, 0]) * (MARGIN / DASH)
    middle = (SIZE - 1) / 2
    inside = np.abs(tail - middle).max(-1) <= middle - PADDING
    inside &= (
        np.abs(after - middle).max(-1) <= middle - PADDING - MARGIN
    )  # the next pivot; so the head is inside
    cells = cells_of(np.arange(len(nearest)), np.clip(points, 0, SIZE - 1))
    free = nearest.reshape(-1)[cells] >= before[:, None, None]
    return inside & free.all(-1)


def take(nearest: np.ndarray, rows: np.ndarray, points: np.ndarray, step: np.ndarray) -> None:
    """Enter the dashes (n, 3, 2), which are number `step` (n,) in the drawings `rows` (n,), in the map."""
    cells = cells_of(rows, points)[:, :, None] + REACH
    flat = nearest.reshape(-1)
    flat[cells] = np.minimum(flat[cells], step.astype(np.uint8)[:, None, None])


def draw(rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Without end: dashes (n, TOTAL, 2, 2) of finished drawings, as in Drawings.

    POOL drawings grow side by side, each by a dash at a time and at a step of its own. A finished one makes room
    for a new one. The two long curves come first. One that has no way to go on goes back a few dashes; a short
    curve is tried ATTEMPTS times, and then left out.
    """
    rows = np.arange(POOL)
    nearest = np.full((POOL, WIDTH, WIDTH), FREE, np.uint8)
    points, pivots, angles = (np.zeros((POOL, TOTAL, *shape)) for shape in ((3, 2), (2,), ()))
    step, attempts = np.zeros(POOL, int), np.zeros(POOL, int)
    while True:
        begin, last = BEGIN[step], np.maximum(step - 1, 0)
        new = begin == step
        # The next dash follows the last one.
        angle = angles[rows, last, None] + np.interp(rng.random((POOL, TURNS)), CUMULATIVE, ANGLES)
        onward = pivots[rows, last] + (DASH + 2 * MARGIN) * unit(angles[rows, last])
        pivot = onward[:, None].repeat(TURNS, 1)
        # The first dash of a curve is in the centre, APART from the other one's, or anywhere.
        first, shape = step[new], (new.sum(), TURNS)
        angle[new], way = rng.uniform(0, 2 * np.pi, (2, *shape))
        tails = rng.uniform(0, SIZE - 1, (*shape, 2))
        tails[first == 0] = CENTRE[0] + (CENTRE[1] - CENTRE[0]) * tails[first == 0] / (SIZE - 1)
        second = first == LENGTH
        tails[second] = points[new][second, :1, 0] + APART * unit(way[second])
        pivot[new] = tails - MARGIN * unit(angle[new])

        dashes = along(pivot, angle)
        room = has_room(nearest, dashes, np.where(new, step, last))
        ok, which = room.any(1), room.argmax(1)
        pivots[rows, step], angles[rows, step] = pivot[rows, which], angle[rows, which]
        points[rows, step] = dashes[rows, which]
        take(nearest, rows[ok], points[rows, step][ok], step[ok])

        # Where no candidate has room: go back to dash `back`, and on from dash `on`.
        luck = rng.random(POOL)
        back = np.maximum(step - rng.integers(0, BACK, POOL), 0)
        back = np.select([begin >= LONG, luck < ANEW, luck < ANEW + AGAIN], [begin, 0, begin], back)
        attempts = np.where(begin >= LONG, attempts + ~ok, 0)
        given_up = attempts == ATTEMPTS
        on = np.where(given_up, back + SHORT, back)
        for i in rows[given_up]:
            points[i, begin[i] : begin[i] + SHORT] = np.nan
        gone = rows[~ok & (back < step)]
        nearest[gone] |= FREE * (nearest[gone] >= back[gone, None, None].astype(np.uint8)).view(np.uint8)
        step = np.where(ok, step + 1, on)
        attempts[given_up | (BEGIN[np.minimum(step, TOTAL - 1)] != begin)] = 0

        if (done := step == TOTAL).any():
            yield points[done][:, :, [0, 2]]
            step[done], nearest[done] = 0, FREE


def marked(dashes: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Drawings:
    """With two dots: at the beginning of a long curve, and at the end of the same one if the label is 1."""
    rows, begins = np.arange(len(labels)), rng.integers(0, 2, len(labels))  # the curve of the first dot
    ends = np.where(labels == 1, begins, 1 - begins)
    dots = [dashes[rows, begins * LENGTH, 0], dashes[rows, (ends + 1) * LENGTH - 1, 1]]
    return Drawings(dashes, np.stack(dots, 1), labels)


def render(drawings: Drawings) -> np.ndarray:
    """Grey pixels (N, 32, 32), uint8. A pixel is as bright as its distance to the nearest line allows."""
    image = np.zeros((len(drawings.labels), SIZE, SIZE), np.float32)

    def add(rows: np.ndarray, a: np.ndarray, b: np.ndarray, width: float, brightness: float) -> None:
        """Draw lines from a to b, both (n, 2), in the drawings `rows` (n,). Of two the brighter one stays."""
        pixels = np.clip(np.rint((a + b) / 2).astype(int)[:, None] + WINDOW, 0, SIZE - 1)  # (n, 25, 2)
        way, line = pixels - a[:, None], (b - a)[:, None]
        part = np.clip(
            (way * line).sum(-1) / np.maximum((line**2).sum(-1), 1e-9), 0, 1
        )  # of the line, at a pixel
        distance = np.sqrt(((way - part[..., None] * line) ** 2).sum(-1))
        place = rows[:, None], pixels[..., 0], pixels[..., 1]
        image[place] = np.maximum(image[place], brightness * np.clip(width / 2 + 0.5 - distance, 0, 1))

    for i in range(TOTAL):
        rows = np.flatnonzero(~np.isnan(drawings.dashes[:, i, 0, 0]))
        add(rows, *drawings.dashes[rows, i].swapaxes(0, 1), THICKNESS, BRIGHTNESS[i >= LONG])
    for dot in drawings.dots.swapaxes(0, 1):
        add(np.arange(len(dot)), dot, dot, 2 * RADIUS, 1.0)
    return np.rint(255 * image).astype(np.uint8)


def generate(sizes: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Drawings for several splits, one after the other: pixels (N, 1024), uint8, and labels (N,), with a bar.

    Half of every split is positive (of an odd number, one more is negative).
    """
    rng = np.random.default_rng(seed)
    labels = np.concatenate([rng.permutation(np.arange(n) % 2) for n in sizes])
    order = rng.permutation(len(labels))  # for the easiest drawings are finished first
    pixels, drawn = np.empty((len(labels), SIZE * SIZE), np.uint8), draw(rng)
    with tqdm(total=len(labels), desc="pathfinder", unit="drawing", disable=None) as bar:
        for start in range(0, len(labels), POOL):
            part, found = order[start : start + POOL], []
            while sum(map(len, found)) < len(part):
                found.append(next(drawn))
                bar.update(min(len(found[-1]), len(labels) - bar.n))
            drawings = marked(np.concatenate(found)[: len(part)], labels[part], rng)
            pixels[part] = render(drawings).reshape(len(part), -1)
    return pixels, labels
