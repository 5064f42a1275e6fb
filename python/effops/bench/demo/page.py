"""The demo's result as one self-contained HTML page: no script, no outside resource, plots as inline SVG."""

from __future__ import annotations

import io
import re
from html import escape
from statistics import quantiles
from typing import Any

from matplotlib.figure import Figure

from effops.bench.demo.experts import HOOK, OURS
from effops.bench.demo.packed import PLAIN
from effops.bench.demo.table import SIDES

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
.big { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.5rem 0; }
.big div { background: var(--soft); border-radius: .6rem; padding: .8rem 1.2rem; }
.big b { display: block; font-size: 1.9rem; }
pre { background: var(--soft); padding: .8rem; border-radius: .4rem; overflow-x: auto; font-size: .8rem; }
figure { margin: 1rem 0; background: white; border-radius: .4rem; } svg { width: 100%; height: auto; }
.no { color: #d33; font-weight: bold; }
"""
COLOURS = {"torch": "#9aa5b1", "effops": "#1f77b4"}


def page(result: dict[str, Any]) -> str:
    """HTML of a result as ``main.Demo.as_json`` makes it."""
    text, points = result["text"], result["long_context"]["points"]
    parts = [
        "<h1>effops demo</h1>",
        "<p>Plain torch and effops decode the same prompts with the same weights, greedily, taking turns. Both are "
        "eager; plain torch takes the fastest of several forms of its attention and of its linear layers, found in "
        "advance for each dtype and, for long contexts, each context.</p>",
        _headlines(text["totals"], result["experts"]["totals"], points),
    ]
    if result["problems"]:
        parts.append('<p class="no">' + "<br>".join(map(escape, result["problems"])) + "</p>")
    parts += ["<h2>Real text</h2>", _svg(_rates(text)), _rows(text["rows"]), _samples(text["rows"])]
    if result["drafting"]["totals"]:
        parts += ["<h2>Drafting</h2>", _drafting(result["drafting"])]
    if result["experts"]["totals"]:
        parts += ["<h2>Mixture of experts</h2>", _experts(result["experts"])]
    elif result["experts"]["missing"]:
        parts += ["<h2>Mixture of experts</h2>", f"<p>Left out: {escape(result['experts']['missing'])}.</p>"]
    if result["few_bits"]["rows"]:
        parts += ["<h2>Weights in few bits</h2>", _few_bits(result["few_bits"])]
    if points:
        parts += [
            "<h2>Long contexts</h2>",
            f"<p>One decode step in bfloat16 of a {escape(result['long_context']['model'])} and a random cache: "
            "only their sizes matter to the time. Median, and the middle half as bars.</p>",
            _svg(_steps(points)),
            _points(points),
        ]
    parts += ["<h2>Conditions</h2>", _conditions(result)]
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>effops demo</title>'
        f"<style>{STYLE}</style>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _headlines(totals: dict[str, Any], experts: dict[str, Any], points: list[dict[str, Any]]) -> str:
    cards = [
        (f"{t['speedup']:.2f}×", f"{t['effops']['tokens_per_second']:.0f} tokens/s end to end, {dtype}")
        for dtype, t in totals.items()
    ]
    cards += [
        (f"{t['speedup'][OURS]:.2f}×", f"mixture of experts over transformers eager, {dtype}")
        for dtype, t in experts.items()
    ]
    if points:
        last = points[-1]
        cards.append((f"{last['speedup']:.2f}×", f"a step at {last['context']} tokens, 0.5B parameters, bfloat16"))
    return '<div class="big">' + "".join(f"<div><b>{a}</b>{escape(b)}</div>" for a, b in cards) + "</div>"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(c)}" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows)
    return f"<table><tr>{head}{body}</table>"


def _rows(rows: list[dict[str, Any]]) -> str:
    cells = []
    for r in rows:
        judgement = r["judgement"]
        kind = escape(_kind(judgement))
        cells.append([
            escape(r["file"]), r["dtype"], str(r["prompt_tokens"]), str(r["new_tokens"]),
            *(f"{r[side]['tokens_per_second']:.0f}" for side in COLOURS), f"{r['speedup']:.2f}×",
            f'<span class="no">{kind}</span>' if judgement["kind"] == "NO" else kind,
        ])  # fmt: skip
    columns = ["file", "dtype", "prompt", "new", "torch tok/s", "effops tok/s", "speed-up", "judgement"]
    note = (
        "<p>In float32 a row is <i>identical</i> if every token agrees, a <i>near-tie</i> if the first difference lies "
        "within twice the error observed against float64, and else NO. In bfloat16 both sides round differently, so "
        "that greedy texts part sooner or later; <i>diverges at</i> says where.</p>"
    )
    return _table(columns, cells) + note


def _samples(rows: list[dict[str, Any]]) -> str:
    return "<h3>What effops wrote, float32</h3>" + "".join(
        f"<details><summary>{escape(r['file'])}</summary><pre>{escape(r['effops']['text'])}</pre></details>"
        for r in rows
        if r["dtype"] == "float32"
    )


def _drafting(drafting: dict[str, Any]) -> str:
    note = (
        "<p>Greedy text again, after the prompt: plain steps, and steps that verify what a drafter guessed. "
        "<i>Copy</i> repeats what followed the same words before; <i>medusa</i> is a tree of the guesses of heads on "
        "the model's last state; <i>medusa + copy</i> has one of these guesses and a copy in one tree; <i>draft "
        "model</i> is a chain of a model of a seventh of the size. <i>Edits</i> are the files, then the beginning of "
        "the same with 5 % of the tokens changed. Files whose output has more than "
        "20 % repeated 4-grams are shown apart. <i>On true text</i>: tokens a step from prefixes of the file itself; "
        "the model decides / the file decides.</p>"
    )
    totals, cells = drafting["totals"], []
    for title, total in totals.items():
        for key, files, kind in (
            ("methods", total["counted"], ""),
            ("methods_of_repetitive", total["files"] - total["counted"], ", repetitive"),
        ):
            for name, m in total.get(key, {}).items():
                forced = total["teacher_forced"].get(name) if not kind else None
                cells.append([
                    escape(title + kind), str(files), escape(name), f"{m['tokens_per_second']:.0f}",
                    f"{m['speedup_over_plain']:.2f}×", f"{m['speedup_over_torch']:.2f}×", f"{m['accepted']:.2f}",
                    f"{forced['model_decides']:.2f} / {forced['text_decides']:.2f}" if forced else "",
                ])  # fmt: skip
    columns = ["set", "files", "method", "tokens/s", "over plain", "over torch", "tokens a step", "on true text"]
    judged = [[escape(t), escape(str(x["judgements"])), str(x["diverging"])] for t, x in totals.items()]
    rows = []
    for r in drafting["rows"]:
        rows += [
            [escape(r["file"]), r["set"], r["dtype"], escape(name), f"{m['tokens_per_second']:.0f}",
             f"{m['accepted']:.2f}", f"{r['repeated_4grams']:.0%}", escape(m["judgement"])]
            for name, m in r["methods"].items()
        ]  # fmt: skip
    each = _table(["file", "set", "dtype", "method", "tokens/s", "tokens a step", "repeated", "judgement"], rows)
    return (
        note + _table(columns, cells) + _table(["judgements", "", "diverging (short types)"], judged)
        + f"<details><summary>Every file</summary>{each}</details>"
    )  # fmt: skip


def _experts(experts: dict[str, Any]) -> str:
    note = (
        f"<p>{escape(experts['model'])}: Mixtral's architecture, 8 experts of which 2 serve a token, trained on "
        "Python source. The Transformers library with its own loop over experts, the same with effops' attention and "
        "experts plugged in, and effops' own model. Of a model this small much of the library's time is its work "
        "around the products. Judged as above; the judge is the library in float64. In bfloat16 a token at the border "
        "of two experts takes either, so texts part earlier.</p>"
    )
    totals = [
        [SIDES[side], dtype, str(total["prompts"]), f"{rate:.0f}",
         f"{total['speedup'][side]:.2f}×" if side in total["speedup"] else "",
         escape(", ".join(f"{n} {kind}" for kind, n in total["judgements"].get(side, {}).items()))]
        for dtype, total in experts["totals"].items()
        for side, rate in total["tokens_per_second"].items()
    ]  # fmt: skip
    rows = [
        [escape(r["file"]), r["dtype"], str(r["prompt_tokens"]), str(r["new_tokens"]),
         *(f"{r['tokens_per_second'][side]:.0f}" for side in SIDES), *(escape(_kind(r["judgements"][side]))
         for side in r["judgements"])]
        for r in experts["rows"]
    ]  # fmt: skip
    each = _table(["file", "dtype", "prompt", "new", *(f"{name} tok/s" for name in SIDES.values()),
                   *(f"{SIDES[side]}: judgement" for side in (HOOK, OURS))], rows)  # fmt: skip
    return (
        note + _table(["side", "dtype", "files", "tokens/s", "over eager", "judgement"], totals)
        + f"<details><summary>Every file</summary>{each}</details>"
    )  # fmt: skip


def _few_bits(part: dict[str, Any]) -> str:
    note = (
        "<p>The shipped models with their linear layers and experts quantised (<code>effops.quantize_</code>), "
        "activations in float32; embedding and LM head stay. Speed after the prompt; loss over "
        f"{part['files']} held-out files, with the standard error over them of its difference from float32's. MB: what "
        "is quantised.</p>"
    )
    plain = {r["model"]: r["tokens_per_second"] for r in part["rows"] if r["format"] == PLAIN}
    rows = [
        [r["model"], r["format"], f"{r['linear_bytes'] / 1e6:.1f}", f"{r['tokens_per_second']:.0f}",
         f"{r['tokens_per_second'] / plain[r['model']]:.2f}×", f"{r['loss']:.4f}",
         "" if r["format"] == PLAIN else f"{r['above']:+.4f} ± {r['deviation']:.4f}"]
        for r in part["rows"]
    ]  # fmt: skip
    columns = ["model", "weights", "MB", "tokens/s", "over float32", "nats a token", "above float32"]
    return note + _table(columns, rows)


def _kind(judgement: dict[str, Any]) -> str:
    return judgement["kind"] + (f" at {judgement['position']}" if "position" in judgement else "")


def _points(points: list[dict[str, Any]]) -> str:
    columns = ["context", "torch ms", "effops ms", "speed-up", "torch's forms", "logit error, torch", "effops"]
    return _table(columns, [
        [
            str(p["context"]), *(f"{p[side]['median_ms']:.1f}" for side in COLOURS), f"{p['speedup']:.2f}×",
            escape(f"{p['forms']['decode']}; {p['forms']['linear']}"),
            *(f"{p['relative_logit_error'][side]:.1%}" for side in COLOURS),
        ]
        for p in points
    ])  # fmt: skip


def _conditions(result: dict[str, Any]) -> str:
    machine, libraries = result["machine"], result["libraries"]
    lines = {
        "model": result["model"],
        "machine": f"{machine['cpu']}, {machine['processors']} processors, {machine['threads']} threads",
        "instruction set": machine["isa"],
        "load before": f"{machine['load_average']:.1f}",
        "versions": ", ".join(f"{k} {v}" for k, v in libraries.items()),
        "commit": result["commit"],
        "time": result["time"],
        "command": result["command"],
        "plain torch": "preallocated cache; "
        + "; ".join(f"{d}: {', '.join(f['forms'].values())}" for d, f in result["text"]["forms"].items()),
    }
    return _table(["", ""], [[k, escape(str(v))] for k, v in lines.items()])


def _rates(text: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 3.4 * len(text["totals"])), layout="constrained")
    for axes, dtype in zip(figure.subplots(len(text["totals"]), squeeze=False)[:, 0], text["totals"], strict=True):
        rows = [r for r in text["rows"] if r["dtype"] == dtype]
        for i, (side, colour) in enumerate(COLOURS.items()):
            places = [x + 0.4 * i for x in range(len(rows))]
            axes.bar(places, [r[side]["tokens_per_second"] for r in rows], 0.4, color=colour, label=side)
        axes.set_xticks([x + 0.2 for x in range(len(rows))], [r["file"] for r in rows], rotation=60, ha="right")
        axes.set_ylabel("new tokens/s")
        axes.set_title(f"{dtype}, prompt included", loc="left")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _steps(points: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    contexts = [p["context"] for p in points]
    for side, colour in COLOURS.items():
        middle = [p[side]["median_ms"] for p in points]
        spread = [quantiles(p[side]["seconds"], n=4) for p in points]
        bars = [
            [max(0.0, m - q[0] * 1e3) for m, q in zip(middle, spread, strict=True)],
            [max(0.0, q[2] * 1e3 - m) for m, q in zip(middle, spread, strict=True)],
        ]
        axes.errorbar(contexts, middle, bars, marker="o", capsize=3, color=colour, label=side)
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [str(c) for c in contexts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("ms a step")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub("<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return f"<figure>{svg}</figure>"
