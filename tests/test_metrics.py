"""Measures on features, against their definitions in NumPy float64 and against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tstitch_jax.evaluation import kernel as kernel_module, manifold
from tstitch_jax.evaluation.frechet import frechet_distance
from tstitch_jax.evaluation.inception_score import InceptionScore
from tstitch_jax.evaluation.kernel import kernel_distance
from tstitch_jax.evaluation.manifold import nearest, precision_recall
from tstitch_jax.evaluation.statistics import Moments


def rng(seed=0):
    return np.random.default_rng(seed)


def moments(features):
    found = Moments()
    found.add(features)
    return found.mean, found.covariance


def rotation(seed, size):
    return np.linalg.qr(rng(seed).standard_normal((size, size)))[0]


def cuts(most):
    """Places to cut so many rows at; some pieces are empty."""
    return st.lists(st.integers(0, most), max_size=6).map(sorted)


# Moments


@pytest.mark.parametrize(
    ("count", "dtype"), [(2, np.float32), (512, np.float64), (1300, np.float32)]
)
def test_moments_are_those_of_numpy(count, dtype):
    features = (rng().standard_normal((count, 5)) @ rng(1).standard_normal((5, 5))).astype(dtype)
    features[count // 2 :] += 3  # blocks differ in their means
    mean, covariance = moments(features)
    assert mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(
        mean, features.astype(np.float64).mean(axis=0), rtol=1e-13, atol=1e-14
    )
    expected = np.cov(features.astype(np.float64).T)
    np.testing.assert_allclose(covariance, expected, rtol=0, atol=1e-13 * np.abs(expected).max())
    np.testing.assert_array_equal(covariance, covariance.T)


def test_moments_far_from_zero():
    """Squares of these features have few digits left for their variance."""
    features = rng().standard_normal((1500, 3)) + 1e6
    expected = np.cov((features - 1e6).T)
    np.testing.assert_allclose(moments(features)[1], expected, rtol=0, atol=1e-8)


MANY = rng(2).standard_normal((1300, 3)) * [1, 10, 1e-3] + 5


@given(cuts(len(MANY)))
def test_moments_do_not_depend_on_cuts(places):
    found = Moments()
    for piece in np.split(MANY, places):
        found.add(piece)
    assert found.count == len(MANY)
    for ours, theirs in zip((found.mean, found.covariance), moments(MANY), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_moments_under_way():
    """Asking changes nothing, and there is an answer at any time."""
    found = Moments()
    with pytest.raises(ValueError, match="a mean needs at least 1 images, got 0"):
        _ = found.mean
    found.add(jnp.asarray(MANY[:1], jnp.float32))
    np.testing.assert_array_equal(found.mean, MANY[0].astype(np.float32))
    with pytest.raises(ValueError, match="a covariance needs at least 2 images, got 1"):
        _ = found.covariance
    found = Moments()
    for start in range(0, 1300, 260):
        found.add(MANY[start : start + 260])
        np.testing.assert_array_equal(found.covariance, moments(MANY[: start + 260])[1])


def test_bad_features_leave_no_trace():
    found = Moments()
    found.add(MANY[:7])
    bad = MANY[7:20].copy()
    bad[[4, 9], 1] = np.nan, np.inf
    for value, message in (
        (bad, "features of image 11 are not finite"),
        (MANY[0], r"features must be float32 or float64 \[N, D\], got float64 \(3,\)"),
        (MANY[:, :2], "features must have 3 numbers a row, as those before, got 2"),
        (np.ones((2, 3), int), r"float32 or float64 \[N, D\], got int64 \(2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            found.add(value)
    np.testing.assert_array_equal(found.covariance, moments(MANY[:7])[1])


# Frechet distance


def by_definition(mean1, covariance1, mean2, covariance2):
    """By the eigenvalues of the product of well-conditioned covariances."""
    roots = np.sqrt(np.linalg.eigvals(covariance1 @ covariance2).astype(complex)).real
    return ((mean1 - mean2) ** 2).sum() + (covariance1 + covariance2).trace() - 2 * roots.sum()


def by_features(first, second):
    """Without covariances: with F F^T one, the trace of the root is the sum of singular values."""

    def factor(features):
        return (features - features.mean(axis=0)).T / np.sqrt(len(features) - 1)

    one, other = factor(first), factor(second)
    shift = first.mean(axis=0) - second.mean(axis=0)
    roots = np.linalg.svd(one.T @ other, compute_uv=False).sum()
    return shift @ shift + (one**2).sum() + (other**2).sum() - 2 * roots


@pytest.mark.parametrize("size", [1, 2, 40, 100])
def test_frechet_distance_is_its_definition(size):
    first = moments(rng(1).standard_normal((4 * size + 4, size)) @ rotation(2, size))
    scales = np.linspace(0.5, 2, size)
    second = moments(rng(3).standard_normal((3 * size + 4, size)) * scales + 0.2)
    found = frechet_distance(*first, *second)
    assert found.distance == pytest.approx(by_definition(*first, *second), rel=1e-10)
    assert found.error < 1e-8
    swapped = frechet_distance(*second, *first)
    assert abs(found.distance - swapped.distance) <= found.error


def test_commuting_gaussians():
    turn, one, other = rotation(0, 30), np.linspace(0.1, 3, 30), np.linspace(2, 1, 30)
    mean = np.linspace(-1, 1, 30)
    found = frechet_distance(mean, turn * one**2 @ turn.T, mean + 0.5, turn * other**2 @ turn.T)
    expected = 30 * 0.25 + ((one - other) ** 2).sum()
    assert abs(found.distance - expected) <= found.error < 1e-9


@pytest.mark.parametrize("angle", [0.0, 0.3, np.pi / 4, np.pi / 2])
def test_gaussians_that_do_not_commute(angle):
    """Two variances a and b, and the same turned: tr (C1 C2)^(1/2)
    = sqrt(tr(C1 C2) + 2 sqrt(det(C1 C2))) of two dimensions."""
    a, b = 4.0, 0.25
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    first = np.diag([a, b])
    trace = np.cos(angle) ** 2 * (a**2 + b**2) + np.sin(angle) ** 2 * 2 * a * b
    expected = 2 * (a + b) - 2 * np.sqrt(trace + 2 * a * b)
    found = frechet_distance(np.zeros(2), first, np.zeros(2), turn @ first @ turn.T)
    assert found.distance == pytest.approx(expected, abs=1e-12)
    assert abs(found.distance - expected) <= found.error < 1e-12


def test_equal_arguments_are_at_distance_0():
    for count in (10, 500):
        both = moments(rng().standard_normal((count, 40)))
        assert frechet_distance(*both, *both) == (0, 0)
    for step in range(1, 40):
        found = frechet_distance(*both, both[0], both[1] * (1 + step * 1e-15))
        assert 0 <= found.distance <= found.error < 1e-10


SPECTRA = {
    "flat": np.ones(90),
    "exponential": np.exp(-np.arange(90) / 4),
    "harmonic": 1 / np.arange(1, 91),
    "two scales": np.where(np.arange(90) % 2, 1, 1e-6),
    "some zero": np.where(np.arange(90) % 3, 1, 0),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("counts", [(2, 3), (30, 400), (60, 50), (91, 91), (400, 300)])
def test_error_covers_covariances_without_full_rank(counts, spectrum):
    """And by no more than is lost to rounding anyway: a root of rounding is 1e-8 of the scale."""
    scales = SPECTRA[spectrum]
    features = [
        rng(seed).standard_normal((count, 90)) * scales @ rotation(turn, 90) + seed
        for seed, turn, count in zip(
            (1, 2), (3, 3 if spectrum == "flat" else 4), counts, strict=True
        )
    ]
    first, second = map(moments, features)
    found = frechet_distance(*first, *second)
    expected = by_features(*features)
    assert abs(found.distance - expected) <= found.error
    scale = (first[1] + second[1]).trace()
    # Roots are taken of rounding only where there are variances as small.
    close = 1e-12 if spectrum in ("flat", "harmonic") else 1e-7
    assert abs(found.distance - expected) < close * scale
    assert found.error < 2e-6 * scale
    swapped = frechet_distance(*second, *first)
    assert abs(found.distance - swapped.distance) <= found.error


def test_error_says_what_the_covariances_lost():
    """A covariance kept in float32 has directions of negative variance; the distance is off."""
    features = [rng(seed).standard_normal((20, 90)) * SPECTRA["flat"] for seed in (1, 2)]
    first, second = map(moments, features)
    kept = first[1].astype(np.float32).astype(np.float64)
    found = frechet_distance(first[0], kept, *second)
    assert 1e-7 < abs(found.distance - by_features(*features)) <= found.error < 10
    assert found.error > 100 * frechet_distance(*first, *second).error


def test_distance_of_points():
    nothing = np.zeros((3, 3))
    assert frechet_distance(np.zeros(3), nothing, np.full(3, 2.0), nothing).distance == 12
    one = frechet_distance(np.zeros(3), nothing, np.zeros(3), np.diag([1.0, 4, 0]))
    assert one.distance == pytest.approx(5, abs=one.error)
    # All images alike: what rounding leaves of their covariance is one, too.
    alike = moments(np.full((700, 3), 0.1))
    found = frechet_distance(*alike, np.zeros(3), nothing)
    assert found.distance == pytest.approx(0.03, abs=1e-12)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, np.zeros(3), r"the first mean .* \[D\] and \[D, D\], got \(3,\) and \(2, 2\)"),
        (3, np.zeros((2, 3)), r"the second mean .* got \(2,\) and \(2, 3\)"),
        (
            2,
            np.array([0, np.nan]),
            "the second mean or covariance holds numbers that are not finite",
        ),
        (1, np.array([[1, 0.5], [0, 1]]), "the first covariance is not symmetric"),
        (1, np.diag([1.0, -0.5]), "the first covariance has directions of negative variance"),
        (3, np.array([[1, 2.0], [2, 1]]), "the second covariance has directions of negative"),
    ],
)
def test_bad_gaussians(place, value, message):
    arguments = [np.zeros(2), np.eye(2), np.ones(2), np.eye(2)]
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        frechet_distance(*arguments)


def test_gaussians_of_other_features():
    with pytest.raises(ValueError, match="of as many features, got 2 and 3"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))


# Kernel distance


def kernel(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a @ b.T / a.shape[1] + 1) ** 3


def kernel_by_definition(x, y):
    """The mean over pairs of two different images, and the spread of each image's part."""

    def others(values):
        return (values.sum(axis=1) - values.diagonal()) / (len(values) - 1)

    xx, yy, xy = others(kernel(x, x)), others(kernel(y, y)), kernel(x, y)
    parts = 2 * (xx - xy.mean(axis=1)), 2 * (yy - xy.mean(axis=0))
    error = np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts))
    return xx.mean() + yy.mean() - 2 * xy.mean(), error


