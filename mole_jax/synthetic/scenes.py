"""What stands in a synthetic picture: four kinds of scene, each drawn from a random state and painted.

A scene is a frozen value of everything that is painted, so two equal scenes are two equal pictures.
Sides are the picture's, in scans too (a radiologist would name the patient's).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import UInt8

from mole_jax.synthetic.draw import COLOURS, SHAPES, SIDE, canvas, outline, paint, shape, write

PLACES = ("left", "middle", "right")
WORDS = ("BANK", "CAFE", "FARM", "FUEL", "GOLD", "LOAN", "MENU", "PARK", "RENT", "SHOP", "TAXI", "WINE")
FINDINGS = ("nodule", "opacity", "fracture")
SKIES = {"day": (190, 220, 250), "night": (25, 25, 60)}
FLOORS = {"grass": (125, 150, 95), "sand": (225, 205, 160), "snow": (240, 240, 245)}
BAR_UNIT = 6
"""Pixels of bar height per unit of value."""
BASELINE = 60
"""Row of a chart's axis; the bars stand above it."""


@dataclasses.dataclass(frozen=True)
class Thing:
    """A coloured object, with the top left corner of its 17 x 17 pixels."""

    colour: str
    shape: str
    x: int
    y: int


@dataclasses.dataclass(frozen=True)
class Everyday:
    """One to three objects before a sky and a floor."""

    kind: ClassVar[str] = "scene"
    domain: ClassVar[str] = "general"
    things: tuple[Thing | None, Thing | None, Thing | None]
    """What stands at the left, in the middle and at the right."""
    sky: str
    floor: str
    horizon: int
    """First row of the floor."""

    def draw(self) -> UInt8[np.ndarray, "64 64 3"]:
        """Paints the scene."""
        picture = canvas(SKIES[self.sky])
        picture[self.horizon :] = FLOORS[self.floor]
        for thing in filter(None, self.things):
            # The rim keeps a green ball apart from the grass.
            paint(picture, outline(thing.shape), thing.x - 1, thing.y - 1, (0, 0, 0))
            paint(picture, shape(thing.shape), thing.x, thing.y, COLOURS[thing.colour])
        return picture


@dataclasses.dataclass(frozen=True)
class Chart:
    """Two or three bars of different colours, 1 to 9 units high, over a grid line per unit."""

    kind: ClassVar[str] = "chart"
    domain: ClassVar[str] = "document"
    bars: tuple[tuple[str, int] | None, ...]
    """Colour and height at the left, in the middle and at the right."""
    paper: tuple[int, int, int]
    shift: int

    def draw(self) -> UInt8[np.ndarray, "64 64 3"]:
        """Paints the scene."""
        picture = canvas(self.paper)
        for unit in range(1, 10):
            picture[BASELINE - unit * BAR_UNIT] = (150, 150, 150) if unit == 5 else (205, 205, 205)
        for slot, bar in enumerate(self.bars):
            if bar:
                colour, height = bar
                x = 7 + 19 * slot + self.shift
                picture[BASELINE - height * BAR_UNIT : BASELINE, x : x + 13] = COLOURS[colour]
        picture[BASELINE : BASELINE + 2] = (0, 0, 0)
        picture[:BASELINE, 2:4] = (0, 0, 0)
        return picture


@dataclasses.dataclass(frozen=True)
class Page:
    """A slip: a printed word, a rule, and below it a number at the left, at the right or at both."""

    kind: ClassVar[str] = "page"
    domain: ClassVar[str] = "document"
    word: str
    left: int | None
    right: int | None
    paper: tuple[int, int, int]
    ink: tuple[int, int, int]
    word_at: tuple[int, int]
    numbers_at: int
    """Row of the numbers' top."""
    shift: int

    def draw(self) -> UInt8[np.ndarray, "64 64 3"]:
        """Paints the scene."""
        picture = canvas(self.paper)
        picture[[0, -1]] = picture[:, [0, -1]] = (110, 110, 110)
        picture[31, 4:-4] = (150, 150, 150)
        write(picture, self.word, *self.word_at, self.ink)
        for number, x in ((self.left, 5), (self.right, 36)):
            if number is not None:
                write(picture, str(number), x + self.shift, self.numbers_at, self.ink)
        return picture


