"""`shapes`: drawn articulated objects with exact named keypoints, to train and to score on without any file.

Every category is one short function that draws an object facing right, in a frame about one unit wide with y
down, from polygons, ellipses, limbs and arcs. Points are complex numbers x + iy, so that a rotation is a
product: with y down, angle 0 points right (front), 90 down, 180 left (back) and -90 up.

Hue and texture of a part vary about those of its role, pose and proportions vary widely, a quarter of the
objects look the other way, and clutter of the same kinds of pieces lies behind them. What an object shares
with its class is the arrangement of its parts and their local shape (a white eye with a dark pupil, a dark
tyre with a light hub). The same seed draws the same bytes.
"""

import colorsys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw

from data import ImageSet, KeypointPair, KeypointSet

SUPERSAMPLE = 3         # objects are drawn this many times larger, then box-averaged down: antialiasing
OUTLINE = 0.008         # width of a part's outline, in image sides
TURN = 12.0             # degrees of in-plane rotation either way
LONGER_SIDE = (0.6, 0.9)  # of the object, in image sides
HUE_SPREAD = 0.05       # standard deviation of a part's hue round that of its role, in turns of the circle
USUAL_TEXTURE = 0.7     # how often a part wears its role's own texture rather than any
TEXTURES = ("plain", "stripes", "dots", "gradient")
FIXED_COLOURS = {"white": (244, 244, 238), "black": (26, 26, 32), "glass": (176, 216, 236)}
FIXED_TEXTURES = {"fin": "stripes", "wing": "stripes", "hub": "plain", "beak": "plain"} | dict.fromkeys(
    FIXED_COLOURS, "plain")


class Style(NamedTuple):
    """The look of all parts of one role in one figure; colours are RGB."""
    base: tuple[int, ...]
    shade: tuple[int, ...]      # of the stripes, the dots, the lower end of the gradient
    edge: tuple[int, ...]
    texture: str                # one of TEXTURES
    pitch: float                # distance between stripes or dots, object units


def step(angle: float, length: float = 1.0) -> complex:
    """The vector of that length (units) in that direction (degrees, clockwise on screen)."""
    return length * complex(np.exp(1j * np.deg2rad(angle)))


def circle(start: float = 0.0, stop: float = 360.0, n: int = 28) -> np.ndarray:
    """(n,) complex points of the unit circle from one angle (degrees) to another."""
    return np.exp(1j * np.deg2rad(np.linspace(start, stop, n)))


