#include "sketch/outer.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <numeric>
#include <vector>

#include "common/philox.h"
#include "common/scratch.h"
#include "sketch/rademacher.h"
#include "sketch/sjlt.h"

namespace activedpo {

namespace {

constexpr std::int64_t kSlab = 4096;  // numbers of a gradient projected densely at a time

// The segments of one row, in their original order.
struct Row {
  const Segment* first;
  const Segment* last;
  std::int64_t number() const { return first->row; }
};

class Rows {
 public:
  Rows(const Segment* segments, std::int64_t count) : segments_(segments, segments + count) {
    std::stable_sort(segments_.begin(), segments_.end(),
                     [](const Segment& a, const Segment& b) { return a.row < b.row; });
    for (const Segment& segment : segments_) {
      if (rows_.empty() || rows_.back().number() != segment.row) {
        rows_.push_back({&segment, &segment});
      }
      rows_.back().last = &segment + 1;
    }
  }
  std::int64_t count() const { return static_cast<std::int64_t>(rows_.size()); }
  const Row& operator[](std::int64_t r) const { return rows_[static_cast<std::size_t>(r)]; }

 private:
  std::vector<Segment> segments_;
  std::vector<Row> rows_;
};

// A rectangle of the gradient.
struct Part {
  std::int64_t top, bottom, begin, end;
  std::int64_t height() const { return bottom - top; }
  std::int64_t width() const { return end - begin; }
};

// The tiles of a part, each small enough for add_product, row-major.
template <typename Visit>
void for_each_tile(const Part& part, Visit visit) {
  const bool wide = part.width() >= part.height();
  const std::int64_t height = wide ? kProductNarrow : kProductWide;
  const std::int64_t width = wide ? kProductWide : kProductNarrow;
  for (std::int64_t a = part.top; a < part.bottom; a += height) {
    for (std::int64_t b = part.begin; b < part.end; b += width) {
      visit(Part{a, std::min(a + height, part.bottom), b, std::min(b + width, part.end)});
    }
  }
}

// tile = the row's gradient there, row-major.
template <typename T, typename S>
void form_tile(S* tile, const OuterSketch<T>& o, const Row& row, const Part& part, S* scratch) {
  std::fill(tile, tile + part.height() * part.width(), S(0));
  for (const Segment* s = row.first; s != row.last; ++s) {
    add_product(tile, o.left + s->begin * o.left_stride + part.top, o.left_stride, part.height(),
                o.right + s->begin * o.right_stride + part.begin, o.right_stride, part.width(),
                s->end - s->begin, scratch);
  }
}

// Returns the n-th of `parts` parts, split at multiples of 32: between rows if there are many, so
// that parts are contiguous in memory, else along the longer side.
Part nth_part(const Part& whole, std::int64_t n, std::int64_t parts) {
  const bool wide =
      whole.height() < parts * kProductNarrow && whole.width() >= whole.height();
  const std::int64_t length = wide ? whole.width() : whole.height();
  const std::int64_t step = (length + 32 * parts - 1) / (32 * parts) * 32;
  const std::int64_t from = std::min(n * step, length), to = std::min(from + step, length);
  return wide ? Part{whole.top, whole.bottom, whole.begin + from, whole.begin + to}
              : Part{whole.top + from, whole.top + to, whole.begin, whole.end};
}

constexpr std::int64_t kTile = kProductNarrow * kProductWide;

}  // namespace

template <typename T>
void OuterSketch<T>::sjlt() const {
  using S = typename Sum<T>::Type;
  const Rows rows(segments, n_segments);
  const std::int64_t count = rows.count();
  // In rows of the gradient.
  const std::int64_t slab = std::min(height, std::max<std::int64_t>(1, kSjltPositions / width));
  const std::int64_t parts = sjlt_parts(count, slab * width, k);
  const int threads = static_cast<int>(std::min<std::int64_t>(num_threads, count * parts));
  Scratch<double> sums(parts > 1 ? count * parts : 0, k);
  Scratch<S> scratch(threads, kTile + kProductScratch);
  SjltHash hash(k, kSjltStream, key);

  for (std::int64_t top = 0; top < height; top += slab) {
    const Part whole{top, std::min(top + slab, height), 0, width};
    hash.draw(top * width, whole.bottom * width, num_threads);
    sjlt_sum_parts(
        count, parts, k, sums, threads,
        [&](std::int64_t r) { return out + rows[r].number() * out_stride; },
        [&](std::int64_t r, std::int64_t n, double* target) {
          S* tile = scratch.of(thread_number());
          for_each_tile(nth_part(whole, n, parts), [&](const Part& part) {
            form_tile(tile, *this, rows[r], part, tile + kTile);
            const bool contiguous = part.width() == width;
            const std::int64_t lines = contiguous ? 1 : part.height();
            const std::int64_t length = part.height() * part.width() / lines;
            for (std::int64_t line = 0; line < lines; ++line) {
              hash.add(target, tile + line * length, (part.top + line) * width + part.begin, length);
            }
          });
        });
  }
}

// Forms a slab of every row's gradient and projects it for all rows at once: signs are drawn once
// for the whole batch.
template <typename T>
void OuterSketch<T>::rademacher() const {
  using S = typename Sum<T>::Type;
  const Rows rows(segments, n_segments);
  const std::int64_t count = rows.count();
  const std::int64_t slab_height = std::max<std::int64_t>(1, std::min(height, kSlab / width));
  const std::int64_t slab_width = std::min(width, kSlab);
  const std::int64_t stride = slab_height * slab_width;
  const std::int64_t column_blocks = (k + kRademacherColumns - 1) / kRademacherColumns;
  const double scale = 1.0 / std::sqrt(static_cast<double>(k));
  const int threads = num_threads;
  Scratch<S> gradients(1, count * stride);
  Scratch<S> scratch(threads, kTile + kProductScratch);
  Scratch<double> sums(threads, count * kRademacherColumns);

  for (std::int64_t top = 0; top < height; top += slab_height) {
    for (std::int64_t begin = 0; begin < width; begin += slab_width) {
      const Part slab{top, std::min(top + slab_height, height), begin,
                      std::min(begin + slab_width, width)};
#pragma omp parallel num_threads(threads)
      {
        S* tile = scratch.of(thread_number());
#pragma omp for schedule(dynamic)
        for (std::int64_t r = 0; r < count; ++r) {
          for_each_tile(slab, [&](const Part& part) {
            form_tile(tile, *this, rows[r], part, tile + kTile);
            for (std::int64_t a = 0; a < part.height(); ++a) {
              S* target = gradients.of(0) + r * stride + (part.top + a - slab.top) * slab.width() +
                          (part.begin - slab.begin);
              std::copy(tile + a * part.width(), tile + (a + 1) * part.width(), target);
            }
          });
        }
        double* block_sums = sums.of(thread_number());
#pragma omp for schedule(dynamic)
        for (std::int64_t block = 0; block < column_blocks; ++block) {
          std::fill(block_sums, block_sums + count * kRademacherColumns, 0.0);
          rademacher_columns(block_sums, gradients.of(0), stride, count,
                             slab.height() * slab.width(),
                             static_cast<std::uint64_t>(slab.top * width + slab.begin),
                             static_cast<std::uint32_t>(block), key);
          const std::int64_t first = block * kRademacherColumns;
          const std::int64_t columns = std::min<std::int64_t>(kRademacherColumns, k - first);
          for (std::int64_t r = 0; r < count; ++r) {
            double* target = out + rows[r].number() * out_stride + first;
            const double* source = block_sums + r * kRademacherColumns;
            for (std::int64_t j = 0; j < columns; ++j) target[j] += source[j] * scale;
          }
        }
      }
    }
  }
}

namespace {

// Buckets and signs of the positions of one side.
template <typename S>
struct Side {
  std::vector<std::int32_t> bucket;
  std::vector<S> sign;
  std::int64_t buckets;
  bool identity;  // the side keeps its length, and positions are buckets

