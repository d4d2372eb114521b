"""The suite of images: what its data and its networks are."""

import itertools

import jax
import numpy as np
import pytest

from benchmarks.suites import classifier, curves, images, mnist


@pytest.fixture(autouse=True)
def _as_users_run_it():
    """Benchmarks are an application: float32, and JAX's own defaults."""
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def drawn():
    return curves.curves(2000)


def test_curves_have_the_statistics_of_the_true_set(drawn):
    mean = drawn.mean(axis=0, dtype=np.float64)
    constant = -(mean * np.log(mean) + (1 - mean) * np.log1p(-mean)).sum()
    # 16.58, 125.1 and 55.3 are the calibration's; 16.92, 125.5 and 54.1 the true set's.
    assert drawn.var(axis=0).sum() == pytest.approx(16.58, rel=0.03)
    assert constant == pytest.approx(125.1, rel=0.03)
    assert curves.entropy_floor(drawn) == pytest.approx(55.3, rel=0.03)


def test_curves_are_images(drawn):
    assert drawn.shape == (2000, 784)
    assert drawn.dtype == np.float32
    assert drawn.min() >= 0
    assert 0.9 < drawn.max() < 1


def test_curves_are_those_of_their_seed(drawn):
    few = curves.curves(30)
    np.testing.assert_array_equal(curves.curves(30), few)
    np.testing.assert_allclose(drawn[:30], few, atol=1e-6)
    for other in (curves.curves(30, seed=1)[0], few[1]):
        assert np.abs(other - few[0]).max() > 0.1


def test_a_curve_is_the_sum_over_its_blobs(drawn):
    points = 4 + 19 * np.random.default_rng(0).spawn(2)[0].uniform(size=(3, 2))
    t = np.linspace(0, 1, 20_001)[:, None]
    path = 2 * (t - 0.5) * (t - 1) * points[0] - 4 * t * (t - 1) * points[1]
    path += 2 * t * (t - 0.5) * points[2]
    lengths = np.append(0, np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1)))
    along = np.arange(0, lengths[-1], 0.25)
    blobs = np.stack([np.interp(along, lengths, x) for x in path.T], axis=-1)
    rows, columns = np.mgrid[:28, :28]
    squares = (columns[..., None] - blobs[:, 0]) ** 2
    squares += (rows[..., None] - blobs[:, 1]) ** 2
    ink = 0.25 * np.exp(-squares / (2 * 0.88**2)).sum(axis=-1)
    image = drawn[0].reshape(28, 28)
    np.testing.assert_allclose(image, 1 - np.exp(-0.6 * ink), atol=1e-4)


def test_the_entropy_floor_counts_only_shades():
    shades = np.array([[0.0, 1.0, 0.5], [0.0, 0.0, 0.25]], np.float32)
    floor = curves.entropy_floor(shades)
    quarter = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert floor == pytest.approx((np.log(2) + quarter) / 2)


def test_missing_mnist_is_an_error_that_says_where_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mnist\.npz.*--download"):
        mnist.images(tmp_path)


def test_labels_that_are_not_those_of_mnist_are_an_error(tmp_path):
    np.savez(tmp_path / "mnist.npz", y_train=np.zeros(60_000, np.uint8))
    with pytest.raises(ValueError, match=r"values of y_train have sha256"):
        mnist.labels(tmp_path)


def other_arrays(path):
    x = np.zeros((60_000, 28, 28), np.uint8)
    np.savez_compressed(path, x_train=x, x_test=x[:10_000])


def other_shapes(path):
    np.savez(path, x_train=np.zeros((3, 28, 28)), x_test=np.zeros((2, 28, 28)))


def labels_only(path):
    np.savez(path, y_train=np.zeros(60_000, np.uint8))


def cut_short(path):
    np.savez(path, x_train=np.zeros((3, 28, 28), np.uint8))
    path.write_bytes(path.read_bytes()[:-100])


def damaged(path):
    np.savez(path, x_train=np.zeros(10_000, np.uint8), x_test=np.zeros(1, np.uint8))
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)


def lone_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def pickled(path):
    np.savez(path, x_train=np.array([{}], object), x_test=np.zeros(1))


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "write",
    [
        other_arrays,
        other_shapes,
        labels_only,
        cut_short,
        damaged,
        lone_array,
        pickled,
        empty,
    ],
)
def test_a_file_that_is_not_mnist_is_one_clear_error(write, tmp_path):
    write(tmp_path / "mnist.npz")
    with pytest.raises(ValueError, match=r"mnist\.npz does not hold MNIST: .*Remove"):
        mnist.images(tmp_path)


def test_a_failed_download_leaves_nothing_and_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "URL", (tmp_path / "nowhere.npz").as_uri())
    with pytest.raises(ConnectionError, match=r"Could not fetch .* put it at"):
        mnist.fetch(tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def test_a_download_of_something_else_leaves_nothing(tmp_path, monkeypatch):
    source = tmp_path / "other.npz"
    other_shapes(source)
    monkeypatch.setattr(mnist, "URL", source.as_uri())
    with pytest.raises(ValueError, match=r"other\.npz does not hold MNIST"):
        mnist.fetch(tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def test_the_network_has_a_linear_code_and_logits():
    init, model_fn = images.autoencoder((6, 4, 3))
    generator = np.random.default_rng(0)
    params = [
        {name: generator.normal(size=leaf.shape) for name, leaf in layer.items()}
        for layer in jax.eval_shape(init, jax.random.key(0))
    ]
    x = generator.uniform(size=(2, 6))
    first, code, third, last = (
        lambda x, layer=layer: x @ layer["kernel"] + layer["bias"] for layer in params
    )

    def logistic(x):
        return 1 / (1 + np.exp(-x))

    logits = last(logistic(third(code(logistic(first(x))))))
    np.testing.assert_allclose(model_fn(params, x), logits, rtol=1e-5)
    shapes = [layer["kernel"].shape for layer in params]
    assert shapes == [(6, 4), (4, 3), (3, 4), (4, 6)]


def test_problems_have_the_published_networks():
    params = jax.eval_shape(images.autoencoder(images.CURVES).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 842_340
    sizes = [layer["kernel"].shape[0] for layer in params]
    assert sizes == [784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400]
    assert images.DIGITS == (784, 1000, 500, 250, 30)


def test_the_classifier_is_a_tanh_network_of_logits():
    generator = np.random.default_rng(0)
    pixels, labels = generator.uniform(size=(5, 784)), np.arange(5)
    problem = classifier.classification(pixels.astype(np.float32), labels)
    params = problem.start(jax.random.key(0))
    x, layers = pixels, [jax.device_get(layer) for layer in params]
    for layer in layers[:-1]:
        x = np.tanh(x @ layer["kernel"] + layer["bias"])
    logits = x @ layers[-1]["kernel"] + layers[-1]["bias"]
    shapes = itertools.pairwise(classifier.SIZES)
    assert [layer["kernel"].shape for layer in layers] == list(shapes)
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(5), labels]
    loss, value = problem.measurer(params, 0)(params, 0)
    assert loss == value == pytest.approx(expected.mean(), rel=1e-5)
