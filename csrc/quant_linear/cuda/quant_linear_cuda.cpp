// Host entry of the CUDA kernels of quant_linear, on the LibTorch stable ABI: library
// lora_kernels_cuda. Shapes, dtypes and formats are those of lora_kernels/ops/quant_linear/cuda.py,
// which has checked them; here only what a wrong caller could crash on is checked again.
//
// quant_dequantize: one launch. quant_linear_fwd and quant_linear_dgrad: the product, and finish
// where its sum is shared out or there is an adapter; before them a copy of rows of x that are not
// 16-byte aligned. Where they do not apply, cuda.py dequantizes and calls lora_linear's entry.
// Everything runs on the current stream, allocates through torch and never waits for the device, so
// a call can be captured into a graph.
#include <tuple>

#include "../../common/stable_torch.h"
#include "../../lora_linear/cuda/operands.h"
#include "../../lora_linear/cuda/split.h"
#include "launch.h"

namespace lora_kernels::quant_linear::cuda {
namespace {

namespace lora = lora_linear::cuda;
using lora::ceil_div;
using stable::as_matrix;
using stable::check_launch;
using stable::dtype_of;
using stable::Matrix;
using stable::on_device;
using stable::Place;
using stable::ScalarType;
using stable::Tensor;

constexpr stable::Require require{"quant_linear"};

// Spec of a weight as cuda.py passes it; formats.py says what its parts are.
struct Spec {
  std::string layout;
  int64_t n, k, block_size, nested_block;
  double factor;
};

// A part of the expected length, contiguous, on the device of the first one.
const void* part(const std::vector<Tensor>& parts, size_t index, ScalarType type, int64_t length) {
  require(index < parts.size(), "parts are missing");
  const Tensor& t = parts[index];
  require(stable::same_device(t, parts[0]), "a part is on another device");
  require(t.scalar_type() == type, "a part has another dtype than its format");
  require(t.numel() == length && t.is_contiguous(), "a part has another shape than its format");
  return t.const_data_ptr();
}

int log2_of(int64_t value) {
  for (int i = 0; i < 31; ++i) {
    if (value == int64_t{1} << i) return i;
  }
  require.refuse("the block size is no power of two");
}

void fill_flat(QuantWeight& w, const Spec& s, const std::vector<Tensor>& parts) {
  const int64_t blocks = ceil_div(s.n * s.k, s.block_size);
  w.layout = Layout::kFlat;
  w.packed = part(parts, 0, ScalarType::Byte, (s.n * s.k + 1) / 2);
  w.block_shift = log2_of(s.block_size);
  w.nested_shift = s.nested_block > 0 ? log2_of(s.nested_block) : 0;
  w.absmax = part(parts, 1, s.nested_block > 0 ? ScalarType::Byte : ScalarType::Float, blocks);
  w.code = static_cast<const float*>(part(parts, 2, ScalarType::Float, 16));
  if (s.nested_block == 0) return;
  const int64_t nested = ceil_div(blocks, s.nested_block);
  w.nested_absmax = static_cast<const float*>(part(parts, 3, ScalarType::Float, nested));
  w.nested_code = static_cast<const float*>(part(parts, 4, ScalarType::Float, 256));
  w.offset = static_cast<const float*>(part(parts, 5, ScalarType::Float, 1));
}

void fill_rows(QuantWeight& w, const Spec& s, const std::vector<Tensor>& parts) {
  const bool int8 = s.layout == "int8_row", block = s.layout == "fp8_block";
  w.layout = int8 ? Layout::kInt8 : Layout::kFp8;
  w.packed = part(parts, 0, int8 ? ScalarType::Char : ScalarType::Float8_e4m3fn, s.n * s.k);
  w.scale_rows = block ? s.block_size : s.layout == "fp8_tensor" ? s.n : 1;
  w.scale_columns = block ? s.block_size : s.k;
  w.scale_ld = ceil_div(s.k, w.scale_columns);
  w.factor = static_cast<float>(s.factor);
  const int64_t scales = ceil_div(s.n, w.scale_rows) * w.scale_ld;
  w.scale = static_cast<const float*>(part(parts, 1, ScalarType::Float, scales));
}

void fill_int4(QuantWeight& w, const Spec& s, const std::vector<Tensor>& parts, bool in_order) {
  const bool awq = s.layout == "awq";
  w.layout = awq ? Layout::kAwq : Layout::kGptq;
  w.packed_n = ceil_div(s.n, 8);
  w.group = s.block_size;
  w.groups = ceil_div(s.k, s.block_size);
  w.zero_offset = s.layout == "gptq_v1" ? 1 : 0;
  w.packed = part(parts, 0, ScalarType::Int, awq ? s.k * w.packed_n : ceil_div(s.k, 8) * s.n);
  w.zeros = static_cast<const int32_t*>(part(parts, 1, ScalarType::Int, w.groups * w.packed_n));
  require(parts.size() > 2, "parts are missing");
  w.scales_dtype = dtype_of(parts[2], "part scales");
  w.scales = part(parts, 2, parts[2].scalar_type(), w.groups * s.n);
  if (awq || in_order) return;
  w.g_idx = static_cast<const int32_t*>(part(parts, 3, ScalarType::Int, s.k));
}

// in_order: the groups of gptq follow k, so that g_idx need not be read.
QuantWeight make_weight(const Spec& s, const std::vector<Tensor>& parts, bool in_order) {
  require(s.n >= 1 && s.k >= 1 && s.block_size >= 1 && s.nested_block >= 0 && !parts.empty(),
          "the spec of the weight has an extent of zero");
  QuantWeight w{};
  w.n = s.n;
  w.k = s.k;
  if (s.layout == "flat") {
    fill_flat(w, s, parts);
  } else if (s.layout == "int8_row" || s.layout == "fp8_tensor" || s.layout == "fp8_row" ||
             s.layout == "fp8_block") {
    fill_rows(w, s, parts);
  } else if (s.layout == "gptq" || s.layout == "gptq_v1" || s.layout == "awq") {
    fill_int4(w, s, parts, in_order);
  } else {
    require.refuse("layout '" + s.layout + "' is unknown");
  }
  return w;
}

ScalarType scalar_type(Dtype dtype) {
  return dtype == Dtype::kFloat32    ? ScalarType::Float
         : dtype == Dtype::kBFloat16 ? ScalarType::BFloat16
                                     : ScalarType::Half;
}

// dtype: 0 float32, 1 bfloat16, 2 float16.
Tensor dequantize(std::vector<Tensor> parts, std::string layout, int64_t n, int64_t k,
                  int64_t block_size, int64_t nested_block, double factor, int64_t dtype) {
  require(!parts.empty() && on_device(parts[0]), "the weight is not on a CUDA device");
  require(dtype >= 0 && dtype <= 2, "dtype is not 0, 1 or 2");
  const Place place(parts[0]);
  DequantizeParams p{};
  p.w = make_weight({layout, n, k, block_size, nested_block, factor}, parts, false);
  p.numel = n * k;
  p.dtype = static_cast<Dtype>(dtype);
  Tensor out = stable::empty(parts[0], {n, k}, scalar_type(p.dtype));
  p.out = out.mutable_data_ptr();
  require(check(p));
  check_launch(launch_dequantize(p, place.stream), "dequantize");
  return out;
}

Tensor contiguous_values(const Tensor& w) {
  require(on_device(w) && w.numel() >= 1, "w is not on a CUDA device or empty");
  return torch::stable::contiguous(w);
}

// (packed, absmax) of nf4 or fp4: `values` ascending, nibbles[i] the code of values[i].
std::tuple<Tensor, Tensor> quantize_flat(Tensor w, int64_t block_size, std::vector<double> values,
                                         std::vector<int64_t> nibbles, double least) {
  require(values.size() == 16 && nibbles.size() == 16, "a code table has 16 values");
  const Place place(w);
  const Tensor held = contiguous_values(w);
  QuantizeFlatParams p{};
  p.w = held.const_data_ptr();
  p.dtype = dtype_of(held, "w");
  p.numel = held.numel();
  p.block_shift = log2_of(block_size);
  p.least = static_cast<float>(least);
  for (int i = 0; i < 16; ++i) {
    require(nibbles[i] >= 0 && nibbles[i] < 16, "a nibble is not in 0..15");
    p.nibbles |= static_cast<uint64_t>(nibbles[i]) << (4 * i);
    if (i == 15) break;
    p.middle[i] = (static_cast<float>(values[i]) + static_cast<float>(values[i + 1])) / 2.0f;
  }
  Tensor packed = stable::empty(held, {(p.numel + 1) / 2}, ScalarType::Byte);
  Tensor absmax = stable::empty(held, {ceil_div(p.numel, block_size)}, ScalarType::Float);
  p.packed = static_cast<uint8_t*>(packed.mutable_data_ptr());
  p.absmax = static_cast<float*>(absmax.mutable_data_ptr());
  require(check(p));
  check_launch(launch_quantize_flat(p, place.stream), "quantize_flat");
  return {packed, absmax};
}

// (codes, nested_absmax) of absmax - offset.
std::tuple<Tensor, Tensor> quantize_nested(Tensor absmax, int64_t nested_block, Tensor code,
                                           Tensor offset, double least) {
  const Place place(absmax);
  const std::vector<Tensor> parts = {absmax, code, offset};
  QuantizeNestedParams p{};
  p.blocks = absmax.numel();
  p.absmax = static_cast<const float*>(part(parts, 0, ScalarType::Float, p.blocks));
  p.code = static_cast<const float*>(part(parts, 1, ScalarType::Float, 256));
  p.offset = static_cast<const float*>(part(parts, 2, ScalarType::Float, 1));
  p.nested_shift = log2_of(nested_block);
  p.least = static_cast<float>(least);
  Tensor codes = stable::empty(absmax, {p.blocks}, ScalarType::Byte);
  Tensor nested = stable::empty(absmax, {ceil_div(p.blocks, nested_block)}, ScalarType::Float);
  p.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  p.nested_absmax = static_cast<float*>(nested.mutable_data_ptr());
  require(check(p));
  check_launch(launch_quantize_nested(p, place.stream), "quantize_nested");
  return {codes, nested};
}

// (packed, scale) of int8.
std::tuple<Tensor, Tensor> quantize_rows(Tensor w) {
  require(w.dim() == 2, "w is not two-dimensional");
  const Place place(w);
  const Tensor held = contiguous_values(w);
  QuantizeRowsParams p{};
  p.w = held.const_data_ptr();
  p.dtype = dtype_of(held, "w");
  p.n = held.size(0);
  p.k = held.size(1);
  Tensor packed = stable::empty(held, {p.n, p.k}, ScalarType::Char);
  Tensor scale = stable::empty(held, {p.n}, ScalarType::Float);
  p.packed = static_cast<int8_t*>(packed.mutable_data_ptr());
  p.scale = static_cast<float*>(scale.mutable_data_ptr());
  require(check(p));
  check_launch(launch_quantize_rows(p, place.stream), "quantize_rows");
  return {packed, scale};
}

// What both directions need of the operands, and the buffers that live as long as the launches.
class Skinny {
 public:
  Skinny(const Tensor& z_in, const std::vector<Tensor>& parts, const Spec& spec, bool dgrad)
      : place_(z_in),
        z_(as_matrix(z_in, dgrad ? "dy" : "x")),
        pads_(z_.tensor, dtype_of(z_in, "x")) {
    require(!parts.empty() && parts[0].get_device_index() == z_in.get_device_index(),
            "the weight is on another device than x");
    p.dtype = dtype_of(z_in, "x");
    p.dgrad = dgrad;
    p.m = z_.rows;
    p.w = make_weight(spec, parts, true);
    p.sm_count = place_.sm_count;
    require(z_.columns == (dgrad ? spec.n : spec.k),
            "x has another number of columns than the weight");
    const lora::Operand aligned = pads_.add(z_, 0, z_.columns, true);
    p.z = aligned.data;
    p.ldz = aligned.ld;
  }