  Side(std::int64_t length, std::int64_t buckets, std::uint32_t stream, std::uint64_t key)
      : buckets(buckets), identity(buckets == length) {
    SjltHash hash(buckets, stream, key);
    hash.draw(0, length, 1);
    for (std::int64_t p = 0; p < length; ++p) {
      bucket.push_back(static_cast<std::int32_t>(identity ? p : hash.bucket(p)));
      sign.push_back(hash.negative(p) != 0 ? S(-1) : S(1));
    }
  }
};

// target[bucket(p)] += sign(p) * factor * x[p].
template <typename S, typename T>
ACTIVEDPO_INLINE void add_side(S* target, const Side<S>& side, const T* x, std::int64_t first,
                               std::int64_t count, S factor) {
  const S* sign = side.sign.data() + first;
  if (side.identity) {
    for (std::int64_t p = 0; p < count; ++p) target[first + p] += sign[p] * factor * widened(x[p]);
    return;
  }
  const std::int32_t* bucket = side.bucket.data() + first;
  for (std::int64_t p = 0; p < count; ++p) target[bucket[p]] += sign[p] * factor * widened(x[p]);
}

// projected[t] = one side of token t in its buckets.
template <typename T, typename S>
void project_tokens(S* projected, const Side<S>& side, const T* x, std::int64_t stride,
                    std::int64_t length, std::int64_t tokens) {
  std::fill(projected, projected + tokens * side.buckets, S(0));
  for (std::int64_t t = 0; t < tokens; ++t) {
    add_side(projected + t * side.buckets, side, x + t * stride, 0, length, S(1));
  }
}

}  // namespace

template <typename T>
void OuterSketch<T>::kronecker() const {
  using S = typename Sum<T>::Type;
  const Rows rows(segments, n_segments);
  const std::int64_t count = rows.count();
  const std::int64_t a = sides[0], b = sides[1];
  const Side<S> left_side(height, a, kKroneckerLeftStream, key);
  const Side<S> right_side(width, b, kKroneckerRightStream, key);
  const std::int64_t run = std::gcd(k, kSjltRun), runs = k / run;
  // Tokens whose sides are projected at a time: 128 KiB in float32.
  const std::int64_t step = std::clamp<std::int64_t>(32768 / (a + b), 8, kProductTokens);
  const int threads = static_cast<int>(std::min<std::int64_t>(num_threads, count));
  Scratch<S> scratch(threads, kTile + kProductScratch + a * b + step * (a + b));

#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (std::int64_t r = 0; r < count; ++r) {
    const Row& row = rows[r];
    S* tile = scratch.of(thread_number());
    S* sketch = tile + kTile + kProductScratch;
    S* projected_left = sketch + a * b;
    S* projected_right = projected_left + step * a;
    std::fill(sketch, sketch + a * b, S(0));
    for (const Segment* s = row.first; s != row.last; ++s) {
      if ((s->end - s->begin) * (height + width) >= height * width) {
        // If the gradient has fewer numbers than its tokens, form it first and project it once.
        for_each_tile(Part{0, height, 0, width}, [&](const Part& part) {
          form_tile(tile, *this, Row{s, s + 1}, part, tile + kTile);
          for (std::int64_t i = 0; i < part.height(); ++i) {
            const auto p = static_cast<std::size_t>(part.top + i);
            add_side(sketch + left_side.bucket[p] * b, right_side, tile + i * part.width(),
                     part.begin, part.width(), left_side.sign[p]);
          }
        });
        continue;
      }
      for (std::int64_t t = s->begin; t < s->end; t += step) {
        const std::int64_t tokens = std::min(step, s->end - t);
        project_tokens(projected_left, left_side, left + t * left_stride, left_stride, height,
                       tokens);
        project_tokens(projected_right, right_side, right + t * right_stride, right_stride, width,
                       tokens);
        for_each_tile(Part{0, a, 0, b}, [&](const Part& part) {
          std::fill(tile, tile + part.height() * part.width(), S(0));
          add_product(tile, projected_left + part.top, a, part.height(),
                      projected_right + part.begin, b, part.width(), tokens, tile + kTile);
          for (std::int64_t i = 0; i < part.height(); ++i) {
            S* target = sketch + (part.top + i) * b + part.begin;
            for (std::int64_t j = 0; j < part.width(); ++j) {
              target[j] += tile[i * part.width() + j];
            }
          }
        });
      }
    }
    double* target = out + row.number() * out_stride;
    std::int64_t place = first_run;
    for (std::int64_t begin = 0; begin < a * b; begin += run) {
      const std::int64_t count = std::min(run, a * b - begin);
      for (std::int64_t j = 0; j < count; ++j) target[place * run + j] += sketch[begin + j];
      place += run_stride;
      if (place >= runs) place -= runs;
    }
  }
}

template struct OuterSketch<float>;
template struct OuterSketch<double>;
template struct OuterSketch<BFloat16>;

}  // namespace activedpo
