"""fashion-b trained on at all times, for as many images as fashion_b_late.py.

Command:  tstitch train configs/fashion_b_all.py --out runs/fashion_b_all
Data:     --data fashion_mnist.npz, which fetch_fashion_mnist.py --split embedded writes: the
          images that sweep_finetuned.py compares with must not be among them
Cost:     153,600 images, about 15 minutes on 2 CPU cores
Expected: docs/results.md
"""

from fashion import make_further

config = make_further("fashion-b-all", times=(0.0, 1.0))