@pytest.mark.parametrize(
    ("n", "m", "size"), [(2, 2, 3), (3, 40, 64), (1024, 7, 5), (2100, 1030, 16)]
)
def test_kernel_distance_is_its_definition(n, m, size):
    """Below, at and above the number of images that a device compares at once."""
    x = rng(1).standard_normal((n, size)).astype(np.float32)
    y = rng(2).exponential(size=(m, size)).astype(np.float32)
    found = kernel_distance(x, y)
    np.testing.assert_allclose(found, kernel_by_definition(x, y), rtol=1e-5)
    np.testing.assert_allclose(kernel_distance(y, x), found, rtol=1e-5)
    mixed = kernel_distance(rng(3).permutation(x), jnp.asarray(rng(4).permutation(y)))
    np.testing.assert_allclose(mixed, found, rtol=1e-5)


def test_kernel_distance_is_unbiased_with_its_error():
    """Over many draws: of one distribution 0, which squares of one image would lift; of two, the
    spread of the draws is the error."""

    def draws(shift):
        return np.array(
            [
                kernel_distance(
                    rng([1, i]).standard_normal((30, 4)),
                    rng([2, i]).standard_normal((50, 4)) + shift,
                )
                for i in range(80)
            ]
        ).T

    found, _ = draws(0.0)
    assert abs(found.mean()) < 3.5 * found.std() / np.sqrt(80)
    assert (found < 0).any()
    found, errors = draws(0.7)
    assert 0.75 < errors.mean() / found.std() < 1.4


