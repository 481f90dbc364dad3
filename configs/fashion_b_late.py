"""fashion-b trained on for its part alone: the last 60% of the steps, after 40% by fashion-s.

With fashion_b_all.py, which spends as much on all times: does a network that is stitched gain from
training for its stage alone? sweep_finetuned.py compares the two.

Command:  tstitch train configs/fashion_b_late.py --out runs/fashion_b_late
Data:     --data fashion_mnist.npz, which fetch_fashion_mnist.py --split embedded writes: the
          images that sweep_finetuned.py compares with must not be among them
Cost:     153,600 images, about 15 minutes on 2 CPU cores
Expected: docs/results.md
"""

from fashion import make_further

config = make_further("fashion-b-late", times=(0.0, 0.6))
