"""Fashion-MNIST as one file, for those without tensorflow-datasets.

Command:  python configs/fetch_fashion_mnist.py
Result:   fashion_mnist.npz with x_train, y_train, x_test, y_test, from where the authors publish it
          (31 MB), compared with the MD5 sums that they give
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import sys
import urllib.request
from pathlib import Path

import numpy as np

SOURCE = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"

FILES = {
    "x_train": ("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
    "y_train": ("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
    "x_test": ("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
    "y_test": ("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
}


def fetch(source: str, out: Path) -> None:
    """Writes the file; raises OSError if there is no connection, ValueError for other bytes."""
    arrays = {}
    for key, (name, md5) in FILES.items():
        with urllib.request.urlopen(f"{source}/{name}", timeout=60) as response:
            content = response.read()
        found = hashlib.md5(content).hexdigest()
        if found != md5:
            raise ValueError(f"{name} has the MD5 sum {found}, expected {md5}; fetch it again")
        # After 4 bytes of which the last is the number of sides, each side has 4.
        raw = gzip.decompress(content)
        sides = np.frombuffer(raw, ">i4", raw[3], 4)
        arrays[key] = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sides)
    np.savez_compressed(out, **arrays)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", default=SOURCE, help="address of the folder of the four files")
    parser.add_argument("--out", type=Path, default=Path("fashion_mnist.npz"))
    arguments = parser.parse_args()
    try:
        fetch(arguments.source, arguments.out)
    except (OSError, ValueError) as error:
        sys.exit(f"cannot fetch Fashion-MNIST: {error}")
    print(arguments.out)