class Figure:
    """Coloured polygons in object units, back to front, and the keypoints attached to them.

    A primitive's optional `kp` names the keypoint at its centre, or at a limb's far end.
    """

    def __init__(self, rng: np.random.Generator, saturation: tuple[float, float] = (0.45, 0.95)):
        self.rng, self.saturation, self.light = rng, saturation, True
        self.parts: list[tuple[np.ndarray, str, complex]] = []  # closed, role, axis across its stripes
        self.styles: dict[str, Style] = {}
        self.kps: dict[str, complex] = {}

    def u(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def mark(self, **points: complex) -> None:
        self.kps.update({name: complex(z) for name, z in points.items() if name})

    def poly(self, points: Sequence[complex] | np.ndarray, role: str, axis: complex = 1.0) -> None:
        if role not in self.styles:
            self.styles[role] = self._style(role)
        self.parts.append((np.asarray(points, dtype=complex), role, axis))

    def ellipse(self, centre: complex, rx: float, ry: float, role: str,
                angle: float = 0.0, kp: str = "") -> None:
        self.poly(centre + step(angle) * (rx * circle().real + 1j * ry * circle().imag), role, step(angle))
        self.mark(**{kp: centre})

    def limb(self, start: complex, stop: complex, r0: float, r1: float, role: str, kp: str = "") -> complex:
        """A bone with round ends of radius r0 and r1; returns its far end, where the next bone starts."""
        axis = (stop - start) / abs(stop - start)
        ends = start + r0 * axis * circle(90, 270, 9), stop + r1 * axis * circle(-90, 90, 9)
        self.poly(np.concatenate(ends), role, axis)
        self.mark(**{kp: stop})
        return stop

    def arc(self, centre: complex, radius: float, width: float, start: float, stop: float, role: str) -> None:
        """A band along a circle, `radius` being that of its middle line; 0 to 360 makes a ring."""
        points = circle(start, stop)
        sides = centre + (radius + width / 2) * points, centre + (radius - width / 2) * points[::-1]
        self.poly(np.concatenate(sides), role)

    def discs(self, centre: complex, radius: float, outer: str, inner: str, kp: str = "") -> None:
        """Concentric discs: a wheel (black round white), a lamp's joint, a boat's porthole."""
        for share, role in ((1.0, outer), (0.5, inner), (0.15, outer)):
            self.ellipse(centre, share * radius, share * radius, role, kp=kp)

    def eye(self, centre: complex, radius: float) -> None:
        self.ellipse(centre, radius, radius, "white", kp="eye")
        self.ellipse(centre + 0.25 * radius, 0.5 * radius, 0.5 * radius, "black")

    def _style(self, role: str) -> Style:
        """A look near the role's own. Roles alternate between light and dark: neighbours stand apart."""
        self.light = not self.light
        value = self.u(0.78, 1.0) if self.light else self.u(0.42, 0.62)
        own = zlib.crc32(role.encode())
        hue = (own / 2**32 + HUE_SPREAD * float(self.rng.normal())) % 1
        rgb = colorsys.hsv_to_rgb(hue, self.u(*self.saturation), value)
        base = FIXED_COLOURS.get(role) or tuple(int(255 * c) for c in rgb)
        shade = tuple(min(255, int((0.55 if self.light else 1.55) * c)) for c in base)
        any_texture, usual = str(self.rng.choice(TEXTURES)), self.rng.random() < USUAL_TEXTURE
        texture = FIXED_TEXTURES.get(role) or (TEXTURES[own % len(TEXTURES)] if usual else any_texture)
        return Style(base, shade, tuple(int(0.3 * c) for c in base), texture, self.u(0.06, 0.1))


def fish(f: Figure) -> None:
    h, swing, root = f.u(0.15, 0.25), f.u(-28, 28), -0.26 + 0j
    tail_top, tail_bottom = (root + step(180 + swing + sign * f.u(28, 52), f.u(0.2, 0.3)) for sign in (1, -1))
    top, belly = f.u(-0.2, 0.0) - 1j * (h + f.u(0.07, 0.15)), f.u(-0.12, 0.08) + 1j * (h + f.u(0.05, 0.12))
    f.poly([root + 0.06, tail_top, root + step(180 + swing, 0.12), tail_bottom], "fin", 1j)
    f.poly([-0.17 - 0.7j * h, top, 0.14 - 0.8j * h], "fin")
    f.poly([-0.1 + 0.8j * h, belly, 0.1 + 0.8j * h], "fin")
    f.limb(root, -0.1 + 0j, 0.05, 0.6 * h, "body")
    f.ellipse(0.04 + 0j, 0.32, h, "body")
    f.poly([0.36 - 0.01j, 0.27 + 0.03j, 0.34 + 0.05j], "black")
    f.arc(0.02 + 0j, 0.13, 0.03, -50, 50, "gill")
    f.eye(0.24 - 0.3j * h, 0.045)
    f.mark(mouth=0.34 + 0.01j, gill=0.15, top_fin=top, belly_fin=belly, tail_root=root, tail_top=tail_top,
           tail_bottom=tail_bottom)


def bird(f: Figure) -> None:
    tilt, gaze, wave, spread = f.u(-35, 5), f.u(-25, 25), f.u(-25, 25), f.u(8, 20)
    along, beak = step(tilt), step(gaze)
    head, rump = 0.24 * along + step(-70 + tilt / 2, f.u(0.1, 0.2)), -0.24 * along
    ends = [rump - along * step(wave + s * spread, f.u(0.22, 0.3)) for s in (-1, 1)]
    f.poly([rump + 0.08 * along, *ends], "tail", 1j * along)
    for name, angle in (("back_foot", f.u(98, 122)), ("front_foot", f.u(58, 82))):
        foot = f.limb(0.1j, 0.1j + step(angle, f.u(0.2, 0.28)), 0.016, 0.016, "leg", kp=name)
        f.limb(foot - 0.02, foot + 0.07, 0.018, 0.01, "leg")
    f.limb(0.16 * along, head, 0.1, 0.08, "body")
    f.ellipse(0j, 0.28, f.u(0.13, 0.18), "body", tilt)
    f.poly(head + beak * np.array([-0.08j, 0.22, 0.08j]), "beak")
    f.ellipse(head, 0.1, 0.1, "head")
    f.eye(head + beak * (0.04 - 0.022j), 0.035)
    shoulder, lift = 0.1 * along - 0.04j, step(f.u(165, 265), f.u(0.32, 0.42))
    f.poly(shoulder + lift * np.array([0.27j, 0.9 + 0.1j, 1, 0.6 - 0.18j, -0.2, -0.1 + 0.2j]), "wing", lift)
    f.mark(beak=head + 0.2 * beak, shoulder=shoulder, wing_tip=shoulder + 0.97 * lift, tail=sum(ends) / 2,
           breast=0.22 * along + 0.05j)


def dog(f: Figure) -> None:
    hip, shoulder, r, leg = -f.u(0.2, 0.3) + 0j, f.u(0.2, 0.28) - 0.02j, f.u(0.08, 0.12), f.u(0.13, 0.2)

    def draw_leg(root: complex, angle: float, bend: float, role: str, name: str = "") -> None:
        knee = f.limb(root, root + step(angle, leg), 0.06, 0.04, role, kp=name and f"{name}_knee")
        paw = f.limb(knee, knee + step(angle + bend, leg), 0.036, 0.03, role, kp=name and f"{name}_paw")
        f.ellipse(paw + 0.02, 0.05, 0.03, "paw")

    draw_leg(hip + 0.05j, f.u(50, 120), f.u(5, 45), "far leg")
    draw_leg(shoulder + 0.05j, f.u(60, 130), f.u(-40, 10), "far leg")
    tail = hip - 0.05 - 0.04j + step(f.u(165, 265), f.u(0.2, 0.3))
    f.limb(hip - 0.05, tail, 0.035, 0.015, "tail", kp="tail_tip")
    f.limb(hip, shoulder, r, r + 0.02, "body")
    head = f.limb(shoulder, shoulder + step(f.u(-80, -25), f.u(0.2, 0.27)), 0.08, 0.06, "body")
    nod = step(f.u(-20, 45))
    snout = f.limb(head, head + f.u(0.14, 0.2) * nod, 0.07, 0.045, "snout")
    f.ellipse(head, 0.095, 0.085, "head")
    f.ellipse(snout + 0.03 * nod, 0.028, 0.028, "black", kp="nose")
    ear = head + nod * (step(f.u(-160, -75), 0.17) - 0.05)
    f.poly([head + nod * (0.02 - 0.07j), ear, head + nod * (-0.09 - 0.01j)], "ear")
    f.eye(head + nod * (0.045 - 0.025j), 0.032)
    draw_leg(hip + 0.04j, f.u(50, 115), f.u(10, 60), "near leg", "hind")
    draw_leg(shoulder + 0.04j, f.u(60, 130), f.u(-50, 5), "near leg", "fore")
    f.mark(ear=ear, rump=hip - 0.5 * r)


def person(f: Figure) -> None:
    lean, arm, leg = f.u(-20, 25), f.u(0.13, 0.18), f.u(0.17, 0.24)
    up = step(lean - 90)
    neck, head = f.u(0.28, 0.36) * up, 0.46 * up
    for side, angle, bend in (("back", f.u(100, 135), f.u(5, 60)), ("front", f.u(40, 80), f.u(0, 60))):
        knee = f.limb(0j, step(angle, leg), 0.065, 0.05, "trousers", kp=f"{side}_knee")
        foot = f.limb(knee, knee + step(angle + bend, leg), 0.045, 0.035, "trousers", kp=f"{side}_foot")
        f.limb(foot, foot + step(angle + bend - 85, 0.08), 0.035, 0.025, "shoe")
    for side, angle, bend in (("lowered", f.u(70, 150), f.u(-70, 0)), ("raised", f.u(-75, 0), f.u(-30, 25))):
        if side == "raised":    # the torso hides the root of the far arm; the near arm lies over the torso
            f.limb(0j, neck, 0.08, 0.085, "shirt")
            f.limb(-0.075j * up, 0.075j * up, 0.025, 0.025, "belt")
        elbow = f.limb(neck - 0.02 * up, neck + step(angle, arm), 0.045, 0.035, "sleeve")
        hand = f.limb(elbow, elbow + step(angle + bend, arm), 0.032, 0.026, "skin")
        f.ellipse(hand, 0.04, 0.04, "skin", kp=f"{side}_hand")
    f.poly(head + up * np.array([0.02 + 0.07j, -0.02 + 0.13j, -0.045 + 0.07j]), "skin")
    f.ellipse(head, 0.085, 0.095, "skin", lean)
    cap = np.array([0.03 - 0.09j, 0.11 - 0.06j, 0.11 + 0.06j, 0.04 + 0.17j, 0.02 + 0.17j])
    f.poly(head + up * cap, "cap")
    f.discs(head + 0.04j * up, 0.024, "white", "black")     # no keypoint: too close to the nose
    f.mark(nose=head + up * (-0.015 + 0.115j), cap_top=head + 0.1 * up, belt=0)


def truck(f: Figure) -> None:
    cab, top, depth, tilt = f.u(0.2, 0.28), f.u(0.3, 0.42), f.u(0.16, 0.27), step(f.u(-38, 0))
    length, slope, wheel = 0.82 - cab, f.u(0.02, 0.1), f.u(0.075, 0.11)
    bed = -0.42 - 0.06j + tilt * np.array([0, length, length + 0.03 - 1j * depth, -0.05 - 1j * depth])
    f.limb(0.445 - cab - 0.05j, 0.445 - cab - 1j * (top + 0.06), 0.022, 0.018, "pipe", kp="pipe_top")
    f.poly(bed, "bed", tilt)
    f.poly([-0.46 - 0.05j, 0.46 - 0.05j, 0.46 + 0.03j, -0.46 + 0.03j], "chassis")
    f.poly(0.46 + np.array([0.02j - cab, -cab - 1j * top, -slope - 1j * top, -0.16j, 0.02j]), "cab")
    window = 0.46 - 0.42 * cab - 0.72j * top
    f.poly(window + np.array([-0.06 - 0.06j, 0.03 - 0.06j, 0.065 + 0.05j, -0.06 + 0.05j]), "glass")
    f.ellipse(0.43 - 0.08j, 0.028, 0.04, "white", kp="headlight")
    f.limb(0.44 + 0.02j, 0.49 + 0.02j, 0.022, 0.022, "bumper")
    f.discs(-f.u(0.24, 0.36) + 0.04j, wheel, "black", "white", kp="rear_wheel")
    f.discs(0.45 - 0.5 * cab + 0.04j, wheel, "black", "white", kp="front_wheel")
    f.mark(window=window, roof_front=0.45 - slope - 1j * (top - 0.01), bed_front_top=bed[2],
           bed_rear_top=bed[3])


def bicycle(f: Figure) -> None:
    r, spin, rear, front = f.u(0.15, 0.21), f.u(0, 60), -0.28 + 0j, f.u(0.28, 0.36) + 0j
    crank, head = f.u(-0.08, -0.01) + f.u(0.0, 0.06) * 1j, front - f.u(0.06, 0.14) - f.u(0.24, 0.34) * 1j
    seat = crank - f.u(0.05, 0.12) - f.u(0.25, 0.36) * 1j
    for hub, name in ((rear, "rear_hub"), (front, "front_hub")):
        for spoke in (step(spin + 60 * k, r) for k in range(3)):
            f.limb(hub - spoke, hub + spoke, 0.008, 0.008, "white")
        f.arc(hub, r, 0.045, 0, 360, "black")
        f.ellipse(hub, 0.035, 0.035, "hub", kp=name)
    post = crank + 0.72 * (seat - crank)
    for start, stop in ((rear, crank), (rear, post), (crank, head), (post, head), (crank, seat)):
        f.limb(start, stop, 0.02, 0.02, "frame")
    stem = f.limb(front, head - 0.06j, 0.018, 0.022, "fork")
    grip = f.limb(stem, stem + step(f.u(-60, 40), 0.12), 0.02, 0.02, "fork")
    f.ellipse(grip, 0.035, 0.035, "black", kp="grip")
    f.poly(seat + np.array([-0.1 - 0.04j, 0.1 - 0.02j, 0.09 + 0.01j, -0.06 + 0.04j]), "saddle")
    f.ellipse(crank, 0.055, 0.055, "hub", kp="crank")
    pedal = f.limb(crank, crank + step(f.u(0, 360), 0.12), 0.016, 0.016, "black", kp="pedal")
    f.limb(pedal - 0.045, pedal + 0.045, 0.02, 0.02, "saddle")
    f.mark(saddle=seat, fork_top=head - 0.03j)


def plane(f: Figure) -> None:
    h, root, tail = f.u(0.07, 0.1), f.u(-0.06, 0.1) + 0j, -0.42 - 0.03j
    near, far = root + f.u(-0.26, 0.02) + f.u(0.2, 0.34) * 1j, root + f.u(-0.24, -0.02) - f.u(0.18, 0.28) * 1j
    fin, low = tail + f.u(-0.1, 0.0) - f.u(0.18, 0.26) * 1j, tail + f.u(-0.12, -0.02) + f.u(0.08, 0.14) * 1j
    spin, wheel = step(f.u(50, 130), f.u(0.12, 0.17)), f.u(0.2, 0.27) + 1j * (h + f.u(0.05, 0.1))
    f.poly([root + 0.12 - 0.5j * h, far + 0.05, far - 0.06, root - 0.1 - 0.5j * h], "wing", 1j)
    f.limb(0.22 + 0.04j, wheel, 0.014, 0.014, "gear")
    f.discs(wheel, 0.045, "black", "white", kp="wheel")
    f.poly([tail + 0.15 - 0.02j, fin + 0.06, fin - 0.03, tail - 0.04], "fin")
    f.limb(tail, 0j, 0.035, h, "body")
    f.limb(0j, 0.33 + 0.01j, h, 0.75 * h, "body")
    f.poly(0.2 - 0.8j * h + np.array([-0.1, -0.05 - 0.07j, 0.03 - 0.07j, 0.1 + 0.02j]), "glass")
    f.poly([tail + 0.12 + 0.02j, low + 0.05, low - 0.03, tail + 0.01 + 0.02j], "fin", 1j)
    f.poly([root + 0.13 + 0.3j * h, near + 0.06, near - 0.06, root - 0.11 + 0.3j * h], "wing", 1j)
    engine = 0.5 * (root + near) + 0.05
    f.limb(engine - 0.06, engine + 0.06, 0.035, 0.045, "engine")
    f.limb(0.42 - spin, 0.42 + spin, 0.014, 0.014, "blade")
    f.limb(0.38 + 0.01j, 0.43 + 0.01j, 0.045, 0.02, "spinner", kp="nose")
    f.mark(cockpit=0.19 - 0.8j * h - 0.03j, near_wing_tip=near, far_wing_tip=far, fin_tip=fin + 0.01,
           tailplane_tip=low, engine=engine)


def lamp(f: Figure) -> None:
    width, aim, depth, rim = f.u(0.12, 0.2), step(f.u(20, 95)), f.u(0.16, 0.22), f.u(0.1, 0.16)
    f.poly([-width + 0.07j, -0.6 * width, 0.6 * width, width + 0.07j], "base")
    elbow = f.limb(0j, step(f.u(-140, -95), f.u(0.28, 0.4)), 0.022, 0.022, "lower arm")
    neck = f.limb(elbow, elbow + step(f.u(-70, -15), f.u(0.26, 0.38)), 0.02, 0.02, "upper arm")
    f.discs(0j, 0.045, "black", "white", kp="foot_joint")
    f.discs(elbow, 0.045, "black", "white", kp="elbow")
    f.ellipse(neck + depth * aim, 0.06, 0.06, "white")
    f.poly(neck + aim * np.array([0.045j, depth + 1j * rim, depth - 1j * rim, -0.045j]), "shade", aim)
    f.ellipse(neck, 0.05, 0.05, "knob", kp="neck")
    f.mark(base_front=width + 0.06j, base_back=-width + 0.06j, bulb=neck + (depth + 0.045) * aim,
           rim_back=neck + (depth + 0.97j * rim) * aim, rim_front=neck + (depth - 0.97j * rim) * aim)


def sailboat(f: Figure) -> None:
    bow, stern, keel = f.u(0.36, 0.46) + 0.2j, -f.u(0.32, 0.42) + 0.22j, f.u(0.12, 0.18)
    foot, up, height = f.u(-0.02, 0.1) + 0.2j, step(f.u(-102, -82)), f.u(0.55, 0.72)
    top, gooseneck = foot + height * up, foot + 0.08 * up
    clew = gooseneck + step(f.u(160, 190), f.u(0.26, 0.36))
    pennant = step(f.u(150, 215), f.u(0.14, 0.22))
    f.limb(stern + 0.02 + 0.02j, stern - 0.05 + f.u(0.16, 0.22) * 1j, 0.02, 0.035, "rudder", kp="rudder")
    f.poly([foot + 0.94 * height * up + 0.03, bow - 0.06 - 0.02j, foot + 0.1 * up + 0.04], "jib", up)
    f.poly([gooseneck - 0.03, clew - 0.02j, foot + f.u(0.8, 0.93) * height * up - 0.02], "main sail", up)
    f.poly([top, top + 0.07j, top + pennant], "pennant")
    f.limb(foot, top, 0.018, 0.014, "mast", kp="mast_top")
    f.limb(gooseneck, clew, 0.016, 0.016, "mast", kp="boom_end")
    f.poly([stern, bow, bow - 0.12 + 1j * keel, stern + 0.06 + 1j * keel], "hull")
    f.poly([stern, bow, bow - 0.04 + 0.045j, stern + 0.02 + 0.045j], "rail")
    f.discs(bow - 0.17 + (0.02 + keel / 2) * 1j, 0.035, "white", "black", kp="porthole")
    f.mark(bow=bow - 0.01, stern=stern + 0.01, mast_foot=foot, pennant_tip=top + 0.94 * pennant)


def teapot(f: Figure) -> None:
    rx, ry, rim, grip = f.u(0.2, 0.27), f.u(0.16, 0.24), f.u(0.1, 0.15), f.u(0.09, 0.13)
    root, handle, hinge, lift = rx - 0.02 + 0.04j, -rx - 0.02 - 0.02j, -rim - 0.93j * ry, step(f.u(-55, 0))
    f.arc(handle, grip, 0.045, 60, 300, "handle")
    bend = root + step(f.u(-40, 5), f.u(0.1, 0.16))
    f.limb(root - 0.03, bend, 0.075, 0.045, "spout", kp="spout_bend")
    spout = f.limb(bend, bend + step(f.u(-80, -30), f.u(0.1, 0.18)), 0.045, 0.03, "spout")
    f.ellipse(spout, 0.034, 0.034, "black", kp="spout_tip")
    f.poly(1j * ry + np.array([-0.12 - 0.2j * ry, 0.12 - 0.2j * ry, 0.15 + 0.05j, -0.15 + 0.05j]), "foot")
    f.ellipse(0j, rx, ry, "body")
    f.ellipse(-0.93j * ry, rim, 0.03, "black")
    dome = circle(180, 360, 14)
    f.poly(hinge + lift * (rim + rim * dome.real + 0.09j * dome.imag), "lid", lift)
    f.ellipse(hinge + lift * (rim - 0.11j), 0.035, 0.035, "knob", kp="knob")
    f.mark(spout_root=root, handle_top=handle + step(285, grip), handle_bottom=handle + step(75, grip),
           handle_back=handle - grip, lid_hinge=hinge, foot=1j * (ry + 0.02))


DRAWERS: dict[str, Callable[[Figure], None]] = {
    draw.__name__: draw for draw in (fish, bird, dog, person, truck, bicycle, plane, lamp, sailboat, teapot)}
SHAPE_CLASSES: tuple[str, ...] = tuple(DRAWERS)


def texture_mask(kind: str, size: tuple[int, int], axis: complex, pitch: float) -> Image.Image:
    """Where a part's second colour goes: an L image of size (w, h); axis (unit) and pitch in its pixels."""
    if kind == "gradient":
        return Image.linear_gradient("L").resize(size)
    layer = Image.new("L", size)
    draw, centre, reach, r = ImageDraw.Draw(layer), complex(*size) / 2, abs(complex(*size)) / 2, 0.28 * pitch
    for a in np.arange(-reach, reach, pitch):
        if kind == "stripes":
            ends = centre + axis * np.array([a - 1j * reach, a + 1j * reach])
            draw.line(ends.view(float).tolist(), fill=255, width=round(0.45 * pitch))
            continue
        for z in centre + axis * (a + 1j * np.arange(-reach, reach, pitch)):
            if 0 <= z.real < size[0] and 0 <= z.imag < size[1]:
                draw.ellipse((z.real - r, z.imag - r, z.real + r, z.imag + r), fill=255)
    return layer


def paint(figure: Figure, image: Image.Image, to_pixel: Callable, edges: bool = True) -> Image.Image:
    """Draws the parts into `image`, back to front; returns their silhouette, an L image of the same size.

    to_pixel: a similarity from complex object units, an array of any shape, to complex pixels.
    """
    silhouette = Image.new("L", image.size)
    draw, draw_silhouette = ImageDraw.Draw(image), ImageDraw.Draw(silhouette)
    width, unit = round(OUTLINE * image.width), abs(to_pixel(1.0) - to_pixel(0.0))
    for outline, role, axis in figure.parts:
        style, points = figure.styles[role], to_pixel(outline)
        flat = points.view(float).tolist()      # x, y, x, y, ...
        draw.polygon(flat, fill=style.base)
        draw_silhouette.polygon(flat, fill=255)
        if style.texture != "plain":
            x0, y0 = int(points.real.min()), int(points.imag.min())
            inside = Image.new("L", (int(points.real.max()) - x0 + 2, int(points.imag.max()) - y0 + 2))
            ImageDraw.Draw(inside).polygon((points - complex(x0, y0)).view(float).tolist(), fill=255)
            along = to_pixel(axis) - to_pixel(0.0)
            texture = texture_mask(style.texture, inside.size, along / abs(along), style.pitch * unit)
            image.paste(style.shade, (x0, y0), ImageChops.multiply(inside, texture))
        if edges:
            draw.line(flat + flat[:4], fill=style.edge, width=width)
            draw_silhouette.line(flat + flat[:4], fill=255, width=width)
    return silhouette


def draw_background(rng: np.random.Generator, side: int) -> Image.Image:
    """An RGB image of side x side: colour gradient, smooth noise, muted clutter, one to three distractors."""
    corners = Image.fromarray(rng.integers(80, 200, (2, 2, 3), dtype=np.uint8))
    ramp = np.asarray(corners.resize((12, 12), Image.Resampling.BILINEAR), dtype=float)
    noise = rng.normal(0, 14, (12, 12, 1)) + rng.normal(0, 6, (12, 12, 3))      # mostly of brightness
    coarse = Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8))
    image = coarse.resize((side, side), Image.Resampling.BICUBIC)

    def scatter(count: int, kinds: Sequence[str], radii: tuple, saturation: tuple, edges: bool) -> None:
        things = Figure(rng, saturation)
        for k in range(count):
            centre, r, angle = complex(*rng.uniform(0, 1, 2)), things.u(*radii), things.u(0, 360)
            kind = rng.choice(kinds)
            if kind == "wheel":
                things.discs(centre, r, "black", "white")
            elif kind == "bar":
                things.limb(centre, centre + step(angle, 3 * r), 0.3 * r, 0.3 * r, f"thing {k}")
            elif kind == "ellipse":
                things.ellipse(centre, r, r * things.u(0.4, 1), f"thing {k}", angle)
            else:
                polygon, triangle = kind == "polygon", angle + np.array([0, 120, 240])
                corners = np.sort(rng.uniform(0, 360, 5)) if polygon else triangle
                things.poly(centre + r * np.exp(1j * np.deg2rad(corners)), f"thing {k}")
        paint(things, image, lambda z: np.asarray(z, dtype=complex) * side, edges)

    clutter, distractors = ["polygon", "ellipse", "bar"], ["triangle", "ellipse", "bar", "wheel"]
    scatter(int(rng.integers(4, 9)), clutter, (0.03, 0.16), (0.05, 0.35), edges=False)
    scatter(int(rng.integers(1, 4)), distractors, (0.03, 0.07), (0.45, 0.95), edges=True)
    return image


