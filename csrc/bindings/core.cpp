// What is no tensor op: build facts, the instruction set in use, the page allocator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "transmla/transmla.h"

namespace py = pybind11;
using namespace transmla;

namespace {

constexpr Isa kIsas[] = {Isa::kScalar, Isa::kNeon, Isa::kAvx2, Isa::kAvx512};

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (Isa isa : kIsas) {
    if (isa_available(isa)) names.push_back(isa_name(isa));
  }
  return names;
}

void force_isa_by_name(const std::string& name) {
  for (Isa isa : kIsas) {
    if (name == isa_name(isa) && force_isa(isa)) return;
  }
  std::string known;
  for (const std::string& isa : available_isas()) known += (known.empty() ? "" : ", ") + isa;
  throw std::invalid_argument("isa must be one of " + known + ", got " + name);
}

py::dict build_info() {
  py::dict info;
  info["version"] = TRANSMLA_VERSION;
  info["compiler"] = TRANSMLA_COMPILER;
  info["build_type"] = TRANSMLA_BUILD_TYPE;
  info["cpu_isas"] = py::str(TRANSMLA_CPU_ISAS).attr("split")();
  info["cuda_archs"] = py::str(TRANSMLA_CUDA_ARCHS).attr("split")();
  return info;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.def("build_info", &build_info);
  m.def("cpu_isa", [] { return isa_name(active_isa()); });
  m.def("available_isas", &available_isas);
  m.def("force_isa", &force_isa_by_name, py::arg("name"));
  m.def("reset_isa", &reset_isa);
  m.def("plan_splits", &plan_splits, py::arg("batch_size"), py::arg("num_rows"),
        py::arg("max_seqlen"), py::arg("num_workers"));
  py::class_<BlockPool>(m, "BlockPool")
      .def(py::init<int32_t>(), py::arg("num_blocks"))
      .def("allocate", &BlockPool::allocate, py::arg("count"))
      .def("free", &BlockPool::free, py::arg("blocks"))
      .def_property_readonly("num_blocks", &BlockPool::num_blocks)
      .def_property_readonly("num_free", &BlockPool::num_free);
}
