"""What one GPU does: plain loops, clients in one step, engines with and without offloading, three tiers on Ray.

    python jobs/benchmarks/gpu.py [ROW ...] [--quick] [--device cpu] [--seconds 480] [--output .bench/gpu]

The model is a Llama decoder of 1.1 billion random parameters in bfloat16, with LoRA of rank 8 on query and value, and
sequences of 128 tokens; a client takes 8 steps. Rows are measured one after another, in processes of their own (those
that share a model share one), and are written to gpu.json and gpu.md as soon as they are there. A row that fails says
so, and so do those that the time did not suffice for. A positional argument selects the rows that contain it. With
--quick everything is tiny. docs/gpu.md says what the rows mean.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from os import environ, pathsep
from pathlib import Path
from subprocess import STDOUT, Popen, TimeoutExpired
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from measure import ENVIRONMENT, adopt_orphans, end_descendants

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "ray")
RATE = "matrix products in bfloat16"
OPERATIONS = 4
"""Per parameter and token: one product forward and one backward, since the base model is frozen."""
GIB = 2**30

COLUMNS = ("row", "ms per client", "compared", "of the rate", "peak, GiB", "predicted", "predicted / peak", "")


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        decoder: fields of the model's configuration.
        tokens: of every sequence.
        steps: of every client.
        batches: of the plain loop and of clients in one step.
        widths: clients in one step, with the first batch size; the last one also with the others.
        engine_batch: of engines and tiers.
        matrix: rows of the square matrices whose product is timed.
        repeats: whose median counts, after one that warms up.
    """

    decoder: Mapping[str, Any]
    tokens: int = 128
    steps: int = 8
    batches: tuple[int, ...] = (1, 2, 8)
    widths: tuple[int, ...] = (1, 4, 16, 32)
    engine_batch: int = 4
    matrix: int = 8192
    repeats: int = 3


LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
}
"""1.1 billion parameters."""
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 300}
WHOLE = Sizes(LLAMA)
QUICK = Sizes({**LLAMA, **TINY}, 16, 2, (1, 2), (1, 2, 3), 2, 64, 1)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        measure: name of the function in gpu_rows.py.
        options: its arguments.
        reference: the row whose time is divided by this one's.
        process: rows with the same name share a process; default: the row has one of its own.
    """

    name: str
    measure: str
    options: Mapping[str, Any] = field(default_factory=dict)
    reference: str = ""
    process: str = ""


def all_rows(sizes: Sizes) -> list[Row]:
    """Return every row, in the order in which they are measured."""
    first, *others = sizes.batches
    plain = {batch: f"plain peft loop, batch {batch}" for batch in sizes.batches}
    rows = [Row(RATE, "matrix_rate", process="plain")]
    rows += [Row(name, "plain_loop", {"batch": batch}, process="plain") for batch, name in plain.items()]
    for batch, width in [*((first, width) for width in sizes.widths), *((b, sizes.widths[-1]) for b in others)]:
        how = f"{width} clients in one step" if width > 1 else "one by one"
        options = {"batch": batch, "width": width}
        rows.append(Row(f"fedavg, batch {batch}, {how}", "fedavg", options, plain[batch], "fedavg"))
    rows.append(Row(f"fedavg, batch {first}, as many as fit", "fedavg", {"batch": first}, plain[first], "fedavg"))
    host, params = {"optimizer": "cpu"}, {"params": "cpu"}
    engines: list[tuple[str, Any, str]] = [
        ("torch", None, ""),
        ("ZeRO-0", "none", "engine torch"),
        ("ZeRO-2, Adam on the host", host, "plain DeepSpeed, ZeRO-2"),
        ("ZeRO-3, all on the host", params, "plain DeepSpeed, ZeRO-3"),
    ]
    rows += [Row(f"engine {name}", "engine", {"offload": offload}, other) for name, offload, other in engines]
    rows += [
        Row("plain DeepSpeed, ZeRO-2", "plain_deepspeed", {"offload": host}),
        Row("plain DeepSpeed, ZeRO-3", "plain_deepspeed", {"offload": params}),
        Row("base model held once", "shared_base"),
        Row("three tiers on Ray, four actors", "three_tiers"),
        Row("plain DeepSpeed, ZeRO-3, its own limits", "plain_deepspeed", {"offload": params, "sized": False}),
    ]
    return rows


def measure_rows(
    rows: Sequence[Row], sizes: Sizes, device: str, seconds: float, save: Callable[[dict[str, Any]], None]
) -> None:
    """Measure rows, process by process. Kills every descendant of this process: for a program that does nothing else.

    Args:
        seconds: for all of them together; what is not there by then is not measured.
        save: is called with all results so far, by row, whenever there are more.
    """
    adopt_orphans()
    deadline = monotonic() + seconds
    results: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        for process in dict.fromkeys(row.process or row.name for row in rows):
            mine = [row for row in rows if process in (row.process, row.name)]
            for name, fields in _in_a_process(mine, sizes, device, Path(folder), deadline):
                results[name] = fields
                save(results)


def _in_a_process(
    rows: Sequence[Row], sizes: Sizes, device: str, folder: Path, deadline: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the result of each row."""
    missing = [row.name for row in rows]
    if monotonic() < deadline:
        task = {"rows": [asdict(row) for row in rows], "sizes": asdict(sizes), "device": device, "folder": str(folder)}
        lines, log = folder / "results", folder / "output"
        lines.write_text("")
        own = {**environ, **ENVIRONMENT, "PYTHONPATH": pathsep.join(map(str, (ROOT, HERE)))}
        own |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        own.pop("RAY_ADDRESS", None)
        with log.open("w") as stdout:
            command = [sys.executable, str(HERE / "gpu_rows.py"), json.dumps(task), str(lines)]
            process = Popen(command, env=own, stdout=stdout, stderr=STDOUT)
            try:
                while process.poll() is None and monotonic() < deadline:
                    with suppress(TimeoutExpired):
                        process.wait(0.5)
                    yield from _read(lines, missing)
            finally:
                ended = process.poll()
                end_descendants()
        yield from _read(lines, missing)
        if ended is not None:
            last = (log.read_text(errors="replace").strip() or "no output").splitlines()[-1]
            yield from ((name, {"error": f"the process ended with {ended}: {last}"}) for name in missing)
            return
    yield from ((name, {"error": "not measured: the time was up"}) for name in missing)