def draw_shape(category: str, seed: int, size: int = 128) -> dict:
    """One instance of a category; the same arguments give the same bytes in every process.

    Returns "image", PIL RGB (size x size); "mask", PIL L, 255 on the object's silhouette; "kps", {name: (x,
    y)} with every keypoint of the category, in pixels, the centre of pixel (i, j) being at (i, j); "bbox",
    the (x0, y0, x1, y1) of the mask in pixels, x1 and y1 exclusive, so that its width is x1 - x0; "parts",
    the polygons in the same pixels, back to front, complex arrays, the same number with the same vertices in
    every instance of a category.
    """
    if category not in DRAWERS:
        raise ValueError(f"unknown category {category!r}; known: {', '.join(SHAPE_CLASSES)}")
    rng = np.random.default_rng([zlib.crc32(category.encode()), seed])
    figure, side = Figure(rng), size * SUPERSAMPLE
    DRAWERS[category](figure)

    mirror, turn = rng.random() < 0.25, step(rng.uniform(-TURN, TURN))

    def posed(z: np.ndarray | complex) -> np.ndarray:
        z = np.asarray(z, dtype=complex)
        return turn * (-z.conj() if mirror else z)

    # the whole object lies inside the image
    points = posed(np.concatenate([outline for outline, _, _ in figure.parts]))
    xy = np.stack([points.real, points.imag])                   # (2, n)
    low, extent = xy.min(1), np.ptp(xy, 1)
    scale, margin = rng.uniform(*LONGER_SIDE) * side / extent.max(), 0.02 * side    # the margin: for outlines
    shift = complex(*(margin + rng.uniform(0, 1, 2) * (side - 2 * margin - scale * extent) - scale * low))

    image = draw_background(rng, side)
    silhouette = paint(figure, image, lambda z: scale * posed(z) + shift)
    mask = silhouette.reduce(SUPERSAMPLE).point(lambda v: 255 if v >= 128 else 0)

    # ImageDraw's pixel i spans i to i + 1, whereas a keypoint's coordinates have the centre of pixel i at i
    def pixels(z: np.ndarray | complex) -> np.ndarray:
        return (scale * posed(z) + shift) / SUPERSAMPLE - (0.5 + 0.5j)

    kps = {name: pixels(z) for name, z in figure.kps.items()}
    return {"image": image.reduce(SUPERSAMPLE), "mask": mask,
            "kps": {name: (float(z.real), float(z.imag)) for name, z in kps.items()},
            "bbox": tuple(float(v) for v in mask.getbbox()),
            "parts": [pixels(outline) for outline, _, _ in figure.parts]}


