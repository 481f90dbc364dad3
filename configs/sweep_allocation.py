"""Half of the steps to each network, in four orders.

Command:  tstitch sweep configs/sweep_allocation.py --out runs/allocation
Data:     --reference fashion_mnist.npz:x_test, which fetch_fashion_mnist.py --split embedded writes
Cost:     60,000 images, about 70 minutes on 2 CPU cores
Expected: four times that differ little; of DiT on ImageNet the published FIDs are, in the order of
          the list, 10.06, 12.94, 19.02 and 27.61
"""

from sweep_fashion import OPTIONS, PAIR, make

from tstitch_jax import Plan, Point

PLANS = {
    "small to large": Plan.from_counts([5, 5]),
    "decreasing probability": Plan.decreasing(10, seed=2),  # of which 5 are small
    "interleaved": Plan.interleaved([1, 1], 10),
    "large to small": Plan.from_counts([5, 5]).reversed(),
}

config = make(
    [
        Point(
            series="fashion-s and fashion-xl, 5 steps each",
            x=name,
            networks=PAIR,
            options=OPTIONS | dict(plan=plan),
        )
        for name, plan in PLANS.items()
    ],
    x_label="order of the networks",
    seeds=[0, 1, 2],
)
