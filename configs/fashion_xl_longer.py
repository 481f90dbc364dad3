"""The embedded large network: fashion_xl.py's, trained for longer from where that ended.

Command:  tstitch train configs/fashion_xl_longer.py --out runs/fashion-xl-longer
Data:     tensorflow-datasets' fashion_mnist; or --data FILE.npz with x_train and y_train
Cost:     384,000 images on top of its 294,400, about 75 minutes on 2 CPU cores (85 images/s)
Expected: a loss of 0.032 at the end
"""

from fashion import make

config = make(
    "fashion-xl",
    {"width": 192, "depth": 7, "num_heads": 3},
    steps=6000,
    batch=64,
    learning_rate=6e-4,
    cooldown=2500,
    ema=0.9995,
    seed=1,
    init="runs/fashion-xl/network",
)
