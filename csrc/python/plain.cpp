#include "plain.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/_unsafe_view.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <cstdlib>

namespace py = pybind11;

namespace lora_kernels::python {

namespace {

// Of any device.
const at::Tensor* dense(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const at::Tensor& t = THPVariable_Unpack(object);
  if (!t.defined() || t.key_set().has(c10::DispatchKey::Python) || t.layout() != at::kStrided ||
      t.is_nested()) {
    return nullptr;
  }
  return &t;
}

}  // namespace

const at::Tensor* plain(py::handle object) {
  const at::Tensor* t = dense(object.ptr());
  if (t == nullptr || !t->is_cpu() || t->is_neg() || t->is_conj() || t->_fw_grad(0).defined()) {
    return nullptr;
  }
  return t;
}

bool is_read(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

namespace {

bool is_set(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0';
}

bool untraced() {
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         !c10::impl::tls_is_dispatch_key_included(
             c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !torch::jit::tracer::isTracing();
}

}  // namespace

bool eager() {
  return untraced() && !at::autocast::is_autocast_enabled(at::kCPU) &&
         !is_set("LORA_KERNELS_BACKEND") && !is_set("LORA_KERNELS_DISABLE");
}

const at::Tensor* eager_input(py::handle object) {
  const at::Tensor* x = plain(object);
  const bool fits = x != nullptr && x->dim() > 0 && x->numel() > 0 && is_read(x->scalar_type());
  return fits && eager() ? x : nullptr;
}

at::Tensor flat_rows(const at::Tensor& t) { return t.dim() == 2 ? t : t.reshape({-1, t.size(-1)}); }

at::Tensor with_leading_shape(const at::Tensor& y, const at::Tensor& input) {
  if (input.dim() == 2) return y;
  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = y.size(1);
  return at::_unsafe_view(y, shape);
}

namespace {

bool holds_only(PyObject* list, PyObject* item) {
  return PyList_CheckExact(list) && PyList_GET_SIZE(list) == 1 && PyList_GET_ITEM(list, 0) == item;
}

bool is_empty(PyObject* container) {
  if (PyDict_Check(container)) return PyDict_GET_SIZE(container) == 0;
  return PyList_Check(container) && PyList_GET_SIZE(container) == 0;
}

bool modules_stand(const py::dict& state, const py::tuple& own, const py::tuple& same,
                   const py::tuple& absent, const py::tuple& empty, const py::tuple& types) {
  const auto item = [](const py::tuple& t, Py_ssize_t i) { return PyTuple_GET_ITEM(t.ptr(), i); };
  const auto size = [](const py::tuple& t) { return static_cast<Py_ssize_t>(t.size()); };
  for (Py_ssize_t i = 0; i + 1 < size(own); i += 2) {
    if (PyDict_GetItemWithError(state.ptr(), item(own, i)) != item(own, i + 1)) return false;
  }
  for (Py_ssize_t i = 0; i + 2 < size(same); i += 3) {
    PyObject *mapping = item(same, i), *key = item(same, i + 1), *value = item(same, i + 2);
    if (!PyDict_Check(mapping)) {
      if (!holds_only(mapping, value)) return false;
    } else if (PyDict_GetItemWithError(mapping, key) != value) {
      PyErr_Clear();
      return false;
    }
  }
  for (Py_ssize_t i = 0; i + 1 < size(absent); i += 2) {
    PyObject* mapping = item(absent, i);
    if (!PyDict_Check(mapping) || PyDict_GetItemWithError(mapping, item(absent, i + 1)) != nullptr) {
      return false;
    }
  }
  for (Py_ssize_t i = 0; i < size(empty); ++i) {
    if (!is_empty(item(empty, i))) return false;
  }
  for (Py_ssize_t i = 0; i + 1 < size(types); i += 2) {
    PyObject *object = item(types, i), *type = item(types, i + 1);
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != type) return false;
  }
  return true;
}

bool is_floating(at::ScalarType dtype) { return is_read(dtype) || dtype == at::kDouble; }

bool tensors_fit(py::handle x_in, const py::tuple& tensors) {
  const at::Tensor* x = dense(x_in.ptr());
  if (x == nullptr || tensors.size() != 4 || !is_floating(x->scalar_type())) return false;
  const at::Device device = x->device();
  if (!device.is_cpu() && !device.is_cuda() && !device.is_meta()) return false;
  const bool autocast = !device.is_meta() && at::autocast::is_autocast_enabled(device.type());
  if (autocast && x->scalar_type() == at::kDouble) return false;
  at::ScalarType adapter{};
  for (size_t i = 0; i < 4; ++i) {
    PyObject* object = PyTuple_GET_ITEM(tensors.ptr(), i);
    if (i == 3 && object == Py_None) return true;
    const at::Tensor* t = dense(object);
    if (t == nullptr || t->device() != device || !is_floating(t->scalar_type())) return false;
    if (i < 3 && t->dim() != 2) return false;
    const bool of_base = i == 0 || i == 3;
    if (autocast ? t->scalar_type() == at::kDouble
                 : of_base && t->scalar_type() != x->scalar_type()) {
      return false;
    }
    if (i == 1) adapter = t->scalar_type();
    if (i == 2 && !autocast && t->scalar_type() != adapter) return false;
  }
  return true;
}

}  // namespace

bool plan_stands(py::handle x, py::tuple tensors, py::dict state, py::tuple own, py::tuple same,
                 py::tuple absent, py::tuple empty, py::tuple types) {
  return untraced() && modules_stand(state, own, same, absent, empty, types) &&
         tensors_fit(x, tensors);
}

}  // namespace lora_kernels::python
