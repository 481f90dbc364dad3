"""Whether the best fraction moves with guidance: scales, an interval, autoguidance.

Command:  tstitch sweep configs/sweep_guidance.py --out runs/guidance
Data:     --reference fashion_mnist.npz:x_test, which fetch_fashion_mnist.py --split embedded writes
Cost:     225,000 images, about 80 minutes on a CPU core with AMX
Expected: outside of the interval, and under autoguidance alone, steps at about half the price
"""

from sweep_fashion import OPTIONS, PAIR, make

from tstitch_jax import Point

GUIDANCE = {
    "scale 1.5": dict(cfg_scale=1.5),
    "scale 2": dict(cfg_scale=2.0),
    "scale 3": dict(cfg_scale=3.0),
    "scale 2, noise levels 0.3 to 3": dict(cfg_scale=2.0, cfg_interval=[0.3, 3.0]),
    "autoguidance by fashion-s": dict(cfg_scale=None, auto_scale=1.5),
}

config = make(
    [
        Point(
            series=name,
            x=tenths / 10,
            networks=PAIR,
            options=OPTIONS | dict(fractions=[tenths / 10, 1 - tenths / 10]) | guidance,
        )
        for name, guidance in GUIDANCE.items()
        for tenths in (0, 1, 2, 3, 4, 5, 6, 8, 10)
    ],
    x_label="fraction of the steps taken by fashion-s",
    dtype="bfloat16",
)
