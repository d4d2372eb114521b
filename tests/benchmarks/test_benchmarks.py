"""The benchmarks: what their data are, what they leave, and how they fail."""

import functools
import json

import jax
import numpy as np
import pytest

import hfjax
from benchmarks import (
    autoencoder,
    cost_problems,
    costs,
    data,
    milestones,
    mnist,
    network,
    product,
)
from benchmarks.__main__ import main
from benchmarks.history import Row, write_json

PICTURES = ("loss.png", "reconstructions.png", "updates.png")
TINY = ("autoencoder", "--cases", "40", "--layers", "784,5")


@pytest.fixture(autouse=True)
def _as_users_run_it():
    """Benchmarks are an application: float32, and JAX's own defaults."""
    jax.config.update("jax_disable_most_optimizations", True)  # Compiling is the cost.
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def curves():
    return data.curves(2000, 100)


def test_curves_have_the_statistics_of_the_true_set(curves):
    mean = curves.train.mean(axis=0, dtype=np.float64)
    constant = -(mean * np.log(mean) + (1 - mean) * np.log1p(-mean)).sum()
    # 16.58, 125.1 and 55.3 are the calibration's; 16.92, 125.5 and 54.1 the true set's.
    assert curves.train.var(axis=0).sum() == pytest.approx(16.58, rel=0.03)
    assert constant == pytest.approx(125.1, rel=0.03)
    assert curves.entropy_floor() == pytest.approx(55.3, rel=0.03)


def test_curves_are_images(curves):
    assert curves.train.shape == (2000, 784)
    assert curves.test.shape == (100, 784)
    assert curves.train.dtype == curves.test.dtype == np.float32
    assert curves.train.min() >= 0
    assert 0.9 < curves.train.max() < 1


def test_curves_are_those_of_their_seed(curves):
    few = data.curves(30, 20)
    np.testing.assert_array_equal(data.curves(30, 20).train, few.train)
    np.testing.assert_allclose(curves.train[:30], few.train, atol=1e-6)
    np.testing.assert_allclose(curves.test[:20], few.test, atol=1e-6)
    others = data.curves(30, 20, seed=1).train[0], few.test[0], few.train[1]
    for other in others:
        assert np.abs(other - few.train[0]).max() > 0.1


def test_a_curve_is_the_sum_over_its_blobs(curves):
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
    image = curves.train[0].reshape(28, 28)
    np.testing.assert_allclose(image, 1 - np.exp(-0.6 * ink), atol=1e-4)


def test_the_entropy_floor_counts_only_shades():
    images = np.array([[0.0, 1.0, 0.5], [0.0, 0.0, 0.25]], np.float32)
    floor = data.Images("shades", images, images).entropy_floor()
    quarter = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert floor == pytest.approx((np.log(2) + quarter) / 2)


def test_missing_mnist_is_an_error_that_says_where_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mnist\.npz.*--download"):
        mnist.load(tmp_path)


def test_labels_that_are_not_those_of_mnist_are_an_error(tmp_path):
    np.savez(tmp_path / "mnist.npz", y_train=np.zeros(60_000, np.uint8))
    with pytest.raises(ValueError, match=r"values of y_train have sha256"):
        mnist.labels(tmp_path)


def other_arrays(path):
    x = np.zeros((60_000, 28, 28), np.uint8)
    np.savez_compressed(path, x_train=x, x_test=x[:10_000])


def other_shapes(path):
    np.savez(path, x_train=np.zeros((3, 28, 28)), x_test=np.zeros((2, 28, 28)))


def no_test_images(path):
    np.savez(path, x_train=np.zeros((3, 28, 28), np.uint8))


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
        no_test_images,
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
        mnist.load(tmp_path)


def test_a_failed_download_leaves_nothing_and_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "URL", (tmp_path / "nowhere.npz").as_uri())
    with pytest.raises(ConnectionError, match=r"Could not fetch .* put it at"):
        mnist.load(tmp_path / "data", download=True)
    assert not list((tmp_path / "data").iterdir())


def test_a_download_of_something_else_leaves_nothing(tmp_path, monkeypatch):
    source = tmp_path / "other.npz"
    other_shapes(source)
    monkeypatch.setattr(mnist, "URL", source.as_uri())
    with pytest.raises(ValueError, match=r"other\.npz does not hold MNIST"):
        mnist.load(tmp_path / "data", download=True)
    assert not list((tmp_path / "data").iterdir())


