"""Texts, corpora and toy models for tests of the embedded model and its recipe."""

import json
import sysconfig
from pathlib import Path

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

STDLIB = Path(sysconfig.get_path("stdlib"))
CHINESE = """靜夜思
李白
床前明月光，疑是地上霜。
舉頭望明月，低頭思故鄉。

春曉
孟浩然
春眠不覺曉，處處聞啼鳥。
夜來風雨聲，花落知多少。
"""
GERMAN = """§ 1 Geltungsbereich

(1) Dieses Gesetz gilt für die Zulassung von Fahrzeugen zum Verkehr auf öffentlichen Straßen.

(2) Die zuständige Behörde kann Ausnahmen zulassen.
"""
LATEX = r"""\begin{lemma}
\label{lemma-flat}
Let $f : X \to Y$ be a flat morphism of schemes. Then $f^*$ is exact.
\end{lemma}
"""


def toy_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            norm_topk_prob=True,
            tie_word_embeddings=True,
        )
    )


def toy_olmoe(*, num_layers: int = 2) -> OlmoeForCausalLM:
    torch.manual_seed(0)
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=8,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def write_stdlib_corpora(folder: Path, *, chars: int) -> Path:
    """Two domains out of the running Python's own library: sources, and prose from docstrings."""
    sources = [
        (STDLIB / f"{name}.py").read_text() for name in ("argparse", "ast", "typing", "enum")
    ]
    prose = (STDLIB / "pydoc_data" / "topics.py").read_text().replace("\\n", "\n")
    folder.mkdir()
    for name, text in (("code", "".join(sources)), ("prose", prose)):
        rows = [
            json.dumps({"id": f"{name}-{start}", "text": text[start : start + 1000]})
            for start in range(0, chars, 1000)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder
