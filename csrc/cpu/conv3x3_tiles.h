// The tiles of a Winograd convolution, for any storage type and vector: how they are read,
// transformed and written. The includer defines FASTADV_LEVEL and FASTADV_LEVEL_INLINE, how a
// function is declared for the processor, and includes one of csrc/cpu/vector_*.h first. A storage
// type has `load` and `store` of a vector of it in fastadv::vec, and in fastadv::conv `finish`.
#pragma once

#include "cpu/conv3x3.h"

namespace fastadv::conv3x3 {
namespace {

using namespace vec;

// The transforms evaluate polynomials at 0, +-a, +-b and infinity. The usual +-1, +-2 make numbers
// of very different sizes, and rounding them to bfloat16 twice the error: .025 of the result's norm
// on normal data, against .011 with these.
constexpr float kA = 0.625f, kA2 = kA * kA;
constexpr float kB = 1.5f, kB2 = kB * kB;

// The transform of inputs along one axis.
FASTADV_LEVEL_INLINE void transform_input(V (&r)[6], const V (&d)[6]) {
  const V a2 = constant(kA2), b2 = constant(kB2), sum = constant(kA2 + kB2);
  const V even_a = fnmadd(b2, d[2], d[4]), even_b = fnmadd(a2, d[2], d[4]);
  const V odd_a = mul(constant(kA), fnmadd(b2, d[1], d[3]));
  const V odd_b = mul(constant(kB), fnmadd(a2, d[1], d[3]));
  const V product = constant(kA2 * kB2);
  r[0] = fmadd(product, d[0], fnmadd(sum, d[2], d[4]));
  r[1] = add(even_a, odd_a);
  r[2] = sub(even_a, odd_a);
  r[3] = add(even_b, odd_b);
  r[4] = sub(even_b, odd_b);
  r[5] = fmadd(product, d[1], fnmadd(sum, d[3], d[5]));
}

// The transform of results along one axis.
FASTADV_LEVEL_INLINE void transform_output(V (&y)[4], const V (&m)[6]) {
  const V sum_a = add(m[1], m[2]), difference_a = sub(m[1], m[2]);
  const V sum_b = add(m[3], m[4]), difference_b = sub(m[3], m[4]);
  y[0] = add(m[0], add(sum_a, sum_b));
  y[1] = fmadd(constant(kA), difference_a, mul(constant(kB), difference_b));
  y[2] = fmadd(constant(kA2), sum_a, mul(constant(kB2), sum_b));
  y[3] = fmadd(constant(kA2 * kA), difference_a, fmadd(constant(kB2 * kB), difference_b, m[5]));
}

// The transform of filters along one axis.
FASTADV_LEVEL_INLINE void transform_filter(V (&u)[6], V g0, V g1, V g2) {
  const V share_a = constant(1 / (2 * kA2 * (kA2 - kB2)));
  const V share_b = constant(1 / (2 * kB2 * (kB2 - kA2)));
  const V even_a = mul(share_a, fmadd(constant(kA2), g2, g0));
  const V even_b = mul(share_b, fmadd(constant(kB2), g2, g0));
  const V odd_a = mul(share_a, mul(constant(kA), g1));
  const V odd_b = mul(share_b, mul(constant(kB), g1));
  u[0] = mul(constant(1 / (kA2 * kB2)), g0);
  u[1] = add(even_a, odd_a);
  u[2] = sub(even_a, odd_a);
  u[3] = add(even_b, odd_b);
  u[4] = sub(even_b, odd_b);
  u[5] = g2;
}

struct TilePlace {
  int64_t image, row, column;  // of the tile's first result
};

inline TilePlace place_of(const Shape& shape, int64_t tile) {
  const int64_t across = shape.tiles_across(), per_image = across * shape.tiles_down();
  const int64_t within = tile % per_image;
  return {tile / per_image, within / across * kTile, within % across * kTile};
}

// Reads one tile's 6x6 inputs and writes its 36 transformed rows: v[point * stride + channel].
template <class Stored>
FASTADV_LEVEL void gather_tile(Stored* v, int64_t stride, const Stored* x, const Shape& shape,
                               const TilePlace& place) {
  const int64_t channels = shape.in_channels;
  const Stored* image = x + place.image * shape.height * shape.width * channels;
  const Stored* source[6][6];
  for (int i = 0; i < 6; ++i) {
    for (int j = 0; j < 6; ++j) {
      const int64_t row = place.row + i - 1, column = place.column + j - 1;
      const bool inside = row >= 0 && row < shape.height && column >= 0 && column < shape.width;
      source[i][j] = inside ? image + (row * shape.width + column) * channels : nullptr;
    }
  }
  for (int64_t c = 0; c < channels; c += kLanes) {
    V half[6][6];
    for (int j = 0; j < 6; ++j) {
      V d[6], r[6];
      for (int i = 0; i < 6; ++i) d[i] = source[i][j] ? load(source[i][j] + c) : zero();
      transform_input(r, d);
      for (int i = 0; i < 6; ++i) half[i][j] = r[i];
    }
    for (int i = 0; i < 6; ++i) {
      V r[6];
      transform_input(r, half[i]);
      for (int j = 0; j < 6; ++j) store(v + (i * 6 + j) * stride + c, r[j]);
    }
  }
}

// Transforms one tile's 36 products back and stores its 4x4 results of `width` channels from
// `channel` on.
template <class Stored>
FASTADV_LEVEL void scatter_tile(Stored* out, const float* m, int64_t stride, int64_t width,
                                const Shape& shape, const TilePlace& place, int64_t channel,
                                const conv::EpilogueOf<Stored>& epilogue) {
  for (int64_t c = 0; c < width; c += kLanes) {
    const int64_t left = shape.out_channels - channel - c;
    if (left <= 0) break;
    const Live live = live_lanes(left);
    V half[4][6];
    for (int j = 0; j < 6; ++j) {
      V column[6], y[4];
      for (int i = 0; i < 6; ++i) column[i] = load(m + (i * 6 + j) * stride + c);
      transform_output(y, column);
      for (int i = 0; i < 4; ++i) half[i][j] = y[i];
    }
    for (int i = 0; i < kTile && place.row + i < shape.height; ++i) {
      V y[4];
      transform_output(y, half[i]);
      for (int j = 0; j < kTile && place.column + j < shape.width; ++j) {
        const int64_t pixel =
            (place.image * shape.height + place.row + i) * shape.width + place.column + j;
        const int64_t at = pixel * shape.out_channels + channel + c;
        conv::finish(out, y[j], epilogue, at, channel + c, live);
      }
    }
  }
}

// The 36 transformed values of a vector of output channels, from `out` on, and one input channel.
FASTADV_LEVEL_INLINE void transform_taps(V (&u)[6][6], const Filters& f, int64_t out, int64_t in) {
  const float* base = f.weight + out * f.out_stride + in * f.in_stride;
  const Live live = live_lanes(f.out_channels - out);
  V scale = constant(1);
  if (f.scale) scale = f.scale_by_input ? constant(f.scale[in]) : load(f.scale + out, live);
  V g[3][3];
  for (int k = 0; k < 9; ++k) {
    const int from = f.rotated ? 8 - k : k;
    g[k / 3][k % 3] = mul(scale, gather(base + from * f.tap_stride, f.out_stride, live));
  }
  V half[6][3];
  for (int j = 0; j < 3; ++j) {
    V column[6];
    transform_filter(column, g[0][j], g[1][j], g[2][j]);
    for (int i = 0; i < 6; ++i) half[i][j] = column[i];
  }
  for (int i = 0; i < 6; ++i) transform_filter(u[i], half[i][0], half[i][1], half[i][2]);
}

}  // namespace
}  // namespace fastadv::conv3x3
