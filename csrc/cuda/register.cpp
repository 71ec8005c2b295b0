// The CUDA kernels: on the tensor's device, on its current stream, without synchronisation.
#include "../boxed.h"

namespace tnn {
namespace {

struct DeviceGuard {
  DeviceGuardHandle handle = nullptr;
  explicit DeviceGuard(int device) { TNN_CHECK(aoti_torch_create_device_guard(device, &handle)); }
  ~DeviceGuard() { aoti_torch_delete_device_guard(handle); }
};

void run(int (*kernel)(const Call&, void*), const Call& call, int device) {
  const DeviceGuard guard(device);
  void* stream;
  TNN_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error = kernel(call, stream);
  if (error < 0) bad_dtype();
  if (error) throw std::runtime_error("trainable_nn: CUDA error " + std::to_string(error) + " at kernel launch");
}

Tensor like(const Tensor& w) { return w.empty_like(); }

struct Cuda {
  template <Derivative D> static void entry_norm(StableIValue* stack, uint64_t inputs, uint64_t) {
    boxed(D, stack, inputs, like, [](const Call& call, int device) { run(entry_norm_cuda, call, device); });
  }
  template <Derivative D> static void weight_norm(StableIValue* stack, uint64_t inputs, uint64_t) {
    boxed(D, stack, inputs, like, [](const Call& call, int device) { run(weight_norm_cuda, call, device); });
  }
};

const bool registered = register_device<Cuda>("CUDA");

}  // namespace
}  // namespace tnn
