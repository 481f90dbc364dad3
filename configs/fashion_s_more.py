"""The second part of fashion-s's training, in which all times weigh alike.

Min-SNR weighting, as in the first part, hardly trains the noisiest times, where the few steps of a
fast solver decide the layout.

Command:  tstitch train configs/fashion_s_more.py --out runs/fashion_s_more
          after the first part, which is in runs/fashion_s
Data:     tensorflow-datasets' fashion_mnist; or --data FILE.npz with x_train and y_train
Cost:     256,000 images, about 5 minutes on 2 CPU cores
Expected: a loss of 0.15 at the end; garments that can be named, with grainy edges
"""

from fashion import make

config = make(
    "fashion-s",
    {"width": 64, "depth": 3, "num_heads": 1},
    file="fashion_s_more",
    init="runs/fashion_s/network",
    steps=2000,
    batch=128,
    learning_rate=1.2e-3,
    warmup=100,
    cooldown=1200,
    ema=0.998,
    min_snr=None,
    seed=1,
)
