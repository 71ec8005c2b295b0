// A convolution with P(w) and one with DP(w) g at once, P weight normalisation, in blocks of the kernel's rows.
// Schema and reference: trainable_nn/ops/convolution.py.
//
// DP(w) g of a block is multiplied while it is in cache.  A normalised row is a number times the row, so
// that P(w) is not written: the convolution with w itself is multiplied with that number where it is added
// up; but where w's size could let a product overflow or vanish that P(w) would not.
#pragma once
#include <vector>

#include "../boxed.h"

namespace tnn {

using Integers = std::vector<int64_t>;

inline Integers sizes_of(const Tensor& t) { return Integers(t.sizes(), t.sizes() + t.dim()); }

inline Integers take_integers(StableIValue value) {
  const auto list = reinterpret_cast<StableListHandle>(value);
  size_t size;
  TNN_CHECK(torch_list_size(list, &size));
  Integers out(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue item;
    TNN_CHECK(torch_list_get_item(list, i, &item));
    out[i] = (int64_t)item;
  }
  TNN_CHECK(torch_delete_list(list));
  return out;
}

inline StableIValue give_integers(const Integers& items) {
  StableListHandle list;
  TNN_CHECK(torch_new_list_reserve_size(items.size(), &list));
  for (const int64_t item : items) TNN_CHECK(torch_list_push_back(list, (StableIValue)item));
  return reinterpret_cast<StableIValue>(list);
}

inline Integers contiguous_strides(const Integers& sizes) {
  Integers strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
  return strides;
}

inline Tensor empty(const Integers& sizes, const Tensor& like) {
  AtenTensorHandle made;
  TNN_CHECK(aoti_torch_empty_strided((int64_t)sizes.size(), sizes.data(), contiguous_strides(sizes).data(),
                                     like.dtype(), like.device_type(), like.device_index(), &made));
  return Tensor(reinterpret_cast<StableIValue>(made));
}

inline Tensor contiguous(Tensor t) {
  const Integers sizes = sizes_of(t), strides = contiguous_strides(sizes);
  for (size_t d = 0; t.numel() && d < sizes.size(); ++d)
    if (sizes[d] > 1 && t.strides()[d] != strides[d]) {
      Tensor copy = empty(sizes, t);
      StableIValue stack[3] = {copy.release(), t.release(), 0};
      TNN_CHECK(torch_call_dispatcher("aten::copy_", "", stack, kTorchTarget));
      return Tensor(stack[0]);
    }
  return t;
}

// Some rows at `data`, which stays there for as long as this is used, in the layout of w's.
inline Tensor rows_at(const void* data, int64_t rows, const Tensor& w) {
  Integers sizes = sizes_of(w);
  sizes[0] = rows;
  AtenTensorHandle made;
  TNN_CHECK(torch_from_blob(const_cast<void*>(data), w.dim(), sizes.data(), w.strides(), 0, w.dtype(),
                            w.device_type(), w.device_index(), &made, 0, nullptr, 0, nullptr, nullptr));
  return Tensor(reinterpret_cast<StableIValue>(made));
}

struct Geometry {
  Integers stride, padding, dilation;
  int64_t groups;

  // (images, filters, pixels...)
  Integers output_sizes(const Tensor& x, const Tensor& w) const {
    Integers sizes = {x.sizes()[0], w.sizes()[0]};
    for (size_t d = 0; d < stride.size(); ++d) {
      const int64_t reach = dilation[d] * (w.sizes()[2 + d] - 1) + 1;
      sizes.push_back((x.sizes()[2 + d] + 2 * padding[d] - reach) / stride[d] + 1);
    }
    return sizes;
  }

