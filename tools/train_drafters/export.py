"""Turn the trained drafters into shipped directories: `python tools/train_drafters/export.py --run DIR`.

Writes code-7m-medusa/ and code-1m/ (bf16 weights, training.json, MODEL_CARD.md, licence). All figures are those of
the bf16 weights, computed in float32.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from accept import RANKS, acceptance_table, best_tree, doc_ranks, rank_of, walk_chain, walk_tree
from card import draft_card, medusa_card
from corpus import (
    BASE,
    CALIBRATION,
    SHIPPED,
    base_model,
    copy_licence,
    document_hidden,
    held_out_documents,
    training_documents,
)
from effops.decoding import MedusaHeads
from torch import Tensor
from transformers import LlamaForCausalLM

CONTEXT, OVERLAP = 2048, 512
LAST_ENTRIES = 5
FREQUENT = 1024
TREE_NODES = (4, 8, 16, 32, 64)
CHAIN_LENGTHS = (2, 3, 4, 5)
PROMPT, CONTINUATION, PROMPT_EVERY = 256, 128, 512  # tokens of a greedy sample; one every PROMPT_EVERY


class Base:
    """The code model in float32 and its hidden states at the held-out files."""

    def __init__(self) -> None:
        self.model = base_model()
        self.lm_head = self.model.lm_head.weight
        self.calibration = self._states(held_out_documents(calibration=True))
        self.others = self._states(held_out_documents(calibration=False))
        self.calibration_greedy = self.greedy_texts(self.calibration)
        self.others_greedy = self.greedy_texts(self.others)

    def _states(self, documents: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (ids, document_hidden(self.model, ids, CONTEXT, OVERLAP)) for name, ids in documents.items()}

    def greedy_texts(self, documents: dict[str, tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """(ids, hidden states) of the model's own continuations of pieces of the documents, PROMPT + CONTINUATION."""
        prompts = [
            ids[begin : begin + PROMPT]
            for ids, _ in documents.values()
            for begin in range(0, len(ids) - PROMPT, PROMPT_EVERY)
        ]
        texts = self.model.generate(
            torch.stack(prompts),
            attention_mask=torch.ones(len(prompts), PROMPT),
            do_sample=False,
            min_new_tokens=CONTINUATION,
            max_new_tokens=CONTINUATION,
        )
        return [(ids, document_hidden(self.model, ids, CONTEXT, OVERLAP)) for ids in texts]


