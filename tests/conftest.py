"""Eight CPU devices, strict dtypes, and jaxtyping checked at run time, before anything else.

Programs are compiled without LLVM's optimisations: most run once, and compiling them is most of the
tests' work. What XLA itself does to a program stays.
"""

import gc
import os
import tempfile

UNOPTIMISED = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{UNOPTIMISED} --xla_force_host_platform_device_count=8"
os.environ.setdefault("MPLBACKEND", "Agg")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # What takes long to compile is kept for this run's workers, and for processes they start.
    PROGRAMS = tempfile.TemporaryDirectory(prefix="programs")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
# libtpu compiles here, and need look for no TPU; more than one process may.
os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

from beartype import beartype
from jaxtyping import install_import_hook


def check_types(thing):
    """Beartype, but for functions within a module's ``__call__``, made anew at each layer."""
    return thing if "__call__.<locals>" in thing.__qualname__ else beartype(thing)


install_import_hook("tstitch_jax", "conftest.check_types")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")

from hypothesis import settings


@pytest.fixture
def standard_promotion():
    """For code of others, such as Optax, that counts on JAX's usual promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# The first example of a property compiles; on a busy machine that takes long.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

# Tracing makes many objects, few of them garbage; to look through all again and again, those of the
# imports too, took a seventh of the tests' time.
gc.freeze()
gc.set_threshold(50_000, 20, 20)
