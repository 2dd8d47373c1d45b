"""The kernels in C: random cases against float64, threads, forks, what is no number, and installations without them."""

import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from syncbn import SyncBatchNorm, kernels, reference
from syncbn.kernels import Affine, eager
from tests.op.kernel_steps import LAST, assert_steps_agree, in_float64, inputs, make, step

ROOT = Path(__file__).parents[2]
# Around the lanes of a vector, the columns of a tile, the rows and values of a block
SIZES = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 48, 63, 64, 65, 80, 100, 127, 129, 200, 257]
# In float64 a message of values 100 standard deviations from zero loses 4 digits of 16
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4 * 2**-7, torch.float16: 4 * 2**-10}


@pytest.fixture
def cpu():
    return make("cpu")


@pytest.fixture
def threads():
    """Sets the number of threads, for the test alone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def drawn(seed):
    """A case of any shape, dtype, layout and option."""
    draw = random.Random(seed)
    shape = [draw.choice([1, 2, 3, 9]), draw.choice(SIZES), *draw.choices(SIZES[:14], k=draw.randrange(4))]
    if len(shape) < 4:
        shape[0] = draw.choice([0, *SIZES])
    dtype = draw.choice(list(TOLERANCE))
    masks = [None, None, "element", "image"]
    options = {name: draw.random() < 0.5 for name in ("affine", "relu", "residual")}
    mean = draw.choice([0.0, 10.0, 3e2]) if dtype in (torch.float32, torch.float64) else draw.choice([0.0, 1.0])
    case = inputs(tuple(shape), dtype, mean, **options, mask=draw.choice(masks))
    if draw.random() < 0.5:
        # Channels last, whatever the dimensions; what comes with x lies otherwise
        case["x"] = case["x"].movedim(1, -1).contiguous().movedim(-1, 1)
    if draw.random() < 0.2:
        case["dy"] = case["dy"].flip(0)
    return case


@pytest.mark.parametrize("seed", range(150))
def test_any_case_agrees_with_float64(cpu, seed):
    case = drawn(seed)

    got = step(cpu, **case)

    assert_steps_agree(got, in_float64(case), TOLERANCE[case["x"].dtype])
    assert got["y"].stride() == got["dx"].stride() == case["x"].stride()


@pytest.mark.parametrize("seed", range(0, 150, 5))
def test_any_case_agrees_with_the_specification(cpu, seed):
    case = drawn(seed) | {"mask": None}
    if case["x"].numel() == 0:
        return
    x, weight, bias, residual = (
        None if case[name] is None else case[name].double().requires_grad_()
        for name in ("x", "weight", "bias", "residual")
    )
    y = reference.batch_norm(x, weight, bias, 1e-5)
    y = y if residual is None else y + residual
    y = y.relu() if case["relu"] else y
    y.backward(case["dy"].double())

    got = step(cpu, **case)

    want = {"y": y.detach(), "dx": x.grad, "dresidual": None if residual is None else residual.grad}
    want |= {"dweight": None if weight is None else weight.grad, "dbias": None if bias is None else bias.grad}
    want = {name: t for name, t in want.items() if t is not None}
    # Where y is all but 0, float32 may find another sign than float64
    tolerance = TOLERANCE[x.dtype] if not case["relu"] else max(1e-3, TOLERANCE[case["x"].dtype])
    assert_steps_agree({name: got[name] for name in want}, want, max(tolerance, TOLERANCE[case["x"].dtype]))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(5, 96, 31, 33), (3, 3, 150, 151), (70_001, 5), (4, 300, 40), (1, 1, 200_003)], ids=str
)
def test_any_number_of_threads_gives_the_same_bits(cpu, threads, shape, dtype, masked):
    case = inputs(shape, dtype, relu=True, residual=True, mask="element" if masked else None)
    for last in (False, True) if len(shape) in LAST else (False,):
        if last:
            case["x"] = case["x"].contiguous(memory_format=LAST[len(shape)])
        threads(1)
        want = step(cpu, **case)
        for count in 2, 3, 4:
            threads(count)
            assert_close(step(cpu, **case), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux")
def test_threads_are_torchs_own(cpu, threads):
    """A second pool of threads would be in the way of the first, which spins for some milliseconds."""
    threads(3)
    case = inputs((16, 64, 64, 64))
    torch.ops.aten.native_batch_norm(case["x"], None, None, None, None, True, 0.1, 1e-5)
    before = len(os.listdir("/proc/self/task"))

    step(cpu, **case)

    assert len(os.listdir("/proc/self/task")) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_of_a_process_with_threads_does_not_wait_for_them(cpu, threads):
    threads(2)
    x = torch.randn(8, 64, 40, 40)
    want = cpu.moments(x, None, "row").packed
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(cpu.moments(x, None, "row").packed, want) else 1)
    deadline = time.monotonic() + 20
    while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_comes_through_and_is_rounded_to_the_nearest_even(cpu, dtype, last):
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    # One channel in planes; 16 in rows
    x = halves.view(-1, 16) if last else halves.view(1, 1, -1)
    channels = x.size(1)
    row = torch.cat([torch.zeros(channels), torch.ones(channels), torch.ones(1)]).double().unsqueeze(0)
    for scale in 1.0, 1 / 3, 1e-3, 2.5:
        weight = torch.full((channels,), scale)
        y, _ = cpu.normalize(x, row, Affine(weight, eps=0.0))
        assert_close(
            y, (x.float() * weight.view(1, -1, *[1] * (x.dim() - 2))).to(dtype), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("place", [0, 77, 99])
def test_what_is_no_number_spoils_its_own_channel_and_no_other(cpu, value, dtype, last, place):
    case = inputs((1, 20, 10, 10), dtype, mean=1.0, relu=True)
    if last:
        case["x"] = case["x"].contiguous(memory_format=torch.channels_last)
    case["x"][0, 3, place // 10, place % 10] = value

    got = step(cpu, **case)

    others = [c for c in range(20) if c != 3]
    assert got["var"][3].isnan()
    assert got["y"][:, 3].isnan().all()
    assert got["dx"][:, 3].isnan().all()
    for name in "y", "dx":
        assert got[name][:, others].isfinite().all()
    assert got["var"][others].isfinite().all()


def test_what_is_masked_may_be_anything(cpu):
    for last in False, True:
        case = inputs((2, 5, 6, 7), mask="element")
        if last:
            case["x"] = case["x"].contiguous(memory_format=torch.channels_last)
        want = step(cpu, **case)
        case["x"] = case["x"].where(case["mask"], torch.nan)
        got = step(cpu, **case)
        assert_close({n: got[n] for n in ("mean", "var", "count")}, {n: want[n] for n in ("mean", "var", "count")})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("parameters", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_another_dtype_have_gradients_of_it(cpu, parameters, dtype):
    case = inputs((6, 5, 4, 3), dtype, mean=1.0)
    case |= {name: case[name].to(parameters) for name in ("weight", "bias")}

    got = step(cpu, **case)

    assert got["dweight"].dtype == got["dbias"].dtype == parameters
    assert_steps_agree(got, in_float64(case), max(TOLERANCE[dtype], TOLERANCE[parameters]))


def test_parameters_elsewhere_are_refused(cpu):
    with pytest.raises(ValueError, match="x is on the CPU but a parameter or buffer of its layer on meta"):
        step(cpu, **inputs((4, 3)) | {"weight": torch.ones(3, device="meta")})


def test_buffers_of_another_make_move_too(cpu):
    layer, other = SyncBatchNorm(3), SyncBatchNorm(3)
    layer.running_mean, layer.running_var = torch.zeros(3, 2)[:, 0], torch.ones(3, 2)[:, 0]
    x = torch.randn(8, 3)
    layer(x), other(x)
    assert_close(layer.running_mean, other.running_mean)
    assert_close(layer.running_var, other.running_var)


def test_the_kernels_in_c_are_those_in_use(cpu):
    assert kernels.in_use() == "cpu"
    assert kernels.choose(torch.empty(0)) is cpu
    assert kernels.choose(torch.empty(0, device="meta")) is eager
    assert kernels.choose(torch.empty(0, dtype=torch.float8_e5m2)) is eager


def test_without_a_library_torchs_operators_are_used_with_one_line(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("syncbn.kernels.cpu")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(kernels, "cpu", raising=False)
    monkeypatch.setattr("ctypes.CDLL", lambda path: (_ for _ in ()).throw(OSError(f"{path}: no such file")))
    with pytest.warns(UserWarning, match=r"cannot be loaded .*no such file.*Install a C compiler") as warned:
        assert kernels._for_cpu.__wrapped__() is eager
    assert len(warned) == 1


def test_a_library_of_other_sources_is_not_loaded(cpu, monkeypatch):
    library = importlib.import_module("syncbn.kernels.cpu.library")
    monkeypatch.setattr(library.build, "fingerprint", lambda: 1)
    with pytest.raises(OSError, match="was built from other sources"):
        library.Library()


def test_an_installation_without_a_compiler_succeeds(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "CC": "no-such-compiler"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("gcc"), reason="needs gcc on Linux")
def test_the_kernels_touch_no_memory_but_their_own_and_do_nothing_undefined(tmp_path):
    """The tests of the kernels, with a library that watches each access."""
    from syncbn.kernels.cpu import build

    for name in "syncbn", "tests":
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    room = tmp_path / "syncbn/kernels/cpu"
    sanitizers = ["-O1", "-DONE_KIND", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    sources = [room / path.name for path in build.SOURCES]
    defines = [f"-D{name}={value}" for name, value in build.defines()]
    compiler = ["gcc", *build.FLAGS, *defines, *sanitizers, "-g", "-fPIC", "-shared", *sources, "-lm"]
    subprocess.run([*compiler, "-o", room / "compiled.so"], check=True)
    asan = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    environment = {**os.environ, "LD_PRELOAD": asan.strip(), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    tests = ["tests/op/test_kernels.py", "tests/op/test_cpu_kernels.py", "-k", "cpu and not ranks and not installation"]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", *tests]

    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