def corresponding_points(src: dict, trg: dict, points: np.ndarray) -> np.ndarray:
    """Where any points (n, 2) of one drawn object truly lie on another of its category, (n, 2), both in
    pixels.

    A point belongs to the front-most part that covers it and keeps its mean-value coordinates (Floater 2003)
    within that part's polygon, even if something hides it in the target. A point that no part covers, such as
    one on an outline, moves with the nearest place on any part's boundary.
    """
    z = np.asarray(points, dtype=float) @ (1, 1j)               # (n,)
    found, nearest, row = z.copy(), np.full(len(z), np.inf), np.arange(len(z))
    for ours, theirs in zip(reversed(src["parts"]), reversed(trg["parts"])):
        spokes, edges = ours - z[:, None], np.roll(ours, -1) - ours
        along = np.clip(-(spokes * edges.conj()).real / np.maximum(abs(edges) ** 2, 1e-12), 0, 1)
        distance = abs(spokes + along * edges)                  # (n, sides)
        side = distance.argmin(1)
        boundary = theirs[side] + along[row, side] * (np.roll(theirs, -1) - theirs)[side]
        found = np.where(distance[row, side] < nearest, boundary, found)
        nearest = np.minimum(nearest, distance[row, side])
        angles = np.angle(np.roll(spokes, -1, 1) * spokes.conj())       # that each side spans from the point
        covered = (abs(angles.sum(1)) > np.pi) & (nearest > 1e-6)       # the part winds around the point
        half = np.tan(angles / 2)
        weights = (half + np.roll(half, 1, 1)) / np.maximum(abs(spokes), 1e-12)
        found[covered] = (weights[covered] @ theirs) / weights[covered].sum(1)
        nearest[nearest <= 1e-6] = 0
        nearest[covered] = 0                                    # parts behind have no say
    return np.stack([found.real, found.imag], 1)


