"""fashion-b trained on for its part alone: the last 60% of the steps, after 40% by fashion-s.

With fashion_b_all.py, which spends as much on all times: does a network that is stitched gain from
training for its stage alone? sweep_finetuned.py compares the two.

Command:  tstitch train configs/fashion_b_late.py --out runs/fashion_b_late
Data:     tensorflow-datasets' fashion_mnist; or --data FILE.npz with x_train and y_train
Cost:     153,600 images, about 15 minutes on 2 CPU cores
Expected: docs/results.md
"""

from fashion import make_further

config = make_further("fashion-b-late", times=(0.0, 0.6))
