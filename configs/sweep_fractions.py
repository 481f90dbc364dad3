"""Quality and time against the share of the steps that the small network takes, 0 to 1 by 0.1.

Command:  tstitch sweep configs/sweep_fractions.py --out runs/fractions
Data:     --reference fashion_mnist.npz:x_test, which fetch_fashion_mnist.py --split embedded writes
Cost:     165,000 images, about three hours on 2 CPU cores
Expected: docs/results.md: hardly a loss up to 0.3; images 1.6 times quicker at 0.4, 2.8 at 0.7
"""

from sweep_fashion import OPTIONS, PAIR, make

from tstitch_jax import Point

config = make(
    [
        Point(
            series=" + ".join(PAIR),
            x=tenths / 10,
            networks=PAIR,
            options=OPTIONS | dict(fractions=[tenths / 10, 1 - tenths / 10]),
        )
        for tenths in range(11)
    ],
    x_label="fraction of the steps taken by fashion-s",
    seeds=[0, 1, 2],
)
