// Kernels of threads that work each on its own: no barrier, no shared memory, no shuffle. One is a
// struct with `operator()(i)`, the work of thread `i`. A compiler of C++ alone takes the same files
// and runs their threads one after the other: that is how they are tested without a GPU.
#pragma once

#include "../host_device.h"
#include "../tensor.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#endif

namespace patchpack {

// Runs threads `[0, count)` on the device of `x`, on its current stream.
#if defined(__CUDACC__)
inline constexpr int kBlock = 128;

template <typename Body>
__global__ void __launch_bounds__(kBlock, 1) run(int64_t count, const __grid_constant__ Body body) {
  const int64_t i = (int64_t)blockIdx.x * kBlock + threadIdx.x;
  if (i < count) body(i);
}

template <typename Body>
void for_each(int64_t count, const Tensor& x, const Body& body) {
  if (count == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "too many elements for one launch: ", count, " threads");
  run<<<blocks, kBlock, 0, (cudaStream_t)stream>>>(count, body);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

#define PATCHPACK_DEVICE CUDA
#else
template <typename Body>
void for_each(int64_t count, const Tensor& x, const Body& body) {
  for (int64_t i = 0; i < count; ++i) body(i);
}

#define PATCHPACK_DEVICE CPU
#endif

// What a thread reads and writes at once: 16 bytes where alignment allows. Kernels count offsets and
// strides in vectors, which tells the compiler that they are aligned.
template <typename scalar_t, int kSize>
struct alignas(kSize * sizeof(scalar_t)) Vector {
  using Scalar = scalar_t;
  static constexpr int kLanes = kSize;

  scalar_t lanes[kSize];
};

// A vector from and to the floats of arithmetic.
template <typename V>
HOST_DEVICE void load(const V* x, float* lanes) {
  const V vector = *x;
  for (int i = 0; i < V::kLanes; ++i) lanes[i] = vector.lanes[i];
}

// The same, or zeros.
template <typename V>
HOST_DEVICE void load_if(bool wanted, const V* x, float* lanes) {
  V vector{};
  if (wanted) vector = *x;
  for (int i = 0; i < V::kLanes; ++i) lanes[i] = vector.lanes[i];
}

template <typename V>
HOST_DEVICE void store(V* x, const float* lanes) {
  V vector;
  for (int i = 0; i < V::kLanes; ++i) vector.lanes[i] = lanes[i];
  *x = vector;
}

// Whether vectors of `lanes` elements can begin at `x` and at all multiples of these strides.
inline bool aligned(const Tensor& x, int lanes, std::initializer_list<int64_t> strides) {
  const bool odd = std::any_of(strides.begin(), strides.end(), [&](int64_t n) { return n % lanes; });
  const int64_t bytes = lanes * (x.scalar_type() == ScalarType::Float ? 4 : 2);
  return !odd && (uintptr_t)x.const_data_ptr() % bytes == 0;
}

// `body(vector)` with the widest of a floating `dtype` that `fits(lanes)`: of 16 bytes, of 8 if
// `kHalves`, or of one element.
template <bool kHalves, typename Fits, typename Body>
void with_vector(ScalarType dtype, const Fits& fits, const Body& body) {
  const auto widest = [&](auto scalar) {
    using scalar_t = decltype(scalar);
    constexpr int kLanes = 16 / sizeof(scalar_t);
    if (fits(kLanes)) return body(Vector<scalar_t, kLanes>{});
    if constexpr (kHalves && kLanes == 8)
      if (fits(4)) return body(Vector<scalar_t, 4>{});
    body(Vector<scalar_t, 1>{});
  };
  switch (dtype) {
    case ScalarType::BFloat16:
      return widest(BFloat16{});
    case ScalarType::Half:
      return widest(Half{});
    default:
      return widest(float{});
  }
}

// Uninitialised, on the device of `x`.
inline Tensor new_empty(const Tensor& x, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(x, sizes, dtype);
}

}  // namespace patchpack
