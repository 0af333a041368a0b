// vchitect_fast._C: the Engine for Python. Arguments and exceptions are translated here, nothing is
// decided here.
//
// Addresses come as integers (tensor.data_ptr()), so neither torch's headers nor its binary
// interface is needed. Every method runs without the GIL. vchitect_fast/_C.pyi is the typed picture
// of this file.
#include <pybind11/pybind11.h>

#include <memory>

#include "copier_host.h"
#include "engine.h"

namespace py = pybind11;

namespace {

std::unique_ptr<vf::Engine> host_engine(std::size_t budget_bytes, std::size_t alignment) {
  return std::make_unique<vf::Engine>(std::make_unique<vf::HostCopier>(), budget_bytes, alignment);
}

py::dict stats(const vf::Engine& engine) {
  const vf::PoolStats stats = engine.stats();
  py::dict result;
  result["budget_bytes"] = stats.budget_bytes;
  result["used_bytes"] = stats.used_bytes;
  result["requested_bytes"] = stats.requested_bytes;
  result["high_water_bytes"] = stats.high_water_bytes;
  result["largest_free_bytes"] = stats.largest_free_bytes;
  result["num_slots"] = stats.num_slots;
  result["num_free_ranges"] = stats.num_free_ranges;
  result["num_allocations"] = stats.num_allocations;
  return result;
}

py::dict build_info() {
  py::dict result;
  result["compiler"] = VF_COMPILER;
  result["flags"] = VF_FLAGS;
  result["sanitize"] = VF_SANITIZE;
  result["cuda"] = false;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Moves bytes between device memory and one pool of host memory (csrc/).";
  py::register_exception<vf::BudgetError>(m, "BudgetError", PyExc_RuntimeError);
  py::register_exception<vf::TicketError>(m, "TicketError", PyExc_RuntimeError);
  m.def("build_info", &build_info, "compiler, flags, sanitize, cuda: how this module was built.");

  using unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<vf::Engine>(m, "Engine", "Host engine: copies with memcpy on one thread a direction.")
      .def(py::init(&host_engine), unlocked(), py::arg("budget_bytes"), py::arg("alignment") = 4096)
      .def(
          "offload",
          [](vf::Engine& engine, std::uintptr_t address, std::size_t num_bytes) {
            return engine.offload(reinterpret_cast<const void*>(address), num_bytes);
          },
          unlocked(), py::arg("address"), py::arg("num_bytes"))
      .def(
          "prefetch",
          [](vf::Engine& engine, vf::Ticket ticket, std::uintptr_t address) {
            engine.prefetch(ticket, reinterpret_cast<void*>(address));
          },
          unlocked(), py::arg("ticket"), py::arg("address"))
      .def("wait", &vf::Engine::wait, unlocked(), py::arg("ticket"))
      .def("release", &vf::Engine::release, unlocked(), py::arg("ticket"))
      .def("stats", &stats);
}
