// A call of lora_linear without gradients from plain eager mode, whole: checks, choice of the
// engine, packed weights, shapes. Python around a small problem costs more than the problem.
//
// It answers exactly what `auto` of lora_kernels/ops/lora_linear would (the compiled engine where
// that is preferred, else the same library calls as aten.py), or declines, and then says nothing
// about why: the caller goes the long way, which has the messages.
#pragma once

#include <pybind11/pybind11.h>

namespace lora_kernels::lora_linear {

// x [..., K]; equally long tuples of W [N_g, K], A [r_g, K], B [N_g, r_g], numbers and biases [N_g]
// or None. Returns a list of [..., N_g], or None: declined.
pybind11::object lora_linear_eager(pybind11::handle x, pybind11::tuple weights,
                                   pybind11::tuple lora_as, pybind11::tuple lora_bs,
                                   pybind11::tuple scalings, pybind11::tuple biases);

}  // namespace lora_kernels::lora_linear
