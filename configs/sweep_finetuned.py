"""Stage finetuning: the large network trained on only where it is used, against all times.

Command:  tstitch sweep configs/sweep_finetuned.py --out runs/finetuned
          after fashion_b_late.py and fashion_b_all.py
Data:     --reference fashion_mnist.npz:x_test, which fetch_fashion_mnist.py --split embedded writes
Cost:     135,000 images, about 35 minutes on 2 CPU cores
Expected: docs/results.md
"""

from sweep_fashion import OPTIONS, make

from tstitch_jax import Point

LARGE = {
    "as embedded": "fashion-b",
    "trained on at all times": "runs/fashion_b_all/network",
    "trained on at its own times": "runs/fashion_b_late/network",
}

config = make(
    [
        Point(
            series=name,
            x=tenths / 10,
            networks=["fashion-s", large],
            options=OPTIONS | dict(fractions=[tenths / 10, 1 - tenths / 10]),
        )
        for name, large in LARGE.items()
        for tenths in (4, 5, 6)
    ],
    x_label="fraction of the steps taken by fashion-s",
    seeds=[0, 1, 2],
)
