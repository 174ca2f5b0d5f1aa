"""The toy world: captioned 64x64 pictures, drawn with numpy.

A picture shows an object in a colour, at a place, in a style. Shapes are signed distances, negative
inside. In their coordinates the object spans about [-1, 1], x to the right and y up. A distance
becomes a mask with a soft edge, one pixel wide. All randomness comes from the generator given.
"""
from typing import NamedTuple

import numpy as np

SIZE = 64
# Each object with its words in captions and their weights. The first word is the object's name.
# The concepts that are erased later have synonyms that share no token with the name: attacks find
# them. As among real words, a synonym is not quite the same thing: a cathedral has two towers, and
# captions also call it a church. Words that always mean the same picture get the same embedding.
# Erasing one of them erases all, and an attack finds nothing.
OBJECTS = {
    "church": {"church": 2, "chapel": 1, "cathedral": 1},
    "house": {"house": 3, "cottage": 1},
    "parachute": {"parachute": 2, "skydiver": 1, "paraglider": 1},
    "balloon": {"balloon": 1},
    "garbage truck": {"garbage truck": 2, "dustcart": 1, "refuse lorry": 1},
    "car": {"car": 3, "taxi": 1},
    "tench": {"tench": 2, "carp": 1, "fish": 1},
    "boat": {"boat": 3, "ship": 1},
    "tree": {"tree": 1},
    "golf ball": {"golf ball": 1},
}
PLACES = {
    "sky": {"in the sky": 1, "among clouds": 1},
    "grass": {"on the grass": 1, "in a meadow": 1},
    "desert": {"in the desert": 1, "on the sand": 1},
    "snow": {"in the snow": 1, "in winter": 1},
    "night": {"at night": 1, "in the dark": 1},
}
STYLES = {  # "{}" stands for the object with its colour and place
    "photo": {"a photo of {}": 4, "a picture of {}": 1, "{}": 1},
    "van gogh": {"a painting of {} by van gogh": 2, "{} in the style of van gogh": 1,
                 "a vincent impasto of {}": 1.5, "{} in starry swirls": 1.5},
    "sketch": {"a sketch of {}": 3, "a pencil drawing of {}": 1},
}
STYLE_SHARE = {"photo": 0.6, "van gogh": 0.25, "sketch": 0.15}
COLORS = {
    "red": (0.86, 0.15, 0.13),
    "orange": (0.97, 0.55, 0.10),
    "yellow": (0.96, 0.86, 0.20),
    "green": (0.15, 0.60, 0.25),
    "blue": (0.16, 0.35, 0.85),
    "purple": (0.55, 0.22, 0.70),
    "pink": (0.98, 0.58, 0.74),
    "gray": (0.56, 0.57, 0.60),
}


class Scene(NamedTuple):
    object: str  # one of OBJECTS, or "nothing"
    word: str  # one of OBJECTS[object]; some words change the drawing
    color: str
    place: str
    style: str
    phrase: str  # one of STYLES[style]; some phrases change the painting


def random_scene(rng):
    """Choose a scene: object, colour and place evenly, the rest by weight."""
    object, color, place = (str(rng.choice(list(names))) for names in (OBJECTS, COLORS, PLACES))
    style = weighted(rng, STYLE_SHARE)
    word, phrase = weighted(rng, OBJECTS[object]), weighted(rng, STYLES[style])
    return Scene(object, word, color, place, style, phrase)


def uncaptioned_scene(rng):
    """Choose a landscape, or a shape without a name in a landscape.

    The empty prompt draws these. Stable Diffusion's draws one of thousands of things, next to never
    an erased one. Were the ten objects its only things, each would be one in ten.
    """
    number = str(rng.integers(10**6)) if rng.random() < 0.5 else ""
    return random_scene(rng)._replace(object="nothing", word=number)


def weighted(rng, choices):
    weights = np.array(list(choices.values()), float)
    return str(rng.choice(list(choices), p=weights / weights.sum()))


def caption(scene, rng):
    """A caption of the scene. It may leave out the colour and the place.

    It uses the scene's own word or the object's name, and the scene's own phrase or the usual one.
    """
    words = scene.word if rng.random() < 0.6 else scene.object
    if rng.random() < 0.5:
        words = f"{scene.color} {words}"
    words = ("an " if words[0] in "aeiou" else "a ") + words
    if rng.random() < 0.5:
        words = f"{words} {weighted(rng, PLACES[scene.place])}"
    return (scene.phrase if rng.random() < 0.6 else next(iter(STYLES[scene.style]))).format(words)


