"""The model card, filled from a training record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEMPLATE = """\
# code-moe-8m

A small mixture-of-experts language model of Python source: what effops' expert ops are tried on with real weights.
It is no programming assistant.

| | |
|---|---|
| Architecture | Mixtral: 5 layers, width 256, 4 query and 2 key-value heads of 64, tied embedding |
| Experts | 8 of SwiGLU 192 in every layer, 2 for a token |
| Parameters | {parameters:,} ({active:,} of them for a token), stored in bfloat16 |
| Vocabulary, context | 4,096 (`../code-7m/tokenizer.json`), 2,048 tokens |
| Training | {steps:,} steps, {tokens:,} tokens ({epochs:.1f} passes), {hours:.2f} h on one CPU core, {trained_dtype} |
| Objective | CE + {balance} × Switch's balance loss (1 when even) + {z} × z-loss, means over the layers |
| Loss at the end | {loss:.3f} nats per token (mean of the last steps) |
| Licence | Python Software Foundation License Version 2, see LICENSE |

## Data

The training split of `code-7m`, which leaves out {modules} files. `../code-7m/training.json` lists every file with its
hash; its own SHA-256 is {sha256}.
The weights derive from Python's standard library and carry its licence.

## Held-out quality

Bits per byte over {bytes:,} bytes of held-out source (windows of {context} tokens, stride {stride}; the end
token of each file is paid for):

| | bits per byte |
|---|---|
| this model | {bpb:.3f} |
| code-7m, {dense_parameters:,} parameters, all for every token | {dense_bpb:.3f} |
| `xz -9`, file by file | {xz_each:.3f} |
| `xz -9`, all files as one stream | {xz_all:.3f} |

Share of the held-out tokens' choices, by expert ({even:.1%} when even):

| layer | {expert_names} |
|---|{expert_rule}|
{loads}

## effops against the reference

From one seed, {compared} steps of {tokens_a_step:,} tokens in {dtype} (Muon's iterations included), with
Transformers' own loop over experts and with effops' ops. The losses, {first:.3f} to {last:.3f} nats per token, against
the loop's; the last row is the loop with its first weights changed in the last bit. Runs part where rounding sends a
token at the border of two experts to the other one.

| | steps together | relative difference until then | in all |
|---|---|---|---|
{differences}

## Make it again

    python tools/train_moe_model/train_moe.py --out DIR --steps {steps} --dtype {trained_dtype}
    python tools/train_moe_model/compare.py --run DIR
    python tools/train_moe_model/export_moe.py --run DIR

`training.json` holds the curves of both losses and of the held-out bits per byte. Another machine fits another
number of tokens into the time and rounds differently, so the weights will not be the same bit for bit.
"""


def moe_card(record: dict[str, Any], dense: Path) -> str:
    """Markdown text of the card for one training.json record; `dense` is code-7m's directory."""
    base = json.loads((dense / "training.json").read_text())
    scores, compared, loads = record["held_out"], record["effops_against_reference"], record["expert_loads"]
    curve = compared["losses"]["effops"]
    return TEMPLATE.format(
        parameters=record["parameters"],
        active=record["active_parameters"],
        trained_dtype=record["dtype"],
        steps=record["steps"],
        tokens=record["tokens"],
        epochs=record["tokens"] / base["split"]["training_tokens"],
        hours=record["seconds"] / 3600,
        balance=record["balance_coefficient"],
        z=record["z_coefficient"],
        loss=record["final_loss"],
        modules=len(base["split"]["held_out_modules"]),
        sha256=record["data"]["sha256"],
        bytes=scores["bytes"],
        context=scores["context"],
        stride=scores["stride"],
        bpb=scores["bits_per_byte"],
        dense_parameters=6_951_168,
        dense_bpb=base["held_out"]["bits_per_byte"],
        xz_each=scores["xz_bits_per_byte_file_by_file"],
        xz_all=scores["xz_bits_per_byte_together"],
        even=1 / len(loads[0]),
        expert_names=" | ".join(map(str, range(len(loads[0])))),
        expert_rule="|".join("---" for _ in loads[0]),
        loads="\n".join(f"| {i} | " + " | ".join(f"{x:.1%}" for x in layer) + " |" for i, layer in enumerate(loads)),
        compared=compared["steps"],
        tokens_a_step=compared["tokens_a_step"],
        dtype=compared["dtype"],
        first=curve[0],
        last=curve[-1],
        differences="\n".join(
            f"| {name} | {d['steps_together']} | {d['largest_until_then']:.1e} | {d['largest']:.1e} |"
            for name, d in compared["relative_difference"].items()
        ),
    )
