// From the dispatcher's stack to a Call and back: checks, layout, outputs.
//
// Kernels see dense tensors of one layout.  A weight that is dense in any order of its dimensions is
// taken as it is (channels_last, transposed); one with gaps or overlaps is first cloned, which is
// the layout that empty_like gives too, so the fake kernels' strides hold.
#pragma once
#include <vector>

#include "kernels.h"
#include "torch_abi.h"

namespace tnn {

// Whether the entries fill one block of memory, in whatever order of the dimensions.
inline bool is_dense(const Tensor& t) {
  const int64_t *sizes = t.sizes(), *strides = t.strides(), dim = t.dim();
  int64_t expected = 1, left = 0;
  for (int64_t d = 0; d < dim; ++d) left += sizes[d] != 1;
  for (; left; --left) {  // from the fastest dimension to the slowest
    int64_t d = 0;
    while (d < dim && (sizes[d] == 1 || strides[d] != expected)) ++d;
    if (d == dim) return false;
    expected *= sizes[d];
  }
  return true;
}

inline Tensor dense(Tensor t) {
  if (t.numel() == 0 || is_dense(t)) return t;
  StableIValue stack[2] = {t.release(), 0};  // memory_format=None: as empty_like
  TNN_CHECK(torch_call_dispatcher("aten::clone", "", stack, kTorchTarget));
  return Tensor(stack[0]);
}

// The operand in the layout of w.
inline Tensor laid_out_as(const Tensor& w, Tensor t) {
  const int64_t dim = w.dim();
  bool same = t.dim() == dim, strides = true;
  for (int64_t i = 0; same && i < dim; ++i) {
    same = t.sizes()[i] == w.sizes()[i];
    strides = strides && (w.sizes()[i] == 1 || t.strides()[i] == w.strides()[i]);
  }
  if (!same) throw std::runtime_error("trainable_nn: gradient and weight differ in shape");
  if (t.dtype() != w.dtype()) throw std::runtime_error("trainable_nn: gradient and weight differ in dtype");
  if (t.device_type() != w.device_type() || t.device_index() != w.device_index())
    throw std::runtime_error("trainable_nn: gradient and weight lie on different devices");
  if (strides || w.numel() == 0) return t;
  StableIValue stack[3] = {w.empty_like().release(), t.release(), 0};
  TNN_CHECK(torch_call_dispatcher("aten::copy_", "", stack, kTorchTarget));
  return Tensor(stack[0]);
}

inline Rows rows_of(const Tensor& w) {
  if (w.dim() == 0) return {1, 1, 1};
  const int64_t count = w.sizes()[0], inner = count == 1 ? w.numel() : w.strides()[0];
  return {count, w.numel() / (count * inner), inner};
}

// The schemas are op(w, constants), op_backward(g, w, constants), op_double_backward(v, g, w, constants)
// and op_pair(g, w, constants), with the constants eps, gain and, for entry_norm, leak.
template <class Empty, class Run>
void boxed(Derivative derivative, StableIValue* stack, uint64_t inputs, Empty empty_like, Run run) {
  const int operands = 1 + has_g(derivative) + has_v(derivative);
  Tensor w, g, v;
  Tensor* in_order[4][3] = {{&w}, {&g, &w}, {&v, &g, &w}, {&g, &w}};
  for (int i = 0; i < operands; ++i) *in_order[derivative][i] = Tensor(stack[i]);  // owned from here on
  w = dense(std::move(w));
  if (has_g(derivative)) g = laid_out_as(w, std::move(g));
  if (has_v(derivative)) v = laid_out_as(w, std::move(v));
  const bool two = has_two_results(derivative);
  Tensor out = empty_like(w), out_w;
  if (two) out_w = empty_like(w);

  Call call = {};
  call.derivative = derivative;
  call.dtype = w.dtype();
  call.numel = w.numel();
  call.eps = to_double(stack[operands]);
  call.gain = to_double(stack[operands + 1]);
  if ((int)inputs > operands + 2) call.leak = to_double(stack[operands + 2]);
  if (call.numel) {
    call.rows = rows_of(w);
    call.w = w.data();
    call.g = has_g(derivative) ? g.data() : nullptr;
    call.v = has_v(derivative) ? v.data() : nullptr;
    call.out = out.mutable_data();
    call.out_w = two ? out_w.mutable_data() : nullptr;
    run(call, w.device_index());
  }
  stack[0] = out.release();
  if (two) stack[1] = out_w.release();
}

[[noreturn]] inline void bad_dtype() {
  throw std::runtime_error(std::string("trainable_nn: the weight must be ") + kDtypes);
}

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

struct Operator {
  const char* name;
  Boxed kernel;
};

// Operators of one device.
inline void register_kernels(const char* key, const std::vector<Operator>& operators) {
  // never deleted: with the library object the kernels would go, too
  static TorchLibraryHandle library;
  TNN_CHECK(aoti_torch_library_init_impl("trainable_nn", key, __FILE__, __LINE__, &library));
  for (const Operator& op : operators) TNN_CHECK(torch_library_impl(library, op.name, op.kernel, kTorchTarget));
}

// Both maps, with Device::entry_norm and Device::weight_norm as their kernels, and what this device has beside them.
template <class Device, class... Others> bool register_device(const char* key, Others... others) {
  register_kernels(key, {{"entry_norm", Device::template entry_norm<kValue>},
                         {"entry_norm_backward", Device::template entry_norm<kFirst>},
                         {"entry_norm_double_backward", Device::template entry_norm<kSecond>},
                         {"entry_norm_pair", Device::template entry_norm<kPair>},
                         {"weight_norm", Device::template weight_norm<kValue>},
                         {"weight_norm_backward", Device::template weight_norm<kFirst>},
                         {"weight_norm_double_backward", Device::template weight_norm<kSecond>},
                         {"weight_norm_pair", Device::template weight_norm<kPair>},
                         others...});
  return true;
}

}  // namespace tnn
