// The only pybind11 module: one line per host entry, no logic.
#include <torch/csrc/utils/pybind.h>

#include "attention/attention_host.h"
#include "cpu/amx_peak.h"
#include "cpu/isa.h"
#include "gated_activation/eager.h"
#include "gated_activation/gated_activation_host.h"
#include "linear_cross_entropy/linear_cross_entropy_host.h"
#include "lora_linear/eager.h"
#include "lora_linear/lora_linear_host.h"
#include "lora_linear/packed_copies.h"
#include "python/plain.h"
#include "quant_linear/quant_linear_host.h"
#include "rms_norm/eager.h"
#include "rms_norm/rms_norm_host.h"
#include "rope/rope_host.h"

namespace py = pybind11;
using namespace lora_kernels;

PYBIND11_MODULE(_C, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.doc() = "Compiled CPU kernels of lora_kernels.";
  m.attr("torch_version") = LORA_KERNELS_TORCH_VERSION;
  m.attr("compiler") = LORA_KERNELS_COMPILER;
  m.def("isa", [] { return std::string(cpu::isa_name(cpu::active_isa())); });
  m.def("machine_isas", &cpu::machine_isa_names);
  m.def("set_isa_limit", &cpu::set_isa_limit, py::arg("name"));
  m.def("amx_peak_gflops", &cpu::amx_peak_gflops, py::arg("seconds"), py::arg("threads"), release());
  m.def("plan_stands", &python::plan_stands);
  m.def("attention_engine", &attention::engine_name, py::arg("dtype"));
  m.def("attention_fwd", &attention::attention_fwd, release());
  m.def("attention_bwd", &attention::attention_bwd, release());
  m.def("attention_decode", &attention::attention_decode, release());
  m.def("gated_activation_fwd", &gated_activation::gated_activation_fwd, release());
  m.def("gated_activation_eager", &gated_activation::gated_activation_eager);
  m.def("gated_activation_bwd", &gated_activation::gated_activation_bwd, release());
  m.def("gated_activation_fwd_products", &gated_activation::gated_activation_fwd_products,
        release());
  m.def("gated_activation_bwd_products", &gated_activation::gated_activation_bwd_products,
        release());
  m.def("linear_cross_entropy_engine", &linear_cross_entropy::engine_name, py::arg("dtype"));
  m.def("linear_cross_entropy_rows", &linear_cross_entropy::losses_of_rows, release());
  m.def("lora_linear_engine", &lora_linear::engine_name, py::arg("dtype"));
  m.def("lora_linear_packed_bytes", &lora_linear::packed_bytes, py::arg("dtype"), py::arg("k"),
        py::arg("n"));
  m.def("lora_linear_pack_weight", &lora_linear::pack_weight, py::arg("weight"), py::arg("dtype"),
        py::arg("for_dgrad"), release());
  m.def("lora_linear_fwd", &lora_linear::lora_linear_fwd, py::arg("x"), py::arg("packed"),
        py::arg("out_features"), py::arg("lora_as"), py::arg("lora_bs"), py::arg("biases"),
        py::arg("scalings"), py::arg("dropout_p"), py::arg("seed"), py::arg("shrunk") = py::none(),
        release());
  m.def("lora_linear_bwd", &lora_linear::lora_linear_bwd, py::arg("dys"), py::arg("x"),
        py::arg("packed"), py::arg("lora_as"), py::arg("lora_bs"), py::arg("s"),
        py::arg("scalings"), py::arg("dropout_p"), py::arg("seed"), py::arg("need_dx"),
        py::arg("need_da"), py::arg("need_db"), py::arg("ds") = py::none(), release());
  m.def("lora_linear_few_rows", &lora_linear::few_rows, py::arg("dtype"));
  m.def("lora_linear_fwd_few", &lora_linear::lora_linear_fwd_few, py::arg("x"), py::arg("weights"),
        py::arg("lora_as"), py::arg("lora_bs"), py::arg("biases"), py::arg("scalings"),
        py::arg("shrunk") = py::none(), release());
  m.def("lora_linear_eager", &lora_linear::lora_linear_eager);
  m.def("lora_linear_packed_copy", &lora_linear::packed_copy);
  m.def("lora_linear_keep_packed_copy", &lora_linear::keep_packed_copy);
  m.def("lora_linear_packed_copies_bytes", &lora_linear::packed_copies_bytes);
  m.def("lora_linear_packed_copies_count", &lora_linear::packed_copies_count);
  m.def("lora_linear_drop_packed_copies", &lora_linear::drop_packed_copies);
  m.attr("lora_linear_given") = true;  // S and dS are taken where the caller has them
  m.attr("lora_linear_rank_zero") = true;  // members without an adapter, with dropout, too
  py::class_<quant_linear::QuantWeight, std::shared_ptr<quant_linear::QuantWeight>>(m, "QuantWeight")
      .def(py::init(&quant_linear::make_weight), py::arg("layout"), py::arg("n"), py::arg("k"),
           py::arg("block"), py::arg("nested_block"), py::arg("factor"), py::arg("parts"))
      .def_readonly("repacked_bytes", &quant_linear::QuantWeight::repacked_bytes);
  m.def("quant_linear_engine", &quant_linear::engine_name, py::arg("dtype"));
  m.def("quant_linear_dequantize", &quant_linear::dequantize, release());
  m.def("quant_linear_quantize_flat", &quant_linear::quantize_flat, release());
  m.def("quant_linear_quantize_rows", &quant_linear::quantize_rows, release());
  m.def("quant_linear_fwd", &quant_linear::quant_linear_fwd, release());
  m.def("quant_linear_bwd", &quant_linear::quant_linear_bwd, release());
  m.def("rms_norm_fwd", &rms_norm::rms_norm_fwd, release());
  m.def("rms_norm_eager", &rms_norm::rms_norm_eager);
  m.def("rms_norm_bwd", &rms_norm::rms_norm_bwd, release());
  m.def("rope_rotate", &rope::rope_rotate, release());
}
