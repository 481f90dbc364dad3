"""The second part of fashion-b's training, from another beginning of the learning rate.

Command:  tstitch train configs/fashion_b_more.py --out runs/fashion_b_more
          after the first part, which is in runs/fashion_b
Data:     tensorflow-datasets' fashion_mnist; or --data FILE.npz with x_train and y_train
Cost:     422,400 images, about 40 minutes on 2 CPU cores
Expected: a loss of 0.14 at the end; garments that can be named
"""

from fashion import make

config = make(
    "fashion-b",
    {"width": 112, "depth": 4, "num_heads": 2},
    file="fashion_b_more",
    init="runs/fashion_b/network",
    steps=3300,
    batch=128,
    learning_rate=1.2e-3,
    warmup=100,
    cooldown=1900,
    ema=0.999,
    min_snr=None,
    seed=1,
)
