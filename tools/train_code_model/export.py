"""Turn a checkpoint into the shipped directory: `python tools/train_code_model/export.py --run DIR`.

Writes code-7m/ (bf16 weights, tokenizer, training.json, MODEL_CARD.md, licence) and heldout/. Run it on the
interpreter that trained: the split, the overlap and the figures are measured anew from its library.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from card import model_card
from data import (
    BOS,
    EOS,
    HELD_OUT,
    PAD,
    WINDOW,
    encode_documents,
    read_source,
    stdlib_dir,
    training_files,
    window_overlap,
    write_held_out,
)
from evaluate import bits_per_byte, xz_bits_per_byte
from model import CONTEXT, Progress, build_model, load_checkpoint
from tokenizers import Tokenizer
from train import QUICK_MODULES, TOKENS_PER_STEP
from transformers import AutoModelForCausalLM

SHIPPED = Path(__file__).resolve().parents[2] / "python/effops/models/shipped"
STRIDE = 1024


def export_model(run: Path, out: Path) -> Progress:
    """Write the Hugging Face directory `out` from the run's checkpoint, weights in bf16."""
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    model = build_model(tokenizer)
    progress = load_checkpoint(run / "checkpoint.pt", model)
    model.config.use_cache = True
    model.generation_config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # save_pretrained leaves it to its owner alone
    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    shutil.copyfile(stdlib_dir() / "LICENSE.txt", out / "LICENSE")
    return progress


def split_record(tokenizer: Tokenizer) -> dict[str, Any]:
    """Training files with their hashes, sizes of both parts, and their overlap in WINDOW-token windows."""
    root = stdlib_dir()
    paths = training_files()
    training = encode_documents(tokenizer, [read_source(root / path) for path in paths])
    held_out = encode_documents(tokenizer, [read_source(root / f"{name}.py") for name in HELD_OUT])
    hits, windows = window_overlap(held_out, training)
    return {
        "python_version": platform.python_version(),
        "held_out_modules": list(HELD_OUT),
        "held_out_tokens": sum(map(len, held_out)),
        "overlap": {
            "window_tokens": WINDOW,
            "held_out_windows": sum(windows),
            "found_in_training": sum(hits),
            "share": sum(hits) / sum(windows),
            "found_per_module": {name: n for name, n in zip(HELD_OUT, hits, strict=True) if n},
        },
        "training_bytes": sum((root / path).stat().st_size for path in paths),
        "training_tokens": sum(map(len, training)),
        "training_files": {path.as_posix(): hashlib.sha256((root / path).read_bytes()).hexdigest() for path in paths},
    }


def score_record(model_dir: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Held-out bits per byte of the exported bf16 weights (computed in float32) and of `xz -9`."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    files = [(stdlib_dir() / f"{name}.py").read_bytes() for name in HELD_OUT]
    documents = encode_documents(tokenizer, [data.decode("utf-8") for data in files])
    sizes = list(map(len, files))
    per_file = {
        name: round(bits_per_byte(model, [document], size, CONTEXT, STRIDE), 4)
        for name, document, size in zip(HELD_OUT, documents, sizes, strict=True)
    }
    total = sum(bpb * size for bpb, size in zip(per_file.values(), sizes, strict=True)) / sum(sizes)
    one_by_one, together = xz_bits_per_byte(files)
    return {
        "bytes": sum(sizes),
        "context": CONTEXT,
        "stride": STRIDE,
        "bits_per_byte": round(total, 4),
        "bits_per_byte_per_module": per_file,
        "xz_bits_per_byte_file_by_file": round(one_by_one, 4),
        "xz_bits_per_byte_together": round(together, 4),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="directory that train.py wrote")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="gets code-7m/ and heldout/")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model_dir = args.out / "code-7m"
    progress = export_model(args.run, model_dir)
    write_held_out(args.out / "heldout")
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    record = {
        "steps": progress.step,
        "planned_steps": progress.total_steps,
        "tokens": progress.step * TOKENS_PER_STEP,
        "seconds": round(progress.seconds),
        "final_loss": progress.losses[-1][1],
        "torch_version": torch.__version__,
        "held_out": score_record(model_dir, tokenizer),
        "split": split_record(tokenizer),
        "loss_curve": progress.losses,
        "held_out_curve": {"modules": list(QUICK_MODULES), "bits_per_byte": progress.held_out},
    }
    (model_dir / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    (model_dir / "MODEL_CARD.md").write_text(model_card(record))
    held_out = record["held_out"]
    print(f"{model_dir}: {held_out['bits_per_byte']} bits per byte, step {progress.step}")


if __name__ == "__main__":
    main()