def data_record() -> dict[str, Any]:
    """Where the hashes of the training text are."""
    path = BASE / "training.json"
    return {"split": "../code-7m/training.json", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def training_record(run: Path) -> dict[str, Any]:
    """What the training wrote, with its loss at the end: the mean of the last entries of the curve."""
    record = json.loads((run / "record.json").read_text())
    last = torch.tensor([nats for _, nats in record["curve"][-LAST_ENTRIES:]], dtype=torch.float64).mean(0)
    curve = record.pop("curve")
    return record | {"final_nats": [round(x, 4) for x in last.flatten().tolist()], "curve": curve}


def tops(ranks: Tensor) -> dict[str, float]:
    """Share of valid ranks below 1, 3 and 10."""
    valid = ranks[ranks >= 0]
    return {f"top_{n}": round((valid < n).double().mean().item(), 4) for n in (1, 3, 10)}


def mean_length(walks: list[tuple[int, int]]) -> float:
    """Tokens a step over all documents."""
    return round(sum(tokens for tokens, _ in walks) / sum(steps for _, steps in walks), 4)


def frequent_tokens() -> list[int]:
    """The most frequent tokens of the training text, ascending: a part of the vocabulary that drafts quickly."""
    counts = torch.bincount(torch.cat(training_documents()))
    return counts.argsort(descending=True, stable=True)[:FREQUENT].sort().values.tolist()


def export_medusa(run: Path, out: Path, base: Base) -> dict[str, Any]:
    """Write code-7m-medusa/; returns its record."""
    MedusaHeads.from_pretrained(run, dtype=torch.bfloat16).save_pretrained(out)
    heads = MedusaHeads.from_pretrained(out, dtype=torch.float32)

    def ranks(ids: Tensor, hidden: Tensor) -> Tensor:
        return doc_ranks(heads, base.lm_head, hidden, ids)

    table, samples = acceptance_table([ranks(*text) for text in base.calibration.values()])
    # The state at the last token of a prompt is the first that drafts what the model writes itself.
    greedy_table, greedy_samples = acceptance_table([ranks(*text)[:, PROMPT - 1 :] for text in base.calibration_greedy])
    others = {name: ranks(*text) for name, text in base.others.items()}
    others_greedy = [ranks(*text)[:, PROMPT - 1 :] for text in base.others_greedy]
    trees = {}
    for nodes in TREE_NODES:
        tree, greedy_tree = best_tree(table, nodes), best_tree(greedy_table, nodes)
        walks = {name: walk_tree(tree, r) for name, r in others.items()}
        trees[str(nodes)] = {
            "accepted_length": mean_length(list(walks.values())),
            "greedy": mean_length([walk_tree(greedy_tree, r) for r in others_greedy]),
            "per_module": {name: mean_length([walk]) for name, walk in walks.items()},
        }
    together = torch.cat(list(others.values()), 1)
    base_ranks = torch.cat([rank_of(base.model.lm_head(hidden[:-1]), ids[1:]) for ids, hidden in base.others.values()])
    record = {
        "base": "code-7m",
        "parameters": sum(p.numel() for p in heads.parameters()),
        "data": data_record(),
        **training_record(run),
        "calibration_modules": list(CALIBRATION),
        "acceptance": {
            "true_text": table,
            "samples": samples,
            "greedy": greedy_table,
            "greedy_samples": greedy_samples,
        },
        "held_out": {
            "modules": list(others),
            "tokens": sum(len(ids) - 1 for ids, _ in base.others.values()),
            "code_7m": tops(base_ranks),
            "heads": [tops(row) for row in together],
            "greedy_tokens": len(others_greedy) * CONTINUATION,
            "greedy_heads": [tops(row) for row in torch.cat(others_greedy, 1)],
            "trees": trees,
        },
    }
    heads.acceptance = table
    heads.to(torch.bfloat16).save_pretrained(
        out,
        base_model_name_or_path="code-7m",
        acceptance_samples=samples,
        acceptance_greedy=greedy_table,
        acceptance_greedy_samples=greedy_samples,
        frequent_tokens=frequent_tokens(),
    )
    (out / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "MODEL_CARD.md").write_text(medusa_card(record))
    copy_licence(out)
    return record


@torch.inference_mode()
def export_draft(run: Path, out: Path, base: Base) -> dict[str, Any]:
    """Write code-1m/; returns its record."""
    LlamaForCausalLM.from_pretrained(run, dtype=torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    hits: dict[str, Tensor] = {}
    ranks, same, base_right = [], [], []
    for name, (ids, hidden) in base.others.items():
        logits = model.lm_head(document_hidden(model, ids, CONTEXT, OVERLAP))[:-1]
        guess, theirs = logits.argmax(-1), base.model.lm_head(hidden[:-1]).argmax(-1)
        hits[name] = guess == ids[1:]
        ranks.append(rank_of(logits, ids[1:]))
        same.append(guess == theirs)
        base_right.append(theirs == ids[1:])
    greedy_hits = [
        model.lm_head(document_hidden(model, ids, CONTEXT, OVERLAP)[PROMPT - 1 : -1]).argmax(-1) == ids[PROMPT:]
        for ids, _ in base.others_greedy
    ]
    chains = {}
    for length in CHAIN_LENGTHS:
        walks = {name: walk_chain(length, hit) for name, hit in hits.items()}
        chains[str(length)] = {
            "accepted_length": mean_length(list(walks.values())),
            "greedy": mean_length([walk_chain(length, hit) for hit in greedy_hits]),
            "per_module": {name: mean_length([walk]) for name, walk in walks.items()},
        }
    record = {
        "base": "code-7m",
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": data_record(),
        **training_record(run),
        "held_out": {
            "modules": list(hits),
            "tokens": sum(map(len, hits.values())),
            "token": tops(torch.cat(ranks)),
            "code_7m_token": round(torch.cat(base_right).double().mean().item(), 4),
            "code_7m_guess": round(torch.cat(same).double().mean().item(), 4),
            "greedy_tokens": sum(map(len, greedy_hits)),
            "greedy_token": round(torch.cat(greedy_hits).double().mean().item(), 4),
            "ranks": [round((torch.cat(ranks) == r).double().mean().item(), 5) for r in range(RANKS)],
            "chains": chains,
        },
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "MODEL_CARD.md").write_text(draft_card(record, model.config))
    copy_licence(out)
    return record


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="directory that medusa.py and draft.py wrote")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="gets code-7m-medusa/ and code-1m/")
    parser.add_argument("--only", choices=("medusa", "draft"), help="one of the two")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = Base()
    if args.only != "draft":
        record = export_medusa(args.run / "medusa", args.out / "code-7m-medusa", base)["held_out"]
        print("heads:", *(head["top_1"] for head in record["heads"]))
        print("trees:", *(f"{nodes}: {tree['accepted_length']}" for nodes, tree in record["trees"].items()))
    if args.only != "medusa":
        record = export_draft(args.run / "draft", args.out / "code-1m", base)["held_out"]
        print("draft:", record["token"], "code-7m's guess:", record["code_7m_guess"])
        print("chains:", *(f"{length}: {chain['accepted_length']}" for length, chain in record["chains"].items()))


if __name__ == "__main__":
    main()
