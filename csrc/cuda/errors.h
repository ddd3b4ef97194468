// Every call of the CUDA runtime goes through `check`, and every launch is followed by
// `check_launch`: a failure becomes a RuntimeError in Python.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace activedpo {

inline std::string described(cudaError_t status) {
  return std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status);
}

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // clear it, or the next launch reports it again
  throw std::runtime_error(std::string(what) + " failed: " + described(status));
}

inline void check_launch(const char* what) { check(cudaGetLastError(), what); }

// Makes a device current, and restores the previous one on destruction.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = before_ != device;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (changed_) static_cast<void>(cudaSetDevice(before_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace activedpo
