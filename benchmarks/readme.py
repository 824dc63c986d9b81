"""Fills the tables of README.md from `benchmarks/results`, so that no number there is typed.

python -m benchmarks.readme          # rewrite the tables
python -m benchmarks.readme check    # fail if one is out of date
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.fit_speed import PARTS
from benchmarks.record import RESULTS, ROOT
from data.tables import format_table
from predictors.fit.report import summary_rows

README = ROOT / "README.md"
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _where(result: dict[str, Any]) -> str:
    told = result["circumstances"]
    return f"`{told['command']}` on {told['hardware']}, commit {told['commit'][:10]}."


def _demo(result: dict[str, Any]) -> str:
    table = format_table(*summary_rows(result["evaluation"]))
    return (
        f"```text\n{table}\n```\n\n"
        f"{result['first_s']:.0f} s the first time, {result['second_s']:.0f} s the second, "
        f"installs apart. {_where(result)}"
    )


def _embedders(result: dict[str, Any]) -> str:
    rows = [row for row in result["results"] if row["split_by"] == "topic"]
    cells = [
        [
            " ".join(filter(None, [row["predictor"], row["embedder"] and f"({row['embedder']})"])),
            row["variant"],
            *(_mean(row[name]) for name in ("recall@4", "recall@8")),
        ]
        for row in rows
    ]
    table = markdown(["predictor", "search", "recall@4", "recall@8"], cells)
    return f"{table}\n\nMean (sd) over {len(result['seeds'])} splits by topic. {_where(result)}"


def _simulate(result: dict[str, Any]) -> str:
    slots = sorted({row["slots"] for row in result["results"]})
    hits = {(row["policy"], row["slots"]): row["hit_ratio"] for row in result["results"]}
    policies = dict.fromkeys(row["policy"] for row in result["results"])
    table = markdown(
        ["hit ratio, slots of 32", *map(str, slots)],
        [[policy, *(_percent(hits[policy, count]) for count in slots)] for policy in policies],
    )
    wall_s = result["wall_s"]
    return (
        f"{table}\n\nAll 98,777 tokens, {len(policies)} policies and {len(slots)} budgets in "
        f"{wall_s['median']:.0f} s ({wall_s['min']:.0f} to {wall_s['max']:.0f} s in "
        f"{wall_s['repeats']} runs), peak {result['peak_rss_bytes'] / 2**20:.0f} MiB. "
        f"{_where(result)}"
    )


def _recorded_truth(result: dict[str, Any]) -> str:
    table = markdown(
        ["recorded run", "budget", "recorded", "replayed", "same residency", "LFRU", "Belady"],
        [
            [
                row["model"],
                f"{row['budget_bytes'] >> 20} MiB",
                *(_percent(row[f"{key}_hit_ratio"]) for key in ("recorded", "replayed")),
                f"{row['agreement']:.2%}",
                *(_percent(row[f"{key}_hit_ratio"]) for key in ("lfru", "belady")),
            ]
            for row in result["rows"]
        ],
    )
    return f"{table}\n\n{_where(result)}"


def _collect_overhead(result: dict[str, Any]) -> str:
    low, high = result["overhead_quartiles"]
    return (
        f"Overhead {result['overhead']:+.1%}, median of {result['repeats']} pairs (quartiles "
        f"{low:+.1%} and {high:+.1%}); {result['tokens_per_s']:,.0f} tokens/s. {_where(result)}"
    )


def _forecaster(result: dict[str, Any]) -> str:
    settings = result["settings"]
    rows = []
    for name, setting in settings.items():
        summary = setting["summary"]
        cells = [
            summary[name][key]
            for name in ("recall", "gap_closed")
            for key in sorted(summary[name], key=int)
        ]
        rows.append([name, *(_points(cell) for cell in cells)])
    shares = ("25 %", "40 %", "50 %")
    header = ["traces", "recall@K", "recall@2K", *(f"gap closed, {share}" for share in shares)]
    return (
        f"{markdown(header, rows)}\n\nMean (sd) over {len(result['seeds'])} seeds, in per cent. "
        f"Networks on {result['device']}. {_where(result)}"
    )


def _fit_speed(result: dict[str, Any]) -> str:
    parts = [part for part in PARTS if f"{part}_s" in result["fits"][0]]
    rows = [
        [
            "first" if n == 0 else "again",
            f"{fit['fit_s']:.1f}",
            *(f"{fit[f'{part}_s']:.1f}" for part in parts),
        ]
        for n, fit in enumerate(result["fits"])
    ]
    table = markdown(["fit in a process", "seconds", *parts], rows)
    return f"{table}\n\n{result['num_all_tokens']:,} tokens on {result['device']}. {_where(result)}"


def _layer_recall(result: dict[str, Any]) -> str:
    def row(name: str, of_lookahead: Sequence[str]) -> list[str]:
        return [name, *of_lookahead]

    ahead = list(result["recall"])
    reuse = result["router_reuse"]["by_lookahead"]
    table = markdown(
        ["layers ahead", *ahead],
        [
            row("router_reuse", [f"{100 * reuse[h]:.1f}" for h in ahead]),
            row("gate_mlp", [_points(result["recall"][h]) for h in ahead]),
            row(
                "gain at the worst layer",
                [f"{result['worst_layer_gain_points'][h]['mean']:+.1f}" for h in ahead],
            ),
        ],
    )
    return (
        f"{result['model']}, slot recall in per cent, mean (sd) over three seeds:\n\n{table}\n\n"
        f"Layer 0, from the tokens' embeddings: {_points(result['layer_0'])}. "
        f"{result['parameters'] / 1e6:.1f} M parameters, fitted in {result['fit_s']['mean']:.0f} s "
        f"on {result['device']}. {_where(result)}"
    )


def _index(result: dict[str, Any]) -> str:
    (row,) = result["results"]
    query_ms = row["query_ms"]
    return (
        f"{row['num_records']:,} records of {result['dim']} numbers: {row['kind'].upper()}, "
        f"{query_ms['median']:.2f} ms a query ({query_ms['min']:.2f} to {query_ms['max']:.2f}), "
        f"recall@1 {row['recall_at_1']:.3f} against exact search, "
        f"{row['while_changing']['median_ms']:.2f} ms while "
        f"{row['while_changing']['replaced_per_s']:,.0f} records a second are replaced. "
        f"{_where(result)}"
    )


def _decode(result: dict[str, Any]) -> str:
    header = ["resident", "row", "TPOT p50 (p99), ms", "of resident speed", "hit ratio"]
    rows = [
        [
            f"{100 * row['residency']:.0f} %",
            row["row"],
            f"{1e3 * row['tpot_p50_s']:.2f} ({1e3 * row['tpot_p99_s']:.2f})",
            f"{row['resident_speed_fraction']:.2f}",
            _percent(row["hit_ratio"]),
            f"{row['missed_bytes_per_token'] / 1e6:.0f}",
            f"{row['efficiency']:.2f}",
        ]
        for row in result["rows"]
    ]
    rates = ", ".join(
        f"{way} {rate['median'] / 1e9:.1f}" for way, rate in result["link_bytes_per_s"].items()
    )
    gpus = ", ".join(gpu["name"] for gpu in result["hardware"]["gpus"]) or "no GPU"
    options = result["options"]
    skipped = "".join(f" {name}: not run, {why}." for name, why in result["skipped"].items())
    return (
        f"{markdown([*header, 'missed MB/token', 'efficiency'], rows)}\n\n"
        f"{result['model']}, batch 1, {options['repeats']} repeats of {options['tokens']} tokens "
        f"on {gpus}; link in GB/s: {rates}.{skipped} {_where(result)}"
    )


def _points(values: dict[str, Any]) -> str:
    return f"{100 * values['mean']:.1f} ({100 * (values['sd'] or 0):.1f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _mean(values: dict[str, float]) -> str:
    return f"{values['mean']:.3f} ({values['sd']:.3f})"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "collect_overhead": _collect_overhead,
    "decode_gptoss20b": _decode,
    "demo": _demo,
    "embedders": _embedders,
    "fit_speed": _fit_speed,
    "fit_speed_cpu": _fit_speed,
    "forecaster": _forecaster,
    "gptoss20b": _demo,
    "index": _index,
    "layer_recall": _layer_recall,
    "layer_recall_tiny": _layer_recall,
    "recorded_truth": _recorded_truth,
    "simulate": _simulate,
}


def render(text: str) -> str:
    """The README with every table made anew."""

    def fill(match: re.Match[str]) -> str:
        result = json.loads((RESULTS / f"{match[2]}.json").read_text())
        return f"{match[1]}{TABLES[match[2]](result)}\n{match[3]}"

    return _TABLE.sub(fill, text)


def main(arguments: Sequence[str]) -> None:
    """Entry point."""
    old = README.read_text(encoding="utf-8")
    new = render(old)
    if arguments == ["check"]:
        if new != old:
            sys.exit("README.md is out of date: python -m benchmarks.readme")
    else:
        README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
