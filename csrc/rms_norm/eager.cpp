#include "eager.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>

#include "../python/plain.h"
#include "rms_norm_host.h"

namespace py = pybind11;

namespace lora_kernels::rms_norm {

py::object rms_norm_eager(py::handle x_in, py::handle weight_in, double eps, double offset) {
  const at::Tensor* x = python::eager_input(x_in);
  if (x == nullptr || !(eps >= 0.0) || !std::isfinite(eps) || !std::isfinite(offset)) {
    return py::none();
  }
  bool differentiable = x->requires_grad();
  std::optional<at::Tensor> weight;
  if (!weight_in.is_none()) {
    const at::Tensor* w = python::plain(weight_in);
    if (w == nullptr || w->dim() != 1 || w->size(0) != x->size(-1) ||
        !python::is_read(w->scalar_type())) {
      return py::none();
    }
    differentiable = differentiable || w->requires_grad();
    weight = *w;
  }
  if (differentiable && at::GradMode::is_enabled()) return py::none();
  at::Tensor y;
  {
    const py::gil_scoped_release release;
    const at::NoGradGuard no_grad;
    y = std::get<0>(rms_norm_fwd(python::flat_rows(*x), weight, {}, eps, offset));
    y = python::with_leading_shape(y, *x);
  }
  return py::cast(std::move(y));
}

}  // namespace lora_kernels::rms_norm
