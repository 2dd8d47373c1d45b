"""What `make gpu` found, as the table of RESULTS.md: `python -m benchmarks.tables [gpu-results]`.

FOLDER/results.jsonl has a line for each step that was run, {"step", "code", "seconds", "limit_s", "found"}; of a step
that was run again the last counts. What no line holds is "not yet measured".
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import timing
from benchmarks.op_gpu import FLOORS, LARGE_MB, WANTED_OF_COPY, WANTED_OF_TORCH

UNKNOWN = "not yet measured"
BYTES = {"torch.bfloat16": 2, "torch.float16": 2, "torch.float32": 4, "torch.float64": 8}
OURS = ("syncbn", "fused", "syncbn graph", "fused graph", "syncbn compile")

Found = dict[str, Any]


class Row(NamedTuple):
    """A figure of one step's, what is wanted of it, and how it is read out of what the step found."""

    step: str
    figure: str
    wanted: str
    read: Callable[[Found], str | None]


def read(folder: Path) -> dict[str, Found]:
    """The last line of each step, in the order in which steps first came."""
    lines = (folder / "results.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines)}


def spread(values: Iterable[float]) -> str | None:
    """The least and the most."""
    found = sorted(values)
    if not found:
        return None
    return f"{found[0]:.2f}" if len(found) == 1 else f"{found[0]:.2f} to {found[-1]:.2f} (n = {len(found)})"


def middle(times: dict[str, list[float]], name: str, of: str) -> float:
    return timing.ratios(times, name, of)[1]


def of_copy(found: Found) -> str | None:
    shares = []
    for row in found["rows"]:
        mb = BYTES[row["dtype"]] / 1e6
        for n in row["shape"]:
            mb *= n
        if mb > LARGE_MB and row["copy_gb_per_s"]:
            shares.append(FLOORS[row["chain"]] * mb / timing.quartiles(row["ms"]["syncbn"])[1] / row["copy_gb_per_s"])
    return spread(shares)


def torch_over_ours(found: Found) -> str | None:
    rows = [row for row in found["rows"] if row["chain"] in WANTED_OF_TORCH and "torch" in row["ms"]]
    return spread(middle(row["ms"], "torch", "syncbn") for row in rows)


def of_a_pass(name: str) -> Callable[[Found], str | None]:
    return lambda found: spread(row["of_copy"][name] for row in found["rows"] if wide(row))


def wide(row: Found) -> bool:
    return row["mb"] > LARGE_MB and not row["narrow"]


def narrow(found: Found) -> str | None:
    rows = [row for row in found["rows"] if row["narrow"]]
    return spread(share for row in rows for name, share in row["of_copy"].items() if name != "images")


def layer(table: str) -> Callable[[Found], str | None]:
    def ratio(found: Found) -> str | None:
        times = found.get("layers", {}).get("ms_of_all", {}).get(table, {})
        return f"{middle(times, 'syncbn', 'torch'):.2f}" if "torch" in times else None

    return ratio


def at_32_images(found: Found) -> dict[str, Found]:
    return found["steps"].get("32", {})


def ratios(names: Sequence[str], of: str, inverse: bool = False) -> Callable[[Found], str | None]:
    """Of each one's step to another's at 32 images."""

    def told(found: Found) -> str | None:
        rows = at_32_images(found)
        times = {name: row["ms"] for name, row in rows.items()}
        if of not in times:
            return None
        pairs = ((name, middle(times, *((of, name) if inverse else (name, of)))) for name in names if name in times)
        return ", ".join(f"{name} {ratio:.3f}" for name, ratio in pairs) or None

    return told


def counts(name: str, names: Sequence[str]) -> Callable[[Found], str | None]:
    def told(found: Found) -> str | None:
        rows = at_32_images(found)
        known = [(one, rows[one][name]) for one in names if one in rows and rows[one][name] is not None]
        return ", ".join(f"{one} {count:.0f}" for one, count in known) or None

    return told


def drift(found: Found) -> str | None:
    return f"{found['ratios']['image'][1]:.3f}" if "ratios" in found else None


ROWS = [
    *(Row("smoke", f"{name}, tensors > {LARGE_MB} MB: share of a copy's bandwidth", "-", of_a_pass(name))
      for name in ("moments", "normalize", "grad_sums", "grad_input")),
    Row("smoke", "the same where C or S is not divisible by 8", "-", narrow),
    Row("op", f"forward + backward, tensors > {LARGE_MB} MB: share of a copy's bandwidth on 8, 8, 10 passes",
        f"at least {WANTED_OF_COPY}", of_copy),
    Row("op", "torch.nn.SyncBatchNorm + ReLU, and + add + ReLU, over ours", "at least 1.5", torch_over_ours),
    Row("step", "host time of a layer, tiny tensors, of torch.nn.SyncBatchNorm's", "at most 0.6", layer("host")),
    Row("step", "a layer at 8 images, eager, of torch.nn.SyncBatchNorm's time", "at most 0.6", layer("layer")),
    Row("step", "host waits in a step", "0", counts("waits", OURS)),
    Row("step", "kernels in a step", "-", counts("kernels", ("local", "torch", *OURS))),
    Row("step", "32 images: step of local batch norm, with fusion or as a graph", "at most 1.03",
        ratios(("fused", "syncbn graph", "fused graph"), "local")),
    Row("step", "32 images: step of torch.nn.SyncBatchNorm over ours", "at least 1.15",
        ratios(("syncbn", "fused"), "torch", inverse=True)),
    Row("step", "32 images: peak memory, MiB", "below torch's", counts("memory_mib", ("torch", "syncbn", "fused"))),
    Row("drift", "a step of ResNet-50 with drift at level image, of one without", "at most 1.02", drift),
]  # fmt: skip


def results(steps: dict[str, Found]) -> str:
    """RESULTS.md's table."""
    lines = ["| step | figure | wanted | found |", "|---|---|---|---|"]
    for row in ROWS:
        found = steps.get(row.step, {}).get("found")
        lines.append(f"| {row.step} | {row.figure} | {row.wanted} | {(found and row.read(found)) or UNKNOWN} |")
    return "\n".join(lines)


def summary(steps: dict[str, Found], folder: Path) -> str:
    """What became of each step, with the last line of its log where it failed."""
    lines = []
    for name, step in steps.items():
        log = folder / f"{name}.log"
        said = log.read_text().strip().splitlines()[-1:] if log.exists() else []
        became = {0: "ok", 124: "OUT OF TIME", 137: "OUT OF TIME"}.get(step["code"], f"FAILED ({step['code']})")
        lines.append(
            f"{name:<8}{became:<14}{step['seconds']:4} s of {step['limit_s']:3} s  {''.join(said)[:80]}".rstrip()
        )
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("gpu-results"))
    folder = parser.parse_args(given).folder
    if not (folder / "results.jsonl").exists():
        parser.error(f"{folder}/results.jsonl is not there: `make gpu` makes it")
    steps = read(folder)
    machines = [step["found"]["machine"] for step in steps.values() if step["found"] and "machine" in step["found"]]
    print(*machines[:1], results(steps), summary(steps, folder), f"logs: {folder}/", sep="\n\n")


if __name__ == "__main__":
    main()