  // C += scale mask(U) right with U = u_scale mask(Z) left^T; see params.h for A and B.
  void add_low_rank(const Tensor& a, const Tensor& b, double u_scale, double scale,
                    int64_t threshold, const std::optional<Tensor>& seed) {
    require(a.dim() == 2 && b.dim() == 2 && a.size(1) == p.w.k && b.size(0) == p.w.n &&
                b.size(1) == a.size(0),
            "the shapes of x, weight, lora_a and lora_b do not fit");
    for (const Tensor* t : {&a, &b}) {
      require(stable::same_device(*t, z_.tensor), "an operand is on another device than x");
    }
    const Factor of_a{a.const_data_ptr(), dtype_of(a, "lora_a"), a.stride(0), a.stride(1)};
    const Factor of_b{b.const_data_ptr(), dtype_of(b, "lora_b"), b.stride(1), b.stride(0)};
    p.rank = a.size(0);
    p.left = p.dgrad ? of_b : of_a;
    p.right = p.dgrad ? of_a : of_b;
    p.u_scale = static_cast<float>(u_scale);
    p.scale = static_cast<float>(scale);
    p.dropout = lora::make_dropout(threshold, seed);
  }

  Tensor u() {
    Tensor made = stable::empty(z_.tensor, {z_.rows, p.rank});
    p.u = made.mutable_data_ptr();
    return made;
  }

