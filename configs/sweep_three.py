"""Three networks: the 66 ways of sharing ten steps, from the smallest to the largest.

Command:  tstitch sweep configs/sweep_three.py --out runs/three
Data:     --reference fashion_mnist.npz:x_test, which fetch_fashion_mnist.py --split embedded writes
Cost:     330,000 images, about 80 minutes on a CPU core with AMX
Expected: charts of the distance by cost and by time, the front among the latter
"""

from sweep_fashion import OPTIONS, make

from tstitch_jax import Plan, Point, load

NAMES = ["fashion-s", "fashion-b", "fashion-xl"]
STEPS = 10
MACS = [load(name).card.macs for name in NAMES]


def taking_part(counts: list[int]) -> str:
    """The networks that share the steps."""
    used = [name for name, count in zip(NAMES, counts, strict=True) if count]
    return " + ".join(used) if len(used) > 1 else f"{used[0]} alone"


config = make(
    [
        Point(
            series=taking_part(counts),
            x=round(sum(map(int.__mul__, counts, MACS)) / (STEPS * MACS[-1]), 4),
            networks=NAMES,
            options=OPTIONS | dict(plan=Plan.from_counts(counts)),
        )
        for small in range(STEPS + 1)
        for middle in range(STEPS + 1 - small)
        for counts in [[small, middle, STEPS - small - middle]]
    ],
    x_label="multiply-adds, over those of fashion-xl alone",
    dtype="bfloat16",
)
