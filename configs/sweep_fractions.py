"""Quality and time against the share of the steps that the small network takes, 0 to 1 by 0.1.

Command:  tstitch sweep configs/sweep_fractions.py --out runs/fractions
Data:     tensorflow-datasets' fashion_mnist; or --reference fashion_mnist.npz:x_test
Cost:     165,000 images, about 10 hours on 2 CPU cores
Expected: images 1.6 times quicker at 0.4, 3 times at 0.7, 15 to 19 times at 1
"""

from sweep_fashion import PAIR, make

from tstitch_jax import Point

config = make(
    [
        Point(
            series=" + ".join(PAIR),
            x=tenths / 10,
            networks=PAIR,
            options=dict(fractions=[tenths / 10, 1 - tenths / 10], steps=50),
        )
        for tenths in range(11)
    ],
    x_label="fraction of the steps taken by fashion-s",
)
