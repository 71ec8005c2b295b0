// Memory for large outputs, kept between calls.
//
// malloc gives a freed block of some megabytes back to the system, so that the same output touches
// fresh pages at the next training step: about 2 us for each 4 KiB, several times what the arithmetic
// costs.  Blocks taken here return to a free list when torch frees the tensor, and the next output of
// that size takes one.  The list holds no more than TRAINABLE_NN_POOL_MIB (1024; 0: no pool).
#pragma once
#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

#include "../torch_abi.h"

namespace tnn {

class Pool {
  static constexpr size_t kHeader = 64, kSmallest = 256 * 1024, kStep = 64 * 1024;  // bytes
  std::mutex mutex_;
  std::map<size_t, std::vector<void*>> free_;  // size with header -> blocks
  size_t held_ = 0, limit_;

  Pool() {
    const char* mib = getenv("TRAINABLE_NN_POOL_MIB");
    limit_ = (mib ? strtoull(mib, nullptr, 10) : 1024) << 20;
  }

  void* take(size_t size) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = free_.find(size);
      if (found != free_.end() && !found->second.empty()) {
        void* block = found->second.back();
        found->second.pop_back();
        held_ -= size;
        return block;
      }
    }
    void* block = aligned_alloc(kHeader, size);
    if (!block) throw std::runtime_error("trainable_nn: out of memory, " + std::to_string(size) + " bytes wanted");
    *static_cast<size_t*>(block) = size;
    return block;
  }

  void give(void* block) {
    const size_t size = *static_cast<size_t*>(block);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (held_ + size <= limit_) {
        free_[size].push_back(block);
        held_ += size;
        return;
      }
    }
    free(block);
  }

 public:
  static Pool& instance() {
    static Pool* pool = new Pool;  // never deleted: tensors may outlive every static object
    return *pool;
  }

  // As w.empty_like(), from the pool where w is large.
  Tensor empty_like(const Tensor& w, int64_t bytes) {
    if (bytes < (int64_t)kSmallest || !limit_) return w.empty_like();
    const size_t size = ((size_t)bytes + kHeader + kStep - 1) / kStep * kStep;
    char* block = static_cast<char*>(take(size));
    const auto release = [](void* data, void*) { instance().give(static_cast<char*>(data) - kHeader); };
    AtenTensorHandle made;
    const AOTITorchError error =
        torch_from_blob(block + kHeader, w.dim(), w.sizes(), w.strides(), 0, w.dtype(), w.device_type(),
                        w.device_index(), &made, 0, nullptr, 0, release, nullptr);
    if (error) give(block);
    check(error, "torch_from_blob");
    return Tensor(reinterpret_cast<StableIValue>(made));
  }

  // Give all free blocks back to the system; how many bytes they were.
  size_t clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t freed = held_;
    for (auto& entry : free_)
      for (void* block : entry.second) free(block);
    free_.clear();
    held_ = 0;
    return freed;
  }
};

}  // namespace tnn
