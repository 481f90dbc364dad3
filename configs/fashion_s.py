"""The embedded small network, the first part: a DiT of width 64 and depth 3 (256K parameters).

The second part is fashion_s_more.py.

Command:  tstitch train configs/fashion_s.py --out runs/fashion_s
Data:     tensorflow-datasets' fashion_mnist; or --data FILE.npz with x_train and y_train
Cost:     704,000 images, about 15 minutes on 2 CPU cores (900 images/s)
Expected: a loss of 0.039 at the end; garments that can be named, with grainy edges
"""

from fashion import make

config = make(
    "fashion-s",
    {"width": 64, "depth": 3, "num_heads": 1},
    steps=5500,
    batch=128,
    learning_rate=2e-3,
    cooldown=2000,
    ema=0.999,
)
