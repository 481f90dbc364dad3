"""Half of the steps to each network, in four orders.

Command:  tstitch sweep configs/sweep_allocation.py --out runs/allocation
Data:     tensorflow-datasets' fashion_mnist; or --reference fashion_mnist.npz:x_test
Cost:     60,000 images, about 4 hours on 2 CPU cores
Expected: four equal times; of DiT on ImageNet the published FIDs are, in the order of the list,
          10.06, 12.94, 19.02 and 27.61
"""

from sweep_fashion import PAIR, make

from tstitch_jax import Plan, Point

STEPS = 50

PLANS = {
    "small to large": Plan.from_counts([25, 25]),
    "decreasing probability": Plan.decreasing(STEPS, seed=1),  # of which 25 are small
    "interleaved": Plan.interleaved([1, 1], STEPS),
    "large to small": Plan.from_counts([25, 25]).reversed(),
}

config = make(
    [
        Point(
            series="fashion-s and fashion-xl, 25 steps each",
            x=name,
            networks=PAIR,
            options=dict(plan=plan, steps=STEPS),
        )
        for name, plan in PLANS.items()
    ],
    x_label="order of the networks",
)
