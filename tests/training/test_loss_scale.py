"""A step of two micro-batches trains as one of the whole batch, whatever the model's loss does."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.testing import assert_within_budget

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 16,
}  # fmt: skip


def build(kind, dtype):
    import peft

    torch.manual_seed(0)
    if kind == "causal-lm":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    elif kind == "t5":
        config = transformers.T5Config(
            vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
            dropout_rate=0.0, decoder_start_token_id=0,
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config)
    else:
        config = transformers.BertConfig(
            **SHAPE,
            num_labels=2 if kind == "question-answering" else 3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model = {
            "classification": transformers.BertForSequenceClassification,
            "question-answering": transformers.BertForQuestionAnswering,
            "masked-lm": transformers.BertForMaskedLM,
            "token-classification": transformers.BertForTokenClassification,
        }[kind](config)
    lora = peft.LoraConfig(
        r=2, target_modules=["query", "value", "q", "v", "q_proj", "v_proj"],
        init_lora_weights=False,
    )  # fmt: skip
    return peft.get_peft_model(model.to(dtype), lora, autocast_adapter_dtype=False).to(dtype)


def rows(kind):
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(8):
        ids = torch.randint(1, 50, (9,), generator=generator)
        row = {"input_ids": ids}
        if kind == "question-answering":
            row |= {"start_positions": torch.tensor(i), "end_positions": torch.tensor(8)}
        elif kind == "classification":
            row["labels"] = torch.tensor(i % 3)
        else:
            row["labels"] = ids % 3 if kind == "token-classification" else ids
        made.append(row)
    return made


def gradients(kind, dtype, batch, accumulation, folder):
    """Gradients of the first step, before the optimizer."""
    from lora_kernels.training import LoRATrainer

    found = {}

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for name, p in model.named_parameters():
                if p.grad is not None:
                    found[name] = p.grad.detach().clone()

    names = ["start_positions", "end_positions"] if kind == "question-answering" else ["labels"]
    trainer = LoRATrainer(
        model=build(kind, dtype),
        args=transformers.TrainingArguments(
            str(folder), max_steps=1, per_device_train_batch_size=batch, max_grad_norm=0.0,
            gradient_accumulation_steps=accumulation, report_to="none", disable_tqdm=True,
            use_cpu=True, save_strategy="no", label_names=names, seed=5,
        ),
        train_dataset=rows(kind),
        callbacks=[Keep()],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return found


@pytest.mark.parametrize(
    "kind",
    [
        "classification",
        "question-answering",
        "masked-lm",
        "token-classification",
        "causal-lm",
        "t5",
    ],
)
def test_accumulation_changes_no_gradient(kind, tmp_path):
    want = gradients(kind, torch.float64, 8, 1, tmp_path)
    got = gradients(kind, torch.float64, 4, 2, tmp_path)
    low = gradients(kind, torch.float32, 8, 1, tmp_path)
    assert got.keys() == want.keys() and got
    for name, t in got.items():
        assert_within_budget(t, want[name], low[name], name)
