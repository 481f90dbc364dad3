"""The second part of fashion-xl's training, in which all times weigh alike.

Min-SNR weighting, as in the first part, hardly trains the noisiest times, where the few steps of a
fast solver decide the layout.

Command:  tstitch train configs/fashion_xl_more.py --out runs/fashion_xl_more
          after the first part, which is in runs/fashion_xl
Data:     tensorflow-datasets' fashion_mnist; or --data FILE.npz with x_train and y_train
Cost:     96,000 images, about 30 minutes on 2 CPU cores (50 images/s)
Expected: a loss of 0.135 at the end; clean garments, true to their class
"""

from fashion import make

config = make(
    "fashion-xl",
    {"width": 192, "depth": 7, "num_heads": 3},
    file="fashion_xl_more",
    init="runs/fashion_xl/network",
    steps=1500,
    batch=64,
    learning_rate=6e-4,
    warmup=100,
    cooldown=900,
    ema=0.999,
    min_snr=None,
    seed=1,
)
