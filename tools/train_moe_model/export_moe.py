"""Turn a checkpoint into the shipped directory: `python tools/train_moe_model/export_moe.py --run DIR`.

Writes code-moe-8m/ (bf16 weights, training.json, MODEL_CARD.md, licence); the tokenizer is code-7m's and stays there.
Run it on the interpreter that trained, and after compare.py, whose figures go into training.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "train_code_model"))

from data import HELD_OUT, encode_documents, read_source, stdlib_dir, training_files
from export import SHIPPED, score_record
from model import Progress, load_checkpoint
from moe_card import moe_card
from moe_model import BALANCE, Z, build_model
from tokenizers import Tokenizer
from train import QUICK_MODULES, TOKENS_PER_STEP
from train_moe import code_tokenizer
from transformers import MixtralForCausalLM

LARGEST_FILE = 16_000_000  # bytes of the weights
LOAD_WINDOW = 1024  # tokens of a pass in which experts are counted


def export_model(run: Path, out: Path, tokenizer: Tokenizer) -> Progress:
    """Write the Hugging Face directory `out` from the run's checkpoint, weights in bf16."""
    trained = build_model(tokenizer, "eager")
    progress = load_checkpoint(run / "checkpoint.pt", trained)
    model = MixtralForCausalLM(trained.config)  # with transformers' own routers, whose names it writes
    model.load_state_dict(trained.state_dict())
    model.config.use_cache = True
    model.generation_config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # save_pretrained leaves it to its owner alone
    size = (out / "model.safetensors").stat().st_size
    if size > LARGEST_FILE:
        raise SystemExit(f"model.safetensors: expected at most {LARGEST_FILE} bytes, got {size}")
    shutil.copyfile(stdlib_dir() / "LICENSE.txt", out / "LICENSE")
    return progress


def data_record() -> dict[str, Any]:
    """Where the hashes of the training text are; the text must be that one."""
    path = SHIPPED / "code-7m/training.json"
    recorded = json.loads(path.read_text())["split"]["training_files"]
    root = stdlib_dir()
    found = {name.as_posix(): hashlib.sha256((root / name).read_bytes()).hexdigest() for name in training_files()}
    if found != recorded:
        raise SystemExit(f"{root}: expected the library that {path} lists, got another one")
    return {"split": "../code-7m/training.json", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@torch.inference_mode()
def expert_loads(model_dir: Path, tokenizer: Tokenizer) -> list[list[float]]:
    """Share of the held-out tokens' choices that each expert of each layer has."""
    model = MixtralForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    documents = encode_documents(tokenizer, [read_source(stdlib_dir() / f"{name}.py") for name in HELD_OUT])
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_local_experts, dtype=torch.int64)
    for ids in map(torch.from_numpy, documents):
        for window in ids.split(LOAD_WINDOW):
            logits = model.model(window[None], output_router_logits=True).router_logits
            chosen = torch.stack([layer.topk(model.config.num_experts_per_tok).indices.flatten() for layer in logits])
            counts += torch.stack([torch.bincount(c, minlength=counts.shape[1]) for c in chosen])
    return [[round(x, 4) for x in layer] for layer in (counts / counts.sum(1, keepdim=True)).tolist()]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="directory that train_moe.py and compare.py wrote")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="gets code-moe-8m/")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model_dir, tokenizer = args.out / "code-moe-8m", code_tokenizer()
    data = data_record()
    progress = export_model(args.run, model_dir, tokenizer)
    config = MixtralForCausalLM.from_pretrained(model_dir)
    parameters = sum(p.numel() for p in config.parameters())
    experts = sum(p.numel() for name, p in config.named_parameters() if ".experts." in name)
    chosen = config.config.num_experts_per_tok / config.config.num_local_experts
    record = {
        "parameters": parameters,
        "active_parameters": round(parameters - experts * (1 - chosen)),
        "dtype": progress.dtype,
        "steps": progress.step,
        "planned_steps": progress.total_steps,
        "tokens": progress.step * TOKENS_PER_STEP,
        "seconds": round(progress.seconds),
        "final_loss": progress.losses[-1][1],
        "balance_coefficient": BALANCE,
        "z_coefficient": Z,
        "torch_version": torch.__version__,
        "data": data,
        "held_out": score_record(model_dir, tokenizer),
        "expert_loads": expert_loads(model_dir, tokenizer),
        "effops_against_reference": json.loads((args.run / "compare.json").read_text()),
        "loss_curve": progress.losses,
        "held_out_curve": {"modules": list(QUICK_MODULES), "bits_per_byte": progress.held_out},
    }
    (model_dir / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    (model_dir / "MODEL_CARD.md").write_text(moe_card(record, SHIPPED / "code-7m"))
    print(f"{model_dir}: {record['held_out']['bits_per_byte']} bits per byte, step {progress.step}")


if __name__ == "__main__":
    main()
