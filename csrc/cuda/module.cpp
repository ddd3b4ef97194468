// Python bindings of the GPU operations with raw addresses and streams: no libtorch, so one build
// works with every torch. The caller has checked shapes, dtypes and strides, and keeps the tensors
// alive until the stream is done with them.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <string>

#include "bindings/parts.h"
#include "cuda/errors.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace {

std::string version(int number) {  // 13000 -> "13.0"
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// Whether there is code for a compute capability. Machine code also serves later minor versions of
// its major one (that of 90a does not); the highest architecture's PTX serves all later versions.
bool serves(int major, int minor) {
  const int wanted = 10 * major + minor;
  int highest = 0;
  std::istringstream architectures(ACTIVEDPO_CUDA_ARCHS);
  for (std::string name; std::getline(architectures, name, ';');) {
    const int number = std::stoi(name);
    highest = std::max(highest, number);
    if (number == wanted) return true;
    if (name.back() != 'a' && number / 10 == major && number < wanted) return true;
  }
  return highest <= wanted;
}

// Returns which devices cannot run this build; empty if all can. A model may use any of them.
std::string unserved(int devices) {
  std::string found;
  for (int device = 0; device < devices; ++device) {
    int major = 0, minor = 0;
    activedpo::check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
                     "cudaDeviceGetAttribute");
    activedpo::check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
                     "cudaDeviceGetAttribute");
    if (serves(major, minor)) continue;
    found += (found.empty() ? "" : ", ") + std::to_string(major) + "." + std::to_string(minor) +
             " (GPU " + std::to_string(device) + ")";
  }
  if (found.empty()) return "";
  return "this build is for the GPU architectures " ACTIVEDPO_CUDA_ARCHS
         ", and the compute capability here is " + found +
         (devices > 1 ? "; CUDA_VISIBLE_DEVICES can leave a GPU out" : "");
}

// Returns why the devices cannot be used here; empty if every one can.
std::string problem() {
  int devices = 0, driver = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  static_cast<void>(cudaGetLastError());
  if (status == cudaSuccess && devices > 0) return unserved(devices);
  if (status == cudaSuccess || status == cudaErrorNoDevice) {
    return "there is no CUDA device (" + activedpo::described(cudaErrorNoDevice) + ")";
  }
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  const std::string said = " (" + activedpo::described(status) + ")";
  if (driver == 0) return "no NVIDIA driver is installed" + said;
  if (driver < CUDART_VERSION && status == cudaErrorInsufficientDriver) {
    return "the NVIDIA driver is too old: it is for CUDA " + version(driver) +
           ", and this build needs a driver for CUDA " + version(CUDART_VERSION) + said;
  }
  return "CUDA does not start" + said;
}

int device_count() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess) devices = 0;
  static_cast<void>(cudaGetLastError());
  return devices;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Operations on NVIDIA GPUs; called through activedpo_fast.ops.";
  module.attr("architectures") = ACTIVEDPO_CUDA_ARCHS;
  module.attr("runtime_version") = version(CUDART_VERSION);
  module.def("device_count", &device_count, "How many devices can be used; 0 without a driver.");
  module.def("serves", &serves, "Whether there is code for a compute capability.",
             py::arg("major"), py::arg("minor"));
  module.def("problem", &problem, "Why the devices cannot be used; empty where every one can.");
  module.def(
      "rank_update",
      [](std::uintptr_t v, std::int64_t v_stride, std::uintptr_t points,
         std::int64_t points_stride, std::int64_t k, std::int64_t m, double alpha, int device,
         std::uintptr_t stream) {
        activedpo::rank_update(
            {reinterpret_cast<double*>(v), v_stride, reinterpret_cast<const double*>(points),
             points_stride, k, m, alpha},
            {device, reinterpret_cast<cudaStream_t>(stream)});
      },
      py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("v"), py::arg("v_stride"),
      py::arg("points"), py::arg("points_stride"), py::arg("k"), py::arg("m"), py::arg("alpha"),
      py::arg("device"), py::arg("stream"));
  activedpo::bind_pair_norms(module);
  activedpo::bind_greedy(module);
}
