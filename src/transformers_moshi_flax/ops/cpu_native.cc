// Products of few rows with matrices in 8 or 4 bits a number, which are read once and made floats in registers.
//
// What they compute is defined in quantization.py. The compiler makes a version for each level of x86-64 and the loader
// takes the right one, so that one file serves all processors.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_LEVEL __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_LEVEL
#endif
#define INLINE inline __attribute__((always_inline))

constexpr int64_t kLanes = 16;   // outputs that are computed side by side
constexpr int64_t kUnrolled = 8;  // inputs that are added in one pass over the outputs
constexpr int64_t kLine = 64;
constexpr int64_t kBlock = 256;  // outputs of a group whose scales have a step in common, if they are codes

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

constexpr float kNf4[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                            -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                            0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                            0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

enum Kind { kInt8, kInt4, kNormalFloat4 };

template <Kind kind>
constexpr int64_t kPerByte = kind == kInt8 ? 1 : 2;

template <typename T>
INLINE T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

// As a loop, which the compiler makes one instruction of; of a conversion of vectors it makes sixteen.
INLINE Ints integers(const uint8_t* codes) {
  int32_t values[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) values[lane] = static_cast<int8_t>(codes[lane]);
  return load<Ints>(values);
}

INLINE Floats meaning(Ints half, Kind kind) {
  if (kind == kInt4) return __builtin_convertvector(half, Floats) - 8.0f;
#if defined(__clang__)
  Floats found;
  for (int lane = 0; lane < kLanes; ++lane) found[lane] = kNf4[half[lane]];
  return found;
#else
  return __builtin_shuffle(load<Floats>(kNf4), half);
#endif
}

// The numbers of inputs [input, input + count) and 16 outputs; 4 bits: two inputs in a byte.
template <Kind kind, int count>
INLINE void numbers(const uint8_t* codes, int64_t outputs, int64_t input, int64_t output, Floats* found) {
  if constexpr (kind == kInt8) {
#pragma GCC unroll 8
    for (int row = 0; row < count; ++row) {
      found[row] = __builtin_convertvector(integers(codes + (input + row) * outputs + output), Floats);
    }
  } else {
#pragma GCC unroll 8
    for (int row = 0; row < count; row += 2) {
      Ints both = integers(codes + (input + row) / 2 * outputs + output);
      found[row] = meaning(both & 15, kind);
      found[row + 1] = meaning((both >> 4) & 15, kind);
    }
  }
}

struct Product {
  const float* x;        // (rows, inputs)
  const uint8_t* codes;  // (inputs, outputs), or half as many rows
  float* y;              // (rows, outputs)
  int64_t rows, inputs, outputs, groups;
  const float* scales = nullptr;  // (groups, outputs), or instead of them
  const int8_t* scale_codes = nullptr;  // (groups, outputs)
  const float* steps = nullptr;  // (groups, blocks)
  float mean = 0.0f;
};

// The scales of a group and of the outputs from begin to end; made of codes, they are written to the last argument.
INLINE const float* scales_of(const Product& p, int64_t group, int64_t begin, int64_t end, float* made) {
  if (p.scales != nullptr) return p.scales + group * p.outputs + begin;
  const int8_t* codes = p.scale_codes + group * p.outputs;
  const float* steps = p.steps + group * ((p.outputs + kBlock - 1) / kBlock);
  for (int64_t output = begin; output < end;) {
    const float step = steps[output / kBlock];
    const int64_t last = std::min(end, (output / kBlock + 1) * kBlock);
    for (; output < last; ++output) made[output - begin] = step * codes[output] + p.mean;
  }
  return made;
}

// Adds the products of some inputs to the sums of the outputs from begin to end.
template <Kind kind, int count>
INLINE void add_inputs(const Product& p, int64_t input, int64_t begin, int64_t end, float* sums, int64_t width) {
  for (int64_t output = begin; output + kLanes <= end; output += kLanes) {
    if (output % kLine == 0) {
#pragma GCC unroll 8
      for (int row = 0; row < count; row += kPerByte<kind>)
        __builtin_prefetch(p.codes + (input + count + row) / kPerByte<kind> * p.outputs + output);
    }
    Floats found[count];
    numbers<kind, count>(p.codes, p.outputs, input, output, found);
    for (int64_t row = 0; row < p.rows; ++row) {
      float* place = sums + row * width + output - begin;
      const float* x = p.x + row * p.inputs + input;
      Floats sum = load<Floats>(place);
#pragma GCC unroll 8
      for (int each = 0; each < count; ++each) sum += x[each] * found[each];
      std::memcpy(place, &sum, sizeof(sum));
    }
  }
}

// The outputs from begin to end, a multiple of 16 of them; there is place for a row of sums more.
template <Kind kind>
INLINE void multiply(const Product& p, int64_t begin, int64_t end, float* sums) {
  const int64_t width = end - begin, members = p.inputs / p.groups;
  for (int64_t row = 0; row < p.rows; ++row) std::memset(p.y + row * p.outputs + begin, 0, width * sizeof(float));
  for (int64_t group = 0; group < p.groups; ++group) {
    std::memset(sums, 0, p.rows * width * sizeof(float));
    int64_t input = group * members;
    const int64_t last = input + members;
    for (; input + kUnrolled <= last; input += kUnrolled) add_inputs<kind, kUnrolled>(p, input, begin, end, sums, width);
    for (; input < last; input += kPerByte<kind>) add_inputs<kind, kPerByte<kind>>(p, input, begin, end, sums, width);
    const float* scales = scales_of(p, group, begin, end, sums + p.rows * width);
    for (int64_t row = 0; row < p.rows; ++row) {
      float* y = p.y + row * p.outputs + begin;
      for (int64_t each = 0; each < width; ++each) y[each] += scales[each] * sums[row * width + each];
    }
  }
}

FOR_EACH_LEVEL void multiply_int8(const Product& p, int64_t b, int64_t e, float* s) { multiply<kInt8>(p, b, e, s); }
FOR_EACH_LEVEL void multiply_int4(const Product& p, int64_t b, int64_t e, float* s) { multiply<kInt4>(p, b, e, s); }
FOR_EACH_LEVEL void multiply_nf4(const Product& p, int64_t b, int64_t e, float* s) {
  multiply<kNormalFloat4>(p, b, e, s);
}

using Multiply = void (*)(const Product&, int64_t, int64_t, float*);

constexpr int64_t kLeastWork = 1 << 17;  // codes that are worth another thread
constexpr int64_t kSums = 1 << 13;       // floats that stay in the first cache

// Parts are taken one after another by whoever is free; nobody waits for a thread that has not begun.
struct Shared {
  Product product;
  Multiply multiply;
  int64_t width, parts;
  std::atomic<int64_t> next{0}, done{0};

  void work() {
    std::vector<float> sums;
    for (int64_t part; (part = next.fetch_add(1)) < parts;) {
      sums.resize((product.rows + 1) * width);
      const int64_t begin = part * width;
      multiply(product, begin, std::min(begin + width, product.outputs), sums.data());
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

ffi::Error compute(ffi::ThreadPool pool, Multiply multiply, const Product& p) {
  auto shared = std::make_shared<Shared>();
  shared->product = p;
  shared->multiply = multiply;
  const int64_t workers = std::clamp<int64_t>(p.inputs * p.outputs / kLeastWork, 1, pool.num_threads());
  int64_t width = std::min(kSums / p.rows, (p.outputs + workers - 1) / workers);
  width = std::max<int64_t>((width + kLine - 1) / kLine * kLine, kLine);
  shared->width = width;
  shared->parts = (p.outputs + width - 1) / width;
  for (int64_t worker = 1; worker < std::min(workers, shared->parts); ++worker)
    pool.Schedule([shared] { shared->work(); });
  shared->work();
  while (shared->done.load(std::memory_order_acquire) < shared->parts) {
  }
  return ffi::Error::Success();
}

using Matrix = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;

template <ffi::DataType dtype>
Product product(const Matrix& x, const ffi::Buffer<dtype>& codes, int64_t groups, Result& y) {
  return {x.typed_data(),    reinterpret_cast<const uint8_t*>(codes.untyped_data()),
          y->typed_data(),   x.dimensions()[0],
          x.dimensions()[1], codes.dimensions()[1],
          groups};
}

template <Multiply multiply, ffi::DataType dtype>
ffi::Error run(ffi::ThreadPool pool, Matrix x, ffi::Buffer<dtype> codes, Matrix scales, Result y) {
  Product p = product(x, codes, scales.dimensions()[0], y);
  p.scales = scales.typed_data();
  return compute(pool, multiply, p);
}

template <Multiply multiply, ffi::DataType dtype>
ffi::Error run_double(ffi::ThreadPool pool, Matrix x, ffi::Buffer<dtype> codes, ffi::Buffer<ffi::S8> scale_codes,
                      Matrix steps, Matrix mean, Result y) {
  Product p = product(x, codes, scale_codes.dimensions()[0], y);
  p.scale_codes = scale_codes.typed_data();
  p.steps = steps.typed_data();
  p.mean = *mean.typed_data();
  return compute(pool, multiply, p);
}

}  // namespace

#define BIND(dtype) ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<ffi::Buffer<dtype>>()
#define DEFINE(name, multiply, dtype)                                              \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, (run<multiply, dtype>),                      \
                                BIND(dtype).Arg<Matrix>().Ret<Matrix>());          \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                   \
      name##Double, (run_double<multiply, dtype>),                                 \
      BIND(dtype).Arg<ffi::Buffer<ffi::S8>>().Arg<Matrix>().Arg<Matrix>().Ret<Matrix>())

DEFINE(QuantizedDotInt8, multiply_int8, ffi::S8);
DEFINE(QuantizedDotInt4, multiply_int4, ffi::U8);
DEFINE(QuantizedDotNf4, multiply_nf4, ffi::U8);
