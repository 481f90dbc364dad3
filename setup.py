"""Packaging of tstitch_jax."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(
    r'__version__ = "(.+)"', (here / "tstitch_jax" / "__init__.py").read_text()
).group(1)

setup(
    name="tstitch_jax",
    version=version,
    description="Trajectory stitching for diffusion models in JAX",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # Where it is published; the notebooks, mkdocs.yml and README.md name it too (see colab/).
    url="https://github.com/YOUR_ACCOUNT/tstitch_jax",
    python_requires=">=3.11",
    packages=find_packages(include=["tstitch_jax", "tstitch_jax.*", "checkpoints_convert"]),
    package_data={"tstitch_jax": ["embedded/**/*", "py.typed", "*.pyi"]},
    install_requires=[
        "jax>=0.7.2",
        "flax>=0.11.2",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12.4",
        "numpy>=2.1",
        "jaxtyping>=0.3.0",
        "pillow>=11.0",
        "tqdm>=4.60",
        "ml_dtypes>=0.5.1",
        "safetensors>=0.5",
        "huggingface_hub>=0.30",
        "filelock>=3.12",
        "lazy_loader>=0.4",
        "flatbuffers>=24.3",  # of jax.export
        "shtab>=1.7",
        "tokenizers>=0.20.3",
        "msgspec>=0.19",
        "etils[epath]>=1.12.2",
    ],
    extras_require={
        "train": ["tensorflow-datasets>=4.9.9"],
        "plot": ["matplotlib>=3.8"],
        "docs": [
            "mkdocs-material>=9.5,<10",
            "mkdocstrings[python]>=0.29",
            "latex2mathml>=3.77",
            "ruff>=0.9",  # formats the reference's signatures
            "matplotlib>=3.8",
            "nbclient>=0.10",
            "ipykernel>=6.29",
        ],
        "test": [
            "tensorflow-datasets>=4.9.9",
            "matplotlib>=3.8",
            "nbclient>=0.10",
            "ipykernel>=6.29",
            "beartype>=0.20",
            "hypothesis>=6.100",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "basedpyright>=1.20",
            "ruff>=0.9",
        ],
    },
    entry_points={"console_scripts": ["tstitch=tstitch_jax.cli:main"]},
)
