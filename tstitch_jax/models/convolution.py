"""Convolutions in the form that is fastest on a platform."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from tstitch_jax.core.types import Params

CHANNELS = 256
"""Of fewer channels, in or out, the direct form is taken, on CPUs as the quickest."""

ROWS = 256
"""For so few pixels in all, a CPU's time goes to reading the kernel."""

VALUES = 2**24
"""Of more values, in or out, Winograd's form takes too much memory: some 300 MB at this many."""

PRECOMPUTED = range(12**2, 32**2 + 1)
"""For so many pixels an image, Winograd's form takes a CPU half to three quarters of the time where
its kernels are at hand. Of fewer, reading them costs as much as it saves; of more, they cost little
to compute."""

FORMS = "forms"
"""The collection of variables, beside the parameters, that holds such kernels."""

IMAGES = range(2, 8)
"""Of so few rows the direct form takes a TPU twice the time, by its compiler's estimates. In a
decoder, which has one, nine products gain nothing over all."""


def convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "i j c d"],
    stride: int = 1,
    padding: Any = "SAME",
) -> Float[Array, "b k l d"]:
    """``lax.conv_general_dilated``, or the same sums in an order that is faster on a platform.

    Convolutions of 3 x 3 with many channels become products. On CPUs, in float32: one of the
    pixels' surroundings if there are few pixels, else those of Winograd's minimal filtering
    (``winograd``). On TPUs, with few images: one for each place of the kernel (``shifted``).
    Without padding, CPUs multiply once for each row of the kernel (``rows_of_products``).
    """
    if (*kernel.shape[:2], stride) == (1, 1, 1):
        return x @ kernel[0, 0]
    direct = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    forms: dict[str, Any] = {}
    batch, height, width, _ = x.shape
    if padding == "VALID":
        forms["cpu"] = functools.partial(rows_of_products, stride=stride)
    elif _is_wide(kernel.shape, stride, padding):
        if x.dtype == jnp.float32:
            if batch * height * width <= ROWS:
                forms["cpu"] = surroundings
            elif _fits_winograd(x.shape, kernel.shape):
                forms["cpu"] = lambda x, kernel: winograd(x, winograd_kernels(kernel))
        if batch in IMAGES:
            forms["tpu"] = shifted
    if not forms:
        return direct(x, kernel)
    return jax.lax.platform_dependent(x, kernel, **forms, default=direct)


def _is_wide(kernel: tuple[int, ...], stride: int, padding: Any) -> bool:
    rows, columns, *channels = kernel
    plain = (rows, columns, stride, padding) == (3, 3, 1, "SAME")
    return plain and min(channels) >= CHANNELS


def _fits_winograd(shape: tuple[int, ...], kernel: tuple[int, ...]) -> bool:
    batch, height, width, _ = shape
    small = batch * height * width * max(kernel[2:]) <= VALUES
    return small and not (height % 2 or width % 2)


class Conv(nn.Module):
    """Flax's convolution of NHWC images, with the same parameters, by ``convolve``.

    Applied with a mutable collection ``FORMS``, it puts there what a loop on a CPU should not
    compute in every step; applied with that collection, it uses it.
    """

    features: int
    kernel_size: tuple[int, int]
    stride: int = 1
    padding: Any = "SAME"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b k l d"]:
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        if (
            x.dtype == jnp.float32
            and _is_wide(shape, self.stride, self.padding)
            and x.shape[1] * x.shape[2] in PRECOMPUTED
            and _fits_winograd(x.shape, shape)
        ):
            if self.is_mutable_collection(FORMS) and not self.is_initializing():
                self.put_variable(FORMS, "kernel", winograd_kernels(kernel))
            if self.has_variable(FORMS, "kernel"):
                return winograd(x, self.get_variable(FORMS, "kernel")) + bias
        return convolve(x, kernel, self.stride, self.padding) + bias


def forms_of(params: Params, wanted: Any) -> Any:
    """``FORMS`` of a network, of whose shapes ``wanted`` is, from its parameters."""
    if "kernel" in wanted:
        return {"kernel": winograd_kernels(jnp.asarray(params["kernel"], jnp.float32))}
    return {name: forms_of(params[name], inner) for name, inner in wanted.items()}


