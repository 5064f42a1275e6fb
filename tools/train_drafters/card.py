"""The model cards of the drafters, filled from their training records."""

from __future__ import annotations

from typing import Any

COMMON = """\
## Data

The training split of `code-7m`, which leaves out {modules} files. `../code-7m/training.json` lists every file with its
hash; its own SHA-256 is {sha256}.
The weights derive from Python's standard library and carry its licence.

"""

AGAIN = """\
## Make it again

    python tools/train_drafters/{tool}.py --out DIR --passes {passes}{options}
    python tools/train_drafters/export.py --run DIR

`training.json` holds the curve of the loss and every figure above. Another machine rounds differently, so the
weights will not be the same bit for bit.
"""

MEDUSA = (
    """\
# code-7m-medusa

{heads} Medusa heads for `code-7m`: from one hidden state of the model and the embedding of the next token, which is
known, head k guesses the token k + 2 further on. They share the model's LM head.

| | |
|---|---|
| Architecture | {heads} heads: {layers} x `z + silu(W z + b)`, a projection, R e of the root; the model's LM head |
| Parameters | {parameters:,}, stored in bfloat16 |
| Training | {steps:,} steps, {positions:,} positions ({passes} passes), {minutes:.0f} min on one busy CPU core |
| Objective | sum of {decay}^k CE; {soft:.0%} of a target is the model's distribution, the rest the token |
| Loss at the end | {nats} nats a token, by head |
| Licence | Python Software Foundation License Version 2, see LICENSE |

"""
    + COMMON
    + """\
## Held-out quality

Counted at true text: at every position of {files} held-out files ({tokens:,} tokens) with the true tokens before it.
The other {calibration_files} held-out files ({calibration}) gave the acceptance
tables in `config.json` and chose among short trial runs.

| | top 1 | top 3 | top 10 | top 1, greedy text |
|---|---|---|---|---|
{accuracy}

Accepted length, tokens a step, of trees of the table's most probable paths (the root, which the model itself gives,
is a node; plain decoding is 1):

| nodes | {tree_nodes} |
|---|{tree_rule}|
| true text | {tree_lengths} |
| greedy text | {greedy_lengths} |

Greedy text is what the model writes itself after pieces of the same files ({greedy_tokens:,} tokens), with trees of
`acceptance_greedy`. True text bounds the heads by the model: at code it has not seen its own first guess is right at
{base_top_1:.0%} of the tokens, and a head guesses further on without the tokens between.

The table in `config.json`: `acceptance[k][r]` is how often head k's guess of rank r was the token on the calibration
files ({samples:,} positions), `acceptance_greedy` the same on greedy continuations that the model wrote itself
({greedy_samples:,} positions).

"""
    + AGAIN
)

DRAFT = (
    """\
# code-1m

A draft model for `code-7m`: the same tokenizer (`../code-7m/tokenizer.json`), a seventh of the weights, a quarter of
the layers.

| | |
|---|---|
| Architecture | {architecture} |
| Parameters | {parameters:,}, stored in bfloat16 |
| Vocabulary, context | 4,096 (code-7m's), {context:,} tokens |
| Training | {steps:,} steps, {tokens_trained:,} tokens ({passes} passes), {minutes:.0f} min on one busy CPU core |
| Objective | CE; {soft:.0%} of a target is code-7m's distribution, the rest the token |
| Loss at the end | {nats:.3f} nats per token |
| Licence | Python Software Foundation License Version 2, see LICENSE |

"""
    + COMMON
    + """\
## Held-out quality

Counted at true text: at every position of {files} held-out files ({tokens:,} tokens) with the true tokens before it.

| first guess | |
|---|---|
| is the token | {top_1:.1%} (in the first 3: {top_3:.1%}, in the first 10: {top_10:.1%}) |
| is code-7m's first guess | {same:.1%} |
| code-7m's first guess is the token | {base:.1%} |

Accepted length, tokens a step, of greedy chains (the token that code-7m itself gives included; plain decoding is 1):

| drafted tokens | {chain_names} |
|---|{chain_rule}|
| true text | {chain_lengths} |
| greedy text | {greedy_lengths} |

Greedy text is what code-7m writes itself after pieces of the same files ({greedy_tokens:,} tokens); the draft's first
guess is its next token at {greedy_token:.1%} of them.

"""
    + AGAIN
)


def common_fields(record: dict[str, Any]) -> dict[str, Any]:
    """What both cards say of data and training."""
    return {
        "parameters": record["parameters"],
        "steps": record["steps"],
        "passes": record["passes"],
        "minutes": record["seconds"] / 60,
        "soft": record["soft_share"],
        "modules": 24,
        "sha256": record["data"]["sha256"],
        "files": len(record["held_out"]["modules"]),
        "tokens": record["held_out"]["tokens"],
    }


def medusa_card(record: dict[str, Any]) -> str:
    """Markdown text of the card for one training.json record."""
    held_out = record["held_out"]
    rows = [("code-7m itself, t + 1", held_out["code_7m"], 1.0)]
    for k, (head, greedy) in enumerate(zip(held_out["heads"], held_out["greedy_heads"], strict=True)):
        rows.append((f"head {k}, t + {k + 2}", head, greedy["top_1"]))
    trees = held_out["trees"]
    return MEDUSA.format(
        **common_fields(record),
        heads=len(held_out["heads"]),
        layers=record["layers"],
        positions=record["positions"],
        decay=record["decay"],
        nats=", ".join(f"{x:.2f}" for x in record["final_nats"]),
        calibration_files=len(record["calibration_modules"]),
        calibration=", ".join(record["calibration_modules"]),
        accuracy="\n".join(
            f"| {name} | {t['top_1']:.1%} | {t['top_3']:.1%} | {t['top_10']:.1%} | {greedy:.1%} |"
            for name, t, greedy in rows
        ),
        base_top_1=held_out["code_7m"]["top_1"],
        greedy_tokens=held_out["greedy_tokens"],
        greedy_lengths=" | ".join(f"{tree['greedy']:.2f}" for tree in trees.values()),
        tree_nodes=" | ".join(trees),
        tree_rule="|".join("---" for _ in trees),
        tree_lengths=" | ".join(f"{tree['accepted_length']:.2f}" for tree in trees.values()),
        samples=record["acceptance"]["samples"][0],
        greedy_samples=record["acceptance"]["greedy_samples"][0],
        tool="medusa",
        options=f" --layers {record['layers']}",
    )


def draft_card(record: dict[str, Any], config: Any) -> str:
    """Markdown text of the card for one training.json record and the model's configuration."""
    held_out = record["held_out"]
    chains = held_out["chains"]
    return DRAFT.format(
        **common_fields(record),
        architecture=(
            f"Llama: {config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_attention_heads} query "
            f"and {config.num_key_value_heads} key-value heads of {config.head_dim}, "
            f"SwiGLU {config.intermediate_size}, tied embedding"
        ),
        context=config.max_position_embeddings,
        tokens_trained=record["tokens"],
        nats=record["final_nats"][0],
        **held_out["token"],
        same=held_out["code_7m_guess"],
        base=held_out["code_7m_token"],
        chain_names=" | ".join(chains),
        chain_rule="|".join("---" for _ in chains),
        chain_lengths=" | ".join(f"{chain['accepted_length']:.2f}" for chain in chains.values()),
        greedy_tokens=held_out["greedy_tokens"],
        greedy_token=held_out["greedy_token"],
        greedy_lengths=" | ".join(f"{chain['greedy']:.2f}" for chain in chains.values()),
        tool="draft",
        options="",
    )
