"""Fewer steps against stitching, and both: numbers of steps, three solvers, three fractions.

Command:  tstitch sweep configs/sweep_steps.py --out runs/steps
Data:     --reference fashion_mnist.npz:x_test, which fetch_fashion_mnist.py --split embedded writes
Cost:     270,000 images, about 9 hours on a CPU core with AMX, 15 without; 57% at 250 steps
Expected: times in proportion to the steps and to the plan's cost, whatever the solver
"""

from sweep_fashion import OPTIONS, PAIR, make

from tstitch_jax import Point

config = make(
    [
        Point(
            series=f"{solver}, {fraction:g} by fashion-s",
            x=steps,
            networks=PAIR,
            options=OPTIONS | dict(fractions=[fraction, 1 - fraction], steps=steps, solver=solver),
        )
        for steps in (5, 10, 20, 50, 100, 250)
        for solver in ("dpmpp", "ddim", "ddpm")
        for fraction in (0.0, 0.4, 0.8)
    ],
    x_label="steps",
    dtype="bfloat16",
)
