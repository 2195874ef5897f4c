// Checks of op arguments: the same on every device, and all messages name op, argument, expected
// and got.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "transmla/types.h"

namespace transmla {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Dim {
  const char* name;
  int64_t size = -1;  // -1: any
};

enum class Strides { kAny, kDenseLastDim, kContiguous };

using DTypes = std::initializer_list<ScalarType>;
constexpr DTypes kFloats = {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float};

class Check {
 public:
  // Every tensor has to be on the device of `first`.
  Check(const char* op, const Tensor& first) : op_(op), device_(first.device()) {}

  void tensor(const char* name, const Tensor& t, DTypes dtypes, std::initializer_list<Dim> dims,
              Strides strides = Strides::kContiguous) const {
    const bool shape_ok = has_dtype(t, dtypes) && has_shape(t, dims);
    const bool strides_ok = !shape_ok || has_strides(t, strides);
    const bool device_ok = t.device() == device_;
    if (shape_ok && strides_ok && device_ok) return;

    std::ostringstream text;
    text << name << " must be ";
    write_expected(text, dtypes, dims);
    if (!strides_ok) {
      text << (strides == Strides::kContiguous ? ", contiguous" : ", dense in the last dimension");
    }
    if (!device_ok) text << " on " << device_name(device_);
    text << ", got " << dtype_name(t.scalar_type()) << ' ' << list(t.sizes());
    if (!strides_ok) text << " with strides " << list(t.strides());
    if (!device_ok) text << " on " << device_name(t.device());
    fail(text.str());
  }

  // For numbers: `expected` reads as in "kv_lora_rank must be a multiple of 16".
  template <class T>
  void number(bool ok, const char* name, const char* expected, T got) const {
    if (ok) return;
    std::ostringstream text;
    text << name << " must be " << expected << ", got " << got;
    fail(text.str());
  }

  // For numbers that the host can read.
  void finite(const char* name, const double* numbers, int64_t count) const {
    constexpr int64_t kLanes = 8;  // added up apart, so that the compiler may use vectors
    double zeros[kLanes] = {};     // NaN from what is not finite
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) zeros[lane] += 0 * numbers[i + lane];
    }
    for (; i < count; ++i) zeros[0] += 0 * numbers[i];
    if (std::accumulate(zeros, zeros + kLanes, 0.0) == 0) return;
    for (i = 0; i < count; ++i) number(std::isfinite(numbers[i]), name, "finite", numbers[i]);
  }

  [[noreturn]] void fail(const std::string& text) const {
    throw std::runtime_error(std::string("transmla::") + op_ + ": " + text);
  }

 private:
  using Device = torch::stable::Device;
  using Ints = torch::headeronly::IntHeaderOnlyArrayRef;

  static bool has_dtype(const Tensor& t, DTypes dtypes) {
    for (ScalarType dtype : dtypes) {
      if (t.scalar_type() == dtype) return true;
    }
    return false;
  }

  static bool has_shape(const Tensor& t, std::initializer_list<Dim> dims) {
    if (t.dim() != static_cast<int64_t>(dims.size())) return false;
    int64_t i = 0;
    for (const Dim& dim : dims) {
      const int64_t size = t.size(i++);
      if (dim.size >= 0 && size != dim.size) return false;
    }
    return true;
  }

  static bool has_strides(const Tensor& t, Strides strides) {
    if (strides == Strides::kContiguous) return t.is_contiguous();
    if (strides == Strides::kAny || t.dim() == 0) return true;
    return t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) <= 1;
  }

  static void write_expected(std::ostream& out, DTypes dtypes, std::initializer_list<Dim> dims) {
    size_t i = 0;
    for (ScalarType dtype : dtypes) {
      if (i > 0) out << (i + 1 == dtypes.size() ? " or " : ", ");
      out << dtype_name(dtype);
      ++i;
    }
    const char* separator = " [";
    for (const Dim& dim : dims) {
      out << separator << dim.name;
      if (dim.size >= 0) out << '=' << dim.size;
      separator = ", ";
    }
    out << ']';
  }

  static std::string list(Ints values) {
    std::ostringstream out;
    out << '[';
    for (size_t i = 0; i < values.size(); ++i) out << (i > 0 ? ", " : "") << values[i];
    out << ']';
    return out.str();
  }

  // As Python spells it.
  static std::string dtype_name(ScalarType dtype) {
    switch (dtype) {
      case ScalarType::Half:
        return "float16";
      case ScalarType::Float:
        return "float32";
      case ScalarType::Double:
        return "float64";
      case ScalarType::Char:
        return "int8";
      case ScalarType::Int:
        return "int32";
      case ScalarType::Long:
        return "int64";
      default: {
        std::string name = torch::headeronly::toString(dtype);
        for (char& c : name) c = static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
        return name;
      }
    }
  }

  static std::string device_name(const Device& device) {
    const std::string type = device.is_cpu() ? "cpu" : device.is_cuda() ? "cuda" : "another device";
    return device.has_index() && !device.is_cpu() ? type + ":" + std::to_string(device.index())
                                                  : type;
  }

  const char* op_;
  Device device_;
};

inline bool is_int8(const Tensor& t) { return t.scalar_type() == ScalarType::Char; }

// With scales the cache is of one-byte numbers; without, of the dtype of the other tensors.
inline void check_cache(const Check& check, const Tensor& latent_cache,
                        const std::optional<Tensor>& cache_scales, ScalarType dtype, int64_t dim) {
  const DTypes same = {dtype}, one_byte = {ScalarType::Float8_e4m3fn, ScalarType::Char};
  check.tensor("latent_cache", latent_cache, cache_scales ? one_byte : same,
               {{"num_blocks"}, {"block_size"}, {"kv_lora_rank + qk_rope_head_dim", dim}},
               Strides::kDenseLastDim);
  if (!cache_scales) return;
  const Dim num_blocks = {"num_blocks", latent_cache.size(0)};
  const Dim block_size = {"block_size", latent_cache.size(1)};
  if (is_int8(latent_cache)) {
    check.tensor("cache_scales", *cache_scales, {ScalarType::Float},
                 {num_blocks, block_size, {"latent and RoPE key", 2}}, Strides::kDenseLastDim);
  } else {
    check.tensor("cache_scales", *cache_scales, {ScalarType::Float}, {num_blocks, block_size},
                 Strides::kDenseLastDim);
  }
}

// Of a tensor that has passed a check for kFloats.
inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

}  // namespace transmla
