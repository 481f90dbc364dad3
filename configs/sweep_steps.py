"""Fewer steps against stitching, and both: four numbers of steps, three solvers, three fractions.

Command:  tstitch sweep configs/sweep_steps.py --out runs/steps
Data:     tensorflow-datasets' fashion_mnist; or --reference fashion_mnist.npz:x_test
Cost:     540,000 images, about 16 hours on 2 CPU cores
Expected: times in proportion to the steps and to the plan's cost, whatever the solver
"""

from sweep_fashion import PAIR, make

from tstitch_jax import Point

config = make(
    [
        Point(
            series=f"{solver}, {fraction:g} by fashion-s",
            x=steps,
            networks=PAIR,
            options=dict(fractions=[fraction, 1 - fraction], steps=steps, solver=solver),
        )
        for solver in ("ddpm", "ddim", "dpmpp")
        for fraction in (0, 0.4, 0.8)
        for steps in (5, 10, 20, 50)
    ],
    x_label="steps",
)
