// class_means: p_c = s_c / |s_c|, s_c = sum of the bank rows with label c, added in slot order in fp32.
// bank_update_: a batch into the ring, then the same for the classes that it touched.
//
// A counting sort of the labels gives every class its slots in order; a thread owns whole classes, and reads each of
// their rows once. Where one class holds most rows, a thread owns columns instead. Neither changes the order in which a
// number is added up, so the bits depend on neither the threads nor the path.
#include "common.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastrex::class_means {

#define FASTREX_LOOPS "class_means.inl"
#include "isa.h"

using at::Tensor;

constexpr int64_t GRAIN_BYTES = 64 * 1024;  // less than this is not worth another thread
constexpr int64_t COLUMNS = 64;             // the unit in which threads share the columns of a class
constexpr int64_t SCAN = 64 * 1024;         // labels scanned at a time, a fixed number: threads never show in the order

// Which slots belong to class k: order[offset[k], offset[k + 1]).
struct Segments {
  std::unique_ptr<int32_t[]> order;
  std::vector<int64_t> offset;
};

void check_label(const char* op, int64_t label, int64_t classes) {
  TORCH_CHECK_VALUE(label >= 0 && label < classes, op, ": labels must be in [0, ", classes, "), got ", label);
}

template <typename T>
void prototypes_of(const Tensor& features, const Segments& segments, const int64_t* ids, float* prototypes) {
  const int64_t classes = static_cast<int64_t>(segments.offset.size()) - 1, dim = features.size(1);
  const T* data = features.const_data_ptr<T>();
  const int64_t stride = features.stride(0), *offset = segments.offset.data(), rows = offset[classes];
  const int32_t* order = segments.order.get();
  int64_t largest = 0;
  for (int64_t k = 0; k < classes; ++k) largest = std::max(largest, offset[k + 1] - offset[k]);
  const int64_t grain = std::max<int64_t>(1, GRAIN_BYTES / std::max<int64_t>(1, dim * sizeof(T)));
  const int64_t threads = fastrex::num_threads();
  if (threads > 1 && dim >= 2 * COLUMNS && largest > grain && 2 * largest * threads > 3 * rows) {
    fastrex::parallel_for(0, (dim + COLUMNS - 1) / COLUMNS, 1, [&](int64_t begin, int64_t end) {
      FASTREX_DISPATCH(column_range, data, stride, order, offset, ids, classes, begin * COLUMNS,
                       std::min(end * COLUMNS, dim), dim, prototypes);
    });
    fastrex::parallel_for(0, classes, grain, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        if (offset[k + 1] > offset[k]) FASTREX_DISPATCH(normalise, prototypes + (ids ? ids[k] : k) * dim, dim);
    });
    return;
  }
  // Work units are rows and classes: class k starts at unit offset[k] + k.
  auto first = [&](int64_t unit) {
    int64_t low = 0, high = classes;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (offset[middle] + middle < unit) low = middle + 1; else high = middle;
    }
    return low;
  };
  fastrex::parallel_for(0, rows + classes, grain, [&](int64_t begin, int64_t end) {
    FASTREX_DISPATCH(class_range, data, stride, order, offset, ids, first(begin), first(end), rows, dim, prototypes);
  });
}

void prototypes_of(const Tensor& features, const Segments& segments, const int64_t* ids, float* prototypes) {
  switch (features.scalar_type()) {
    case at::kFloat: return prototypes_of<float>(features, segments, ids, prototypes);
    case at::kBFloat16: return prototypes_of<c10::BFloat16>(features, segments, ids, prototypes);
    case at::kHalf: return prototypes_of<c10::Half>(features, segments, ids, prototypes);
    default: TORCH_CHECK_VALUE(false, "class_means: features must be float32, bfloat16 or float16");
  }
}

Tensor dense_rows(const Tensor& x) { return x.stride(1) == 1 || x.size(1) == 1 ? x : x.contiguous(); }

std::tuple<Tensor, Tensor> class_means(const Tensor& features, const Tensor& labels, int64_t classes) {
  const int64_t rows = features.size(0), dim = features.size(1);
  TORCH_CHECK_VALUE(rows <= INT32_MAX, "class_means: features must have fewer than 2^31 rows, got ", rows);
  Tensor prototypes = at::empty({classes, dim}, features.options().dtype(at::kFloat));
  Tensor counts = at::zeros({classes}, labels.options());
  const Tensor packed = labels.contiguous();
  const int64_t* label = packed.const_data_ptr<int64_t>();
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows; ++i) {
    if (static_cast<uint64_t>(label[i]) >= static_cast<uint64_t>(classes)) check_label("class_means", label[i], classes);
    ++count[label[i]];
  }
  Segments segments{std::make_unique_for_overwrite<int32_t[]>(rows), std::vector<int64_t>(classes + 1)};
  auto cursor = std::make_unique_for_overwrite<int32_t[]>(classes);
  int64_t total = 0;
  for (int64_t c = 0; c < classes; ++c) {
    segments.offset[c] = total;
    cursor[c] = static_cast<int32_t>(total);
    total += count[c];
  }
  segments.offset[classes] = total;
  for (int64_t i = 0; i < rows; ++i) segments.order[cursor[label[i]]++] = static_cast<int32_t>(i);
  prototypes_of(dense_rows(features), segments, nullptr, prototypes.mutable_data_ptr<float>());
  return {prototypes, counts};
}

