"""The model card, filled from a training record."""

from __future__ import annotations

import textwrap
from typing import Any

TEMPLATE = """\
# code-7m

A small language model of Python source, made for effops: its demo, tests and benchmarks need real weights and
real text that anyone may have. It is no programming assistant.

| | |
|---|---|
| Architecture | Llama: 8 layers, width 256, 4 query and 2 key-value heads of 64, SwiGLU 704, tied embedding |
| Parameters | 6,951,168, stored in bfloat16 |
| Vocabulary, context | 4,096 (byte-level BPE), 2,048 tokens |
| Training text | Python {python} library: {files} files, {megabytes:.1f} MB, {epoch_tokens:,} tokens |
| Training | {steps:,} steps, {tokens:,} tokens ({epochs:.1f} passes), {hours:.2f} h on one CPU core, bf16 |
| Loss at the end | {loss:.3f} nats per token (mean of the last steps) |
| Licence | Python Software Foundation License Version 2, see LICENSE |

## Data

Every `.py` file of the standard library except tests, `encodings`, `pydoc_data`, generated configuration and
the held-out modules; `training.json` lists each file with its SHA-256. Weights, tokenizer and held-out files
derive from that library and carry its licence. What was changed: the held-out files are unaltered copies, the
weights and the tokenizer were computed from the rest.

Held out:

{modules}

They exist in Python 3.10 to 3.14; copies are in `../heldout/`, so that inputs do not
depend on the interpreter. Of their {windows:,} windows of {window} tokens, {found:,} ({share:.2%}) occur in
training.

## Held-out quality

Bits per byte over {bytes:,} bytes of held-out source (windows of {context} tokens, stride {stride}; the end
token of each file is paid for):

| | bits per byte | model against it |
|---|---|---|
| this model | {bpb:.3f} | |
| `xz -9`, file by file | {xz_each:.3f} | {ratio_each:.2f} |
| `xz -9`, all files as one stream | {xz_all:.3f} | {ratio_all:.2f} |

`xz` figures include its container (about 60 bytes a file).

## Make it again

    python tools/train_code_model/train.py --out DIR --hours {hours_asked}
    python tools/train_code_model/export.py --run DIR

`training.json` holds the curve of the loss and of the held-out bits per byte. Another machine fits another
number of tokens into the time and rounds differently, so the weights will not be the same bit for bit.
"""


def model_card(record: dict[str, Any]) -> str:
    """Markdown text of the card for one training.json record."""
    split, scores = record["split"], record["held_out"]
    overlap = split["overlap"]
    xz_each, xz_all = scores["xz_bits_per_byte_file_by_file"], scores["xz_bits_per_byte_together"]
    return TEMPLATE.format(
        python=split["python_version"],
        files=len(split["training_files"]),
        megabytes=split["training_bytes"] / 1e6,
        epoch_tokens=split["training_tokens"],
        steps=record["steps"],
        tokens=record["tokens"],
        epochs=record["tokens"] / split["training_tokens"],
        hours=record["seconds"] / 3600,
        hours_asked=round(record["seconds"] / 3600, 1),
        loss=record["final_loss"],
        modules=textwrap.fill(", ".join(split["held_out_modules"]), 110),
        windows=overlap["held_out_windows"],
        window=overlap["window_tokens"],
        found=overlap["found_in_training"],
        share=overlap["share"],
        bytes=scores["bytes"],
        context=scores["context"],
        stride=scores["stride"],
        bpb=scores["bits_per_byte"],
        xz_each=xz_each,
        xz_all=xz_all,
        ratio_each=scores["bits_per_byte"] / xz_each,
        ratio_all=scores["bits_per_byte"] / xz_all,
    )