  Tensor convolve(const Tensor& x, const Tensor& kernel) const {
    StableIValue stack[9] = {x.another().release(), kernel.another().release(), 0,  // no bias
                             give_integers(stride), give_integers(padding), give_integers(dilation), 0,
                             give_integers(Integers(stride.size())), (StableIValue)groups};  // not transposed
    TNN_CHECK(torch_call_dispatcher("aten::convolution", "", stack, kTorchTarget));
    Tensor y = contiguous(Tensor(stack[0]));
    if (y.dtype() != x.dtype()) throw std::runtime_error("trainable_nn: autocast changed a convolution's dtype");
    return y;
  }
};

// Rows [row, row + rows) of both results from a = conv(x, DP(w) g) and b = conv(images, w) of that block:
// y = factor b on the images before the last ones, as many as x has, and t = a + factor b on these.
template <class S>
void add_up(const Tensor& values, const Tensor& tangents, const Tensor& a, const Tensor& b, int64_t row,
            const std::vector<double>& factors) {
  struct Lines {
    S *y, *t;
    const S *a, *b;
    const double* factors;
    int64_t row, rows, filters, before, pixels;

    void run(int64_t begin, int64_t end) const {
      for (int64_t line = begin; line < end; ++line) {
        const int64_t image = line / rows, r = line % rows;
        const S factor = (S)factors[r], *from = b + line * pixels, *add = a + (line - before * rows) * pixels;
        if (image < before)
          for (S *to = y + (image * filters + row + r) * pixels, *last = to + pixels; to < last;) *to++ = factor * *from++;
        else
          for (S *to = t + ((image - before) * filters + row + r) * pixels, *last = to + pixels; to < last;)
            *to++ = *add++ + factor * *from++;
      }
    }
  } lines = {static_cast<S*>(values.mutable_data()), static_cast<S*>(tangents.mutable_data()),
             static_cast<const S*>(a.data()), static_cast<const S*>(b.data()), factors.data(), row, a.sizes()[1],
             tangents.sizes()[1], b.sizes()[0] - a.sizes()[0], 1};
  for (int64_t d = 2; d < a.dim(); ++d) lines.pixels *= a.sizes()[d];
  const auto part = [](int64_t begin, int64_t end, void* lines_) { static_cast<Lines*>(lines_)->run(begin, end); };
  const int64_t all = b.sizes()[0] * lines.rows, grain = 1 + 32767 / (lines.pixels + 1);
  if (all <= grain) lines.run(0, all);
  else TNN_CHECK(torch_parallel_for(0, all, grain, part, &lines));
}

// Whether convolutions of x and of images with w are what `add_up` reads.
inline bool fit(const Tensor& w, const Tensor& x, const Tensor& images, const Geometry& geometry) {
  const size_t dim = (size_t)w.dim();
  const Integers kernel = sizes_of(w), one = sizes_of(x), other = sizes_of(images);
  bool fits = dim >= 3 && one.size() == dim && other.size() == dim && geometry.groups >= 1;
  for (const Integers* list : {&geometry.stride, &geometry.padding, &geometry.dilation})
    fits = fits && list->size() + 2 == dim;
  for (size_t d = 1; fits && d < dim; ++d) fits = one[d] == other[d];
  for (size_t d = 0; fits && d + 2 < dim; ++d) fits = geometry.stride[d] >= 1 && geometry.dilation[d] >= 1;
  return fits && one[0] <= other[0] && one[1] == kernel[1] * geometry.groups && w.numel() > 0 &&
         x.dtype() == w.dtype() && images.dtype() == w.dtype();
}

constexpr double kModerate = 0x1p32;  // of a row's factor, and of its inverse

// weight_norm_conv_rows(g, w, x, images, rows, eps, gain, stride, padding, dilation, groups) -> (y, t).
// empty_like(w) is memory, run(call) weight normalisation of rows that follow one another.
template <class Empty, class Run> void weight_norm_conv_rows(StableIValue* stack, Empty empty_like, Run run) {
  Tensor g(stack[0]), w(stack[1]), x(stack[2]), images(stack[3]);
  const Geometry geometry = {take_integers(stack[7]), take_integers(stack[8]), take_integers(stack[9]),
                             (int64_t)stack[10]};
  const int32_t dtype = w.dtype();
  if (dtype != kFloat && dtype != kDouble)
    throw std::runtime_error("trainable_nn: the weight must be float32 or float64");
  if (!fit(w, x, images, geometry)) throw std::runtime_error("trainable_nn: kernel and images do not fit together");
  w = dense(std::move(w));
  if (rows_of(w).outer > 1) w = contiguous(std::move(w));
  g = laid_out_as(w, std::move(g));

  const int64_t at_once = (int64_t)stack[4], filters = w.sizes()[0], inner = w.numel() / filters;
  if (at_once < 1) throw std::runtime_error("trainable_nn: at least one row at once");
  const int64_t most = at_once < filters && geometry.groups == 1 ? at_once : filters;  // a group's rows stay together
  const int64_t row_bytes = inner * size_of(dtype);
  Integers sizes = geometry.output_sizes(x, w);
  Tensor tangents;
  if (most < filters) tangents = empty(sizes, x);
  sizes[0] = images.sizes()[0] - sizes[0];
  Tensor values = empty(sizes, x);
  const Tensor memory = empty_like(rows_at(w.data(), most, w));
  std::vector<double> factors(most);

  for (int64_t row = 0; row < filters; row += most) {
    Call call = {};
    call.derivative = kScales;
    call.dtype = dtype;
    call.rows = {filters - row < most ? filters - row : most, 1, inner};
    call.numel = call.rows.count * inner;
    call.eps = to_double(stack[5]);
    call.gain = to_double(stack[6]);
    call.w = static_cast<const char*>(w.data()) + row * row_bytes;
    call.g = static_cast<const char*>(g.data()) + row * row_bytes;
    call.out = memory.mutable_data();
    call.out_w = factors.data();
    run(call);
    Tensor a = geometry.convolve(x, rows_at(call.out, call.rows.count, w));
    const void* kernel = call.w;
    for (int64_t r = 0; r < call.rows.count; ++r)
      if (!(factors[r] >= 1 / kModerate && factors[r] <= kModerate)) kernel = call.out;
    if (kernel == call.out) {  // P(w), which takes the place of DP(w) g
      call.derivative = kValue;
      run(call);
      factors.assign(most, 1);
    }
    const Tensor b = geometry.convolve(images, rows_at(kernel, call.rows.count, w));
    const Tensor& t = most < filters ? tangents : a;
    (dtype == kFloat ? add_up<float> : add_up<double>)(values, t, a, b, row, factors);
    if (most == filters) tangents = std::move(a);
  }
  stack[0] = values.release();
  stack[1] = tangents.release();
}

}  // namespace tnn
