"""Tables that set gdr beside other libraries, computed from the rows of a data file."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable
from typing import Any

Rows = list[dict[str, Any]]

STREAM = "in-place stream"  # no library: a plain kernel over as many bytes
LARGE = 128  # sequences from which on decoding is set beside it


def own(impl: str) -> bool:
    """Whether it is gdr's."""
    return impl.startswith("gdr")


def microseconds(row: dict[str, Any]) -> float:
    """The time of a row."""
    return float(row["us"] if "us" in row else 1e3 * row["ms"])


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table whose numbers stand to the right."""
    head = list(head)
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def impls(rows: Rows) -> tuple[list[str], list[str]]:
    """gdr's names, and those of other libraries."""
    names = sorted({row["impl"] for row in rows} - {STREAM})
    return [name for name in names if own(name)], [name for name in names if not own(name)]


def _times(rows: Rows) -> dict[tuple[Any, ...], dict[str, float]]:
    """Times by case, and length where there is one, and by implementation."""
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        case = (row["case"], row["T"]) if "T" in row else (row["case"],)
        times.setdefault(case, {})[row["impl"]] = microseconds(row)
    return times


def ratios(rows: Rows, ours: str, other: str | None) -> list[float]:
    """The time of `ours` over that of another, or of the fastest other one, in each case that both ran."""
    found = []
    for times in _times(rows).values():
        others = [us for impl, us in times.items() if (impl == other if other else not own(impl) and impl != STREAM)]
        if ours in times and others:
            found.append(times[ours] / min(others))
    return found


def _spread(values: list[float], form: str) -> str:
    """The geometric mean, and between what the values lie."""
    mean = math.exp(statistics.fmean(map(math.log, values)))
    if len(values) == 1:
        return f"{mean:{form}}"
    # Word joiners: a narrow cell breaks before the bracket, not in it.
    return f"{mean:{form}} ({min(values):{form}}\u2060–\u2060{max(values):{form}})"


def ratio_table(suites: dict[str, Rows]) -> str:
    """gdr's times over those of other libraries, a row for each suite and each of gdr's ways."""
    everyone = impls([row for rows in suites.values() for row in rows])[1]
    if not everyone:
        return ""
    against: list[str | None] = [None, *everyone] if len(everyone) > 1 else [*everyone]
    lines = []
    for suite, rows in suites.items():
        ours, others = impls(rows)
        for impl in ours if others else []:
            found = [ratios(rows, impl, other) for other in against]
            cases = len(found[0])
            cells = [_spread(x, ".2f") + (f"; {len(x)} cases" if len(x) < cases else "") if x else "" for x in found]
            lines.append([f"{suite}, {impl}", str(cases), *cells])
    head = ["", "cases", *(other or "the fastest" for other in against)]
    return (
        "Time of gdr over that of other libraries, and of the fastest of them in each case: the geometric mean of the\n"
        f"cases that both ran, and in brackets the smallest and the largest.\n\n{table(head, lines)}"
    )


def missing(suites: dict[str, Rows]) -> str:
    """What has no time in some cases."""
    gaps = []
    for suite, rows in suites.items():
        ours, others = impls(rows)
        for impl in [*ours, *others] if others else []:
            without = [case for case, times in _times(rows).items() if impl not in times]
            if without:
                cases = ", ".join(f"{name} at {T[0]:,} tokens" if T else name for name, *T in without)
                gaps.append(f"{impl}, {suite}: {cases}")
    return f"Without a time, where a library failed or the run ended first: {'; '.join(gaps)}.\n" if gaps else ""


def call_table(rows: Rows) -> str:
    """What an eager call costs the host, and the largest errors, by implementation."""
    ours, others = impls(rows)
    if not others or not any("host_us" in row for row in rows):
        return ""

    def dtype(row: dict[str, Any]) -> str:
        last = row["case"].split()[-1]
        return f"{last} states" if "float" in last and "T" not in row else "states"

    kinds = list(dict.fromkeys(dtype(row) for row in rows if "err_h" in row))
    lines = []
    for impl in [*ours, *others]:
        of = [row for row in rows if row["impl"] == impl]
        host = [row["host_us"] for row in of if "host_us" in row]
        errors = [[row["err_o"] for row in of if "err_o" in row]]
        errors += [[row["err_h"] for row in of if "err_h" in row and dtype(row) == kind] for kind in kinds]
        cells = [f"{max(found):.1e}" if found else "" for found in errors]
        lines.append([impl, f"{statistics.median(host):.3g}" if host else "", *cells])
    head = ["", "host, us", "error of outputs", *(f"of {kind}" for kind in kinds)]
    return (
        "What a call costs the host before it returns, the median of all cases, and the largest relative RMS errors\n"
        f"against float64 of those for which it was computed.\n\n{table(head, lines)}"
    )


def stream_table(rows: Rows, ceilings: dict[str, float]) -> str:
    """The bandwidth of large batches beside that of a plain kernel."""
    times = _times(rows)
    plain = {(row["case"],): row for row in rows if row["impl"] == STREAM and "GBps" in row}
    large = [case for case in plain if int(re.search(r"B=(\d+)", case[0])[1]) >= LARGE]  # type: ignore[index]
    whole = ceilings.get("in_place_GBps")
    lines, shares = [], []
    for case in large:
        ours = min((us for impl, us in times[case].items() if own(impl)), default=None)
        if ours is None:
            continue
        rate, share = plain[case]["GBps"], plain[case]["us"] / ours
        shares.append(share)
        lines.append([case[0], f"{rate:,.0f}", f"{rate * share:,.0f}", f"{share:.1%}"])
        if whole:
            lines[-1].append(f"{rate * share / whole:.1%}")
    if not lines:
        return ""
    head = ["", "plain kernel, GB/s", "gdr, GB/s", "share", *(["share of 2 GiB's"] if whole else [])]
    over = f"; over 2 GiB at once it reaches {whole:,.0f} GB/s" if whole else ""
    return (
        f"Bytes of states read and written a second from B = {LARGE} on, in the faster of gdr's layouts, and by the\n"
        f"plain kernel over as many bytes{over}. gdr's share is {_spread(shares, '.1%')}.\n\n{table(head, lines)}"
    )


def length_table(rows: Rows) -> str:
    """Times by length, in microseconds, where other libraries were timed as well."""
    ours, others = impls(rows)
    if not others:
        return ""
    names, times = [*ours, *others], _times(rows)
    lines = [
        [f"{T:,}", *(f"{times[case, T][name]:,.4g}" if name in times[case, T] else "" for name in names)]
        for case, T in sorted(times)
    ]
    return f"In microseconds:\n\n{table(['tokens', *names], lines)}"


def slowest_table(rows: Rows) -> str:
    """The slowest step of a period over the mean, by batch."""
    found: dict[str, dict[str, float]] = {}
    batches: dict[str, None] = {}
    for row in rows:
        if "ring" in row["impl"] and "worst" in row:
            batch, dtype = row["case"].split()[-2:]
            batches[batch] = None
            found.setdefault(f"{dtype}, {row['impl'].removeprefix('gdr ')}", {})[batch] = row["worst"] / row["us"]
    if not found:
        return ""
    lines = [[name, *(f"{by[b]:.2f}" if b in by else "" for b in batches)] for name, by in found.items()]
    return f"The slowest step of a period over the mean:\n\n{table(['', *batches], lines)}"
