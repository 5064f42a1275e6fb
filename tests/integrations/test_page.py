"""The Python blocks of docs/integrations.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the page is about transformers")

PAGE = Path(__file__).resolve().parents[2] / "docs/integrations.md"


def test_the_page_runs(tmp_path):
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=64,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    names: dict = {"path": tmp_path}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert "model.layers.1.mlp.experts.gate_up_proj" not in dict(names["model"].named_parameters())
    with torch.inference_mode():
        assert names["model"](torch.arange(8)[None]).logits.isfinite().all()
    bias = names["moe"].router.selection_bias
    assert bias.abs().max() > 0 and bias.abs().max() <= 4 * 1e-3 + 1e-9
