// The part of libtorch's stable C ABI that this extension calls, declared here
// so that building it needs no torch headers and no installed torch.
//
// Each function is exported by libtorch_cpu since torch 2.11 (the CUDA stream
// getter by libtorch_cuda), and torch promises each for two years after any
// release that has it.  tests/test_native.py compiles this file together with the
// installed torch's own headers, where a differing declaration is an error.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

extern "C" {
struct AtenTensorOpaque;
struct TorchLibraryOpaque;
struct DeviceGuardOpaque;
struct StableListOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
using TorchLibraryHandle = TorchLibraryOpaque*;
using DeviceGuardHandle = DeviceGuardOpaque*;
using StableListHandle = StableListOpaque*;
using AOTITorchError = int32_t;
using StableIValue = uint64_t;

AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* key, const char* file, uint32_t line,
                                            TorchLibraryHandle* ret);
AOTITorchError torch_library_impl(TorchLibraryHandle self, const char* name,
                                  void (*fn)(StableIValue*, uint64_t, uint64_t), uint64_t extension_build_version);
AOTITorchError torch_call_dispatcher(const char* op, const char* overload, StableIValue* stack,
                                     uint64_t extension_build_version);
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size,
                                  void (*fn)(int64_t begin, int64_t end, void* ctx), void* ctx);
AOTITorchError torch_new_list_reserve_size(size_t size, StableListHandle* ret);
AOTITorchError torch_list_size(StableListHandle list, size_t* size);
AOTITorchError torch_list_get_item(StableListHandle list, size_t index, StableIValue* element);
AOTITorchError torch_list_push_back(StableListHandle list, StableIValue element);
AOTITorchError torch_delete_list(StableListHandle list);
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle t, AtenTensorHandle* ret);
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle t);
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle t, const void** ret);
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle t, void** ret);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle t, int32_t* ret);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle t, int64_t* ret);
AOTITorchError aoti_torch_get_numel(AtenTensorHandle t, int64_t* ret);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle t, int64_t** ret);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle t, int64_t** ret);
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle t, int32_t* ret);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle t, int32_t* ret);
AOTITorchError aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, AtenTensorHandle* ret);
AOTITorchError torch_from_blob(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                               int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                               AtenTensorHandle* ret, int32_t layout, const uint8_t* opaque_metadata,
                               int64_t opaque_metadata_size, void (*deleter)(void* data, void* ctx), void* deleter_ctx);
AOTITorchError aoti_torch_create_device_guard(int32_t device_index, DeviceGuardHandle* ret);
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard);
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret);   // libtorch_cuda
}

namespace tnn {

constexpr uint64_t kTorchTarget = (2ull << 56) | (11ull << 48);  // 2.11: the oldest torch that is tested

inline void check(AOTITorchError error, const char* call) {
  if (error) throw std::runtime_error(std::string("trainable_nn: ") + call + " failed");
}
#define TNN_CHECK(call) ::tnn::check((call), #call)

// An owned tensor handle.
class Tensor {
  AtenTensorHandle handle_ = nullptr;

 public:
  Tensor() = default;
  explicit Tensor(StableIValue value) : handle_(reinterpret_cast<AtenTensorHandle>(value)) {}
  Tensor(Tensor&& other) noexcept : handle_(other.handle_) { other.handle_ = nullptr; }
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  StableIValue value() const { return reinterpret_cast<StableIValue>(handle_); }
  StableIValue release() {
    const StableIValue released = value();
    handle_ = nullptr;
    return released;
  }

  Tensor another() const {  // handle of the same tensor
    AtenTensorHandle made;
    TNN_CHECK(aoti_torch_new_tensor_handle(handle_, &made));
    return Tensor(reinterpret_cast<StableIValue>(made));
  }

  template <class T, class Getter> T get(Getter getter) const {
    T result;
    TNN_CHECK(getter(handle_, &result));
    return result;
  }
  const void* data() const { return get<const void*>(torch_get_const_data_ptr); }
  void* mutable_data() const { return get<void*>(torch_get_mutable_data_ptr); }
  int64_t dim() const { return get<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return get<int64_t>(aoti_torch_get_numel); }
  int32_t dtype() const { return get<int32_t>(aoti_torch_get_dtype); }
  int32_t device_type() const { return get<int32_t>(aoti_torch_get_device_type); }
  int32_t device_index() const { return get<int32_t>(aoti_torch_get_device_index); }
  const int64_t* sizes() const { return get<int64_t*>(aoti_torch_get_sizes); }
  const int64_t* strides() const { return get<int64_t*>(aoti_torch_get_strides); }

  // Same sizes, strides, dtype and device; contents unset.
  Tensor empty_like() const {
    AtenTensorHandle made;
    TNN_CHECK(aoti_torch_empty_strided(dim(), sizes(), strides(), dtype(), device_type(), device_index(), &made));
    return Tensor(reinterpret_cast<StableIValue>(made));
  }
};

inline double to_double(StableIValue value) {
  double result;
  memcpy(&result, &value, sizeof result);
  return result;
}

}  // namespace tnn
