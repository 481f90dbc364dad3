"""The embedded middle network: a DiT of width 112 and depth 4 (1M parameters) on Fashion-MNIST.

Command:  tstitch train configs/fashion_b.py --out runs/fashion-b
Data:     tensorflow-datasets' fashion_mnist; or --data FILE.npz with x_train and y_train
Cost:     896,000 images, about 45 minutes on 2 CPU cores (345 images/s)
Expected: a loss of 0.036 at the end
"""

from fashion import make

config = make(
    "fashion-b",
    {"width": 112, "depth": 4, "num_heads": 2},
    steps=7000,
    batch=128,
    learning_rate=1.2e-3,
    cooldown=2500,
    ema=0.999,
)
