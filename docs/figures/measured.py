"""Plots of measurements, drawn from docs/data.

``numerics-*.json`` are written by docs/measure_numerics.py, ``deferral-*.json`` by docs/measure_deferral.py,
``reliability-*.json`` by docs/measure_reliability.py, ``serving-*.json`` by docs/measure_serving.py, ``kernels-*.json``
by docs/measure_kernels.py.
``performance-*.json`` hold rows with a ``suite``, a ``case``, an ``impl`` and its time (``us`` or ``ms``), and the
``device`` they were taken on; a suite whose rows have a ``T`` is drawn as time against length
(docs/measure_prefill.py).  Steps and drafts on a ring (docs/measure_ring.py) are drawn beside the times that other
libraries have for the same cases in another file of the device.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from figures import compared
from figures.compared import STREAM
from figures.style import BLUE, GREEN, ORANGE, RED

DATA = Path(__file__).resolve().parents[1] / "data"
LIBRARIES = {"FlashInfer": ORANGE, "SGLang": GREEN, "FlashQLA": RED, "FLA": "#9467bd", "ggml": ORANGE}
COLORS = (GREEN, RED, "#8c564b", "#7f7f7f")
BESIDE = {"deferral": "decode", "drafts": "verify"}  # suites on a ring, and in place
NAMES = {"numpy": "NumPy", "numba": "Numba", "cuda": "CUDA"}


def _load(pattern: str) -> dict[str, dict[str, Any]]:
    paths = sorted(DATA.glob(pattern), key=lambda path: path.stem)
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def figures() -> dict[str, Figure]:
    """Every plot that the data at hand allow, by name."""
    drawn = {name: _numerics(data) for name, data in _load("numerics-*.json").items()}
    drawn |= {name: _deferral(data) for name, data in _load("deferral-*.json").items()}
    drawn |= {name: _serving(data) for name, data in _load("serving-*.json").items()}
    for name, data in _performance_files().items():
        for suite, rows in _suites(data).items():
            if suite not in _TABLES:
                drawn[f"{name}-{suite}"] = _sweep(rows) if "T" in rows[0] else _performance(rows)
    return drawn


def numerics_page() -> str:
    """A section for each backend whose errors were measured."""
    parts = [
        f"### {NAMES[data['backend']]}\n\n```{{figure}} /_build/figures/{name}.svg\n"
        f":alt: Relative error by length for each dtype, {NAMES[data['backend']]}\n```\n\n{_provenance(data)}\n"
        for name, data in _load("numerics-*.json").items()
    ]
    return "\n".join(parts)


def deferral_page() -> str:
    """A figure for each backend on which states were followed for many steps."""
    return "\n".join(
        f"```{{figure}} /_build/figures/{name}.svg\n"
        f":alt: Relative error of states by steps, in place and deferred, {NAMES[data['backend']]}\n```\n\n"
        f"{NAMES[data['backend']]}: {_provenance(data)}\n"
        for name, data in _load("deferral-*.json").items()
    )


def reliability_page() -> str:
    """A table of what was tried, with a column for each backend."""
    runs = list(_load("reliability-*.json").values())
    if not runs:
        return "No run has been committed yet.\n"
    lines: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        ("seconds of load, over threads", lambda r: f"{r['load']['seconds']:g}, {r['load']['threads']}"),
        ("sequences that came and left", lambda r: r["load"]["departures"]),
        ("of them forked from another", lambda r: r["load"]["forks"]),
        ("tokens", lambda r: r["load"]["tokens"]),
        ("times the pool was saved and loaded under way", lambda r: r["load"]["reloads"]),
        ("sequences run again in float64", lambda r: r["load"]["replays"]),
        ("largest relative error of one", lambda r: f"{r['load']['worst']:.1e}"),
        ("growth of memory, MiB", lambda r: r["load"]["growth_mib"]),
        ("growth of the device's, MiB", lambda r: r["load"]["device_growth_mib"] if r["backend"] == "cuda" else "-"),
        ("random sequences of operations on a pool", lambda r: r["model"]["examples"]),
        ("operations in them", lambda r: r["model"]["operations"]),
        ("random calls refused by name", lambda r: sum(x["refused"] for x in r["fuzz"].values())),
        ("random calls answered as the reference does", lambda r: sum(x["answered"] for x in r["fuzz"].values())),
    ]
    rows = [[words, *(_thousands(count(run)) for run in runs)] for words, count in lines]
    table = compared.table(["", *(NAMES[run["backend"]] for run in runs)], rows)
    return table + "".join(f"\n{NAMES[run['backend']]}: {_provenance(run)}\n" for run in runs)


def kernels_page() -> str:
    """A table of calls and of their kernels alone, for each device on which they were timed."""
    files = _load("kernels-*.json").values()
    return "\n".join(f"{data['note']}\n\n{_provenance(data)}\n\n{_kernels(data['rows'])}" for data in files)


def _kernels(rows: list[dict[str, Any]]) -> str:
    calls = {row["case"]: row for row in rows if "kernel" not in row}
    lines = []
    for case, call in calls.items():
        kernels = [
            f"{row['kernel']} {row['us']:.3g} ({row['us'] / call['us']:.0%})"
            if "us" in row
            else f"{row['kernel']} beside"
            for row in rows
            if row["case"] == case and "kernel" in row
        ]
        lines.append([case, f"{call['floor_us']:.3g}", f"{call['us']:.3g}", ", ".join(kernels)])
    return compared.table(["", "floor, us", "call, us", "kernels alone, us, and their share of the call"], lines)


def _thousands(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _time(us: float) -> str:
    return f"{us:.3g} us" if us < 1e3 else f"{us / 1e3:,.3g} ms" if us < 1e5 else f"{us / 1e3:,.0f} ms"


def page() -> str:
    """A section for each file of times."""
    files = _performance_files()
    gpu = {name: data for name, data in files.items() if data["device"].startswith("NVIDIA")}
    parts = [part for name, data in gpu.items() for part in _times(name, data)]
    for name, data in _load("serving-*.json").items():
        parts.append(
            f"## {data['device']}, continuous batching\n\n{data['note']}\n\n{_provenance(data)}\n\n"
            f"```{{figure}} /_build/figures/{name}.svg\n"
            f":alt: Tokens a second by the most sequences at a time, {data['device']}\n```"
        )
    parts += [part for name, data in files.items() if name not in gpu for part in _times(name, data)]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _times(name: str, data: dict[str, Any]) -> list[str]:
    """What the page shows of a file of times."""
    suites = {suite: rows for suite, rows in _suites(data).items() if suite not in _TABLES}
    title = ", ".join(filter(None, (data["device"], data.get("title"))))
    parts = [f"## {title}", data.get("note", ""), _provenance(data), data.get("beside", "")]
    parts += [compared.ratio_table(_with_batches(suites)), compared.missing(suites)]
    parts.append(compared.call_table([row for rows in suites.values() for row in rows]))
    for suite, rows in _suites(data).items():
        if suite in _TABLES:
            parts.append(_TABLES[suite](rows))
            continue
        what = "Time against length" if "T" in rows[0] else suite.capitalize()
        parts.append(
            f"### {what}\n\n```{{figure}} /_build/figures/{name}-{suite}.svg\n"
            f":alt: Times of gdr and its peers, {suite}, {title}\n```"
        )
        if suite == "deferral":
            parts.append(compared.slowest_table(rows))
        if "T" in rows[0]:
            parts += [compared.length_table(rows), _invariance_table(rows)]
        parts.append(compared.stream_table(rows, data.get("ceilings", {})))
    return parts


def _with_batches(suites: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Also steps on a ring without those of one sequence, which has no other to take turns with."""
    found = {}
    for suite, rows in suites.items():
        found[suite] = rows
        if suite == "deferral":
            found["deferral without B=1"] = [row for row in rows if " B=1 " not in f" {row['case']} "]
    return found


