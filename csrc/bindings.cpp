// vchitect_fast._C: the Engine for Python. Arguments and exceptions are translated here, nothing is
// decided here.
//
// Addresses come as integers (tensor.data_ptr()), so neither torch's headers nor its binary
// interface is needed. Every method runs without the GIL. vchitect_fast/_C.pyi is the typed picture
// of this file.
#include <pybind11/pybind11.h>

#include <functional>
#include <memory>
#include <stdexcept>
#include <string>

#include "copier_faulty.h"
#include "copier_host.h"
#include "engine.h"
#ifdef VF_CUDA
#include "copier_cuda.h"
#endif

namespace py = pybind11;

namespace {

// `delay_us_max` and `without` are for tests only (copier_host.h, copier_faulty.h).
std::unique_ptr<vf::Copier> make_copier(bool cuda, std::uint32_t delay_us_max, std::uint32_t seed,
                                        const std::string& without) {
  if (cuda) {
    if (delay_us_max || !without.empty()) {
      throw std::invalid_argument("expected no delays and no missing guard on the CUDA copier.");
    }
#ifdef VF_CUDA
    return std::make_unique<vf::CudaCopier>();
#else
    throw std::invalid_argument(
        "this build has no CUDA copier; build with VCHITECT_FAST_CUDA=1, or move CPU tensors.");
#endif
  }
  std::function<void(vf::Direction)> before_copy;
  if (delay_us_max) before_copy = vf::random_delays(delay_us_max, seed);
  if (!without.empty()) return std::make_unique<vf::FaultyCopier>(without, before_copy);
  return std::make_unique<vf::HostCopier>(before_copy);
}

py::dict stats(vf::Engine& engine) {
  vf::PoolStats pool;
  vf::PoolSetup setup;
  vf::CopyStats out, in;
  {
    const py::gil_scoped_release unlocked;
    pool = engine.stats();
    setup = engine.setup();
    out = engine.copies(vf::Direction::kOffload);
    in = engine.copies(vf::Direction::kPrefetch);
  }
  py::dict result;
  result["budget_bytes"] = pool.budget_bytes;
  result["used_bytes"] = pool.used_bytes;
  result["requested_bytes"] = pool.requested_bytes;
  result["high_water_bytes"] = pool.high_water_bytes;
  result["largest_free_bytes"] = pool.largest_free_bytes;
  result["num_slots"] = pool.num_slots;
  result["num_free_ranges"] = pool.num_free_ranges;
  result["num_allocations"] = pool.num_allocations;
  result["setup_s"] = setup.seconds;
  result["num_setup_threads"] = setup.num_threads;
  result["huge_bytes"] = setup.huge_bytes;
  result["offload_num_copies"] = out.num_copies;
  result["offload_bytes"] = out.bytes;
  result["offload_busy_s"] = out.busy_s;
  result["prefetch_num_copies"] = in.num_copies;
  result["prefetch_bytes"] = in.bytes;
  result["prefetch_busy_s"] = in.busy_s;
  return result;
}

py::dict build_info() {
  py::dict result;
  result["compiler"] = VF_COMPILER;
  result["flags"] = VF_FLAGS;
  result["sanitize"] = VF_SANITIZE;
#ifdef VF_CUDA
  result["cuda"] = true;
#else
  result["cuda"] = false;
#endif
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Moves bytes between device memory and one pool of host memory (csrc/).";
  py::register_exception<vf::BudgetError>(m, "BudgetError", PyExc_RuntimeError);
  py::register_exception<vf::TicketError>(m, "TicketError", PyExc_RuntimeError);
  m.def("build_info", &build_info, "compiler, flags, sanitize, cuda: how this module was built.");

  using unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<vf::Engine>(m, "Engine", "One pool and its copies; cuda=False copies with memcpy.")
      .def(py::init([](std::size_t budget_bytes, std::size_t alignment, unsigned num_threads,
                       std::size_t chunk_bytes, int numa_node, bool cuda,
                       std::uint32_t delay_us_max, std::uint32_t seed, const std::string& without) {
             const vf::PoolOptions options{budget_bytes, alignment, num_threads, chunk_bytes,
                                           numa_node};
             return std::make_unique<vf::Engine>(make_copier(cuda, delay_us_max, seed, without),
                                                 options);
           }),
           unlocked(), py::arg("budget_bytes"), py::arg("alignment") = 4096, py::kw_only(),
           py::arg("num_threads") = 0, py::arg("chunk_bytes") = std::size_t{64} << 30,
           py::arg("numa_node") = -1, py::arg("cuda") = false, py::arg("delay_us_max") = 0,
           py::arg("seed") = 0, py::arg("without") = "")
      .def(
          "offload",
          [](vf::Engine& engine, std::uintptr_t address, std::size_t row_bytes,
             std::size_t num_rows, std::size_t pitch, vf::Stream stream) {
            return engine.offload(
                {reinterpret_cast<const void*>(address), row_bytes, num_rows, pitch}, stream);
          },
          unlocked(), py::arg("address"), py::arg("row_bytes"), py::arg("num_rows") = 1,
          py::arg("pitch") = 0, py::arg("stream") = 0)
      .def(
          "prefetch",
          [](vf::Engine& engine, vf::Ticket ticket, std::uintptr_t address, std::size_t pitch,
             vf::Stream stream) {
            engine.prefetch(ticket, reinterpret_cast<void*>(address), pitch, stream);
          },
          unlocked(), py::arg("ticket"), py::arg("address"), py::arg("pitch") = 0,
          py::arg("stream") = 0)
      .def("wait", &vf::Engine::wait, unlocked(), py::arg("ticket"), py::arg("stream") = 0)
      .def("done", py::overload_cast<vf::Ticket>(&vf::Engine::done), unlocked(), py::arg("ticket"))
      .def("release", &vf::Engine::release, unlocked(), py::arg("ticket"))
      .def("streams",
           [](const vf::Engine& engine) {
             return std::pair(engine.stream(vf::Direction::kOffload),
                              engine.stream(vf::Direction::kPrefetch));
           })
      .def("settle", &vf::Engine::settle, unlocked())
      .def("stats", &stats);
}
