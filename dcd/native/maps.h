// Passes over the maps of a dynamic layer, on a CPU with AVX-512 and its products of bf16: what `dcd/ops/avx512.py`
// calls.
//
// A map is rows of channels (`dcd/ops/rows.py`). Each pass reads a map once for all that is wanted of it, a block of
// positions at a time, and sums in float32. The equations are those of `dcd/ops/fused_core.py` and of the two forms.
//
// Legend of the shape comments: B images, N positions of an image, C channels, L latent dimension, L⁺ columns of q, a
// multiple of 8 and at most 64, of which `used` ones count. An image is shared out among `chunks` tasks; sums have a
// part for each.

#pragma once

#include "tiles.h"

namespace dcd {

constexpr Index BLOCK = 48;  // positions, a multiple of the rows of all tiles: with their channels they stay in the cache
constexpr Index AHEAD = 12;  // rows, as many as the largest tile has
constexpr Index CELLS = 8;   // columns for the cells of the pool, the unused ones zeros

// Which positions of a map are read: all, or those of a convolution with a stride.
struct Positions {
    Index count, width, stride, full_width;

    Index row(Index n) const { return stride == 1 ? n : n / width * stride * full_width + n % width * stride; }
};

// Has what is read later fetched now: maps are read in an order that the processor does not foresee.
template <class Element>
void prefetch(const Element* from, Index count = 1) {
    for (Index i = 0; i < count; i += 64 / Index(sizeof(Element))) _mm_prefetch((const char*)(from + i), _MM_HINT_T1);
}

// Calls body(first, rows) for the blocks of one of `chunks` parts of an image.
template <class Body>
void for_blocks(Index positions, Index chunks, Index chunk, Body body) {
    const Index blocks = (positions + BLOCK - 1) / BLOCK;
    const Index end = std::min(positions, blocks * (chunk + 1) / chunks * BLOCK);
    for (Index n = blocks * chunk / chunks * BLOCK; n < end; n += BLOCK) body(n, std::min(BLOCK, end - n));
}

// The sum over positions of products with a narrow map: sums (L⁺, C) = narrowᵀ wide, zeros from row `used` on.
template <class T>
class NarrowSums {
    using Element = typename T::Element;
    using Factors = typename T::Factors;
    const Index used_, latent_, channels_, width_;
    std::vector<float> sums_;      // (L⁺, width), the columns as `load_columns` orders them
    std::vector<Element> paired_;  // a block of the narrow map, (rows / DEPTH, L⁺, DEPTH)
    const std::vector<Element> zeros_;

  public:
    NarrowSums(Index used, Index latent, Index channels)
        : used_(used),
          latent_(latent),
          channels_(channels),
          width_(round_up(channels, 2 * LANES)),
          sums_(latent * width_),
          paired_(BLOCK * latent),
          zeros_(std::max(latent, channels)) {}

    void clear() { std::fill(sums_.begin(), sums_.end(), 0.f); }

    // Adds those of a block: narrow (rows, L⁺) and wide (rows, C).
    void add(const Element* narrow, const Element* wide, Index rows) {
        const auto next = [&](const Element* map, Index width, Index r) {
            return r + 1 < rows ? map + (r + 1) * width : zeros_.data();
        };
        const Index pairs = (rows + T::DEPTH - 1) / T::DEPTH;
        for (Index i = 0; i < pairs; i++) {
            const Index r = i * T::DEPTH;
            T::pair(narrow + r * latent_, next(narrow, latent_, r), latent_, &paired_[r * latent_]);
        }
        // A strip of columns at a time, copied: its rows may be apart by what the cache maps to one place.
        Factors strip[BLOCK / T::DEPTH][2];
        for (Index c = 0; c < channels_; c += 2 * LANES) {
            for (Index i = 0; i < pairs; i++) {
                const Index r = i * T::DEPTH;
                T::load_columns(wide + r * channels_ + c, next(wide, channels_, r) + c, channels_ - c, strip[i]);
                for (Index d = 0; d < T::DEPTH; d++) prefetch(wide + (BLOCK + r + d) * channels_ + c);
            }
            for (Index l = 0; l < used_;) {
                const bool many = used_ - l > 2;
                const auto tile = many ? &NarrowSums::add_tile<8> : &NarrowSums::add_tile<1>;
                (this->*tile)(&paired_[l * T::DEPTH], strip, pairs, &sums_[l * width_ + c]);
                l += many ? 8 : 1;
            }
        }
    }

