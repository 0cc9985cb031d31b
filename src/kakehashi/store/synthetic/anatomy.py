"""A torso and a head of made-up people, as lists of organs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kakehashi.store.synthetic.shapes import Anatomy, Blob, Organ, Outline, Ribs

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

# Half width and half depth of the muscular trunk, and the thickness of its wall, by height.
# Height 0 is the dome of the liver; arms are raised.
_Z = (-480.0, -400.0, -330.0, -230.0, -150.0, -50.0, 80.0, 180.0, 215.0, 245.0, 280.0, 350.0)
_WIDTH = (168.0, 172.0, 168.0, 146.0, 146.0, 153.0, 160.0, 156.0, 128.0, 82.0, 60.0, 58.0)
_DEPTH = (95.0, 102.0, 100.0, 94.0, 98.0, 106.0, 112.0, 106.0, 88.0, 68.0, 58.0, 58.0)
_WALL = (66.0, 64.0, 44.0, 15.0, 14.0, 13.0, 13.0, 14.0, 26.0, 40.0, 45.0, 45.0)


def _layer(less: float) -> tuple[float, ...]:
    return (less,) * len(_Z)


def torso(rng: Random, *, sex: str, scale: tuple[float, float, float], fat: float) -> Anatomy:
    """Make a person's trunk.

    Parameters
    ----------
    rng : Random
        Where sizes and places of organs are drawn from.
    sex : str
        ``M`` or ``F``.
    scale : tuple of float
        Size over the reference's in (x, y, z).
    fat : float
        Thickness of fat under the skin, mm.
    """

    def size(spread: float = 0.06) -> float:
        return min(max(rng.gauss(1, spread), 1 - 2 * spread), 1 + 2 * spread)

    def at(x: float, y: float, z: float, play: float = 3) -> tuple[float, float, float]:
        return tuple(v + rng.uniform(-play, play) for v in (x, y, z))  # type: ignore[return-value]

    def sized(x: float, y: float, z: float) -> tuple[float, float, float]:
        factor = size()
        return x * factor, y * factor, z * factor

    organs = [
        Organ("body", (Outline(_Z, _WIDTH, _DEPTH, _layer(-fat)),), "fat"),
        Organ("muscle", (Outline(_Z, _WIDTH, _DEPTH, _layer(0)),), "muscle"),
        Organ("cavity", (Outline(_Z, _WIDTH, _DEPTH, _WALL),), "visceral"),
        *_lungs(),
        # Fat around the great vessels, where the lung does not reach.
        Organ(
            "retroperitoneum",
            (Blob((0, 44, -100), (46, 30, math.inf), bottom=-240, top=24),),
            "visceral",
            within="cavity",
        ),
        *_bones(),
        _heart(at, sized),
        *_vessels(size),
        *_organs(sex, size, at, sized),
    ]
    return Anatomy(tuple(organs), scale, ((-130.0, 130.0), (-440.0, 225.0)))


def _lungs() -> list[Organ]:
    # What is drawn later covers them: heart, liver, spine.
    return [
        Organ(
            f"lung_{name}",
            (
                Blob(
                    (side * 84, 2, 62),
                    (74, 92, 128),
                    (2.4, 2.4, 2.2),
                    lean=(side * 0.05, 0.0, 0.0),
                    bend=(0.0, 0.0, 0.0022),
                ),
            ),
            "lung",
            counted=True,
            within="cavity",
            gap=2.5,
        )
        for name, side in (("right", -1), ("left", 1))
    ]


def _bones() -> list[Organ]:
    outer = Outline(_Z, _WIDTH, _DEPTH, _layer(3))
    inner = Outline(_Z, _WIDTH, _DEPTH, _layer(11))
    column = (math.inf,)
    upright = (2.4, 2.4, 2.0)
    sway = (0.0, 0.0, 0.0002)

    def both(x: float, *rest: float, lean: float = 0.0, bottom: float, top: float) -> list[Blob]:
        y, rx, ry = rest
        return [
            Blob(
                (side * x, y, bottom),
                (rx, ry, *column),
                lean=(0.0, side * lean, 0.0),
                bottom=bottom,
                top=top,
            )
            for side in (-1, 1)
        ]

    def pair(
        x: float, y: float, z: float, radii: tuple[float, float, float], lean: float
    ) -> tuple[Blob, Blob]:
        return (
            Blob((-x, y, z), radii, lean=(-0.25, -lean, 0.0)),
            Blob((x, y, z), radii, lean=(0.25, lean, 0.0)),
        )

    wings = pair(92, 22, -305, (9, 52, 55), 0.45)
    heads = pair(86, -4, -396, (23, 23, 23), 0.0)
    shafts = both(104, 2, 15, 15, bottom=-480, top=-405)
    erectors = both(34, 74, 28, 20, bottom=-320, top=240)
    spine = Blob((0, 58, -60), (21, 17, math.inf), upright, bend=sway, bottom=-300)
    return [
        *(
            Organ(f"erector_{side}", (blob,), "muscle")
            for side, blob in zip("rl", erectors, strict=True)
        ),
        Organ("ribs_r", (Ribs(outer, inner, side=-1, bottom=-85, top=205),), "rib"),
        Organ("ribs_l", (Ribs(outer, inner, side=1, bottom=-85, top=205),), "rib"),
        Organ(
            "sternum",
            (Blob((0, -100, 100), (19, 6, 72), (3.0, 2.0, 4.0), lean=(0.0, 0.0, 0.04)),),
            "bone",
            core=(4.0, "marrow"),
        ),
        Organ("arch", (Blob((0, 84, -60), (19, 14, math.inf), bend=sway, bottom=-300),), "arch"),
        Organ("canal", (Blob((0, 84, -60), (9.5, 8, math.inf), bend=sway, bottom=-300),), "csf"),
        Organ("cord", (Blob((0, 84, -60), (5.5, 4.5, math.inf), bend=sway, bottom=-60),), "cord"),
        Organ("spine", (spine,), "vertebra", core=(3.0, "vertebra_core")),
        Organ(
            "sacrum",
            (Blob((0, 62, -325), (48, 20, 46), lean=(0.0, 0.0, -0.25)),),
            "bone",
            core=(4.0, "marrow"),
        ),
        *(
            Organ(f"{name}_{side}", (blob,), "bone", core=(4.0, "marrow"))
            for name, blobs in (("ilium", wings), ("femur_head", heads), ("femur", shafts))
            for side, blob in zip("rl", blobs, strict=True)
        ),
    ]


def _heart(
    at: Callable[..., tuple[float, float, float]],
    sized: Callable[[float, float, float], tuple[float, float, float]],
) -> Organ:
    shape = Blob(at(20, -30, 44), sized(56, 48, 52), (2.2, 2.0, 2.0), lean=(0.2, -0.25, 0.0))
    return Organ(
        "heart",
        (shape,),
        "myocardium",
        counted=True,
        yields_to=("spine",),
        within="cavity",
        core=(14.0, "blood"),
    )


def _vessels(size: Callable[[], float]) -> list[Organ]:
    wide = 11.5 * size()
    descending = Blob(
        (16, 34, -60),
        (wide, wide, math.inf),
        lean=(0.0, 0.03, 0.02),
        bend=(0.0, 0.0, 0.0002),
        bottom=-236,
        top=146,
    )
    ascending = Blob((-10, -22, 100), (16, 16, math.inf), bottom=74, top=142)
    over = Blob((6, 12, 142), (15, 46, 15), lean=(0.28, 0.0, 0.0))
    return [
        Organ("aorta", (descending, ascending, over), "aorta", counted=True),
        Organ(
            "vena_cava",
            (Blob((-20, 30, -100), (11, 9, math.inf), bottom=-236, top=18),),
            "vein",
            counted=True,
            yields_to=("spine", "aorta"),
        ),
        Organ("trachea", (Blob((-4, 22, 190), (9, 9, math.inf), bottom=160, top=300),), "air"),
        *(
            Organ(
                f"bronchus_{name}",
                (Blob((side * 19 - 3, 20, 148), (7, 7, 24), lean=(0.0, -side * 0.9, 0.0)),),
                "air",
                yields_to=("aorta",),
            )
            for name, side in (("right", -1), ("left", 1))
        ),
    ]


def _organs(
    sex: str,
    size: Callable[[], float],
    at: Callable[..., tuple[float, float, float]],
    sized: Callable[[float, float, float], tuple[float, float, float]],
) -> list[Organ]:
    back = ("spine", "aorta", "vena_cava")
    left_bladder = size()
    return [
        Organ(
            "gallbladder",
            (Blob(at(-48, -52, -96), sized(14, 22, 22), lean=(0.1, 0.2, 0.2)),),
            "bile",
            counted=True,
        ),
        Organ(
            "stomach",
            (Blob(at(58, -24, -66), sized(34, 44, 48), lean=(0.2, 0.35, 0.1)),),
            "stomach",
            counted=True,
            yields_to=("heart",),
            within="cavity",
            gap=4.0,
        ),
        Organ(
            "spleen",
            (Blob(at(100, 44, -52), sized(25, 45, 52), (2.2, 2.0, 2.0), bend=(0.004, 0.0, 0.0)),),
            "spleen",
            counted=True,
            yields_to=("stomach",),
            within="cavity",
            gap=3.0,
        ),
        Organ(
            "liver",
            (
                Blob(at(-76, 4, -72), sized(64, 82, 70), (2.3, 2.2, 2.2), ripple=(0.04, 70.0)),
                Blob(at(-18, -42, -44), sized(66, 36, 36), lean=(0.1, 0.5, 0.0)),
            ),
            "liver",
            counted=True,
            yields_to=("heart", "gallbladder", "stomach", "spleen", *back),
            within="cavity",
            gap=3.0,
        ),
        *_kidneys(at, sized, back),
        Organ(
            "pancreas",
            (Blob(at(6, 0, -112), sized(62, 11, 14), lean=(0.0, 1.4, 0.0), ripple=(0.1, 17.0)),),
            "pancreas",
            counted=True,
            yields_to=("liver", "stomach", "spleen", "kidney_left", "gallbladder", *back),
            within="cavity",
        ),
        Organ(
            "bladder",
            (Blob(at(0, -34, -376), (46 * left_bladder, 36 * left_bladder, 32), (2.0, 2.2, 2.4)),),
            "urine",
            counted=True,
        ),
        Organ("rectum", (Blob(at(0, 34, -372), (17, 15, 46)),), "stool", yields_to=("bladder",)),
        Organ(
            "prostate" if sex == "M" else "uterus",
            (
                Blob(at(0, -8, -420), sized(23, 18, 17))
                if sex == "M"
                else Blob(at(4, 2, -350), sized(24, 24, 36), lean=(0.0, 0.0, -0.4)),
            ),
            "muscle",
            yields_to=("bladder", "rectum"),
        ),
    ]


def _kidneys(
    at: Callable[..., tuple[float, float, float]],
    sized: Callable[[float, float, float], tuple[float, float, float]],
    back: tuple[str, ...],
) -> list[Organ]:
    psoas = [
        Blob((side * 36, 50, -240), (17, 19, 105), (2.0, 2.0, 4.0), lean=(0.0, -side * 0.16, 0.0))
        for side in (-1, 1)
    ]
    found = [
        Organ(f"psoas_{side}", (blob,), "muscle", counted=True, yields_to=back)
        for side, blob in zip(("right", "left"), psoas, strict=True)
    ]
    for side, sign, height in (("right", -1, -160.0), ("left", 1, -136.0)):
        found.append(
            Organ(
                f"kidney_{side}",
                (
                    Blob(
                        at(sign * 66, 50, height),
                        sized(27, 25, 53),
                        (2.0, 2.2, 2.2),
                        lean=(sign * 0.3, -sign * 0.12, 0.0),
                        bend=(0.0, -sign * 0.006, 0.0),
                    ),
                ),
                "cortex",
                counted=True,
                yields_to=("liver", "spleen", f"psoas_{side}", *back),
                within="cavity",
                core=(8.0, "medulla"),
            )
        )
    return found


def head(rng: Random, *, scale: tuple[float, float, float], atrophy: float) -> Anatomy:
    """Make a person's head; height 0 is the middle of the brain.

    Parameters
    ----------
    rng : Random
    scale : tuple of float
    atrophy : float
        0 (young) to 1 (very old): wider ventricles, smaller brain.
    """

    def play(amount: float) -> float:
        return 1 + rng.uniform(-amount, amount)

    less = 1 - 0.035 * atrophy
    brain = Blob(
        (0, -1, 4),
        (66 * less, 82 * less, 65 * less),
        (2.2, 2.2, 2.2),
        ripple=(0.02 + 0.02 * atrophy, 17.0),
    )
    wide = (0.75 + 0.9 * atrophy) * play(0.1)
    sides = (("right", -1), ("left", 1))
    round_ = (2.2, 2.2, 2.2)
    organs = [
        Organ("neck", (Blob((0, 20, -60), (58, 62, math.inf), top=-40),), "muscle"),
        Organ("face", (Blob((0, -38, -82), (60, 58, 70), (2.4, 2.4, 2.4)),), "muscle"),
        Organ("body", (Blob((0, 0, 2), (80, 98, 82), round_),), "muscle"),
        Organ("skull", (Blob((0, 0, 2), (75, 93, 77), round_),), "bone", core=(2.5, "diploe")),
        Organ("dura", (Blob((0, 0, 2), (68.5, 86, 70), round_),), "csf"),
        Organ("spine", (Blob((0, 45, -100), (20, 17, math.inf), top=-72),), "bone"),
        Organ(
            "cerebellum",
            (Blob((0, 40, -37), (47, 28, 20), (2.4, 2.2, 2.2), ripple=(0.02, 9.0)),),
            "grey",
            counted=True,
            within="dura",
            gap=1.5,
            core=(9.0, "white"),
        ),
        Organ(
            "brainstem",
            (Blob((0, 14, -55), (14, 14, 34)),),
            "white",
            counted=True,
            yields_to=("cerebellum",),
        ),
        *(
            Organ(
                f"hemisphere_{name}",
                (brain,),
                "grey",
                counted=True,
                within="dura",
                yields_to=("cerebellum", "brainstem"),
                gap=1.0 + atrophy,
                core=(4.0, "white"),
                side=side,
            )
            for name, side in sides
        ),
        *(
            Organ(
                f"ventricle_{name}",
                (
                    Blob(
                        (side * 12, -4, 14),
                        (7.5 * wide, 40, 11 * wide),
                        lean=(side * 0.12, side * 0.1, 0.0),
                        bend=(side * 0.006, 0.0, 0.0),
                    ),
                ),
                "csf",
                counted=True,
                within=f"hemisphere_{name}",
            )
            for name, side in sides
        ),
        Organ("sinus", (Blob((0, -72, -52), (22, 16, 17), ripple=(0.2, 14.0)),), "air"),
        *(
            Organ(f"eye_{name}", (Blob((side * 31, -76, -34), (12, 12, 12)),), "eye")
            for name, side in sides
        ),
    ]
    return Anatomy(tuple(organs), scale, ((-100.0, 100.0), (-95.0, 90.0)))
