"""A LoRATrainer on two gloo processes and on one; losses, weights and checkpoints of each case.

    python trainer_ranks.py FOLDER CASE ...

Imports once and forks. Rank 0 writes FOLDER/<case>.pt; a case that fails writes FOLDER/<case>.txt.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from pathlib import Path

import torch

ROWS, STEPS, BATCH = 32, 3, 8


def build(dtype):
    import peft
    import transformers

    torch.manual_seed(3)
    shape = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(shape).to(dtype)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear",
        init_lora_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(base, lora, autocast_adapter_dtype=False)
    return model.to(dtype)


def rows():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (ROWS, 9), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def train(folder, case, world, dtype):
    """Losses of each step and the adapter at the end, whole."""
    import transformers

    from lora_kernels.training import LoRATrainer

    transformers.set_seed(11)
    options = {}
    home, resumed = folder / case.replace("-resumed", ""), None
    if case.endswith("-resumed"):
        resumed = str(home / "checkpoint-2")
    if case.startswith("fsdp"):
        options = {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                "state_dict_type": "SHARDED_STATE_DICT" if "sharded" in case else "FULL_STATE_DICT",
            },
        }
    args = transformers.TrainingArguments(
        output_dir=str(home), max_steps=STEPS, seed=11, use_cpu=True,
        per_device_train_batch_size=BATCH // world, learning_rate=1e-2, logging_steps=1,
        save_strategy="steps", save_steps=2, report_to="none", disable_tqdm=True, **options,
    )  # fmt: skip
    if case.startswith("fsdp2"):
        admit_fsdp_on_cpu()
    trainer = LoRATrainer(model=build(dtype), args=args, train_dataset=rows())
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resumed)
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapter = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            whole = p.full_tensor() if hasattr(p, "full_tensor") else p
            adapter[name] = whole.detach().clone()
    kinds = {type(p).__name__ for p in trainer.model.parameters()}
    fused = [e.status for e in trainer.kernel_report.layers]
    return {"losses": losses, "adapter": adapter, "kinds": kinds, "fused": fused,
            "wrapped": type(trainer.model_wrapped).__name__,
            "distributed": str(trainer.accelerator.distributed_type)}  # fmt: skip


def admit_fsdp_on_cpu():
    """accelerate shards on accelerators only and would fall back to DDP: tell it this is one."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState()._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def finetune_tiny(folder, case):
    """The whole job as the command line runs it."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))
    from tiny_bert import tiny_config

    from lora_kernels.training import finetune

    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = tiny_config(
        folder / "model", folder / "texts.csv", folder / f"run-{case}", max_steps=6,
        batch_size=8 // world, save_steps=3, base_dropout=0.0,
    )  # fmt: skip
    config["train"]["learning_rate"] = 1e-3
    result = finetune(config, quiet=True)
    return {"losses": [v for _, v in result.report["losses"]], "after": result.report["after"]}


def rank_main(folder, case, rank, world, port, dtype):
    if world > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
    if case.startswith("finetune"):
        result = finetune_tiny(folder, case)
    else:
        result = train(folder, case, world, dtype)
    if rank == 0:
        torch.save(result, folder / f"{case}.pt")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_case(folder, case):
    world = 1 if case in ("one", "one-fp32", "finetune-one") else 2
    dtype = torch.float32 if case == "one-fp32" else torch.float64
    port, children = free_port(), []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                rank_main(folder, case, rank, world, port, dtype)
                code = 0
            except BaseException:
                (folder / f"{case}.txt").write_text(traceback.format_exc())
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def main(folder, cases):
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import lora_kernels.training.trainer  # noqa: F401

    torch.set_num_threads(1)
    if any(case.startswith("finetune") for case in cases):
        sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))
        from tiny_bert import make_texts, write_csv, write_model

        write_model(folder / "model")
        write_csv(folder / "texts.csv", make_texts(40))
    for case in cases:
        print(case, run_case(folder, case), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
