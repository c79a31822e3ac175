// Whether Python objects and the state of the interpreter are plain enough for a shortcut.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

namespace lora_kernels::python {

// The tensor of exactly torch.Tensor or torch.nn.Parameter: on the CPU, dense, without a pending
// negation, without a tangent. Null: something else.
const at::Tensor* plain(pybind11::handle object);

// float32, bfloat16 or float16.
bool is_read(at::ScalarType dtype);

// No dispatch mode, no torch.func transform, nothing traced by torch.jit, no autocast on the CPU, and
// no variable of the environment that chooses a backend.
bool eager();

// The input of a call that may be done whole, eager() included: plain, of a dtype that is read,
// neither empty nor a scalar. Null: the caller declines.
const at::Tensor* eager_input(pybind11::handle object);

// [all rows, last axis] of a tensor, and a result [all rows, n] in the leading shape of its input.
at::Tensor flat_rows(const at::Tensor& t);
at::Tensor with_leading_shape(const at::Tensor& y, const at::Tensor& input);

// Whether a plan that was made of these objects stands for a call with x.
//
// Modules: every (key, value) of `own` is in `state`, every (mapping, key, value) of `same` holds, no
// (mapping, key) of `absent` is there, every container of `empty` is, every (object, class) of `types` is an instance
// of exactly that class. Flat tuples; mappings are dicts, and a (list, None, item) of `same` is a
// list of just that item.
// Tensors: x and (weight, A, B, bias or None) are dense tensors of one device and of floating
// dtypes; weight, A and B are matrices; A and B have one dtype, and weight and bias that of x unless
// autocast converts them.
bool plan_stands(pybind11::handle x, pybind11::tuple tensors, pybind11::dict state,
                 pybind11::tuple own, pybind11::tuple same, pybind11::tuple absent,
                 pybind11::tuple empty, pybind11::tuple types);

}  // namespace lora_kernels::python
