// A call of rms_norm without gradients from plain eager mode, whole; see ../lora_linear/eager.h.
#pragma once

#include <pybind11/pybind11.h>

namespace lora_kernels::rms_norm {

// x [..., K], weight [K] or None. Returns y in the shape of x, or None: declined.
pybind11::object rms_norm_eager(pybind11::handle x, pybind11::handle weight, double eps,
                                double offset);

}  // namespace lora_kernels::rms_norm
