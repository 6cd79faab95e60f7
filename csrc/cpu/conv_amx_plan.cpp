// How a convolution by AMX is laid out and cut into parts.
#include <algorithm>
#include <limits>
#include <numeric>

#include "cpu/conv_amx.h"

namespace fastadv::conv_amx {
namespace {

constexpr int64_t kInputBytes = 1100 << 10;   // of a part: half of the second-level cache
constexpr int64_t kFilterBytes = 1280 << 10;  // that the rest of it holds
constexpr int64_t kDirectRows = 16;           // of 32 places: a strip of inputs read where they lie

int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step; }

bool inside(int64_t place, int64_t size) { return place >= 0 && place < size; }

// Sorts items into classes: items of a class have the same taps in the image.
struct Classes {
  std::vector<std::vector<bool>> kinds;
  std::vector<int64_t> of;  // a class for every item

  void add(std::vector<bool> kind) {
    const auto found = std::find(kinds.begin(), kinds.end(), kind);
    of.push_back(found - kinds.begin());
    if (found == kinds.end()) kinds.push_back(std::move(kind));
  }
};

Classes classes_of_rows(const Shape& shape, bool all) {
  Classes classes;
  for (int64_t i = 0; i < shape.grid_height(); ++i) {
    std::vector<bool> kind(shape.taps, true);
    for (int64_t t = 0; t < shape.taps && !all; ++t) {
      kind[t] = inside(i * shape.in_step + shape.tap_rows[t], shape.in_height);
    }
    classes.add(std::move(kind));
  }
  return classes;
}

// The same for the tiles of a row.
Classes classes_of_columns(const Shape& shape, int64_t images) {
  Classes classes;
  const int64_t width = shape.grid_width();
  for (int64_t first = 0; first < width * images; first += kRows) {
    const int64_t last = std::min(first + kRows - 1, width * images - 1);
    std::vector<bool> kind(shape.taps, false);
    for (int64_t t = 0; t < shape.taps; ++t) {
      for (int64_t j = first / images; j <= last / images; ++j) {
        if (inside(j * shape.in_step + shape.tap_columns[t], shape.in_width)) kind[t] = true;
      }
    }
    classes.add(std::move(kind));
  }
  return classes;
}

std::vector<int64_t> sizes(const Classes& classes) {
  std::vector<int64_t> result(classes.kinds.size());
  for (const int64_t c : classes.of) ++result[c];
  return result;
}

int64_t common(const std::vector<bool>& a, const std::vector<bool>& b) {
  int64_t count = 0;
  for (size_t t = 0; t < a.size(); ++t) count += a[t] && b[t];
  return count;
}

// Columns of a row with its zeros, for tiles that go on in the next row.
int64_t columns_of_rows(const Shape& shape) {
  int64_t left = 0, right = 0;
  for (int64_t t = 0; t < shape.taps; ++t) {
    left = std::max(left, -shape.tap_columns[t]);
    right = std::max(right, shape.grid_width() + shape.tap_columns[t] - shape.in_width);
  }
  return std::max(shape.in_width + std::max(left, right), shape.grid_width());
}

// Processor cycles, about, as measured on an Emerald Rapids: two tiles of inputs and two of filters
// take 64, a tile that has no partner 48 instead of 32. A line that the tiles read comes from the
// second-level cache once for all taps.
constexpr double kPair = 32, kAlone = 48, kLine = 2;

// Cycles for 32 input and output channels.
double cost(const Shape& shape, const Layout& layout) {
  const double groups = double(up(shape.batch, layout.images));
  const auto [low, high] = std::minmax_element(shape.tap_rows, shape.tap_rows + shape.taps);
  const auto [near, far] = std::minmax_element(shape.tap_columns, shape.tap_columns + shape.taps);
  const int64_t tap_rows = *high - *low + 1, span = *far - *near, images = layout.images;
  if (!layout.whole_rows) {
    const int64_t columns = columns_of_rows(shape);
    const int64_t places = (shape.grid_height() - 1) * columns + shape.grid_width();
    const int64_t tiles = up(places, kRows);
    const double products = kPair * double(tiles) + (kAlone - kPair) * double(tiles % 2);
    const double lines = double(tap_rows * tiles * (kRows + span));
    return groups * (double(shape.taps) * products + kLine * lines);
  }
  const Classes rows = classes_of_rows(shape, false);
  const Classes columns = classes_of_columns(shape, images);
  const std::vector<int64_t> tall = sizes(rows), wide = sizes(columns);
  // Two neighbours in a row read less than two in different rows.
  const int64_t across = std::max(2 * kRows / images, int64_t(1)) + span;
  const int64_t lines =
      columns.of.size() > 1 ? tap_rows * across * images : (tap_rows + 1) * (kRows + span * images);
  double total = 0;
  for (size_t a = 0; a < tall.size(); ++a) {
    for (size_t b = 0; b < wide.size(); ++b) {
      const int64_t tiles = tall[a] * wide[b];
      const double taps = double(common(rows.kinds[a], columns.kinds[b]));
      total += taps * (kPair * double(tiles) + (kAlone - kPair) * double(tiles % 2));
      total += kLine * double(lines * tiles) / 2 * taps / double(shape.taps);
    }
  }
  return groups * total;
}

Layout choose(const Shape& shape) {
  Layout best{1, true};
  if (shape.taps == 0) return best;
  double least = cost(shape, best);
  const auto offer = [&](const Layout& layout) {
    if (const double found = cost(shape, layout); found < least) {
      best = layout;
      least = found;
    }
  };
  if (shape.in_step == 1) offer({1, false});
  for (int64_t images = 2; images <= 2 * kRows && images < 2 * shape.batch; images *= 2) {
    offer({images, true});
  }
  return best;
}

// A pointwise convolution of rows of 32 places.
Shape flattened(const Shape& shape, int64_t threads) {
  Shape flat = shape;
  const int64_t rows = up(shape.places(), 2 * kRows);
  flat.in_width = flat.out_width = 2 * kRows;
  flat.in_height = flat.out_height = std::clamp<int64_t>(up(rows, 2 * threads), 1, kDirectRows);
  flat.batch = up(rows, flat.in_height);
  return flat;
}

bool pointwise(const Shape& shape) {
  return shape.taps == 1 && shape.tap_rows[0] == 0 && shape.tap_columns[0] == 0 &&
         shape.in_step == 1 && shape.out_step == 1 && shape.in_height == shape.out_height &&
         shape.in_width == shape.out_width && shape.out_row == 0 && shape.out_column == 0;
}

}  // namespace

