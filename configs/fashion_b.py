"""The first part of fashion-b (fashion_b_more.py): a DiT of width 112, depth 4 (1M parameters).

Command:  tstitch train configs/fashion_b.py --out runs/fashion_b
Data:     tensorflow-datasets' fashion_mnist; or --data FILE.npz with x_train and y_train
Cost:     416,000 images, about 35 minutes on 2 CPU cores
Expected: a loss of 0.15 at the end; garments that can be named
"""

from fashion import make

config = make(
    "fashion-b",
    {"width": 112, "depth": 4, "num_heads": 2},
    steps=3250,
    batch=128,
    learning_rate=1.2e-3,
    warmup=300,
    cooldown=1500,
    ema=0.999,
    min_snr=None,
)