@dataclasses.dataclass(frozen=True)
class Scan:
    """A grey chest: two lungs with ribs and a heart; each side may have one finding, the heart may be large."""

    kind: ClassVar[str] = "scan"
    domain: ClassVar[str] = "biomedical"
    left: str | None
    right: str | None
    large_heart: bool
    left_at: tuple[int, int]
    """Centre of the finding at the left."""
    right_at: tuple[int, int]
    heart_at: tuple[int, int]
    noise: int
    """Seed of the film grain."""

    def draw(self) -> UInt8[np.ndarray, "64 64 3"]:
        """Paints the scene, in whole numbers, so that it is the same on every machine."""
        y, x = np.mgrid[:SIDE, :SIDE]

        def oval(centre_x: int, centre_y: int, radius_x: int, radius_y: int) -> np.ndarray:
            across, down = (x - centre_x) * radius_y, (y - centre_y) * radius_x
            return across * across + down * down <= (radius_x * radius_y) ** 2

        film = np.full((SIDE, SIDE), 8)
        film[oval(32, 36, 31, 38)] = 85
        film[:, 30:34] = np.maximum(film[:, 30:34], 115)
        for centre in (17, 46):
            lung = oval(centre, 32, 12, 24)
            film[lung] = 30
            for rib in (16, 25, 34, 43):
                bow = rib + (x - centre) ** 2 // 24
                film[lung & ((y == bow) | (y == bow + 1))] = 62
        film[oval(*self.heart_at, *((15, 12) if self.large_heart else (7, 9)))] = 150
        for finding, (at_x, at_y), slant in ((self.left, self.left_at, 1), (self.right, self.right_at, -1)):
            away_x, away_y = x - at_x, y - at_y
            squared = away_x * away_x + away_y * away_y
            if finding == "nodule":
                film[squared <= 18] = 235
            elif finding == "opacity":
                film = np.where(squared < 100, np.maximum(film, 175 - squared), film)
            elif finding == "fracture":
                film[(abs(away_x * slant + away_y) <= 1) & (abs(away_x) <= 7)] = 250
        grain = np.random.default_rng(self.noise).integers(-5, 6, (SIDE, SIDE))
        return np.clip(film + grain, 0, 255).astype(np.uint8)[..., None].repeat(3, axis=2)


Scene = Everyday | Chart | Page | Scan


def sample(kind: str, rng: np.random.Generator) -> Scene:
    """Draws a scene of `kind` (scene, chart, page or scan)."""
    match kind:
        case "scene":
            return _sample_everyday(rng)
        case "chart":
            return _sample_chart(rng)
        case "page":
            return _sample_page(rng)
        case "scan":
            return _sample_scan(rng)
    raise ValueError(f"no kind of scene '{kind}', expected scene, chart, page or scan")


def _sample_everyday(rng: np.random.Generator) -> Everyday:
    filled = set(rng.permutation(3)[: rng.choice((1, 2, 3), p=(0.2, 0.4, 0.4))].tolist())
    things = [
        Thing(
            colour=str(rng.choice(list(COLOURS))),
            shape=str(rng.choice(SHAPES)),
            x=2 + 21 * slot + int(rng.integers(-1, 2)),
            y=int(rng.integers(16, 40)),
        )
        if slot in filled
        else None
        for slot in range(3)
    ]
    return Everyday(
        things=(things[0], things[1], things[2]),
        sky=str(rng.choice(list(SKIES))),
        floor=str(rng.choice(list(FLOORS))),
        horizon=int(rng.integers(36, 46)),
    )


def _paper(rng: np.random.Generator) -> tuple[int, int, int]:
    return 255 - int(rng.integers(0, 10)), 255 - int(rng.integers(0, 10)), 255 - int(rng.integers(0, 30))


def _sample_chart(rng: np.random.Generator) -> Chart:
    colours = rng.permutation(list(COLOURS))[:3].tolist()
    heights = rng.integers(1, 10, 3).tolist()
    missing = int(rng.integers(0, 6))
    bars = tuple(None if slot == missing else (colours[slot], heights[slot]) for slot in range(3))
    return Chart(bars, _paper(rng), int(rng.integers(-2, 3)))


def _sample_page(rng: np.random.Generator) -> Page:
    numbers: list[int | None] = rng.integers(10, 100, 2).tolist()
    missing = int(rng.integers(0, 5))
    if missing < 2:
        numbers[missing] = None
    return Page(
        word=str(rng.choice(WORDS)),
        left=numbers[0],
        right=numbers[1],
        paper=_paper(rng),
        ink=((10, 10, 10), (20, 20, 110), (110, 15, 15))[int(rng.integers(0, 3))],
        word_at=(int(rng.integers(5, 13)), int(rng.integers(6, 14))),
        numbers_at=int(rng.integers(36, 46)),
        shift=int(rng.integers(-2, 4)),
    )


def _sample_scan(rng: np.random.Generator) -> Scan:
    def finding() -> str | None:
        return str(rng.choice(FINDINGS)) if rng.random() < 0.6 else None

    def around(x: int, y: int, reach: int) -> tuple[int, int]:
        return x + int(rng.integers(-3, 4)), y + int(rng.integers(-reach, reach + 1))

    return Scan(
        left=finding(),
        right=finding(),
        large_heart=bool(rng.random() < 0.45),
        left_at=around(15, 22, 5),
        right_at=around(48, 22, 5),
        heart_at=around(33, 43, 2),
        noise=int(rng.integers(0, 2**31)),
    )