// A set of class ids that also numbers them: one bit per class, so that scanning a bank's labels stays in the cache.
class Touched {
 public:
  explicit Touched(int64_t classes) : classes_(classes), bits_((classes + 63) / 64), before_(bits_.size()) {}
  void add(int64_t c) {
    if (c >= 0 && c < classes_) bits_[c >> 6] |= uint64_t{1} << (c & 63);
  }
  // The members in ascending order; number() is valid from here on.
  std::vector<int64_t> members() {
    std::vector<int64_t> ids;
    for (size_t word = 0; word < bits_.size(); ++word) {
      before_[word] = static_cast<int32_t>(ids.size());
      for (uint64_t rest = bits_[word]; rest; rest &= rest - 1)
        ids.push_back(static_cast<int64_t>(word) * 64 + std::countr_zero(rest));
    }
    return ids;
  }
  bool has(int64_t c) const {
    return static_cast<uint64_t>(c) < static_cast<uint64_t>(classes_) && (bits_[c >> 6] >> (c & 63) & 1);
  }
  int32_t number(int64_t c) const {
    return before_[c >> 6] + std::popcount(bits_[c >> 6] & ((uint64_t{1} << (c & 63)) - 1));
  }

 private:
  int64_t classes_;
  std::vector<uint64_t> bits_;
  std::vector<int32_t> before_;
};

// The slots of every touched class, found by one scan of the labels.
Segments segments_of(const Touched& touched, int64_t members, const int64_t* label, int64_t rows) {
  struct Found {
    int32_t slot, number;
  };
  std::vector<std::vector<Found>> found((rows + SCAN - 1) / SCAN);
  fastrex::parallel_for(0, static_cast<int64_t>(found.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      for (int64_t i = part * SCAN; i < std::min(rows, (part + 1) * SCAN); ++i)
        if (touched.has(label[i])) found[part].push_back({static_cast<int32_t>(i), touched.number(label[i])});
  });
  std::vector<int64_t> offset(members + 1);
  for (const auto& part : found)
    for (const Found& f : part) ++offset[f.number + 1];
  for (int64_t k = 0; k < members; ++k) offset[k + 1] += offset[k];
  std::vector<int64_t> cursor(offset);
  auto order = std::make_unique_for_overwrite<int32_t[]>(offset[members]);
  for (const auto& part : found)
    for (const Found& f : part) order[cursor[f.number]++] = f.slot;
  return {std::move(order), std::move(offset)};
}

void bank_update_(Tensor& bank_features, Tensor& bank_labels, Tensor& pointer, const Tensor& features,
                  const Tensor& labels, const std::optional<Tensor>& keep, const std::optional<Tensor>& prototypes,
                  const std::optional<Tensor>& counts) {
  const int64_t size = bank_features.size(0), given = features.size(0);
  const int64_t slot = *pointer.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(slot >= 0 && slot < size, "bank_update_: pointer must be in [0, ", size, "), got ", slot);
  const Tensor packed = labels.contiguous();
  const int64_t* label = packed.const_data_ptr<int64_t>();
  if (prototypes)
    for (int64_t i = 0; i < given; ++i) check_label("bank_update_", label[i], prototypes->size(0));
  if (keep && !*keep->const_data_ptr<bool>()) return;
  const int64_t fits = std::min(given, size - slot);
  Tensor slots = bank_labels.narrow(0, slot, fits);
  std::optional<Touched> touched;
  if (prototypes) {
    touched.emplace(prototypes->size(0));
    const int64_t *old = slots.const_data_ptr<int64_t>(), step = slots.stride(0);
    for (int64_t i = 0; i < fits; ++i) {
      touched->add(old[i * step]);
      touched->add(label[i]);
    }
  }
  if (bank_features.is_contiguous() && features.is_contiguous() && bank_features.dtype() == features.dtype()) {
    const int64_t row = bank_features.size(1) * bank_features.element_size();
    std::memcpy(static_cast<char*>(bank_features.mutable_data_ptr()) + slot * row, features.const_data_ptr(), fits * row);
  } else {
    bank_features.narrow(0, slot, fits).copy_(features.narrow(0, 0, fits));
  }
  int64_t* written = slots.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < fits; ++i) written[i * slots.stride(0)] = label[i];
  for (const Tensor& x : {bank_features, bank_labels, pointer})
    if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
  *pointer.mutable_data_ptr<int64_t>() = slot + given < size ? slot + given : 0;
  if (!prototypes) return;
  TORCH_CHECK_VALUE(size <= INT32_MAX, "bank_update_: bank_features must have fewer than 2^31 rows, got ", size);
  const std::vector<int64_t> ids = touched->members();
  const Tensor all = bank_labels.contiguous();
  const Segments segments = segments_of(*touched, static_cast<int64_t>(ids.size()), all.const_data_ptr<int64_t>(), size);
  for (const Tensor& x : {*prototypes, *counts})
    if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
  int64_t* count = counts->mutable_data_ptr<int64_t>();
  for (size_t k = 0; k < ids.size(); ++k) count[ids[k]] = segments.offset[k + 1] - segments.offset[k];
  prototypes_of(dense_rows(bank_features), segments, ids.data(), prototypes->mutable_data_ptr<float>());
}

}  // namespace fastrex::class_means

TORCH_LIBRARY_IMPL(fastrex, CPU, m) {
  m.impl("class_means", fastrex::class_means::class_means);
  m.impl("bank_update_", fastrex::class_means::bank_update_);
}