Plan::Plan(const Shape& of, int64_t threads)
    : Plan(of, threads, pointwise(of) ? Layout{1, true} : choose(of)) {}

Plan::Plan(const Shape& of, int64_t threads, const Layout& of_layout)
    : shape(of),
      layout(of_layout),
      direct(pointwise(of)),
      results(of.batch * of.out_height * of.out_width * of.out_channels) {
  if (direct) {
    shape = flattened(of, threads);
    layout = {1, true};
  }
  place_inputs();
  share_out(threads);
  find_tiles();
}

void Plan::place_inputs() {
  const int64_t channels = shape.in_channels, step = shape.in_step, width = shape.in_width;
  // At multiples of 1024 bytes a tile's rows meet in few sets of the first-level cache.
  pixel = channels % 512 == 0 && !direct ? channels + kDepth : channels;
  int64_t right = 0, last = 0;
  left = first_tap = 0;
  tap_rows = 1;
  if (shape.taps > 0) {
    const auto [low, high] = std::minmax_element(shape.tap_rows, shape.tap_rows + shape.taps);
    first_tap = *low;
    tap_rows = *high - *low + 1;
    const auto columns = std::minmax_element(shape.tap_columns, shape.tap_columns + shape.taps);
    left = std::max<int64_t>(0, -*columns.first);
    last = (shape.grid_width() - 1) * step + *columns.second;
    right = std::max<int64_t>(0, last + 1 - width);
  }
  // At step 1 the zeros after a row are those before the next one.
  columns = step == 1 ? columns_of_rows(shape) : up(left + last + 1, step);
  after = step == 1 ? std::min(left, right) : 0;
}

void Plan::share_out(int64_t threads) {
  const int64_t height = shape.grid_height(), row_bytes = row() * 2;
  const int64_t held = (kInputBytes / std::max<int64_t>(row_bytes, 1) - tap_rows) / shape.in_step;
  int64_t count = up(height, std::clamp<int64_t>(held + 1, 1, height));
  channel_ranges = 1;
  if (groups() * count < 4 * threads && groups() * count % threads != 0) {
    const int64_t filters = conv::padded(shape.out_channels) * shape.depth();
    if (filters > row() * (height * shape.in_step + tap_rows)) {
      channel_ranges = std::min(threads / std::gcd(threads, groups() * count), blocks());
    } else {
      while (count < height && groups() * count % threads != 0) ++count;
    }
  }
  blocks_per_range = up(blocks(), channel_ranges);
  tiles_first = blocks_per_range * kBlock * shape.depth() * 2 <= kFilterBytes;
  channel_ranges = up(blocks(), blocks_per_range);
  rows = up(height, count);
  for (int64_t i = 0; i < height; i += rows) strips.push_back({i, 0, 0});
  const int64_t bytes = ((rows - 1) * shape.in_step + tap_rows) * row_bytes;
  const int64_t together = std::max<int64_t>(kInputBytes / std::max<int64_t>(bytes, 1), 1);
  const int64_t all = int64_t(strips.size()) * channel_ranges;
  // All threads get the same number of parts, or nearly so.
  const int64_t even = up(up(groups(), together) * all, threads) * threads;
  groups_per_range = up(groups(), std::clamp<int64_t>(even / all, 1, groups()));
  group_ranges = up(groups(), groups_per_range);
}

