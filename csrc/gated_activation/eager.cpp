#include "eager.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_unsafe_view.h>
#include <torch/csrc/utils/pybind.h>

#include "../python/plain.h"
#include "gated_activation_host.h"

namespace py = pybind11;

namespace lora_kernels::gated_activation {

py::object gated_activation_eager(py::handle gate_in, py::handle up_in, const std::string& kind) {
  const at::Tensor* gate = python::plain(gate_in);
  if (gate == nullptr || gate->dim() == 0 || gate->numel() == 0 ||
      !python::is_read(gate->scalar_type()) || !python::eager()) {
    return py::none();
  }
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
    const auto rows = [](const at::Tensor& t) {
      return t.dim() == 2 ? t : t.reshape({-1, t.size(-1)});
    };
    std::optional<at::Tensor> factor;
    if (up != nullptr) factor = rows(*up);
    h = gated_activation_fwd(rows(*gate), factor, kind);
    if (gate->dim() != 2) h = at::_unsafe_view(h, gate->sizes());
  }
  return py::cast(std::move(h));
}

}  // namespace lora_kernels::gated_activation