def _read(lines: Path, missing: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the results that a process has written since the last call."""
    for line in lines.read_text().splitlines(keepends=True):
        if line.endswith("\n") and (found := json.loads(line))["row"] in missing:
            missing.remove(found["row"])
            yield found.pop("row"), found


def page(rows: Sequence[Row], results: Mapping[str, Any], sizes: Sizes, place: str) -> str:
    """Return the table in Markdown.

    Args:
        results: by row; rows without a result are left out.
        place: where and when it was measured.
    """
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(_cells(row, results, sizes))} |" for row in rows if row.name in results]
    shares = {row.name: _share(row, results, sizes) or 0.0 for row in rows if row.measure == "fedavg"}
    best = max(shares, key=lambda name: shares[name], default="")
    summary = f"\nThe best width: {best}, with {shares[best]:.0%} of the measured rate.\n" if shares.get(best) else ""
    return f"Measured {place}.\n\n" + "\n".join(lines) + "\n" + summary


def _cells(row: Row, results: Mapping[str, Any], sizes: Sizes) -> list[str]:
    found = results[row.name]
    ms, peak, predicted = (found.get(name) for name in ("client_ms", "peak", "predicted"))
    reference = results.get(row.reference, {}).get("client_ms")
    share = _share(row, results, sizes)
    return [
        row.name,
        f"{ms:,.4g}" if ms else "",
        f"{reference / ms:.3g} × {row.reference}" if ms and reference else "",
        f"{share:.1%}" if share else "",
        f"{peak / GIB:.3g}" if peak else "",
        f"{predicted / GIB:.3g}" if predicted else "",
        f"{predicted / peak:.2f}" if predicted and peak else "",
        f"failed: {found['error']}".replace("|", "/") if "error" in found else found.get("note", ""),
    ]


def _share(row: Row, results: Mapping[str, Any], sizes: Sizes) -> float | None:
    """Return the rate of a client's matrix products as a share of the measured one."""
    found, rate = results.get(row.name, {}), results.get(RATE, {}).get("rate")
    if not rate or "batch" not in row.options or "client_ms" not in found:
        return None
    tokens = row.options["batch"] * sizes.steps * sizes.tokens
    operations: float = OPERATIONS * found["parameters"] * tokens
    return operations / (found["client_ms"] / 1000) / float(rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="rows that contain one of these; default all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=480.0, help="for all rows together")
    parser.add_argument("--output", type=Path, default=ROOT / ".bench" / "gpu", help="folder of gpu.json and gpu.md")
    args = parser.parse_args()
    sizes = QUICK if args.quick else WHOLE
    rows = [row for row in all_rows(sizes) if not args.rows or any(word in row.name for word in args.rows)]
    args.output.mkdir(parents=True, exist_ok=True)
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    shown: set[str] = set()

    def save(results: dict[str, Any]) -> None:
        device = next((found["device"] for found in results.values() if "device" in found), args.device)
        place = f"on {date.today()} on {device}; {libraries}"
        text = page(rows, results, sizes, place)
        whole = {"place": place, "sizes": asdict(sizes), "rows": results}
        (args.output / "gpu.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        (args.output / "gpu.md").write_text(text, encoding="utf-8")
        for row in rows:
            if row.name in results and row.name not in shown:
                shown.add(row.name)
                cells = zip(COLUMNS[1:], _cells(row, results, sizes)[1:], strict=True)
                print(f"{row.name}: " + ", ".join(f"{name} {cell}".strip() for name, cell in cells if cell), flush=True)

    measure_rows(rows, sizes, args.device, args.seconds, save)
    print((args.output / "gpu.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
