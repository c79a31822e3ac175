#include "eager.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "../python/plain.h"
#include "lora_linear.h"
#include "lora_linear_host.h"
#include "packed_copies.h"

namespace py = pybind11;

namespace lora_kernels::lora_linear {
namespace {

struct Members {
  std::vector<at::Tensor> weights, lora_as, lora_bs;
  std::vector<std::optional<at::Tensor>> biases;
  std::vector<double> scalings;
};

bool is_matrix(const at::Tensor& t, int64_t columns) {
  return t.dim() == 2 && t.size(1) == columns && t.size(0) > 0;
}

// The operands, where all are what a frozen layer with one adapter has.
bool read(const at::Tensor& x, const py::tuple& weights, const py::tuple& lora_as,
          const py::tuple& lora_bs, const py::tuple& scalings, const py::tuple& biases,
          Members& m) {
  const size_t n = weights.size();
  if (n == 0 || n > static_cast<size_t>(kMaxGroup) || lora_as.size() != n || lora_bs.size() != n ||
      scalings.size() != n || biases.size() != n) {
    return false;
  }
  const int64_t k = x.size(-1);
  at::ScalarType adapter{};
  for (size_t g = 0; g < n; ++g) {
    const at::Tensor *w = python::plain(weights[g]), *a = python::plain(lora_as[g]),
                     *b = python::plain(lora_bs[g]);
    if (w == nullptr || a == nullptr || b == nullptr) return false;
    if (g == 0) adapter = a->scalar_type();
    const bool fits = w->scalar_type() == x.scalar_type() && !w->requires_grad() &&
                      is_matrix(*w, k) && is_matrix(*a, k) && is_matrix(*b, a->size(0)) &&
                      b->size(0) == w->size(0) && python::is_read(a->scalar_type()) &&
                      a->scalar_type() == adapter && b->scalar_type() == adapter;
    if (!fits) return false;
    PyObject* number = PyTuple_GET_ITEM(scalings.ptr(), g);
    if (!PyFloat_Check(number) && !PyLong_Check(number)) return false;
    const double scaling = PyFloat_AsDouble(number);
    if (!std::isfinite(scaling) || PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      return false;
    }
    if (!biases[g].is_none()) {
      const at::Tensor* bias = python::plain(biases[g]);
      if (bias == nullptr || bias->dim() != 1 || bias->size(0) != w->size(0) ||
          !python::is_read(bias->scalar_type())) {
        return false;
      }
      m.biases.emplace_back(*bias);
    } else {
      m.biases.emplace_back(std::nullopt);
    }
    m.weights.push_back(*w);
    m.lora_as.push_back(*a);
    m.lora_bs.push_back(*b);
    m.scalings.push_back(scaling);
  }
  return true;
}

bool needs_gradient(const at::Tensor& x, const Members& m) {
  if (!at::GradMode::is_enabled()) return false;
  bool any = x.requires_grad();
  for (size_t g = 0; g < m.weights.size(); ++g) {
    any = any || m.lora_as[g].requires_grad() || m.lora_bs[g].requires_grad() ||
          (m.biases[g].has_value() && m.biases[g]->requires_grad());
  }
  return any;
}

at::Tensor in(const at::Tensor& t, at::ScalarType dtype) { return t.to(dtype); }

// The calls of aten.py, in its order: a checkpoint's first pass has to give the bits of the second.
std::vector<at::Tensor> library_calls(const at::Tensor& rows, const Members& m) {
  const at::ScalarType dtype = rows.scalar_type();
  std::vector<at::Tensor> low;
  for (const at::Tensor& a : m.lora_as) low.push_back(in(a, dtype));
  const at::Tensor joined = low.size() == 1 ? low[0] : at::cat(low);
  const at::Tensor s = at::mm(rows, joined.t());
  std::vector<at::Tensor> ys;
  int64_t column = 0;
  for (size_t g = 0; g < m.weights.size(); ++g) {
    std::optional<at::Tensor> bias;
    if (m.biases[g].has_value()) bias = in(*m.biases[g], dtype);
    at::Tensor y = at::linear(rows, m.weights[g], bias);
    const int64_t rank = m.lora_bs[g].size(1);
    const at::Tensor part = low.size() == 1 ? s : s.narrow(1, column, rank);
    y.addmm_(part, in(m.lora_bs[g], dtype).t(), 1, m.scalings[g]);
    column += rank;
    ys.push_back(std::move(y));
  }
  return ys;
}

// One of few rows, from weights whose rows lie side by side.
bool is_few(const at::Tensor& rows, const Members& m) {
  bool side_by_side = true;
  for (const at::Tensor& w : m.weights) side_by_side = side_by_side && w.stride(1) == 1;
  return side_by_side && rows.size(0) <= few_rows(rows.scalar_type());
}

// Nothing where a weight has no packed copy yet.
std::optional<std::vector<at::Tensor>> compiled(const at::Tensor& rows, const Members& m) {
  const char* policy = std::getenv("LORA_KERNELS_PACK");
  if (policy != nullptr && std::strcmp(policy, "never") == 0) return std::nullopt;
  std::vector<at::Tensor> packed;
  std::vector<int64_t> out_features;
  for (const at::Tensor& w : m.weights) {
    std::optional<at::Tensor> copy = packed_copy(w, rows.scalar_type(), false);
    if (!copy) return std::nullopt;
    packed.push_back(std::move(*copy));
    out_features.push_back(w.size(0));
  }
  return std::get<0>(lora_linear_fwd(rows, packed, out_features, m.lora_as, m.lora_bs, m.biases,
                                     m.scalings, 0.0, std::nullopt, std::nullopt));
}

}  // namespace

py::object lora_linear_eager(py::handle x_in, py::tuple weights, py::tuple lora_as,
                             py::tuple lora_bs, py::tuple scalings, py::tuple biases) {
  const at::Tensor* x = python::eager_input(x_in);
  if (x == nullptr) return py::none();
  Members members;
  if (!read(*x, weights, lora_as, lora_bs, scalings, biases, members) ||
      needs_gradient(*x, members)) {
    return py::none();
  }
  std::optional<std::vector<at::Tensor>> ys;
  {
    const py::gil_scoped_release release;
    const at::NoGradGuard no_grad;
    const at::Tensor rows = python::flat_rows(*x);
    if (is_few(rows, members)) {
      ys = std::get<0>(lora_linear_fwd_few(rows, members.weights, members.lora_as,
                                           members.lora_bs, members.biases, members.scalings,
                                           std::nullopt));
    } else {
      ys = engine_name(x->scalar_type()) == "amx" ? compiled(rows, members)
                                                  : library_calls(rows, members);
    }
    if (ys) {
      for (at::Tensor& y : *ys) y = python::with_leading_shape(y, *x);
    }
  }
  return ys ? py::cast(std::move(*ys)) : py::object(py::none());
}

}  // namespace lora_kernels::lora_linear
