"""attention_decode on a GPU through library kernels, shown on a CPU with stand-ins for them."""

from __future__ import annotations

import pytest
import torch

import lora_kernels as lk
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.ops import attention_decode
from lora_kernels.ops.attention import libraries
from lora_kernels.ops.attention.libraries import decode
from tests.ops.attention_kernel_standins import Log
from tests.ops.attention_library_standins import install
from tests.ops.decode_cases import CASES, check_decode, decode_inputs

BF16 = torch.bfloat16
CALLS = {"flash": "flash fwd", "flash-attn-2": "fa2 cache", "flash-attn-3": "fa3 cache"}


@pytest.fixture
def log(monkeypatch) -> Log:
    return install(monkeypatch)


def _able(library: str, case: str, page: int) -> bool:
    takes = case not in ("alibi", "value size", "all")
    if library == "flash":
        return takes and case != "softcap" and not page
    return takes and (library == "flash-attn-3" or page % decode.PAGE_OF_2 == 0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("page", [0, 4, 256])
def test_every_case(log, monkeypatch, case, page):
    """Within the budget by each kernel, or the reason; and by whatever comes first."""
    i = decode_inputs(page=page, dtype=BF16, **CASES[case])
    for library, call in CALLS.items():
        monkeypatch.setenv(libraries.VARIABLE, library)
        if not _able(library, case, page):
            with pytest.raises(BackendUnavailableError, match=library):
                check_decode(i, "aten")
            continue
        log.calls.clear()
        check_decode(i, "aten")
        assert log.of(call)
    monkeypatch.delenv(libraries.VARIABLE)
    check_decode(i, "aten")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_the_batch_as_a_gpu_takes_it(log, monkeypatch, case, dtype):
    """Groups as rows, a boolean mask: on blocks and on the memory-efficient kernel."""
    for name in ("blocks", "auto"):
        monkeypatch.setenv(libraries.VARIABLE, name)
        monkeypatch.setattr(decode, "ORDER", ())
        check_decode(decode_inputs(page=5, dtype=dtype, **CASES[case]), "aten")


@pytest.mark.parametrize("layout", ["strided", "permuted", "misaligned"])
def test_a_cache_that_no_kernel_can_read(log, layout):
    i = decode_inputs(layout=layout, dtype=BF16)
    check_decode(i, "aten")


def test_out_of_range_is_not_a_number_and_is_not_read(log, monkeypatch):
    i = decode_inputs(lengths=(7, 12, 9), page=4, dtype=BF16)
    arguments = i.arguments()
    arguments["cache_seqlens"][1], arguments["block_table"][2, 1] = 13, 10**6
    from lora_kernels.ops.attention import decode_contract

    monkeypatch.setattr(decode_contract, "_check_values", lambda *rest: None)  # as on a GPU
    out = attention_decode(**arguments, backend="aten")
    assert log.of("fa3 cache")
    assert out[0].isfinite().all() and out[1:].isnan().all()


@pytest.mark.parametrize("fault", ["top-left", "exclusive", "scale"])
def test_a_kernel_that_means_something_else_is_not_taken(log, fault):
    log.fault = fault
    i = decode_inputs(S=3, window=(5, 0) if fault == "exclusive" else None, dtype=BF16)
    check_decode(i, "aten")


def test_explain(log, monkeypatch):
    shapes = {"B": 2, "S": 1, "Sk": 64, "H": 4, "D": 64, "cache": "paged", "dtype": "bfloat16"}

    def of_aten(**more):
        asked = {**shapes, "device": "cuda", **more}
        return lk.explain("attention", **asked)["backends"]["aten"]["reason"]

    assert "FlashAttention 3" in of_aten()
    monkeypatch.setenv(libraries.VARIABLE, "flash")
    assert "flash: torch's operator is not called with pages" in of_aten()
    monkeypatch.setenv(libraries.VARIABLE, "auto")
    assert of_aten(alibi=True).startswith("the cache as a batch, masked; flash-attn-3: ")
    assert of_aten(device="cpu") == "the cache as a batch, masked"
