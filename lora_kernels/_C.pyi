import torch
from torch import Tensor

torch_version: str
compiler: str

def isa() -> str: ...
def machine_isas() -> list[str]: ...
def set_isa_limit(name: str) -> None: ...
def amx_peak_gflops(seconds: float, threads: int) -> float: ...
def linear_cross_entropy_engine(dtype: torch.dtype) -> str: ...
def linear_cross_entropy_rows(
    logits: Tensor,
    labels: Tensor,
    coefficients: Tensor | None,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    z_loss: float,
) -> Tensor: ...

lora_linear_rank_zero: bool
lora_linear_given: bool

def lora_linear_engine(dtype: torch.dtype) -> str: ...
def lora_linear_packed_bytes(dtype: torch.dtype, k: int, n: int) -> int: ...
def lora_linear_pack_weight(weight: Tensor, dtype: torch.dtype, for_dgrad: bool) -> Tensor: ...
def lora_linear_packed_copy(
    weight: Tensor, dtype: torch.dtype, for_dgrad: bool
) -> Tensor | None: ...
def lora_linear_keep_packed_copy(
    weight: Tensor, dtype: torch.dtype, for_dgrad: bool, packed: Tensor, budget: int
) -> bool: ...
def lora_linear_packed_copies_bytes() -> int: ...
def lora_linear_packed_copies_count() -> int: ...
def lora_linear_drop_packed_copies() -> None: ...
def lora_linear_few_rows(dtype: torch.dtype) -> int: ...
def lora_linear_fwd_few(
    x: Tensor,
    weights: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    biases: list[Tensor | None],
    scalings: list[float],
    shrunk: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]: ...
def lora_linear_eager(
    x: Tensor,
    weights: tuple[Tensor, ...],
    lora_as: tuple[Tensor, ...],
    lora_bs: tuple[Tensor, ...],
    scalings: tuple[float, ...],
    biases: tuple[Tensor | None, ...],
) -> list[Tensor] | None: ...
def gated_activation_eager(gate: Tensor, up: Tensor | None, kind: str) -> Tensor | None: ...
def rms_norm_eager(
    x: Tensor, weight: Tensor | None, eps: float, offset: float
) -> Tensor | None: ...
def plan_stands(
    x: object,
    tensors: tuple[Tensor | None, ...],
    state: dict[str, object],
    own: tuple[object, ...],
    same: tuple[object, ...],
    absent: tuple[object, ...],
    empty: tuple[object, ...],
    types: tuple[object, ...],
) -> bool: ...
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
    shrunk: Tensor | None = None,
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
    ds: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]: ...

class QuantWeight:
    repacked_bytes: int
    def __init__(
        self,
        layout: str,
        n: int,
        k: int,
        block: int,
        nested_block: int,
        factor: float,
        parts: list[Tensor],
    ) -> None: ...

def quant_linear_engine(dtype: torch.dtype) -> str: ...
def quant_linear_dequantize(
    weight: QuantWeight, dtype: torch.dtype, out: Tensor | None
) -> Tensor: ...
def quant_linear_quantize_flat(
    w: Tensor,
    code: Tensor,
    block: int,
    nested_block: int,
    nested_code: Tensor,
    min_absmax: float,
) -> list[Tensor]: ...
def quant_linear_quantize_rows(w: Tensor) -> list[Tensor]: ...
def quant_linear_fwd(
    x: Tensor,
    weight: QuantWeight,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]: ...
def quant_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: QuantWeight,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    s: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]: ...
def rms_norm_fwd(
    x: Tensor, weight: Tensor | None, lora_as: list[Tensor], eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]: ...
def rms_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]: ...
def rope_rotate(
    heads: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    interleaved: bool,
    inverse: bool,
    in_place: bool,
) -> list[Tensor]: ...
