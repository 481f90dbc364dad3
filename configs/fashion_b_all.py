"""fashion-b trained on at all times, for as many images as fashion_b_late.py.

Command:  tstitch train configs/fashion_b_all.py --out runs/fashion_b_all
Data:     tensorflow-datasets' fashion_mnist; or --data FILE.npz with x_train and y_train
Cost:     153,600 images, about 15 minutes on 2 CPU cores
Expected: docs/results.md
"""

from fashion import make_further

config = make_further("fashion-b-all", times=(0.0, 1.0))