def _bordered(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def rows_of_products(
    x: Float[Array, "b h w c"], kernel: Float[Array, "i j c d"], stride: int
) -> Float[Array, "b k l d"]:
    """The convolution without padding, as one product for each row of the kernel."""
    rows, columns = kernel.shape[:2]
    height, width = (x.shape[1] - rows) // stride + 1, (x.shape[2] - columns) // stride + 1
    last = (width - 1) * stride + 1
    beside = jnp.concatenate([x[:, :, j : j + last : stride] for j in range(columns)], axis=-1)
    last = (height - 1) * stride + 1
    flat = kernel.reshape(rows, -1, kernel.shape[3])
    terms = [beside[:, i : i + last : stride] @ flat[i] for i in range(rows)]
    return sum(terms[1:], terms[0])


def surroundings(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"]
) -> Float[Array, "b h w d"]:
    """The convolution as one product, of each pixel's 3 x 3 surroundings with the kernel."""
    _, height, width, channels = x.shape
    bordered = _bordered(x)
    around = [bordered[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(around, axis=-1) @ kernel.reshape(9 * channels, -1)


def shifted(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"]) -> Float[Array, "b h w d"]:
    """The convolution as nine products, of the image shifted by each place, summed in float32.

    The places are numbers that the compiler is not to know, which makes the nine products alike to
    it; it then looks for the best form of one instead of nine.
    """
    bordered = _bordered(x)
    places = jax.lax.optimization_barrier(jnp.arange(3))

    def product(i: int, j: int) -> jax.Array:
        shift = jax.lax.dynamic_slice(bordered, (0, places[i], places[j], 0), x.shape)
        at = jax.lax.dynamic_slice(kernel, (places[i], places[j], 0, 0), (1, 1, *kernel.shape[2:]))
        return jnp.matmul(shift, at[0, 0], preferred_element_type=jnp.float32)

    products = [product(i, j) for i in range(3) for j in range(3)]
    return functools.reduce(jnp.add, products).astype(x.dtype)


def winograd_kernels(kernel: Float[Array, "3 3 c d"]) -> tuple[Float[Array, "c d"], ...]:
    """``G g G^T`` of ``winograd``: sixteen matrices, by row and column."""

    def of_kernel(g: Any) -> list[jax.Array]:
        """``G g``."""
        return [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]]

    return tuple(u for row in of_kernel(kernel) for u in of_kernel(row))


def winograd(
    x: Float[Array, "b h w c"], kernels: tuple[Float[Array, "c d"], ...]
) -> Float[Array, "b h w d"]:
    """The convolution by F(2 x 2, 3 x 3) (Lavin & Gray 2016, arXiv:1509.09308, section 4.1).

    Each 2 x 2 pixels take 16 multiplications a channel instead of 36. In float32 it differs from
    the direct form by some 2e-6 of the largest value. H and W must be even; the kernels are those
    that ``winograd_kernels`` makes.
    """
    batch, height, width, channels = x.shape

    def of_tiles(values: jax.Array, axis: int) -> list[jax.Array]:
        """``B^T d``: tiles of four values that begin at every second one."""
        last = values.shape[axis] - 3
        d = [jax.lax.slice_in_dim(values, i, i + last, 2, axis) for i in range(4)]
        return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]

    def of_products(m: list[Any]) -> list[Any]:
        """``A^T m``."""
        return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]

    tiles = [v for row in of_tiles(_bordered(x), 1) for v in of_tiles(row, 2)]
    # Sixteen products apart are quicker than a batched one.
    products = [v.reshape(-1, channels) @ u for v, u in zip(tiles, kernels, strict=True)]
    by_column = [of_products(products[j::4]) for j in range(4)]
    pixels = [of_products([column[i] for column in by_column]) for i in range(2)]
    shape = batch, height // 2, width // 2, -1
    rows = [jnp.stack([v.reshape(shape) for v in row], axis=3) for row in pixels]
    return jnp.stack(rows, axis=2).reshape(batch, height, width, -1)
