// A call of gated_activation without gradients from plain eager mode, whole; see
// ../lora_linear/eager.h.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace lora_kernels::gated_activation {

// gate [..., N] and up of its shape or None. Returns h in the shape of gate, or None: declined.
pybind11::object gated_activation_eager(pybind11::handle gate, pybind11::handle up,
                                        const std::string& kind);

}  // namespace lora_kernels::gated_activation