def test_kernel_distance_in_float32_products():
    """A small difference of large values: the rounding of products must not add up."""
    x = np.maximum(rng(1).standard_normal((1500, 256)), 0).astype(np.float32) + 1
    y = np.maximum(rng(2).standard_normal((1200, 256)) + 0.01, 0).astype(np.float32) + 1
    found, expected = kernel_distance(x, y), kernel_by_definition(x, y)
    assert abs(expected[0]) < 0.01 * kernel(x[:1], y[:1]).item()
    assert abs(found.distance - expected[0]) < 1e-3 * expected[1]


def test_bad_sets_for_the_kernel():
    good = np.ones((3, 2))
    for reference, samples, message in (
        (good, good[:1], "samples must have at least 2 images, got 1"),
        (good[:1], good, "reference must have at least 2 images, got 1"),
        (good, np.ones((3, 4)), "must be features of one network, got 2 and 4 a row"),
        (good, np.array([[0, 0], [0, np.inf]]), "samples of image 1 are not finite"),
        (np.ones(3), good, r"reference must be float32 or float64 \[N, D\], got float64 \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel_distance(reference, samples)


# Inception Score


def score(logits):
    found = InceptionScore()
    found.add(logits)
    return found.result()


def score_by_definition(logits, size=5000):
    shares = np.exp(logits.astype(np.float64))
    shares /= shares.sum(axis=1, keepdims=True)
    scores = []
    for split in (shares[start : start + size] for start in range(0, len(shares), size)):
        divergence = (split * (np.log(split) - np.log(split.mean(axis=0)))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize("count", [1, 70, 5000, 12345])
def test_score_is_its_definition(count):
    logits = (2 * rng().standard_normal((count, 6))).astype(np.float32)
    logits[:4000, 0] += 1  # splits differ
    found = score(logits)
    np.testing.assert_allclose(found, score_by_definition(logits), rtol=1e-12, atol=1e-15)
    assert (found.deviation > 0) == (count > 5000)


def test_scores_in_closed_form():
    certain = 1000 * np.eye(8)[np.arange(80) % 8]
    assert score(certain).mean == pytest.approx(8, rel=1e-12)
    assert score(certain - 1e5).mean == pytest.approx(8, rel=1e-12)
    unused = np.pad(certain, ((0, 0), (0, 1)))  # a class that no image has a share of
    assert score(unused).mean == pytest.approx(8, rel=1e-12)
    assert score(np.full((80, 8), 3.0)) == pytest.approx((1, 0), abs=1e-12)
    assert score(certain[::8]).mean == pytest.approx(1, rel=1e-12)
    assert score(certain[:1]) == pytest.approx((1, 0), abs=1e-12)


def test_score_is_the_mean_over_splits():
    """5000 images of four classes, then 2500 of one; together they would score higher."""
    logits = 1000 * np.eye(4)[np.concatenate([np.arange(5000) % 4, np.zeros(2500, int)])]
    assert score(logits) == pytest.approx(((4 + 1) / 2, (4 - 1) / 2), rel=1e-12)
    within = np.concatenate([rng().permutation(logits[:5000]), logits[5000:]])
    assert score(within) == pytest.approx(score(logits), rel=1e-12)


LOGITS = rng(3).standard_normal((10_400, 3)).astype(np.float32)
WHOLE = score(LOGITS)


@settings(max_examples=30)
@given(cuts(len(LOGITS)))
def test_score_does_not_depend_on_cuts(places):
    found = InceptionScore()
    for piece in np.split(LOGITS, places):
        found.add(piece)
        if found.count:
            found.result()  # changes nothing
    assert found.count == len(LOGITS)
    assert found.result() == WHOLE


def test_bad_logits():
    found = InceptionScore()
    with pytest.raises(ValueError, match="at least 1 image, got 0"):
        found.result()
    found.add(LOGITS[:3])
    for value, message in (
        (np.array([[0, 0, 0], [0, np.nan, 0]]), "logits of image 4 are not finite"),
        (LOGITS[0], r"logits must be float32 or float64 \[N, D\], got float32 \(3,\)"),
        (LOGITS[:, :2], "logits must have 3 numbers a row, as those before, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            found.add(value)
    assert found.result() == score(LOGITS[:3])


# Precision, recall, neighbours


def distances(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.sqrt(sum((x[:, None] - y) ** 2 for x, y in zip(a.T, b.T, strict=True)))


def precision_recall_by_definition(reference, samples, k):
    def radii(points):
        among = distances(points, points)
        np.fill_diagonal(among, np.inf)
        return np.sort(among, axis=1)[:, k - 1]

    between = distances(reference, samples)
    precision = (between <= radii(reference)[:, None]).any(axis=0).mean()
    return precision, (between <= radii(samples)).any(axis=1).mean()


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("n", "m"), [(6, 9), (300, 1024), (2100, 1030)])
def test_precision_and_recall_are_their_definition(n, m, k):
    """Below, at and above the number of images that a device compares at once."""
    reference = rng(1).standard_normal((n, 6)).astype(np.float32)
    samples = (0.8 * rng(2).standard_normal((m, 6)) + 0.4).astype(np.float32)
    found = precision_recall(reference, samples, k)
    expected = precision_recall_by_definition(reference, samples, k)
    assert 0 < expected[1] < 1 or n < 10
    # Rounding may move one point over a boundary.
    assert abs(found.precision - expected[0]) <= 1 / m + 1e-9
    assert abs(found.recall - expected[1]) <= 1 / n + 1e-9
    mixed = precision_recall(rng(3).permutation(reference), rng(4).permutation(samples), k)
    np.testing.assert_allclose(mixed, found, atol=1.5 / min(n, m))
    swapped = precision_recall(samples, reference, k)
    np.testing.assert_allclose(swapped, found[::-1], atol=1.5 / min(n, m))


def test_boundaries_count_and_a_point_is_not_its_own_neighbour():
    """On a line, where float32 is exact; the radii for k = 1 and 2 are known."""
    reference = np.array([[-2.0], [-1], [0], [1], [2]])
    samples = np.array([[3.0], [3.5], [-4], [4], [4.5], [-8]])
    assert precision_recall(reference, samples, 1) == (pytest.approx(1 / 6), pytest.approx(3 / 5))
    # To the second nearest: 2 from the ends, which is where -4 and 4 are.
    assert precision_recall(reference, samples, 2) == (pytest.approx(4 / 6), 1)
    assert precision_recall(reference, samples, 4) == (pytest.approx(5 / 6), 1)


def test_equal_and_far_sets():
    features = rng().standard_normal((1100, 20)).astype(np.float32)
    assert precision_recall(features, features) == (1, 1)
    assert precision_recall(features, rng(1).permutation(features)[:500]).precision == 1
    assert precision_recall(features, features + 100) == (0, 0)


def test_far_from_zero():
    """Without the mean taken off, squares in float32 would hide these distances."""
    reference = (rng(1).standard_normal((200, 4)) + 3000).astype(np.float32)
    samples = (0.5 * rng(2).standard_normal((150, 4)) + 3000).astype(np.float32)
    found = precision_recall(reference, samples)
    expected = precision_recall_by_definition(reference, samples, 3)
    assert expected[1] < 0.9
    np.testing.assert_allclose(found, expected, atol=1.5 / 150)


@pytest.mark.parametrize("size", [64, 500, 2048])
def test_duplicates(size):
    """Radii of 0 hold exact copies and nothing else, though products round."""
    points = rng(1).standard_normal((300, size)).astype(np.float32) ** 3
    reference = rng(2).permutation(np.repeat(points, 4, axis=0))
    samples = points.copy()
    samples[::2] *= 1.05
    found = precision_recall(reference, samples)
    assert found.precision == 0.5
    # Two of each would reach farther.
    assert precision_recall(reference[: len(reference) // 2], samples).precision > 0.5
    near, place = nearest(reference, samples)
    np.testing.assert_array_equal(near == 0, np.arange(300) % 2 == 1)
    np.testing.assert_array_equal(reference[place][1::2], samples[1::2])


def test_only_a_point_itself_is_left_out():
    """Its copy in the same place of another piece is its nearest neighbour, at distance 0."""
    points = rng(1).standard_normal((1024, 16)).astype(np.float32)
    assert precision_recall(np.concatenate([points, points]), 1.05 * points, 1).precision == 0


@pytest.mark.parametrize(("n", "m"), [(1, 1), (40, 30), (2100, 1500)])
def test_nearest(n, m):
    reference = rng(1).standard_normal((n, 5)).astype(np.float32)
    samples = rng(2).standard_normal((m, 5)).astype(np.float32)
    near, place = nearest(reference, samples)
    expected = distances(samples, reference)
    np.testing.assert_allclose(near, expected.min(axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(expected[np.arange(m), place], expected.min(axis=1), rtol=1e-4)
    # Of equal ones the first, also across the pieces that a device compares.
    twice = np.concatenate([reference, reference])
    np.testing.assert_array_equal(nearest(twice, reference)[1], np.arange(n))


def test_one_program_for_all_sizes():
    sets = [rng(n).standard_normal((n, 11)).astype(np.float32) for n in (4, 1024, 1300, 2500)]
    precision_recall(sets[0], sets[1])
    programs = manifold._closest._cache_size(), manifold._covered._cache_size()
    precision_recall(sets[2], sets[3])
    assert (manifold._closest._cache_size(), manifold._covered._cache_size()) == programs


def test_products_are_of_float32_where_others_are_quicker():
    """Also under the settings of a user who trains."""
    chunk = manifold._place(rng(1).standard_normal((20, 30)), np.zeros(30))[0]
    with jax.default_matmul_precision("bfloat16"):
        distances = jax.jit(manifold._squares).lower(chunk, chunk).as_text()
        products = kernel_module._kernel.lower(chunk.rows, chunk.rows).as_text()
    assert "precision = [HIGHEST, HIGHEST]" in distances
    assert "precision = [HIGHEST, HIGHEST]" in products


def test_bad_sets_for_the_manifold():
    good = np.ones((4, 2))
    for reference, samples, k, message in (
        (good, good[:3], 3, "samples must have at least 4 images, got 3"),
        (good, np.ones((9, 2)), 4, "reference must have at least 5 images, got 4"),
        (good, good, 0, "k must be 1 to 1024, got 0"),
        (good, np.ones((4, 3)), 3, "must be features of one network, got 2 and 3 a row"),
        (np.full((4, 2), np.nan), good, 3, "reference of image 0 are not finite"),
        (good, np.ones((4, 2, 1)), 3, r"samples must be .* got float64 \(4, 2, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            precision_recall(reference, samples, k)
    with pytest.raises(ValueError, match="reference must have at least 1 images, got 0"):
        nearest(good[:0], good)
