"""The embedded large network, the first part: a DiT of width 192, depth 7 (4.8M parameters).

The second part is fashion_xl_more.py.

Command:  tstitch train configs/fashion_xl.py --out runs/fashion_xl
Data:     tensorflow-datasets' fashion_mnist; or --data FILE.npz with x_train and y_train
Cost:     294,400 images, about an hour on 2 CPU cores (85 images/s)
Expected: a loss of 0.034 at the end; clean garments, varied within a class
"""

from fashion import make

config = make(
    "fashion-xl",
    {"width": 192, "depth": 7, "num_heads": 3},
    steps=4600,
    batch=64,
    learning_rate=7e-4,
    cooldown=1500,
    ema=0.9995,
)