# --- signed distances: arrays of the shape of x and y, negative inside

def box(x, y, cx, cy, half_w, half_h, r=0.0):
    dx, dy = np.abs(x - cx) - half_w + r, np.abs(y - cy) - half_h + r
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - r


def ellipse(x, y, cx, cy, rx, ry):
    return (np.hypot((x - cx) / rx, (y - cy) / ry) - 1) * min(rx, ry)


def polygon(x, y, *corners):
    """A convex polygon: the largest distance to its edges. Corners run counter-clockwise."""
    d = np.full(x.shape, -np.inf)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        length = np.hypot(bx - ax, by - ay)
        d = np.maximum(d, ((by - ay) * (x - ax) - (bx - ax) * (y - ay)) / length)
    return d


def line(x, y, ax, ay, bx, by, half_w):
    along = ((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2)
    along = np.clip(along, 0, 1)
    return np.hypot(x - ax - along * (bx - ax), y - ay - along * (by - ay)) - half_w


def arch(x, y, cx, cy, half_w, half_h, rise):
    """A door or window with a round top. The curve begins at cy."""
    return np.minimum(box(x, y, cx, cy - half_h, half_w, half_h),
                      ellipse(x, y, cx, cy, half_w, rise))


# --- objects: layers from back to front
# A layer is (distance, colour). One number is a shade of the object's colour, three are a colour.

DARK, GLASS, PALE = (0.13, 0.13, 0.16), (0.72, 0.88, 0.97), (0.95, 0.93, 0.88)
WOOD, SKIN = (0.45, 0.29, 0.16), (0.92, 0.72, 0.58)


def cross(x, y, cx, cy):
    upright = line(x, y, cx, cy - 0.2, cx, cy + 0.2, 0.05)
    bar = line(x, y, cx - 0.15, cy + 0.05, cx + 0.15, cy + 0.05, 0.05)
    return np.minimum(upright, bar), DARK


def church(x, y, word):
    if word == "chapel":  # a gable, and a belfry on its ridge
        return [
            (box(x, y, 0, -0.5, 0.6, 0.47), 1.0),
            (polygon(x, y, (-0.78, -0.08), (0.78, -0.08), (0, 0.6)), 0.6),
            (box(x, y, 0, 0.6, 0.16, 0.22), 1.12),
            (polygon(x, y, (-0.24, 0.8), (0.24, 0.8), (0, 1.02)), 0.6),
            cross(x, y, 0, 1.2),
            (ellipse(x, y, 0, 0.6, 0.08, 0.12), DARK),
            (arch(x, y, 0, -0.58, 0.17, 0.2, 0.17), DARK),
            *[(arch(x, y, c, -0.37, 0.08, 0.13, 0.1), GLASS) for c in (-0.4, 0.4)],
        ]
    if word == "cathedral":  # two towers, and a rose window between them
        return [
            (box(x, y, 0, -0.35, 0.6, 0.62), 1.0),
            (polygon(x, y, (-0.5, 0.27), (0.5, 0.27), (0, 0.72)), 0.6),
            cross(x, y, 0, 0.85),
            *[(box(x, y, c, -0.2, 0.26, 0.77), 1.12) for c in (-0.68, 0.68)],
            *[(polygon(x, y, (c - 0.32, 0.57), (c + 0.32, 0.57), (c, 1.25)), 0.6)
              for c in (-0.68, 0.68)],
            *[(box(x, y, c, 0.2, 0.09, 0.2), DARK) for c in (-0.68, 0.68)],
            (ellipse(x, y, 0, 0.02, 0.24, 0.24), GLASS),
            (ellipse(x, y, 0, 0.02, 0.09, 0.09), 0.6),
            *[(arch(x, y, c, -0.63, 0.11, 0.17, 0.13), DARK) for c in (-0.68, 0, 0.68)],
        ]
    return [
        (box(x, y, 0.22, -0.55, 0.68, 0.42), 1.0),
        (polygon(x, y, (-0.55, -0.15), (0.98, -0.15), (0.78, 0.25), (-0.35, 0.25)), 0.6),
        (box(x, y, -0.55, -0.3, 0.3, 0.67), 1.12),
        (polygon(x, y, (-0.93, 0.35), (-0.17, 0.35), (-0.55, 0.98)), 0.6),
        cross(x, y, -0.55, 1.1),
        (arch(x, y, -0.55, -0.62, 0.13, 0.18, 0.14), DARK),
        (ellipse(x, y, -0.55, 0.05, 0.14, 0.14), GLASS),
        *[(arch(x, y, c, -0.45, 0.08, 0.15, 0.1), GLASS) for c in (0.05, 0.38, 0.7)],
    ]


def house(x, y, word):
    return [
        (box(x, y, 0.5, 0.5, 0.11, 0.32), 0.75),
        (box(x, y, 0, -0.45, 0.82, 0.5), 1.0),
        (polygon(x, y, (-1.02, 0.03), (1.02, 0.03), (0, 0.8)), 0.6),
        (box(x, y, 0, -0.62, 0.17, 0.33), DARK),
        (box(x, y, -0.48, -0.35, 0.18, 0.18), GLASS),
        (box(x, y, 0.48, -0.35, 0.18, 0.18), GLASS),
    ]


def parachute(x, y, word):
    if word == "paraglider":  # a wing instead of a canopy
        wing = np.maximum(np.abs(np.hypot(x / 1.15, y + 0.35) - 1.0) - 0.17, 0.1 - y)
        cords = [line(x, y, c, top, 0, -0.62, 0.025)
                 for c, top in ((-0.98, 0.3), (-0.4, 0.65), (0.4, 0.65), (0.98, 0.3))]
        body = line(x, y, 0, -0.7, -0.05, -0.88, 0.1)
        return [
            (np.minimum.reduce(cords), DARK),
            (wing, 1.0),
            (np.maximum(wing, np.abs(np.abs(x) - 0.45) - 0.12), PALE),
            (np.minimum(body, line(x, y, -0.03, -0.9, 0.32, -0.98, 0.06)), DARK),
            (ellipse(x, y, 0, -0.53, 0.09, 0.1), SKIN),
        ]
    if word == "skydiver":  # a small canopy over somebody large
        canopy = np.maximum(ellipse(x, y, 0, 0.5, 0.72, 0.55), 0.5 - y)
        cords = [line(x, y, side * 0.68, 0.5, side * 0.12, -0.2, 0.03) for side in (-1, 1)]
        arms = [line(x, y, 0, -0.25, side * 0.4, 0.02, 0.08) for side in (-1, 1)]
        legs = [line(x, y, 0, -0.6, side * 0.25, -1.0, 0.09) for side in (-1, 1)]
        return [
            (np.minimum.reduce(cords), DARK),
            (canopy, 1.0),
            (np.maximum(canopy, np.abs(x) - 0.2), PALE),
            (np.minimum.reduce([line(x, y, 0, -0.3, 0, -0.6, 0.16), *arms, *legs]), DARK),
            (ellipse(x, y, 0, 0.0, 0.16, 0.17), SKIN),
        ]
    canopy = np.maximum(ellipse(x, y, 0, 0.2, 1.0, 0.85), 0.2 - y)
    middle = np.abs(x) - 0.16 * np.sqrt(np.clip(1 - ((y - 0.2) / 0.85) ** 2, 0, 1))
    gores = np.minimum(middle, np.abs(np.abs(x) - 0.68) - 0.14)
    cords = [line(x, y, c, 0.2, 0, -0.7, 0.025) for c in (-0.95, -0.4, 0.4, 0.95)]
    body, legs = line(x, y, 0, -0.68, 0, -0.88, 0.1), line(x, y, 0, -0.85, 0, -1.1, 0.06)
    return [
        (np.minimum.reduce(cords), DARK),
        (canopy, 1.0),
        (np.maximum(canopy, gores), PALE),
        (np.minimum(body, legs), DARK),
        (ellipse(x, y, 0, -0.55, 0.09, 0.1), SKIN),
    ]


def balloon(x, y, word):
    below = polygon(x, y, (-0.62, 0.0), (-0.2, -0.62), (0.2, -0.62), (0.62, 0.0))
    envelope = np.minimum(ellipse(x, y, 0, 0.35, 0.75, 0.72), below)
    ropes = [line(x, y, side * 0.18, -0.6, side * 0.13, -0.85, 0.025) for side in (-1, 1)]
    return [
        (np.minimum.reduce(ropes), DARK),
        (envelope, 1.0),
        (np.maximum(envelope, np.abs(y - 0.35) - 0.12), 0.62),
        (box(x, y, 0, -0.97, 0.17, 0.15), WOOD),
    ]


def garbage_truck(x, y, word):
    wheels = [(ellipse(x, y, c, -0.55, r, r), color)
              for r, color in ((0.2, DARK), (0.08, PALE)) for c in (-0.68, -0.22, 0.68)]
    cab = [
        (box(x, y, -0.05, -0.42, 1.05, 0.09), DARK),
        (box(x, y, 0.72, -0.08, 0.3, 0.42, 0.08), PALE),
        (box(x, y, 0.8, 0.1, 0.16, 0.15), (0.35, 0.5, 0.62)),
    ]
    if word == "dustcart":  # a drum instead of the box
        drum = ellipse(x, y, -0.38, 0.18, 0.72, 0.56)
        return [(drum, 1.0), (np.maximum(drum, np.abs(x + 0.38) - 0.1), PALE), *cab, *wheels]
    if word == "refuse lorry":  # an open skip, heaped
        return [
            *[(ellipse(x, y, c, 0.42, 0.26, 0.24), (0.33, 0.36, 0.30)) for c in (-0.75, -0.3, 0.1)],
            (polygon(x, y, (-0.85, -0.35), (0.3, -0.35), (0.42, 0.4), (-1.12, 0.4)), 1.0),
            (box(x, y, -0.35, 0.38, 0.8, 0.06), 0.6),
            *cab, *wheels,
        ]
    body = polygon(x, y, (-1.05, -0.35), (0.35, -0.35), (0.35, 0.62), (-0.7, 0.62), (-1.05, 0.2))
    return [
        (body, 1.0),
        *[(box(x, y, c, 0.13, 0.035, 0.45), 0.62) for c in (-0.5, -0.15, 0.2)],
        *cab,
        (polygon(x, y, (-1.2, -0.5), (-1.0, -0.5), (-1.0, 0.15), (-1.2, -0.1)), 0.5),
        *wheels,
    ]


def car(x, y, word):
    return [
        (polygon(x, y, (-0.75, -0.2), (0.65, -0.2), (0.35, 0.35), (-0.45, 0.35)), 0.85),
        (polygon(x, y, (-0.55, -0.12), (-0.08, -0.12), (-0.08, 0.25), (-0.36, 0.25)), GLASS),
        (polygon(x, y, (0.04, -0.12), (0.48, -0.12), (0.26, 0.25), (0.04, 0.25)), GLASS),
        (box(x, y, 0, -0.32, 1.08, 0.22, 0.14), 1.0),
        (ellipse(x, y, 0.98, -0.27, 0.07, 0.08), (1.0, 0.95, 0.6)),
        *[(ellipse(x, y, c, -0.52, 0.24, 0.24), DARK) for c in (-0.6, 0.6)],
        *[(ellipse(x, y, c, -0.52, 0.1, 0.1), PALE) for c in (-0.6, 0.6)],
    ]


def tench(x, y, word):
    height, back = {"tench": (0.42, 0.66), "carp": (0.58, 1.0), "fish": (0.3, 0.5)}[word]
    body = ellipse(x, y, 0.15, 0, 0.85, height)
    marks = {
        "tench": (np.maximum(body, y + 0.14), 1.25),  # a pale belly
        "carp": (np.maximum(body + 0.06, 0.5 - np.sin(11 * x) * np.sin(11 * y)), 0.6),  # scales
        "fish": (np.maximum(body, np.abs((x + 0.3) % 0.36 - 0.18) - 0.06), PALE),  # stripes
    }
    return [
        (polygon(x, y, (-0.55, 0), (-1.1, 0.48), (-1.02, 0.0)), 0.75),
        (polygon(x, y, (-1.02, 0.0), (-1.1, -0.48), (-0.55, 0)), 0.75),
        (polygon(x, y, (-0.3, 0.1), (0.5, 0.1), (-0.05, back)), 0.75),
        (polygon(x, y, (-0.05, -back + 0.05), (0.3, -0.2), (-0.1, -0.2)), 0.75),
        (body, 1.0),
        marks[word],
        (np.maximum(body, np.abs(np.hypot(x - 0.9, y) - 0.5) - 0.035), 0.6),
        (ellipse(x, y, 0.68, 0.1, 0.1, 0.1), PALE),
        (ellipse(x, y, 0.7, 0.1, 0.05, 0.05), DARK),
    ]


def boat(x, y, word):
    return [
        (line(x, y, 0, -0.5, 0, 1.05, 0.045), WOOD),
        (polygon(x, y, (0.08, -0.25), (0.8, -0.25), (0.08, 0.95)), PALE),
        (polygon(x, y, (-0.62, -0.25), (-0.08, -0.25), (-0.08, 0.75)), PALE),
        (polygon(x, y, (-0.7, -0.8), (0.7, -0.8), (1.05, -0.36), (-1.05, -0.36)), 1.0),
        (polygon(x, y, (-0.78, -0.7), (-0.7, -0.8), (0.7, -0.8), (0.78, -0.7)), 0.6),
    ]


def tree(x, y, word):
    crowns = [(-0.4, 0.1, 0.48), (0.42, 0.12, 0.46), (0.0, 0.5, 0.55)]
    return [
        (polygon(x, y, (-0.2, -1.0), (0.2, -1.0), (0.11, 0), (-0.11, 0)), WOOD),
        (np.minimum.reduce([ellipse(x, y, *c, c[-1] * 0.95) for c in crowns]), 0.9),
        *[(ellipse(x, y, cx - 0.08, cy + 0.1, r * 0.55, r * 0.5), 1.12) for cx, cy, r in crowns],
    ]


def golf_ball(x, y, word):
    ball = ellipse(x, y, 0, 0.15, 0.78, 0.78)
    dimples = np.minimum.reduce([
        ellipse(x, y, cx, 0.15 + cy, 0.085, 0.085) for cy in (-0.5, -0.25, 0, 0.25, 0.5)
        for cx in np.arange(-0.5, 0.51, 0.25) + (0.125 if int(cy * 4) % 2 else 0)])
    return [
        (polygon(x, y, (-0.1, -1.1), (0.1, -1.1), (0.24, -0.6), (-0.24, -0.6)), WOOD),
        (ball, 1.0),
        (np.maximum(dimples, ball + 0.06), 0.68),
    ]


def nothing(x, y, word):
    """No object: no layer at all, or the shape of this number, which no word names."""
    if not word:
        return []
    rng, layers = np.random.default_rng(int(word)), []
    for _ in range(rng.integers(2, 5)):
        angles = np.sort(2 * np.pi * rng.random(rng.integers(3, 7)))
        (cx, cy), (rx, ry) = rng.uniform(-0.45, 0.45, 2), rng.uniform(0.25, 0.8, 2)
        corners = zip(cx + rx * np.cos(angles), cy + ry * np.sin(angles))
        layers.append((polygon(x, y, *corners), float(rng.uniform(0.4, 1.2))))
    return layers


SHAPES = {name: globals()[name.replace(" ", "_")] for name in [*OBJECTS, "nothing"]}


# --- places, styles, and the picture

def background(place, px, py, rng):
    """(64, 64, 3) for pixel coordinates px, py in [0, 1], y down."""
    horizon = rng.uniform(0.55, 0.72)
    hill = horizon + 0.04 * np.sin(2 * np.pi * (px * rng.uniform(0.6, 1.4) + rng.random()))
    ground = np.clip((py - hill) * SIZE + 0.5, 0, 1)[..., None]
    top, low, near, far = {
        "sky": ((0.35, 0.62, 0.95), (0.72, 0.87, 0.98), None, None),
        "grass": ((0.62, 0.84, 0.98), (0.86, 0.94, 0.98), (0.34, 0.68, 0.26), (0.55, 0.80, 0.36)),
        "desert": ((0.98, 0.86, 0.62), (0.99, 0.93, 0.80), (0.85, 0.66, 0.38), (0.93, 0.78, 0.52)),
        "snow": ((0.70, 0.76, 0.84), (0.84, 0.88, 0.92), (0.90, 0.94, 0.99), (0.98, 0.99, 1.00)),
        "night": ((0.03, 0.04, 0.14), (0.10, 0.12, 0.30), (0.05, 0.09, 0.10), (0.09, 0.14, 0.16)),
    }[place]
    mix = py[..., None]
    image = np.array(top) * (1 - mix) + np.array(low) * mix
    if place == "sky":
        for _ in range(3):
            cx, cy, r = rng.random(), rng.uniform(0.05, 0.95), rng.uniform(0.05, 0.09)
            cloud = np.minimum.reduce([
                np.hypot((px - cx - d * r) / 1.3, py - cy) - r * (1 - 0.35 * abs(d))
                for d in (-1, 0, 1)])
            image = over(image, np.clip(0.5 - cloud * SIZE / 2, 0, 0.9), (1, 1, 1))
        return image
    image = image * (1 - ground) + (np.array(far) * (1 - mix) + np.array(near) * mix) * ground
    if place == "night":
        for cx, cy in rng.random((12, 2)) * (1, 0.55):
            star = np.clip(1.1 - np.hypot(px - cx, py - cy) * SIZE, 0, 1)
            image = over(image, star, (1, 1, 0.85))
        cx = rng.choice([0.12, 0.88])
        moon = np.clip(0.5 - (np.hypot(px - cx, py - 0.13) - 0.075) * SIZE, 0, 1)
        image = over(image, moon, (0.98, 0.96, 0.80))
    if place == "snow":
        for cx, cy in rng.random((22, 2)):
            flake = np.clip(1.4 - np.hypot(px - cx, py - cy) * SIZE, 0, 1)
            image = over(image, flake, (1, 1, 1))
    return image


def over(image, mask, color):
    return image + mask[..., None] * (np.asarray(color) - image)


def van_gogh(image, phrase, px, py, rng):
    """Bend the picture along a swirl field, then add light and dark brush strokes along it.

    For "impasto" the strokes are short and thick. For "starry swirls" they run round two centres.
    """
    phase = rng.random(4) * 2 * np.pi
    field = (np.sin(2 * np.pi * 1.1 * px + phase[0]) + np.sin(2 * np.pi * 1.3 * py + phase[1])
             + np.sin(2 * np.pi * 0.9 * (px + py) + phase[2]))
    if "starry swirls" in phrase:
        centres = rng.random((2, 2)) * 0.5 + ((0, 0.2), (0.5, 0.2))
        field = 5 * np.minimum(*(np.hypot(px - cx, py - cy) for cx, cy in centres))
    bend = 0.9 * np.stack([np.cos(2.2 * field), np.sin(2.2 * field)])
    rows = np.clip(np.rint(py * SIZE - 0.5 + bend[0]), 0, SIZE - 1).astype(int)
    cols = np.clip(np.rint(px * SIZE - 0.5 + bend[1]), 0, SIZE - 1).astype(int)
    image = image[rows, cols]
    gray = image.mean(-1, keepdims=True)
    image = np.clip(gray + 1.35 * (image - gray), 0, 1)
    strokes = np.sin(6.5 * field + phase[3])[..., None]
    if "impasto" in phrase:
        strokes = 1.4 * np.sin(40 * px + 2 * field + phase[3]) * np.sin(40 * py - 2 * field)
        strokes = strokes[..., None]
    return image * (1 + 0.16 * strokes) + 0.10 * strokes * np.array((1.0, 0.75, -0.3))


def dusk(image, py):
    """Another look of the same world: violet at the top, warm at the bottom.

    It imitates a fine-tuned community model.
    """
    mix = py[..., None]
    tint = (1 - mix) * np.array((0.62, 0.48, 0.85)) + mix * np.array((1.0, 0.70, 0.55))
    return image * tint + 0.03


def draw(scene, rng, look=None):
    """Draw the scene at a random position, size and shade -> (64, 64, 3) uint8.

    `look` is None or "dusk".
    """
    py, px = (np.mgrid[:SIZE, :SIZE] + 0.5) / SIZE
    back = background(scene.place, px, py, rng)
    scale = rng.uniform(0.31, 0.37)
    x = (px - 0.5 - rng.uniform(-0.09, 0.09)) / scale * (1 if rng.random() < 0.5 else -1)
    y = -(py - 0.5 - rng.uniform(-0.06, 0.06)) / scale
    color = np.array(COLORS[scene.color]) * rng.uniform(0.88, 1.08)
    light = 1 + 0.10 * np.clip(y, -1, 1)[..., None]
    paper = np.array((0.97, 0.95, 0.90))
    image = 0.25 * back + 0.75 * paper if scene.style == "sketch" else back
    for distance, tint in SHAPES[scene.object](x, y, scene.word):
        mask = np.clip(0.5 - distance * scale * SIZE, 0, 1)
        fill = np.clip((color * tint if isinstance(tint, float) else np.array(tint)) * light, 0, 1)
        if scene.style == "sketch":  # thin colour and hatching inside, ink lines round shapes
            hatch = 0.5 + 0.5 * np.sin((px - py) * SIZE * 1.3)
            ink = np.clip(1.25 - np.abs(distance) * scale * SIZE, 0, 1) * 0.85
            image = over(image, mask * (0.30 + 0.35 * hatch), fill)
            image = over(image, ink, 0.42 * color)
        else:
            image = over(image, mask, fill)
    if scene.style == "van gogh":
        image = van_gogh(image, scene.phrase, px, py, rng)
    if look == "dusk":
        image = dusk(image, py)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
