#include "eager.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/utils/pybind.h>

#include "../python/plain.h"
#include "gated_activation_host.h"

namespace py = pybind11;

namespace lora_kernels::gated_activation {

py::object gated_activation_eager(py::handle gate_in, py::handle up_in, const std::string& kind) {
  const at::Tensor* gate = python::eager_input(gate_in);
  if (gate == nullptr) return py::none();
  bool differentiable = gate->requires_grad();
  const at::Tensor* up = nullptr;
  if (!up_in.is_none()) {
    up = python::plain(up_in);
    if (up == nullptr || up->scalar_type() != gate->scalar_type() || up->sizes() != gate->sizes()) {
      return py::none();
    }
    differentiable = differentiable || up->requires_grad();
  }
  if (differentiable && at::GradMode::is_enabled()) return py::none();
  at::Tensor h;
  {
    const py::gil_scoped_release release;
    const at::NoGradGuard no_grad;
    std::optional<at::Tensor> factor;
    if (up != nullptr) factor = python::flat_rows(*up);
    h = gated_activation_fwd(python::flat_rows(*gate), factor, kind);
    h = python::with_leading_shape(h, *gate);
  }
  return py::cast(std::move(h));
}

}  // namespace lora_kernels::gated_activation