def test_the_network_has_a_linear_code_and_logits():
    init, model_fn = network.autoencoder((6, 4, 3))
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


def test_a_race_leaves_its_history_its_milestones_and_its_pictures(tmp_path, capsys):
    options = ("--curvature-batches", "4", "--updates", "4", "--out", str(tmp_path))
    assert main([*TINY, *options]) == 0
    history = json.loads((tmp_path / "history.json").read_text())
    assert history["settings"]["cases"] == 40
    hf, *rivals = history["runs"]
    assert [row["updates"] for row in hf["rows"]] == [0, 1, 2, 3, 4]
    assert [update["count"] for update in hf["updates"]] == [1, 2, 3, 4]
    cg_iterations = sum(update["cg_iterations"] for update in hf["updates"])
    assert hf["rows"][-1]["cg_iterations"] == cg_iterations
    assert history["entropy_floor"] < hf["rows"][-1]["loss"] < hf["rows"][0]["loss"]
    names = ["adam 0.01", "adam 0.001", "adam 0.0001", "lbfgs"]
    assert [run["name"] for run in rivals] == names
    for run in rivals:  # The same start, and as long as HF took.
        assert run["rows"][0]["loss"] == hf["rows"][0]["loss"]
        assert run["rows"][-1]["seconds"] >= hf["rows"][-1]["seconds"]
        assert run["rows"][-1]["updates"] > 0
    assert json.loads((tmp_path / "milestones.json").read_text())["martens"]
    for picture in ("loss.png", "reconstructions.png", "updates.png"):
        assert (tmp_path / picture).stat().st_size > 5000
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("hf", *names, "Martens"))


def test_an_interrupt_leaves_what_there_is(tmp_path, monkeypatch, capsys):
    def interrupted(self, run, seconds, **_):
        if run.name == "adam 0.001" and run.rows[-1].updates:
            raise KeyboardInterrupt

    monkeypatch.setattr(autoencoder.Live, "show", interrupted)
    options = ("--optimizers", "adam", "--seconds", "0.1", "--out", str(tmp_path))
    assert main([*TINY, *options]) == 130
    history = json.loads((tmp_path / "history.json").read_text())
    assert [run["name"] for run in history["runs"]] == ["adam 0.01", "adam 0.001"]
    assert all(run["rows"][-1]["updates"] for run in history["runs"])
    assert (tmp_path / "loss.png").exists()
    assert (tmp_path / "reconstructions.png").exists()
    printed = capsys.readouterr().out
    assert "Interrupted" in printed
    assert "adam 0.001" in printed


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--cases", "0"), "at least 1, got '0'"),
        (("--seconds", "nan"), "above 0, got 'nan'"),
        (("--optimizers", "sgd"), "among hf,adam,lbfgs, got 'sgd'"),
        (("--layers", "700,5"), "784 pixels"),
        (("--layers", "784,5.5"), "whole number"),
        (("--cases", "10", "--curvature-batches", "3"), "divide the 10 images, got 3"),
        (("--updates", "3", "--optimizers", "adam"), "--updates is for HF"),
        (("--data", "mnist", "--data-dir", "nowhere"), "No MNIST"),
    ],
)
def test_a_bad_option_is_one_line_and_status_2(words, complaint, capsys):
    try:
        status = main(["autoencoder", *words])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    message = capsys.readouterr().err
    assert complaint in message
    assert message.count("\n") == 1


def test_milestones_are_where_an_error_is_first_passed():
    rows = [
        Row(0.0, 0, 0, 300.0, 90.0, 90.0),
        Row(1.0, 1, 7, 100.0, 9.0, 9.0),
        Row(2.0, 2, 20, 90.0, 8.0, 8.0),
    ]
    assert milestones.passed(rows) == [(20.0, 1, 7), (10.0, 1, 7)]


def test_products_in_fewer_digits_are_timed_and_compared(tmp_path, capsys):
    out = tmp_path / "low_precision.json"
    words = ("--parts", "products", "--cases", "20", "--layers", "784,3")
    assert main(["low_precision", *words, "--out", str(out)]) == 0
    found = json.loads(out.read_text())["products"]
    assert found["float32"]["error"] == 0
    assert 1e-4 < found["bfloat16"]["error"] < 0.1
    assert all(row["seconds"] > 0 for row in found.values())
    assert "Products" in capsys.readouterr().out
    assert main(["low_precision", "--precision", "4 digits"]) == 2
    assert "got '4 digits'" in capsys.readouterr().err