void Plan::find_tiles() {
  const int64_t width = shape.grid_width(), images = layout.images;
  const Classes down = classes_of_rows(shape, !layout.whole_rows);
  Classes across;
  if (layout.whole_rows) {
    across = classes_of_columns(shape, images);
  } else {
    across.kinds = {std::vector<bool>(shape.taps, true)};
  }
  // The taps of every class.
  std::vector<std::pair<int64_t, int64_t>> lists;
  int64_t reach = 0;
  for (const auto& a : down.kinds) {
    for (const auto& b : across.kinds) {
      lists.emplace_back(taps.size(), common(a, b));
      for (int64_t t = 0; t < shape.taps; ++t) {
        if (!(a[t] && b[t])) continue;
        const int64_t column = shape.tap_columns[t] + left;
        const int64_t at = column % shape.in_step * columns + column / shape.in_step;
        taps.push_back({(shape.tap_rows[t] - first_tap) * row() + at * place(), t});
        reach = std::max(reach, taps.back().input);
      }
    }
  }
  const auto result = [&](int64_t i, int64_t j, int64_t image) {
    const int64_t row = image * shape.out_height + i * shape.out_step + shape.out_row;
    const int64_t column = j * shape.out_step + shape.out_column;
    return (row * shape.out_width + column) * shape.out_channels;
  };
  int64_t end = 0;
  const auto add = [&](bool pair, int64_t list, int64_t input) -> Tiles& {
    end = std::max(end, input);
    if (pair) {
      tiles.back().next = input;
      tiles.back().pair = true;
    } else {
      tiles.push_back({input, 0, false, lists[list].first, lists[list].second, 0, {}});
    }
    return tiles.back();
  };
  for (Strip& strip : strips) {
    const int64_t past = std::min(strip.row + rows, shape.grid_height());
    strip.first = int64_t(tiles.size());
    if (!layout.whole_rows) {
      const int64_t places = (past - strip.row - 1) * columns + width;
      for (int64_t first = 0; first < places; first += kRows) {
        const bool pair = first / kRows % 2 == 1;
        Tiles& to = add(pair, 0, first * pixel);
        for (int64_t k = first; k < std::min(first + kRows, places); ++k) {
          const int64_t i = strip.row + k / columns, j = k % columns;
          const int64_t sums = (k - first + pair * kRows) * kBlock;
          if (j < width) to.rows[to.count++] = {sums, result(i, j, 0)};
        }
      }
    }
    for (size_t list = 0; list < lists.size() && layout.whole_rows; ++list) {
      bool pair = false;
      for (int64_t i = strip.row; i < past; ++i) {
        if (down.of[i] != int64_t(list / across.kinds.size())) continue;
        for (size_t n = 0; n < across.of.size(); ++n) {
          if (across.of[n] != int64_t(list % across.kinds.size())) continue;
          const int64_t first = int64_t(n) * kRows;
          const int64_t above = (i - strip.row) * shape.in_step * row();
          Tiles& to = add(pair, int64_t(list), above + first * pixel);
          for (int64_t k = first; k < std::min(first + kRows, width * images); ++k) {
            to.rows[to.count++] = {(k - first + pair * kRows) * kBlock,
                                   result(i, k / images, k % images)};
          }
          pair = !pair;
        }
      }
    }
    strip.count = int64_t(tiles.size()) - strip.first;
  }
  const int64_t in_rows = (rows - 1) * shape.in_step + tap_rows;
  group_elements = std::max(in_rows * row() + after * place(), end + reach + kRows * pixel);
  group_elements = up(group_elements, 32) * 32;
}

int64_t Plan::scratch_bytes() const {
  const int64_t laid_out = direct || tiles_first ? 1 : groups_per_range;
  return laid_out * group_elements * int64_t(sizeof(uint16_t));
}

}  // namespace fastadv::conv_amx
