"""Tools to test ops against: error budgets, inputs, oracles, poisoned allocations."""

from __future__ import annotations

from lora_kernels.testing.attention import (
    AttentionInputs,
    attention_inputs,
    attention_op,
    check_attention,
)
from lora_kernels.testing.budget import BudgetExceededError, Margin, assert_within_budget
from lora_kernels.testing.check import check_lora_linear, compare, lora_linear_op
from lora_kernels.testing.dora_linear import (
    DoraLinearInputs,
    check_dora_linear,
    dora_linear_inputs,
    dora_linear_op,
    dora_linear_results,
)
from lora_kernels.testing.gated_activation import (
    GatedActivationInputs,
    check_adapter_products,
    check_gated_activation,
    gated_activation_inputs,
    gated_activation_op,
)
from lora_kernels.testing.inputs import LAYOUTS, LoraLinearInputs, lora_linear_inputs, relayout
from lora_kernels.testing.linear_cross_entropy import (
    LinearCrossEntropyInputs,
    check_linear_cross_entropy,
    linear_cross_entropy_inputs,
    linear_cross_entropy_op,
)
from lora_kernels.testing.lora_qkv import (
    LoraQkvInputs,
    check_lora_qkv,
    lora_qkv_inputs,
    lora_qkv_op,
)
from lora_kernels.testing.moved import moved
from lora_kernels.testing.oracle import LoraLinearResults, lora_linear_results, yardstick
from lora_kernels.testing.poison import poisoned_empty
from lora_kernels.testing.quant_linear import (
    QuantLinearInputs,
    check_quant_linear,
    quant_linear_inputs,
    quant_linear_op,
)
from lora_kernels.testing.rms_norm import (
    RmsNormInputs,
    check_rms_norm,
    rms_norm_inputs,
    rms_norm_op,
)
from lora_kernels.testing.rope import RopeInputs, check_rope, rope_inputs, rope_op

__all__ = [
    "LAYOUTS",
    "AttentionInputs",
    "BudgetExceededError",
    "DoraLinearInputs",
    "GatedActivationInputs",
    "LinearCrossEntropyInputs",
    "LoraLinearInputs",
    "LoraLinearResults",
    "LoraQkvInputs",
    "Margin",
    "QuantLinearInputs",
    "RmsNormInputs",
    "RopeInputs",
    "assert_within_budget",
    "attention_inputs",
    "attention_op",
    "check_adapter_products",
    "check_attention",
    "check_dora_linear",
    "check_gated_activation",
    "check_linear_cross_entropy",
    "check_lora_linear",
    "check_lora_qkv",
    "check_quant_linear",
    "check_rms_norm",
    "check_rope",
    "compare",
    "dora_linear_inputs",
    "dora_linear_op",
    "dora_linear_results",
    "gated_activation_inputs",
    "gated_activation_op",
    "linear_cross_entropy_inputs",
    "linear_cross_entropy_op",
    "lora_linear_inputs",
    "lora_linear_op",
    "lora_linear_results",
    "lora_qkv_inputs",
    "lora_qkv_op",
    "moved",
    "poisoned_empty",
    "quant_linear_inputs",
    "quant_linear_op",
    "relayout",
    "rms_norm_inputs",
    "rms_norm_op",
    "rope_inputs",
    "rope_op",
    "yardstick",
]