def _performance_files() -> dict[str, dict[str, Any]]:
    """The files of times, with other libraries' times beside those on a ring."""
    files = _load("performance-*.json")
    for data in files.values():
        for suite, in_place in BESIDE.items():
            cases = {row["case"] for row in data["rows"] if row.get("suite") == suite}
            for other in files.values():
                if other["device"] != data["device"]:
                    continue
                # What a call costs the host and how exact it is stays with that file.
                rows = [
                    {"suite": suite, "case": row["case"], "impl": row["impl"], "us": row["us"]}
                    for row in other["rows"]
                    if row.get("suite") == in_place
                    and row["case"] in cases
                    and row["impl"] != STREAM
                    and not compared.own(row["impl"])
                ]
                if rows:
                    data["rows"] += rows
                    title = other.get("title", "another run")
                    data["beside"] = f"The times of other libraries are those of “{title}”, taken on {other['date']}."
    return files


def _provenance(data: dict[str, Any]) -> str:
    """When and with what the times of a file were taken."""
    versions = dict(data.get("versions", {}))
    if "driver" in data:
        versions["driver"] = data["driver"]
    what = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"Taken on {data['date']} on {data['device']} by `{data['command']}`: {what}."


def _numerics(data: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    series = defaultdict(list)
    for row in data["rows"]:
        series[row["dtype"], row["operation"], row["gates"]].append(row)
    colors = {"float32": BLUE, "float16": GREEN, "bfloat16": ORANGE}
    for axis, key, title in zip(axes, ("o", "h"), ("outputs", "final states (float32)")):
        for (dtype, operation, gates), rows in series.items():
            if gates != "ordinary":
                continue
            style = "-" if operation == "chunk" else "--"
            lengths, errors = [row["length"] for row in rows], [row[key] for row in rows]
            axis.plot(lengths, errors, style, marker="o", ms=3, color=colors[dtype], label=f"{dtype}, {operation}")
        axis.set(title=title, xlabel="tokens", xscale="log", yscale="log", ylim=(3e-8, 1e-2))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative RMS error against float64")
    axes[1].legend(frameon=False, fontsize=8, ncols=2)
    return figure


def _deferral(data: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = {"slow": "slow decay", "ordinary": "ordinary decay", "fast": "fast decay"}
    axes = figure.subplots(1, len(panels), sharey=True)
    colors = {"float32": BLUE, "float16": GREEN, "bfloat16": ORANGE}
    series = defaultdict(list)
    for row in data["rows"]:
        series[row["gates"], row["dtype"], row["ring"]].append(row)
    for axis, (gates, title) in zip(axes, panels.items()):
        for (regime, dtype, ring), rows in series.items():
            if regime == gates:
                steps, errors = [row["steps"] for row in rows], [row["error"] for row in rows]
                label = f"{dtype}, {f'ring={ring}' if ring else 'in place'}"
                axis.plot(steps, errors, "-" if ring else "--", marker="o", ms=3, color=colors[dtype], label=label)
        axis.set(title=title, xlabel="steps", xscale="log", yscale="log", ylim=(3e-8, 5e-2))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative RMS error of the state")
    axes[-1].legend(frameon=False, fontsize=8, loc="center", bbox_to_anchor=(0.5, 0.38))
    return figure


CHUNKWISE, CHOSEN, INVARIANT = "gdr chunkwise", "gdr prefill", "gdr batch_invariant=True"


def _host_table(rows: list[dict[str, Any]]) -> str:
    lines = "".join(f"| {row['case']} | {_time(row['us'])} |\n" for row in rows)
    return f"### Cost of a call to the host\n\n| | |\n|---|---:|\n{lines}"


def _packed_table(rows: list[dict[str, Any]]) -> str:
    """Packed sequences of few tokens on average, by both forms and as they are called."""
    times = {(row["case"], row["impl"]): row["us"] for row in rows}
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    lines = [
        [case, *(_time(times[case, impl]) for impl in impls)] for case in dict.fromkeys(row["case"] for row in rows)
    ]
    table = compared.table(["tokens", *impls], lines)
    return f"### Packed sequences of few tokens on average\n\n{table}"


# Suites that have a table and no plot.
_TABLES = {"host": _host_table, "packed": _packed_table}


def _invariance_table(rows: list[dict[str, Any]]) -> str:
    """How much longer calls take with batch_invariant=True, by case and length."""
    times = {(row["case"], row["T"], row["impl"]): row["us"] for row in rows}
    lengths = sorted({T for _, T, impl in times if impl == INVARIANT})
    if not lengths:
        return ""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    lines = []
    for T in lengths:
        pairs = [(times.get((case, T, INVARIANT)), times.get((case, T, CHUNKWISE))) for case in cases]
        lines.append([_thousands(T), *(f"{x / y:.2f}" if x and y else "" for x, y in pairs)])
    table = compared.table(["tokens", *cases], lines)
    return f"Time with `batch_invariant=True`, relative to without:\n\n{table}"


def _sweep(rows: list[dict[str, Any]]) -> Figure:
    """Time against length, a panel for each case; dots for what is chosen."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    impls = sorted(dict.fromkeys(row["impl"] for row in rows), key=lambda impl: not compared.own(impl))
    colors = _colors(impls)
    styles: dict[str, dict[str, Any]] = {
        CHUNKWISE: {"color": BLUE},
        "gdr recurrent": {"color": "#6baed6", "linestyle": "--"},
        INVARIANT: {"color": BLUE, "linestyle": ":"},
        CHOSEN: {"color": "0.1", "linestyle": "", "marker": "o", "markersize": 3},
    }
    styles |= {impl: {"color": colors[impl], "linewidth": 1.2} for impl in impls if impl not in styles}
    across = min(2, len(cases))
    down = -(-len(cases) // across)
    figure = Figure(figsize=(9, 3.4 * down + 0.6), layout="constrained")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat
    for axis, case in zip(panels, cases):
        for impl in impls:
            points = sorted((row["T"], row["us"]) for row in rows if (row["case"], row["impl"]) == (case, impl))
            if points:
                axis.plot(*zip(*points), **styles[impl], label=impl)
        axis.set(title=case, xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    for axis in figure.axes[-across:]:
        axis.set_xlabel("tokens of the sequence")
    for axis in figure.axes[::across]:
        axis.set_ylabel("microseconds")
    handles = {label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(
        handles.values(),
        handles.keys(),
        frameon=False,
        fontsize=9,
        loc="outside upper center",
        ncols=min(4, len(handles)),
    )
    return figure


def _serving(data: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    dtypes = list(dict.fromkeys(row["dtype"] for row in data["rows"]))
    series: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in data["rows"]:
        series[row["dtype"]][row["impl"]].append(row)
    for axis, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False)[0], dtypes):
        colors = _colors(series[dtype])
        for impl, rows in series[dtype].items():
            limits, rates = [row["limit"] for row in rows], [row["tokens_per_second"] for row in rows]
            axis.plot(limits, rates, marker="o", ms=3, label=impl, color=colors[impl])
        axis.set(title=f"{dtype} states", xlabel="most sequences at a time", xscale="log", ylim=(0, None))
        axis.set_xticks(limits, [str(limit) for limit in limits])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.set_ylabel("tokens a second")
    axis.legend(frameon=False, fontsize=8)
    return figure


def _suites(data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    suites = defaultdict(list)
    for row in data["rows"]:
        if "us" in row or "ms" in row:
            suites[row.get("suite") or row["case"].split()[0]].append(row)
    return dict(suites)


_LONGEST = 8.0  # a bar beyond this many times the fastest is cut, and says so


def _performance(rows: list[dict[str, Any]]) -> Figure:
    """Horizontal bars by case, this library's in blue: how many times the fastest time of the case each
    takes."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    ours, others = compared.impls(rows)
    impls = [*ours, *others]
    colors = _colors(impls)
    # Inches: a bar, and a gap of one bar between cases; above them the legend, below them the axis.
    bars = len(cases) * (len(impls) + 1)
    figure = Figure(figsize=(7.5, 0.17 * bars + 1.1), layout="constrained")
    axis = figure.subplots()
    handles = {impl: _bar(color) for impl, color in colors.items()}
    for i, case in enumerate(cases):
        times = {row["impl"]: compared.microseconds(row) for row in rows if row["case"] == case}
        stream = times.pop(STREAM, None)
        best, first = min(times.values()), i * (len(impls) + 1)
        line = stream / best if stream else None
        for j, impl in enumerate(impls):
            if impl in times:
                y, ratio = first + j, times[impl] / best
                label = _time(times[impl]) if ratio <= _LONGEST else f"{_time(times[impl])}, {ratio:.0f} times"
                axis.barh(y, min(ratio, _LONGEST), color=colors[impl])
                end = line if line and ratio < line < ratio + 0.5 else min(ratio, _LONGEST)
                axis.text(end, y, f" {label}", va="center", fontsize=8)
        if line:
            ends = (first - 0.5, first + len(impls) - 0.5)
            (handles[STREAM],) = axis.plot((line, line), ends, color="0.1", linewidth=1.5)
    axis.set_yticks([i * (len(impls) + 1) + (len(impls) - 1) / 2 for i in range(len(cases))], cases, fontsize=9)
    axis.set(xlabel="time, relative to the fastest of the case (shorter is better)", ylim=(bars - 1, -1))
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        list(handles.values()), list(handles), frameon=False, fontsize=9,
        loc="outside upper center", ncols=min(4, len(handles)),
    )  # fmt: skip
    return figure


def _colors(impls: Iterable[str]) -> dict[str, str]:
    """Blue for this library's ways; each other library has a color of its own."""
    rest, blues = iter(COLORS * 3), iter((BLUE, "#6baed6", "#c6dbef", "#08306b") * 3)
    return {
        impl: next(blues) if compared.own(impl) else LIBRARIES[impl] if impl in LIBRARIES else next(rest)
        for impl in impls
    }


def _bar(color: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color)
