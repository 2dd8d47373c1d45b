"""The layer agrees with Keras 3's BatchNormalization and with TensorFlow's formula, their conventions translated.

Keras computes in float32, ours does here in float64: they agree to torch's own tolerance for float32. Keras' momentum
is the weight of the old average, 1 - torch's; its epsilon is eps, 1e-3 unless said; its moving variance averages the
biased variance, torch's the unbiased one. docs/norms.md has the table.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import numpy
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import syncbn

pytestmark = pytest.mark.skipif(find_spec("keras") is None, reason="keras is not installed")

STEPS = 20
CASES = {  # shape of a batch, Keras' momentum and epsilon: its defaults first
    "NCHW": ((6, 3, 4, 5), 0.99, 1e-3),
    "NC": ((8, 3), 0.9, 1e-5),
    "NCL": ((2, 3, 7), 0.5, 1e-2),
}


def case(shape, momentum, epsilon):
    channels = shape[1]
    gamma, beta = 0.5 + torch.rand(channels, dtype=torch.float64), torch.randn(channels, dtype=torch.float64)
    mean, variance = torch.randn(channels, dtype=torch.float64), 0.5 + torch.rand(channels, dtype=torch.float64)
    batches = 5 + 3 * torch.randn(STEPS, *shape, dtype=torch.float64)
    return {
        "momentum": momentum,
        "epsilon": epsilon,
        "weights": [gamma, beta, mean, variance],
        "batches": batches,
    }


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    """name -> the case, and what Keras made of it, in a process that has no other use."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("keras")
    cases = {name: case(*values) for name, values in CASES.items()}
    torch.save(cases, folder / "cases.pt")
    command = [sys.executable, "-m", "tests.op.keras_layers", folder / "cases.pt", folder / "results.pt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr
    results = torch.load(folder / "results.pt", weights_only=True)
    return {name: (cases[name], results[name]) for name in CASES}


def same(got, want):
    assert_close(got.detach().float(), want.detach().float())


def ours(case, weights=None):
    """The layer with Keras' weights, momentum and epsilon."""
    gamma, beta, moving_mean, moving_variance = weights or case["weights"]
    layer = syncbn.SyncBatchNorm(len(gamma), eps=case["epsilon"], momentum=1 - case["momentum"], dtype=torch.float64)
    state = {"weight": gamma, "bias": beta, "running_mean": moving_mean, "running_var": moving_variance}
    layer.load_state_dict({**state, "num_batches_tracked": torch.tensor(0)})
    return layer


def values_per_channel(case):
    return case["batches"][0].numel() / case["batches"].size(2)


@pytest.mark.parametrize("name", CASES)
def test_training_gives_the_same_output_and_moving_averages(keras, name):
    case, theirs = keras[name]
    layer = ours(case)
    same(torch.stack([layer(x) for x in case["batches"]]), theirs["trained"])

    gamma, beta, moving_mean, moving_variance = theirs["weights"]
    for one, other in zip((layer.weight, layer.bias, layer.running_mean), (gamma, beta, moving_mean), strict=True):
        same(one, other)
    # What is left of the start is the same; of each batch's variance torch's has n / (n - 1) times as much
    n, left = values_per_channel(case), case["momentum"] ** STEPS * case["weights"][3]
    same((layer.running_var - left) * (n - 1) / n + left, moving_variance)
    assert (layer.running_var > moving_variance * 1.001).all()


@pytest.mark.parametrize("name", CASES)
def test_weights_carried_over_from_keras_evaluate_the_same(keras, name):
    case, theirs = keras[name]
    torchs = nn.BatchNorm1d(3, eps=case["epsilon"], dtype=torch.float64)
    torchs.load_state_dict(ours(case, theirs["weights"]).state_dict())
    x = case["batches"][0]
    same(ours(case, theirs["weights"]).eval()(x), theirs["evaluated"])
    same(torchs.eval()(x.reshape(*x.shape[:2], -1)).view_as(x), theirs["evaluated"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_weights_carried_over_to_keras_evaluate_the_same(tmp_path, keras, name):
    case, _ = keras[name]
    layer = ours(case)
    for x in case["batches"]:
        layer(x)
    state = layer.eval().state_dict()
    weights = [state[key] for key in ("weight", "bias", "running_mean", "running_var")]
    once = {"back": {**case, "weights": weights, "momentum": 1.0, "batches": case["batches"][:1]}}
    torch.save(once, tmp_path / "cases.pt")
    command = [sys.executable, "-m", "tests.op.keras_layers", tmp_path / "cases.pt", tmp_path / "results.pt"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    same(layer(case["batches"][0]), torch.load(tmp_path / "results.pt", weights_only=True)["back"]["evaluated"])
    assert_close(tensorflow(case["batches"][0], *weights, case["epsilon"]), layer(case["batches"][0]).detach())


def tensorflow(x, scale, offset, mean, variance, epsilon):
    """tf.nn.batch_normalization(x, mean, variance, offset, scale, variance_epsilon), in NumPy's float64."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    scale, offset, mean, variance = (v.detach().numpy().reshape(shape) for v in (scale, offset, mean, variance))
    inv = scale / numpy.sqrt(variance + epsilon)
    return torch.from_numpy(x.numpy() * inv + (offset - mean * inv))


@pytest.mark.parametrize("name", CASES)
def test_training_is_tensorflows_formula_with_the_batchs_moments(name):
    case_ = case(*CASES[name])
    layer, x = ours(case_), case_["batches"][0]
    axes = tuple(d for d in range(x.dim()) if d != 1)
    mean, variance = (torch.from_numpy(f(x.numpy(), axis=axes)) for f in (numpy.mean, numpy.var))
    gamma, beta, *_ = case_["weights"]
    assert_close(layer(x).detach(), tensorflow(x, gamma, beta, mean, variance, case_["epsilon"]))
