// The small matrices of a dynamic layer, forward and backward, on a CPU with AVX-512: what `dcd/ops/avx512.py` calls.
//
// By PyTorch's operations they cost little arithmetic and about 150 calls a layer. Here they are one call each way, in
// float32. The equations are those of `dcd/ops/image_matrices.py`, whose names are kept.
//
// Legend of the shape comments: B images, C·D width of the pooled input, S squeezed width, L latent dimension, L⁺ the
// width of q, O output and C input channels. Of matrices with L⁺ rows those behind row L are zeros, or mean nothing.

#pragma once

#include <cmath>

#include "tiles.h"

namespace dcd {

using Matrix = Left<Float32>;

// c (rows, columns) = a (rows, depth) · b (depth, columns), plus c if it is to be added. b and c have rows of these
// widths.
inline void multiply(Matrix a, const float* b, Index b_width, float* c, Index c_width, Index rows, Index depth,
                     Index columns, bool add = false) {
    const auto finish = [&](Index r, Index i, __mmask16 mask, __m512 values) {
        store(c + r * c_width + i, mask, values);
    };
    if (add)
        product<Float32>(
            a, b, b_width, rows, depth, columns,
            [&](Index r, Index i, __mmask16 mask) { return load(c + r * c_width + i, mask); }, finish);
    else
        product<Float32>(a, b, b_width, rows, depth, columns, nothing, finish);
}

inline Matrix plain(const float* data, Index width) { return {data, width, 1}; }
inline Matrix transposed(const float* data, Index width) { return {data, 1, width}; }

inline void transpose(const float* from, Index rows, Index columns, float* to) {
    for (Index r = 0; r < rows; r++)
        for (Index c = 0; c < columns; c++) to[c * rows + r] = from[r * columns + c];
}

// Calls body(first, rows) for parts of `total` rows, on all threads. To be called by all of them.
template <class Body>
void share(Index total, Index part, Body body) {
#pragma omp for schedule(static)
    for (Index first = 0; first < total; first += part) body(first, std::min(part, total - first));
}

inline float hard(float value) { return std::min(std::max(value / 3 + 1, 0.f), 2.f); }
inline float through_hard(float gradient, float result) { return result <= 0 || result >= 2 ? 0 : gradient / 3; }

struct Sizes {
    Index images, pooled, squeezed, latent_dim, latent, out_channels, positions;
};

struct Branch {
    const float *squeeze, *gate, *to_phi, *to_scale;  // (S, C·D), (S, S), (L·L, S), (O, S)
};

struct Norms {
    const float *weight1, *bias1, *weight2, *bias2;  // (L,)
};

struct Coefficients {
    float *squeezed, *gates, *y, *channel_scale, *phi;  // (B, S), (B, S), (B, S), (B, O), (B, L, L)
};

struct Statistics {
    float *mean1, *var1, *mean2, *var2;  // (L,)
};

struct Fuse {
    float *mean1, *inv1, *inv2, *scale2, *first, *mixed;  // (L,) four times, (L⁺, L), (B, L⁺, L)
};

// Φ and Λ from descriptor (B, C·D). Matrices are transposed within: the lanes of a vector are images.
inline void coefficients(const Sizes& sizes, const float* descriptor, const Branch& branch, const Coefficients& found) {
    const auto [images, pooled, squeezed, latent_dim, latent, out_channels, positions] = sizes;
    const Index size = latent_dim * latent_dim;
    std::vector<float> input(pooled * images), hidden(squeezed * images), gated(squeezed * images);
    // rows of a matrix (rows, depth) by columns (depth, B): body(r, b, value)
    const auto each = [&](const float* matrix, Index depth, const float* columns, Index first, Index rows, auto body) {
        product<Float32>(plain(matrix + first * depth, depth), columns, images, rows, depth, images, nothing,
                         [&](Index r, Index b, __mmask16 mask, __m512 values) {
                             float lanes[LANES];
                             _mm512_storeu_ps(lanes, values);
                             for (Index i = 0; i < LANES && mask >> i & 1; i++) body(first + r, b + i, lanes[i]);
                         });
    };
#pragma omp parallel
    {
        share(images, 1, [&](Index b, Index) {
            for (Index c = 0; c < pooled; c++) input[c * images + b] = descriptor[b * pooled + c];
        });
        share(squeezed, 12, [&](Index first, Index rows) {
            each(branch.squeeze, pooled, input.data(), first, rows, [&](Index s, Index b, float value) {
                found.squeezed[b * squeezed + s] = hidden[s * images + b] = value;
            });
        });
        share(squeezed, 12, [&](Index first, Index rows) {
            each(branch.gate, squeezed, hidden.data(), first, rows, [&](Index s, Index b, float value) {
                const float gate = hard(value);
                found.gates[b * squeezed + s] = gate;
                found.y[b * squeezed + s] = gated[s * images + b] = hidden[s * images + b] * gate;
            });
        });
        share(size, 12, [&](Index first, Index rows) {
            each(branch.to_phi, squeezed, gated.data(), first, rows,
                 [&](Index i, Index b, float value) { found.phi[b * size + i] = value; });
        });
        share(out_channels, 12, [&](Index first, Index rows) {
            each(branch.to_scale, squeezed, gated.data(), first, rows,
                 [&](Index o, Index b, float value) { found.channel_scale[b * out_channels + o] = hard(value); });
        });
    }
}

// Equations 3 and 9 to 13: `fused` and `read_out` (B, L⁺, O), and the statistics, mean1 without the centre in `offset`.
inline void fuse(const Sizes& sizes, const float* phi, const float* moments, const float* offset, const Norms& norms,
                 const float* eps, const float* proj_out, const Fuse& saved, float* fused, float* read_out,
                 const Statistics& statistics) {
    const auto [images, pooled, squeezed, latent_dim, latent, out_channels, positions] = sizes;
    const Index L = latent_dim, size = latent * L;
    std::vector<float> scale1(L), shift(L), mean2(L), to_out(L * out_channels);
    std::vector<float> moments_mixed(images * size), squares(images * L);
    std::fill_n(saved.first, size, 0.f);
    for (Index l = 0; l < L; l++) {
        double mean = 0, square = 0;
        for (Index b = 0; b < images; b++) {
            mean += moments[(b * latent + L) * latent + l];
            square += moments[(b * latent + l) * latent + l];
        }
        mean /= images;
        const float var = std::max<double>(square / images - mean * mean, 0);
        saved.mean1[l] = mean;
        saved.inv1[l] = 1 / std::sqrt(var + eps[0]);
        scale1[l] = norms.weight1[l] * saved.inv1[l];
        shift[l] = norms.bias1[l] - saved.mean1[l] * scale1[l];
        saved.first[l * L + l] = scale1[l];
        saved.first[L * L + l] = shift[l];
        statistics.mean1[l] = saved.mean1[l] - offset[l];
        statistics.var1[l] = var;
    }
#pragma omp parallel
    {
        share(out_channels, 16, [&](Index first, Index rows) {
            for (Index o = first; o < first + rows; o++)
                for (Index l = 0; l < L; l++) to_out[l * out_channels + o] = proj_out[o * L + l];
        });
        share(images, 1, [&](Index b, Index) {
            float *mixed = saved.mixed + b * size, *here = &moments_mixed[b * size];
            transpose(phi + b * L * L, L, L, mixed);
            multiply(plain(shift.data(), L), mixed, L, mixed + L * L, L, 1, L, L);
            for (Index i = 0; i < L; i++)
                for (Index j = 0; j < L; j++) mixed[i * L + j] *= scale1[i];
            std::fill(mixed + (L + 1) * L, mixed + size, 0.f);
            multiply(plain(moments + b * latent * latent, latent), mixed, L, here, L, L + 1, L + 1, L);
        });
#pragma omp single
        for (Index l = 0; l < L; l++) {
            double mean = 0;
            for (Index b = 0; b < images; b++) mean += moments_mixed[b * size + L * L + l];
            mean2[l] = statistics.mean2[l] = mean / images;
        }
        share(images, 1, [&](Index b, Index) {  // of `mixed` with outputs of mean 0
            float *mixed = saved.mixed + b * size, *sums = &squares[b * L];
            for (Index l = 0; l < L; l++) mixed[L * L + l] -= mean2[l];
            std::fill_n(sums, L, 0.f);
            for (Index i = 0; i <= L; i++)
                for (Index l = 0; l < L; l++) {
                    const float product =
                        moments_mixed[b * size + i * L + l] - moments[(b * latent + i) * latent + L] * mean2[l];
                    sums[l] += product * mixed[i * L + l];
                }
        });
#pragma omp single
        for (Index l = 0; l < L; l++) {
            double sum = 0;
            for (Index b = 0; b < images; b++) sum += squares[b * L + l];
            statistics.var2[l] = std::max(sum / images, 0.);
            saved.inv2[l] = 1 / std::sqrt(statistics.var2[l] + eps[1]);
            saved.scale2[l] = norms.weight2[l] * saved.inv2[l];
        }
        share(images, 1, [&](Index b, Index) {
            float *here = fused + b * size, *out = read_out + b * latent * out_channels;
            for (Index i = 0; i < latent; i++)
                for (Index l = 0; l < L; l++)
                    here[i * L + l] = saved.first[i * L + l] + saved.scale2[l] * saved.mixed[b * size + i * L + l];
            for (Index l = 0; l < L; l++) here[L * L + l] += norms.bias2[l];
            multiply(plain(here, L), to_out.data(), out_channels, out, out_channels, L + 1, L, out_channels);
            std::fill(out + (L + 1) * out_channels, out + latent * out_channels, 0.f);
        });
    }
}

struct FuseGradients {
    float *d_phi, *q_to_d_q, *d_proj_out;              // (B, L, L), (B, L⁺, L⁺), (O, L)
    float *d_weight1, *d_bias1, *d_weight2, *d_bias2;  // (L,)
};

// Equations 5 and 15 to 21, from d_read_out (B, L⁺, O).
inline void fuse_backward(const Sizes& sizes, const float* d_read_out, const float* phi, const float* moments,
                          const float* fused, const Norms& norms, const float* proj_out, const Fuse& saved,
                          const FuseGradients& found) {
    const auto [images, pooled, squeezed, latent_dim, latent, out_channels, positions] = sizes;
    const Index L = latent_dim, size = latent * L;
    const float values = float(images) * positions;
    std::vector<float> d_fused(images * size), sums(images * 4 * L), share2(L), by_weight(L), away1(L), constant1(L);
    const auto [d_phi_out, q_to_d_q_out, d_proj_out, d_weight1, d_bias1, d_weight2, d_bias2] = found;
    const auto sum_of = [&](Index part, Index l) {
        double sum = 0;
        for (Index b = 0; b < images; b++) sum += sums[(b * 4 + part) * L + l];
        return float(sum);
    };
#pragma omp parallel
    {
        std::vector<float> away(size), d_mixed(size), turned(L * latent);
        share(images, 1, [&](Index b, Index) {
            float *here = &d_fused[b * size], *of_bias = &sums[b * 4 * L], *of_weight = of_bias + L;
            multiply(plain(d_read_out + b * latent * out_channels, out_channels), proj_out, L, here, L, L + 1,
                     out_channels, L);
            std::copy_n(here + L * L, L, of_bias);
            std::fill_n(of_weight, L, 0.f);
            for (Index i = 0; i <= L; i++)
                for (Index l = 0; l < L; l++) of_weight[l] += here[i * L + l] * saved.mixed[b * size + i * L + l];
        });
#pragma omp single
        for (Index l = 0; l < L; l++) {
            d_bias2[l] = sum_of(0, l);
            d_weight2[l] = sum_of(1, l) * saved.inv2[l];
            share2[l] = -saved.scale2[l] / values;
            by_weight[l] = share2[l] * saved.inv2[l] * d_weight2[l];
        }
        share(images, 1, [&](Index b, Index) {
            const float *mixed = saved.mixed + b * size, *phi_here = phi + b * L * L, *d_here = &d_fused[b * size];
            float *q_to_d_q = q_to_d_q_out + b * latent * latent, *d_phi = d_phi_out + b * L * L;
            float *of_row = &sums[(b * 4 + 2) * L], *of_diagonal = of_row + L;
            for (Index i = 0; i <= L; i++)
                for (Index l = 0; l < L; l++) {
                    away[i * L + l] = mixed[i * L + l] * by_weight[l] + (i == L ? share2[l] * d_bias2[l] : 0);
                    d_mixed[i * L + l] = d_here[i * L + l] * saved.scale2[l] / positions;
                }
            multiply(plain(moments + b * latent * latent, latent), away.data(), L, d_mixed.data(), L, L + 1, L + 1, L,
                     true);
            for (Index i = 0; i < (L + 1) * L; i++) d_mixed[i] *= positions;
            // d_mixedᵀ first, where first is a diagonal and row L
            for (Index j = 0; j < L; j++)
                for (Index i = 0; i < L; i++)
                    d_phi[j * L + i] =
                        d_mixed[i * L + j] * saved.first[i * L + i] + d_mixed[L * L + j] * saved.first[L * L + i];
            // of d_first row L and the diagonal alone are wanted
            multiply(plain(&d_mixed[L * L], L), phi_here, L, of_row, L, 1, L, L);
            for (Index i = 0; i < L; i++) {
                float sum = d_here[i * L + i];
                for (Index j = 0; j < L; j++) sum += d_mixed[i * L + j] * phi_here[j * L + i];
                of_diagonal[i] = sum;
                of_row[i] += d_here[L * L + i];
            }
            std::fill_n(q_to_d_q, latent * latent, 0.f);
            transpose(mixed, L, L, turned.data());
            multiply(plain(away.data(), L), turned.data(), L, q_to_d_q, latent, L + 1, L, L);
        });
#pragma omp single
        for (Index l = 0; l < L; l++) {
            d_bias1[l] = sum_of(2, l);
            d_weight1[l] = (sum_of(3, l) - saved.mean1[l] * d_bias1[l]) * saved.inv1[l];
            const float share1 = -norms.weight1[l] * saved.inv1[l] / values;
            away1[l] = share1 * saved.inv1[l] * d_weight1[l];
            constant1[l] = share1 * d_bias1[l] - away1[l] * saved.mean1[l];
        }
        share(images, 1, [&](Index b, Index) {
            float* q_to_d_q = q_to_d_q_out + b * latent * latent;
            for (Index l = 0; l < L; l++) {
                q_to_d_q[l * latent + l] += away1[l];
                q_to_d_q[L * latent + l] += constant1[l];
            }
        });
        share(out_channels, 24, [&](Index first, Index rows) {
            for (Index b = 0; b < images; b++)
                multiply(transposed(d_read_out + b * latent * out_channels + first, out_channels), fused + b * size, L,
                         d_proj_out + first * L, L, rows, L + 1, L, b > 0);
        });
    }
}

struct BranchGradients {
    float *d_descriptor, *d_squeeze, *d_gate, *d_to_phi, *d_to_scale;
};

// From d_phi (B, L, L) and d_scale (B, O).
inline void coefficients_backward(const Sizes& sizes, const float* descriptor, const Branch& branch,
                                  const Coefficients& saved, const float* d_phi, const float* d_scale,
                                  const BranchGradients& found) {
    const auto [images, pooled, squeezed, latent_dim, latent, out_channels, positions] = sizes;
    const Index size = latent_dim * latent_dim, S = squeezed;
    std::vector<float> d_y(images * S), d_gates(images * S), d_squeezed(images * S), d_before(images * out_channels);
#pragma omp parallel
    {
        share(images, 4, [&](Index first, Index rows) {
            for (Index i = first * out_channels; i < (first + rows) * out_channels; i++)
                d_before[i] = through_hard(d_scale[i], saved.channel_scale[i]);
            multiply(plain(d_phi + first * size, size), branch.to_phi, S, &d_y[first * S], S, rows, size, S);
            multiply(plain(&d_before[first * out_channels], out_channels), branch.to_scale, S, &d_y[first * S], S, rows,
                     out_channels, S, true);
            for (Index i = first * S; i < (first + rows) * S; i++) {
                d_gates[i] = through_hard(d_y[i] * saved.squeezed[i], saved.gates[i]);
                d_squeezed[i] = d_y[i] * saved.gates[i];
            }
            multiply(plain(&d_gates[first * S], S), branch.gate, S, &d_squeezed[first * S], S, rows, S, S, true);
            multiply(plain(&d_squeezed[first * S], S), branch.squeeze, pooled, found.d_descriptor + first * pooled,
                     pooled, rows, S, pooled);
        });
        const auto outer = [&](const float* left, Index width, const float* right, Index columns, float* to) {
            share(width, 24, [&](Index first, Index rows) {
                multiply(transposed(left + first, width), right, columns, to + first * columns, columns, rows, images,
                         columns);
            });
        };
        outer(d_squeezed.data(), S, descriptor, pooled, found.d_squeeze);
        outer(d_gates.data(), S, saved.squeezed, S, found.d_gate);
        outer(d_phi, size, saved.y, S, found.d_to_phi);
        outer(d_before.data(), out_channels, saved.y, S, found.d_to_scale);
    }
}

// Equation 25: kernels (B, O, C), of the elements of T, and unless offset is null the bias (B, O).
template <class T>
void form_kernels(const Sizes& sizes, Index channels, const float* channel_scale, const float* static_weight,
                  const float* read_out, const float* proj_in, const float* offset, typename T::Element* kernels,
                  float* bias) {
    const Index L = sizes.latent_dim, out_channels = sizes.out_channels;
#pragma omp parallel for schedule(static)
    for (Index b = 0; b < sizes.images; b++) {
        const float *by = read_out + b * sizes.latent * out_channels, *scale = channel_scale + b * out_channels;
        auto* to = kernels + b * out_channels * channels;
        product<Float32>(
            transposed(by, out_channels), proj_in, channels, out_channels, L, channels,
            [&](Index o, Index c, __mmask16 mask) {
                return load(static_weight + o * channels + c, mask) * _mm512_set1_ps(scale[o]);
            },
            [&](Index o, Index c, __mmask16 mask, __m512 values) { T::store(to + o * channels + c, mask, values); });
        if (offset)
            multiply(plain(offset, L + 1), by, out_channels, bias + b * out_channels, out_channels, 1, L + 1,
                     out_channels);
    }
}

// Equation 28: d_scale (B, O) and d_static (O, C) from d_kernels (B, O, C).
template <class T>
void form_kernels_backward(Index images, Index out_channels, Index channels, const typename T::Element* d_kernels,
                           const float* channel_scale, const float* static_weight, float* d_scale, float* d_static) {
#pragma omp parallel for schedule(static)
    for (Index o = 0; o < out_channels; o++) {
        const float* weight = static_weight + o * channels;
        float* to = d_static + o * channels;
        std::fill_n(to, channels, 0.f);
        for (Index b = 0; b < images; b++) {
            const auto* gradient = d_kernels + (b * out_channels + o) * channels;
            const __m512 scale = _mm512_set1_ps(channel_scale[b * out_channels + o]);
            __m512 sum = _mm512_setzero_ps();
            for (Index c = 0; c < channels; c += LANES) {
                const __mmask16 mask = mask_of(channels - c);
                const __m512 values = T::load(gradient + c, mask);
                sum = _mm512_fmadd_ps(values, load(weight + c, mask), sum);
                store(to + c, mask, _mm512_fmadd_ps(values, scale, load(to + c, mask)));
            }
            d_scale[b * out_channels + o] = _mm512_reduce_add_ps(sum);
        }
    }
}

}  // namespace dcd