def test_what_json_lacks_becomes_null(tmp_path):
    write_json(tmp_path / "x.json", {"x": [float("nan"), 1.5, float("inf")]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"x": [None, 1.5, None]}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_product_of_one_layer_is_no_dearer_than_its_gradient():
    # No layer below: F tangents, F transposes; gradient F forward, F weights.
    assert product.flop_limits((784, 30))["product"] == 1
    assert product.flop_limits((784, 30))["empirical_fisher"] == 1


def test_costs_are_those_of_the_compiled_update(tmp_path, monkeypatch, capsys):
    # As few kernels as there may be: they are what compiling takes its time for.
    bare = {"preconditioner": None, "backtracking": None, "line_search": None}
    usual = costs.Option(functools.partial(hfjax.hessian_free, **bare))
    undonated = usual._replace(donated=False)
    monkeypatch.setattr(costs, "OPTIONS", {"usual": usual, "undonated": undonated})
    path = tmp_path / "new" / "costs.json"
    words = ("--cases", "3", "--layers", "784,4,2", "--only", "", "--out", str(path))
    assert main(["costs", *words]) == 0
    usual, undonated = json.loads(path.read_text())["rows"]
    numbers = 2 * (784 * 4 + 4 * 2) + (4 + 2 + 4 + 784)  # Four kernels and biases.
    assert usual["vector_bytes"] == 4 * numbers
    # Besides the direction there are scalars, and the record of 250 iterations.
    scalars = usual["state_bytes"] - usual["vector_bytes"]
    assert 0 < scalars - 4 * (251 + 2 * 250) < 100
    # Parameters and some scalars give their place to what replaces them; a direction
    # that no run starts from is not read at all.
    assert undonated["saved_bytes"] == 0
    saved = usual["saved_bytes"] - usual["vector_bytes"]
    assert 0 < saved <= scalars
    for row in (usual, undonated):
        # Some of conjugate gradients' own; of kept iterates none, as nobody chooses.
        assert 4 < row["temporary_bytes"] / row["vector_bytes"] < 12
        assert row["instructions"] > row["kernels"] == sum(row["places"].values())
        assert row["places"]["once"] > row["places"]["pcg.run"] > row["kinds"]["dot"]
        # Once for gradient and linearisation together, and once for f at the step.
        assert row["models"] == {"once": 2}
        assert row["jax_seconds"] > 0 < row["xla_seconds"]
    printed = capsys.readouterr().out
    assert "usual" in printed
    assert "784-4-2, 3 images" in printed
    assert "pcg.run" in printed


def test_products_of_a_convolutional_network_are_timed(tmp_path, capsys):
    path = tmp_path / "convolutions.json"
    words = ("--cases", "4", "--channels", "2", "3", "4", "--layout", "NCHW")
    assert main(["convolutions", *words, "--rounds", "1", "--out", str(path)]) == 0
    found = json.loads(path.read_text())["seconds"]
    assert set(found) == {"gradient", "hfjax", "JAX alone"}
    assert "G v in a loop" in capsys.readouterr().out


def test_plain_losses_are_timed_beside_their_closed_forms(tmp_path, capsys):
    path = tmp_path / "losses.json"
    words = ("--losses", "labels", "--outputs", "3", "--cases", "4", "--rounds", "1")
    assert main(["losses", *words, "--out", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["form"] for row in rows] == ["plain", "closed"]
    assert all(row["seconds"] > 0 and row["compile_seconds"] > 0 for row in rows)
    assert "labels, 3 outputs" in capsys.readouterr().out


def test_costs_of_nothing_are_an_error(tmp_path, capsys):
    assert main(["costs", "--only", "adam"]) == 2
    assert "no set-up has 'adam'" in capsys.readouterr().err
    words = ("--gpu", str(tmp_path / "none"), "--out", str(tmp_path / "costs.json"))
    assert main(["costs", *words]) == 2
    assert "none" in capsys.readouterr().err


def test_problems_whose_costs_are_told_are_those_they_say():
    shapes = {name: build(None, None) for name, build in cost_problems.PROBLEMS.items()}
    assert len(jax.tree.leaves(shapes["autoencoder"].params)) == 24
    for problem in shapes.values():
        value = jax.eval_shape(problem.objective.value, problem.params, problem.batch)
        assert value.shape == ()
