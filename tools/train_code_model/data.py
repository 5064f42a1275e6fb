"""Text of the shipped code model: Python's standard library, split by module, as bytes and tokens."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sysconfig
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCAB_SIZE = 4096
WINDOW = 32  # tokens in one window of the overlap measure

# Directories and files that are tests, tables or generated, not source text a reader would write.
LEFT_OUT_DIRS = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "__pycache__"}
LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-")

# Held-out modules: all exist in Python 3.10 to 3.14, and no training module is a near-duplicate.
HELD_OUT = (
    "bisect", "calendar", "cmd", "colorsys", "configparser", "csv", "difflib", "filecmp", "fractions",
    "getpass", "graphlib", "gzip", "heapq", "netrc", "pprint", "queue", "reprlib", "sched", "shelve",
    "shlex", "statistics", "tabnanny", "textwrap", "zipapp",
)  # fmt: skip


def stdlib_dir() -> Path:
    """Directory of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def training_files() -> list[Path]:
    """Standard-library sources of the training split, sorted; paths are relative to stdlib_dir()."""
    root = stdlib_dir()
    held_out = {f"{name}.py" for name in HELD_OUT}
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if LEFT_OUT_DIRS & set(relative.parts) or str(relative) in held_out:
            continue
        if str(relative).startswith(LEFT_OUT_PREFIXES) or not path.read_bytes().strip():
            continue
        files.append(relative)
    return files


def read_source(path: Path) -> str:
    """One source file as text, line ends as they are; every standard-library source is UTF-8."""
    return path.read_bytes().decode("utf-8")


def write_held_out(directory: Path) -> None:
    """Copy the held-out modules of the running interpreter, Python's licence and an index to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    root = stdlib_dir()
    entries = []
    for name in HELD_OUT:
        data = (root / f"{name}.py").read_bytes()
        (directory / f"{name}.py.txt").write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        entries.append({"module": name, "file": f"{name}.py.txt", "bytes": len(data), "sha256": sha256})
    shutil.copyfile(root / "LICENSE.txt", directory / "LICENSE")
    index = {"python_version": platform.python_version(), "files": entries}
    (directory / "index.json").write_text(json.dumps(index, indent=1) + "\n")


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of VOCAB_SIZE entries: identifiers, single digits, line end with indentation."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"\n+ *| ?[\p{L}_]+|\d| ?[^\s\p{L}_\d]+| +(?= )| +|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos_id)])
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Token ids, int64 [n], of each text as one document: BOS, text, EOS."""
    eos = tokenizer.token_to_id(EOS)
    return [np.array([*encoding.ids, eos]) for encoding in tokenizer.encode_batch_fast(texts)]


def epoch_stream(documents: list[np.ndarray], seed: list[int]) -> np.ndarray:
    """All documents in the seed's order, int64 [tokens]; rotated, so that row borders differ by seed."""
    rng = np.random.default_rng(seed)
    stream = np.concatenate([documents[i] for i in rng.permutation(len(documents))])
    return np.roll(stream, int(rng.integers(len(stream))))


def _window_hashes(ids: np.ndarray) -> np.ndarray:
    """Hash of every WINDOW-token window of ids [n], uint64 [max(n - WINDOW + 1, 0)]; wraps mod 2**64."""
    count = len(ids) - WINDOW + 1
    if count <= 0:
        return np.zeros(0, dtype=np.uint64)
    hashes = np.zeros(count, dtype=np.uint64)
    for i in range(WINDOW):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[i : i + count].astype(np.uint64) + np.uint64(1)
    return hashes


def _found(hashes: np.ndarray, seen: np.ndarray) -> int:
    """How many of `hashes` occur in the sorted `seen`."""
    places = np.minimum(np.searchsorted(seen, hashes), len(seen) - 1)
    return int((seen[places] == hashes).sum())


def window_overlap(held_out: list[np.ndarray], training: list[np.ndarray]) -> tuple[list[int], list[int]]:
    """Windows of each held-out document that occur in training, and its windows in all."""
    seen = np.sort(np.concatenate([_window_hashes(ids) for ids in training]))
    per_file = [_window_hashes(ids) for ids in held_out]
    return [_found(h, seen) for h in per_file], [len(h) for h in per_file]