    // The sums times a factor, as (L⁺, C).
    void write(float* to, float factor) const {
        std::fill(to + used_ * channels_, to + latent_ * channels_, 0.f);
        for (Index l = 0; l < used_; l++)
            for (Index c = 0; c < channels_; c += 2 * LANES) {
                __m512 sums[2];
                for (int v = 0; v < 2; v++) sums[v] = _mm512_loadu_ps(&sums_[l * width_ + c + v * LANES]);
                T::sort_columns(sums);
                for (int v = 0; v < 2; v++)
                    store(to + l * channels_ + c + v * LANES, mask_of(channels_ - c - v * LANES),
                          sums[v] * _mm512_set1_ps(factor));
            }
    }

  private:
    template <int COUNT>
    void add_tile(const Element* paired, const Factors (*strip)[2], Index pairs, float* to) {
        __m512 sums[2 * COUNT];
#pragma GCC unroll 16
        for (int i = 0; i < 2 * COUNT; i++) sums[i] = _mm512_loadu_ps(to + i / 2 * width_ + i % 2 * LANES);
        for (Index r = 0; r < pairs; r++, paired += latent_ * T::DEPTH)
#pragma GCC unroll 16
            for (int i = 0; i < 2 * COUNT; i++)
                sums[i] = T::multiply_add(sums[i], T::broadcast(paired + i / 2 * T::DEPTH), strip[r][i % 2]);
#pragma GCC unroll 16
        for (int i = 0; i < 2 * COUNT; i++) _mm512_storeu_ps(to + i / 2 * width_ + i % 2 * LANES, sums[i]);
    }
};

// Rows (rows, C) of a block: in place where all positions are read, else gathered.
template <class T>
const typename T::Element* rows_of(const typename T::Element* image, const Positions& positions, Index n, Index rows,
                                   Index channels, std::vector<typename T::Element>& gathered) {
    if (positions.stride == 1) return image + n * channels;
    gathered.resize(BLOCK * channels);
    for (Index r = 0; r < rows; r++)
        std::copy_n(image + positions.row(n + r) * channels, channels, &gathered[r * channels]);
    return gathered.data();
}

// Equations 1 and 4, and the pool. The centre is the mean over the images at the position `middle`. Where moments is
// null, q has neither a centre nor constants, as for equation 33; where L⁺ is 0, there is the pool alone.
template <class T>
void read_latent(const typename T::Element* x, const float* proj_in, const typename T::Element* cells, Index cells_from,
                 Index cell_count, Index images, const Positions& seen, Index positions, Index middle, Index channels,
                 Index latent_dim, Index latent, Index chunks, float* offset, typename T::Element* q, float* moments,
                 float* pooled) {
    using Element = typename T::Element;
    const Index image_size = positions * channels;
    const auto factor = pack<T>(proj_in, 1, channels, channels, latent_dim);
    const Index factor_width = round_up(latent_dim, LANES);
    std::vector<float> shift(round_up(latent, LANES));
    if (moments) {
        std::vector<float> mean(channels);
        for (Index c = 0; c < channels; c += LANES) {
            const __mmask16 mask = mask_of(channels - c);
            __m512 sum = _mm512_setzero_ps();
            for (Index b = 0; b < images; b++) sum += T::load(x + b * image_size + middle * channels + c, mask);
            store(&mean[c], mask, sum * _mm512_set1_ps(1.f / images));
        }
        for (Index l = 0; l < latent_dim; l++) {
            __m512 sum = _mm512_setzero_ps();
            for (Index c = 0; c < channels; c += LANES) {
                const __mmask16 mask = mask_of(channels - c);
                sum = _mm512_fmadd_ps(load(proj_in + l * channels + c, mask), load(mean.data() + c, mask), sum);
            }
            shift[l] = -_mm512_reduce_add_ps(sum);
        }
        shift[latent_dim] = 1;
        std::copy_n(shift.data(), latent, offset);
    }
#pragma omp parallel
    {
        NarrowSums<T> q_sums(latent_dim + 1, latent, latent), x_sums(cell_count, CELLS, channels);
        std::vector<Element> gathered;
#pragma omp for schedule(static)
        for (Index task = 0; task < images * chunks; task++) {
            const Element* image = x + task / chunks * image_size;
            Element* q_image = q + task / chunks * seen.count * latent;
            q_sums.clear();
            x_sums.clear();
            for_blocks(seen.count, chunks, task % chunks, [&](Index n, Index rows) {
                const Element* block = rows_of<T>(image, seen, n, rows, channels, gathered);
                if (seen.stride == 1) x_sums.add(cells + n * CELLS, block, rows);
                if (!latent) return;
                Element* to = q_image + n * latent;
                product<T>({block, channels, 1}, factor.data(), factor_width, rows, channels, latent_dim, nothing,
                           [&](Index r, Index c, __mmask16, __m512 values) {
                               T::store(to + r * latent + c, mask_of(latent - c), values + _mm512_loadu_ps(&shift[c]));
                           });
                for (Index r = 0; r < rows; r++) {
                    for (Index c = factor_width; c < latent; c += LANES)
                        T::store(to + r * latent + c, mask_of(latent - c), _mm512_loadu_ps(&shift[c]));
                    if (cells_from) std::copy_n(cells + (n + r) * CELLS, cell_count, to + r * latent + cells_from);
                }
                if (moments) q_sums.add(to, to, rows);
            });
            if (seen.stride > 1)
                for_blocks(positions, chunks, task % chunks,
                           [&](Index n, Index rows) { x_sums.add(cells + n * CELLS, image + n * channels, rows); });
            if (moments) q_sums.write(moments + task * latent * latent, 1.f / seen.count);
            x_sums.write(pooled + task * CELLS * channels, 1.f / positions);
        }
    }
}

// sums (B, chunks, L⁺, C) of qᵀ wide.
template <class T>
void narrow_sums(const typename T::Element* q, const typename T::Element* wide, Index images, const Positions& seen,
                 Index positions, Index channels, Index used, Index latent, Index chunks, float* sums) {
#pragma omp parallel
    {
        NarrowSums<T> collected(used, latent, channels);
        std::vector<typename T::Element> gathered;
#pragma omp for schedule(static)
        for (Index task = 0; task < images * chunks; task++) {
            const auto* image = wide + task / chunks * positions * channels;
            const auto* q_image = q + task / chunks * seen.count * latent;
            collected.clear();
            for_blocks(seen.count, chunks, task % chunks, [&](Index n, Index rows) {
                collected.add(q_image + n * latent, rows_of<T>(image, seen, n, rows, channels, gathered), rows);
            });
            collected.write(sums + task * latent * channels, 1);
        }
    }
}

// out (rows, C) = scale ⊙ wide + bias + narrow (rows, L⁺) times a factor of C columns. scale and bias may be null.
template <class T>
void add_from_narrow(const typename T::Element* wide, const float* scale, const float* bias,
                     const typename T::Element* narrow, const typename T::Element* factor, Index rows, Index channels,
                     Index depth, Index latent, typename T::Element* out) {
    const auto start = [&](Index r, Index c, __mmask16 mask) {
        if (c == 0) prefetch(wide + (r + AHEAD) * channels, channels);
        const __m512 values = T::load(wide + r * channels + c, mask);
        const __m512 scaled = scale ? values * load(scale + c, mask) : values;
        return bias ? scaled + load(bias + c, mask) : scaled;
    };
    const auto finish = [&](Index r, Index c, __mmask16 mask, __m512 values) {
        T::store(out + r * channels + c, mask, values);
    };
    product<T>({narrow, latent, 1}, factor, round_up(channels, LANES), rows, depth, channels, start, finish);
}

// Equation 22, and with a bias equation 34: scale ⊙ wide + bias + q read_out.
template <class T>
void combine(const typename T::Element* wide, const float* scale, const float* bias, const typename T::Element* q,
             const float* read_out, Index images, Index positions, Index channels, Index used, Index latent,
             Index chunks, typename T::Element* out) {
    const Index depth = round_up(used, T::DEPTH);
#pragma omp parallel for schedule(static)
    for (Index task = 0; task < images * chunks; task++) {
        const Index image = task / chunks, start = image * positions;
        const auto factor = pack<T>(read_out + image * latent * channels, channels, 1, depth, channels);
        for_blocks(positions, chunks, task % chunks, [&](Index n, Index rows) {
            add_from_narrow<T>(wide + (start + n) * channels, scale ? scale + image * channels : nullptr,
                               bias ? bias + image * channels : nullptr, q + (start + n) * latent, factor.data(), rows,
                               channels, depth, latent, out + (start + n) * channels);
        });
    }
}

// Equation 23: d_static_out, and d_scale (B, chunks, C) and d_read_out (B, chunks, L⁺, C).
template <class T>
void combine_backward(const typename T::Element* d_y, const typename T::Element* static_out, const float* scale,
                      const typename T::Element* q, Index images, Index positions, Index channels, Index used,
                      Index latent, Index chunks, typename T::Element* d_static_out, float* d_scale,
                      float* d_read_out) {
#pragma omp parallel
    {
        NarrowSums<T> collected(used, latent, channels);
#pragma omp for schedule(static)
        for (Index task = 0; task < images * chunks; task++) {
            const Index image = task / chunks, start = image * positions;
            float* sums = d_scale + task * channels;
            std::fill_n(sums, channels, 0.f);
            collected.clear();
            for_blocks(positions, chunks, task % chunks, [&](Index n, Index rows) {
                const Index at = (start + n) * channels;
                for (Index i = at; i < at + rows * channels; i += channels)
                    for (Index c = 0; c < channels; c += LANES) {
                        const __mmask16 mask = mask_of(channels - c);
                        const __m512 gradient = T::load(d_y + i + c, mask), value = T::load(static_out + i + c, mask);
                        store(sums + c, mask, _mm512_fmadd_ps(gradient, value, load(sums + c, mask)));
                        T::store(d_static_out + i + c, mask, gradient * load(scale + image * channels + c, mask));
                    }
                collected.add(q + (start + n) * latent, d_y + at, rows);
            });
            collected.write(d_read_out + task * latent * channels, 1);
        }
    }
}

// The mean (L) over all positions of d_q of equation 6, from the sums of d_y in row L of d_read_out, and of q in row L
// of moments. It is that of the products with read_out as they are rounded.
template <class T>
std::vector<float> latent_gradient_mean(const float* d_read_out, const float* read_out, const float* moments,
                                        const float* q_to_d_q, Index images, Index positions, Index channels,
                                        Index latent_dim, Index latent) {
    std::vector<float> means(images * latent_dim), mean(round_up(latent_dim, LANES));
#pragma omp parallel for schedule(static)
    for (Index b = 0; b < images; b++) {
        const float* sums = d_read_out + (b * latent + latent_dim) * channels;
        for (Index l = 0; l < latent_dim; l++) {
            const float* row = read_out + (b * latent + l) * channels;
            __m512 by_output = _mm512_setzero_ps();
            for (Index c = 0; c < channels; c += LANES) {
                const __mmask16 mask = mask_of(channels - c);
                by_output = _mm512_fmadd_ps(load(sums + c, mask), T::rounded(load(row + c, mask)), by_output);
            }
            float by_statistics = 0;
            for (Index k = 0; k <= latent_dim; k++)
                by_statistics +=
                    moments[(b * latent + latent_dim) * latent + k] * q_to_d_q[(b * latent + k) * latent + l];
            means[b * latent_dim + l] = _mm512_reduce_add_ps(by_output) / positions + by_statistics;
        }
    }
    for (Index l = 0; l < latent_dim; l++) {
        double sum = 0;
        for (Index b = 0; b < images; b++) sum += means[b * latent_dim + l];
        mean[l] = sum / images;
    }
    return mean;
}

// d_q of equation 6 less its mean, and behind its L columns `cells` from cells_from on, unless that is 0, and zeros.
template <class T>
void latent_gradient(const typename T::Element* d_y, const float* d_read_out, const float* read_out,
                     const typename T::Element* q, const float* moments, const float* q_to_d_q,
                     const typename T::Element* cells, Index cells_from, Index cell_count, Index images,
                     Index positions, Index channels, Index latent_dim, Index latent, Index chunks,
                     typename T::Element* d_q) {
    const Index width = round_up(latent_dim, LANES);
    const auto mean = latent_gradient_mean<T>(d_read_out, read_out, moments, q_to_d_q, images, positions, channels,
                                              latent_dim, latent);
#pragma omp parallel
    {
        std::vector<float> q_exact(BLOCK * latent), by_output(BLOCK * width);
#pragma omp for schedule(static)
        for (Index task = 0; task < images * chunks; task++) {
            const Index image = task / chunks, start = image * positions;
            const auto factor = pack<T>(read_out + image * latent * channels, 1, channels, channels, latent_dim);
            for_blocks(positions, chunks, task % chunks, [&](Index n, Index rows) {
                const Index at = (start + n) * latent;
                prefetch(d_y + (start + n + BLOCK) * channels, BLOCK * channels);
                product<T>({d_y + (start + n) * channels, channels, 1}, factor.data(), width, rows, channels,
                           latent_dim, nothing, [&](Index r, Index c, __mmask16, __m512 values) {
                               _mm512_storeu_ps(&by_output[r * width + c], values);
                           });
                for (Index i = 0; i < rows * latent; i += LANES) {
                    const __mmask16 mask = mask_of(rows * latent - i);
                    store(&q_exact[i], mask, T::load(q + at + i, mask));
                }
                product<Float32>(
                    {q_exact.data(), latent, 1}, q_to_d_q + image * latent * latent, latent, rows, latent_dim + 1,
                    latent_dim, [&](Index r, Index c, __mmask16) { return _mm512_loadu_ps(&by_output[r * width + c]); },
                    [&](Index r, Index c, __mmask16, __m512 values) {
                        T::store(d_q + at + r * latent + c, mask_of(latent - c), values - _mm512_loadu_ps(&mean[c]));
                    });
                for (Index r = 0; r < rows; r++) {
                    for (Index c = width; c < latent; c += LANES)
                        T::store(d_q + at + r * latent + c, mask_of(latent - c), _mm512_setzero_ps());
                    if (cells_from)
                        std::copy_n(cells + (n + r) * CELLS, cell_count, d_q + at + r * latent + cells_from);
                }
            });
        }
    }
}

// d_x += left · right, `right` of equation 24, or with q_to_d_q that of equation 29. q_to_d_q may be null.
template <class T>
void add_input_gradient(const typename T::Element* left, const float* proj_in, const float* q_to_d_q,
                        const float* d_descriptor, Index cells_from, Index cell_count, Index images, Index positions,
                        Index channels, Index latent_dim, Index latent, Index chunks, typename T::Element* d_x) {
    const Index depth = round_up(cells_from + cell_count, T::DEPTH);
#pragma omp parallel
    {
        std::vector<float> right(latent * channels);
#pragma omp for schedule(static)
        for (Index task = 0; task < images * chunks; task++) {
            const Index image = task / chunks, start = image * positions;
            if (q_to_d_q)
                product<Float32>({q_to_d_q + image * latent * latent, latent, 1}, proj_in, channels, latent, latent_dim,
                                 channels, nothing, [&](Index r, Index c, __mmask16 mask, __m512 values) {
                                     store(&right[r * channels + c], mask, values);
                                 });
            else {
                std::copy_n(proj_in, latent_dim * channels, right.data());
                std::fill(right.begin() + latent_dim * channels, right.end(), 0.f);
            }
            for (Index d = 0; d < cell_count; d++)
                for (Index c = 0; c < channels; c++)
                    right[(cells_from + d) * channels + c] +=
                        d_descriptor[(image * channels + c) * cell_count + d] / positions;
            const auto factor = pack<T>(right.data(), channels, 1, depth, channels);
            for_blocks(positions, chunks, task % chunks, [&](Index n, Index rows) {
                auto* here = d_x + (start + n) * channels;
                add_from_narrow<T>(here, nullptr, nullptr, left + (start + n) * latent, factor.data(), rows, channels,
                                   depth, latent, here);
            });
        }
    }
}

}  // namespace dcd