SHAPE_SPLITS = {"train": (0, 60), "val": (100_000, 8), "test": (200_000, 20)}   # first seed, images a class


class Shapes(ImageSet):
    """The built-in set of one split, drawn on first use and kept. Saliency maps are the objects'
    silhouettes."""

    def __init__(self, split: str, saliency: bool = True) -> None:
        if split not in SHAPE_SPLITS:
            raise ValueError(f"unknown split {split!r} of shapes; known: {', '.join(SHAPE_SPLITS)}")
        first, count = SHAPE_SPLITS[split]
        self.seeds = [first + k for _ in SHAPE_CLASSES for k in range(count)]
        labels = [label for label in range(len(SHAPE_CLASSES)) for _ in range(count)]
        paths = [Path(f"shapes/{SHAPE_CLASSES[label]}/{seed}") for label, seed in zip(labels, self.seeds)]
        super().__init__(paths, labels, list(SHAPE_CLASSES))
        self.use_saliency, self.drawn = saliency, {}

    def draw(self, index: int) -> dict:
        """draw_shape's record of one image."""
        if index not in self.drawn:
            self.drawn[index] = draw_shape(self.classes[self.labels[index]], self.seeds[index])
        return self.drawn[index]

    def load(self, index: int) -> tuple[Image.Image, Image.Image | None]:
        record = self.draw(index)
        mask = Image.fromarray(np.asarray(record["mask"], np.float32) / 255) if self.use_saliency else None
        return record["image"], mask

    def size(self, index: int) -> tuple[int, int]:
        return self.draw(index)["image"].size

    def as_stored(self, index: int) -> bool:
        return False


def shapes_pairs(split: str) -> KeypointSet:
    """Annotated pairs of one split: every image is once the source, its target a random one of its class."""
    images = Shapes(split)
    rng, pairs = np.random.default_rng(SHAPE_SPLITS[split][0]), []
    for src in range(len(images)):
        same = [i for i, label in enumerate(images.labels) if label == images.labels[src] and i != src]
        trg = int(rng.choice(same))
        a, b = images.draw(src), images.draw(trg)
        kps = [torch.tensor([record["kps"][name] for name in a["kps"]]) for record in (a, b)]
        pairs.append(KeypointPair(src, trg, *kps, images.classes[images.labels[src]], a["bbox"], b["bbox"]))
    return KeypointSet(f"shapes {split}", images, pairs)
