"""The monitor on a GPU: the host waits for it in no step, a CUDA graph replays it, and its figures are a CPU's."""

import pytest
import torch

from syncbn.drift import DriftMonitor
from tests.drift.shards import images, net


@pytest.fixture(autouse=True)
def convolutions_with_all_digits(monkeypatch):
    """A GPU's TF32 has three, and what is compared here is a CPU's."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "local"])
@pytest.mark.parametrize("level", ["rank", "image"])
def test_figures_are_those_of_a_cpu_and_no_step_waits(sync, level):
    by_device = []
    for device in "cpu", "cuda":
        model = net(sync).to(device)
        monitor = DriftMonitor(model, level=level)
        batches = [images(0, step, 4).to(device) for step in range(40)]
        model(batches[0])
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            for batch in batches[1:]:
                model(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        by_device.append(monitor.read().layers)
    for layer, want in by_device[0].items():
        assert by_device[1][layer] == pytest.approx(want, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "local"])
def test_a_graph_replays_what_it_observes(sync):
    model, batch = net(sync).cuda(), images(0, 0, 4).cuda()
    monitor = DriftMonitor(model)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(batch)
        monitor.read()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            model(batch)
        for step in range(1, 6):
            batch.copy_(images(0, step, 4))
            graph.replay()
    torch.cuda.synchronize()
    eager, other = net(sync).cuda(), []
    with DriftMonitor(eager) as watch:
        for step in [0, 0, 0, 1, 2, 3, 4, 5]:
            if step == 1:
                watch.read()
            eager(images(0, step, 4).cuda())
        other = watch.read().layers
    got = monitor.read().layers
    # A layer that does not synchronise keeps the last forward of a graph alone
    names = ("n_eff", "lag", "dmean_z") if sync else ("dead",)
    for layer, want in other.items():
        for name in names:
            assert got[layer][name] == pytest.approx(want[name], rel=1e-3)