  void add_bias(const Tensor& bias) {
    require(bias.numel() == p.w.n && stable::same_device(bias, z_.tensor),
            "the bias has another length or device than the weight");
    bias_ = torch::stable::contiguous(bias);
    p.bias = bias_->const_data_ptr();
    p.bias_dtype = dtype_of(*bias_, "bias");
  }

  Tensor run() {
    Tensor c = stable::empty(z_.tensor, {z_.rows, p.dgrad ? p.w.k : p.w.n});
    p.c = c.mutable_data_ptr();
    // Shapes are right by now, so the size is; check() has the rest.
    Tensor space = stable::workspace(z_.tensor, skinny_workspace(p));
    p.workspace = space.mutable_data_ptr();
    require(check(p));
    pads_.launch(place_.stream);
    check_launch(launch_skinny(p, place_.stream), p.dgrad ? "skinny_dgrad" : "skinny_gemm");
    return c;
  }

  SkinnyParams p{};

 private:
  const Place place_;
  Matrix z_;
  lora::Pads pads_;
  std::optional<Tensor> bias_;
};

std::tuple<Tensor, Tensor> forward(Tensor x, std::vector<Tensor> parts, std::string layout,
                                   int64_t n, int64_t k, int64_t block_size, int64_t nested_block,
                                   double factor, std::optional<Tensor> bias,
                                   std::optional<Tensor> lora_a, std::optional<Tensor> lora_b,
                                   double scaling, double keep_scale, int64_t threshold,
                                   std::optional<Tensor> seed) {
  require(lora_a.has_value() == lora_b.has_value(), "one of lora_a and lora_b is missing");
  Skinny call(x, parts, {layout, n, k, block_size, nested_block, factor}, false);
  if (lora_a.has_value()) {
    call.add_low_rank(*lora_a, *lora_b, keep_scale, scaling, threshold, seed);
  }
  Tensor s = call.u();
  if (bias.has_value()) call.add_bias(*bias);
  return {call.run(), s};
}

Tensor dgrad(Tensor dy, std::vector<Tensor> parts, std::string layout, int64_t n, int64_t k,
             int64_t block_size, int64_t nested_block, double factor, std::optional<Tensor> lora_a,
             std::optional<Tensor> lora_b, double scaling, double keep_scale, int64_t threshold,
             std::optional<Tensor> seed) {
  require(lora_a.has_value() == lora_b.has_value(), "one of lora_a and lora_b is missing");
  Skinny call(dy, parts, {layout, n, k, block_size, nested_block, factor}, true);
  if (lora_a.has_value()) {
    call.add_low_rank(*lora_a, *lora_b, scaling * keep_scale, 1.0, threshold, seed);
  }
  return call.run();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(LK_LIBRARY, m) {
  m.def(
      "quant_dequantize(Tensor[] parts, str layout, int n, int k, int block_size, "
      "int nested_block, float factor, int dtype) -> Tensor");
  m.def(
      "quant_quantize_flat(Tensor w, int block_size, float[] values, int[] nibbles, float least) "
      "-> (Tensor packed, Tensor absmax)");
  m.def(
      "quant_quantize_nested(Tensor absmax, int nested_block, Tensor code, Tensor offset, "
      "float least) -> (Tensor codes, Tensor nested_absmax)");
  m.def("quant_quantize_rows(Tensor w) -> (Tensor packed, Tensor scale)");
  m.def(
      "quant_linear_fwd(Tensor x, Tensor[] parts, str layout, int n, int k, int block_size, "
      "int nested_block, float factor, Tensor? bias, Tensor? lora_a, Tensor? lora_b, "
      "float scaling, float keep_scale, int threshold, Tensor? seed) -> (Tensor y, Tensor s)");
  m.def(
      "quant_linear_dgrad(Tensor dy, Tensor[] parts, str layout, int n, int k, int block_size, "
      "int nested_block, float factor, Tensor? lora_a, Tensor? lora_b, float scaling, "
      "float keep_scale, int threshold, Tensor? seed) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(LK_LIBRARY, LK_KEY, m) {
  m.impl("quant_dequantize", TORCH_BOX(&dequantize));
  m.impl("quant_quantize_flat", TORCH_BOX(&quantize_flat));
  m.impl("quant_quantize_nested", TORCH_BOX(&quantize_nested));
  m.impl("quant_quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("quant_linear_fwd", TORCH_BOX(&forward));
  m.impl("quant_linear_dgrad", TORCH_BOX(&dgrad));
}

}  // namespace lora_kernels::quant_linear::cuda
