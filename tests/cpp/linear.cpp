// Multiplies matrices of many shapes in buffers of exactly the size that the contract asks for: a
// sanitizer sees every byte too far. All numbers are 0.5, so that every result is known.
#include <transmla/transmla.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace transmla;

namespace {

struct Shape {
  index_t num_tokens, num_groups, in_features, out_features;
};
constexpr Shape kShapes[] = {{1, 1, 1, 1}, {2, 1, 131, 3}, {7, 1, 33, 4}, {3, 2, 48, 9}};

uint16_t bits_of_half(DType dtype) { return dtype == DType::kFloat16 ? 0x3800 : 0x3f00; }

std::vector<char> halves(index_t count, DType dtype) {
  if (dtype == DType::kFloat32) {
    const std::vector<float> numbers(count, 0.5f);
    const char* bytes = reinterpret_cast<const char*>(numbers.data());
    return {bytes, bytes + count * sizeof(float)};
  }
  const std::vector<uint16_t> numbers(count, bits_of_half(dtype));
  const char* bytes = reinterpret_cast<const char*>(numbers.data());
  return {bytes, bytes + count * sizeof(uint16_t)};
}

float number(const std::vector<char>& tensor, index_t i, DType dtype) {
  if (dtype == DType::kFloat32) return reinterpret_cast<const float*>(tensor.data())[i];
  const uint32_t bits = reinterpret_cast<const uint16_t*>(tensor.data())[i];
  if (dtype == DType::kFloat16) {
    return std::ldexp(static_cast<float>(bits % 1024 + 1024), static_cast<int>(bits / 1024) - 25);
  }
  return std::ldexp(static_cast<float>(bits % 128 + 128), static_cast<int>(bits / 128) - 134);
}

int count_wrong(const Shape& shape, DType dtype) {
  const index_t columns = shape.num_groups * shape.out_features;
  const auto x = halves(shape.num_tokens * shape.num_groups * shape.in_features, dtype);
  const auto w = halves(columns * shape.in_features, dtype), bias = halves(columns, dtype);
  auto out = halves(shape.num_tokens * columns, dtype);
  LinearParams params{};
  params.x = x.data();
  params.w = w.data();
  params.bias = bias.data();
  params.out = out.data();
  params.dtype = dtype;
  params.num_tokens = shape.num_tokens;
  params.num_groups = shape.num_groups;
  params.in_features = params.x_stride_group = params.w_stride_row = shape.in_features;
  params.out_features = shape.out_features;
  params.x_stride_token = shape.num_groups * shape.in_features;
  params.w_stride_group = shape.out_features * shape.in_features;
  params.workspace = std::malloc(linear_cpu_workspace_size(params, 1));
  linear_cpu(params, serial());
  std::free(params.workspace);

  const float expected = 0.25f * static_cast<float>(shape.in_features) + 0.5f;
  int num_wrong = 0;
  for (index_t i = 0; i < shape.num_tokens * columns; ++i) {
    num_wrong += number(out, i, dtype) != expected;
  }
  return num_wrong;
}

}  // namespace

int main() {
  int num_wrong = 0;
  for (Isa isa : {Isa::kScalar, Isa::kNeon, Isa::kAvx2, Isa::kAvx512}) {
    if (!force_isa(isa)) continue;
    for (const Shape& shape : kShapes) {
      for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        num_wrong += count_wrong(shape, dtype);
      }
    }
    std::printf("%s: %d wrong numbers\n", isa_name(isa), num_wrong);
  }
  return num_wrong > 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
