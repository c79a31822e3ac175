import torch
from torch import Tensor

torch_version: str
compiler: str

def isa() -> str: ...
def machine_isas() -> list[str]: ...
def set_isa_limit(name: str) -> None: ...
def amx_peak_gflops(seconds: float, threads: int) -> float: ...
def lora_linear_engine(dtype: torch.dtype) -> str: ...
def lora_linear_packed_bytes(dtype: torch.dtype, k: int, n: int) -> int: ...
def lora_linear_pack_weight(weight: Tensor, dtype: torch.dtype, for_dgrad: bool) -> Tensor: ...
def lora_linear_fwd(
    x: Tensor,
    packed: list[Tensor],
    out_features: list[int],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    biases: list[Tensor | None],
    scalings: list[float],
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor]: ...
def lora_linear_bwd(
    dys: list[Tensor],
    x: Tensor,
    packed: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    s: Tensor,
    scalings: list[float],
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]: ...
