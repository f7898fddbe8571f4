// Products by AVX-512, in tiles that stay in registers, and how the elements of maps are loaded, stored and multiplied.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace dcd {

using Index = std::int64_t;
constexpr Index LANES = 16;  // numbers of float32 in a vector

// The lanes that the first `columns` columns take; any count, negative ones too.
inline __mmask16 mask_of(Index columns) { return columns >= LANES ? 0xffff : columns <= 0 ? 0 : (1u << columns) - 1; }

constexpr Index round_up(Index count, Index unit) { return (count + unit - 1) / unit * unit; }

inline __m512 load(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
inline void store(float* to, __mmask16 mask, __m512 values) { _mm512_mask_storeu_ps(to, mask, values); }

// Elements of maps. A product takes DEPTH elements of a row at once: a factor has DEPTH consecutive elements for each
// column of a vector. `load_columns` makes factors of 32 columns of DEPTH rows, `sort_columns` puts their sums in
// order.
struct Float32 {
    using Element = float;
    using Factors = __m512;
    static constexpr Index DEPTH = 1;
    static __m512 load(const Element* from, __mmask16 mask) { return dcd::load(from, mask); }
    static void store(Element* to, __mmask16 mask, __m512 values) { dcd::store(to, mask, values); }
    static __m512 rounded(__m512 values) { return values; }
    static Factors load_factors(const Element* from, __mmask16 mask) { return dcd::load(from, mask); }
    static void store_factors(Element* to, __m512 row, __m512) { _mm512_storeu_ps(to, row); }
    static Factors broadcast(const Element* from) { return _mm512_set1_ps(*from); }
    static __m512 multiply_add(__m512 sum, Factors left, Factors right) { return _mm512_fmadd_ps(left, right, sum); }
    static void load_columns(const Element* row, const Element*, Index columns, Factors found[2]) {
        for (int v = 0; v < 2; v++) found[v] = load(row + v * LANES, mask_of(columns - v * LANES));
    }
    static void sort_columns(__m512[2]) {}
    static void pair(const Element* row, const Element*, Index count, Element* to) { std::copy_n(row, count, to); }
};

struct BFloat16 {
    using Element = std::uint16_t;
    using Factors = __m512bh;
    static constexpr Index DEPTH = 2;
    static __m512 load(const Element* from, __mmask16 mask) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
    }
    static void store(Element* to, __mmask16 mask, __m512 values) {
        _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(values));
    }
    static __m512 rounded(__m512 values) {
        const __m512i bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
        return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    }
    static Factors load_factors(const Element* from, __mmask16 mask) {
        return (Factors)_mm512_maskz_loadu_epi32(mask, from);
    }
    static void store_factors(Element* to, __m512 row, __m512 next) {
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(row));
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(next));
        _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    static Factors broadcast(const Element* from) {
        std::int32_t both;
        std::memcpy(&both, from, sizeof both);
        return (Factors)_mm512_set1_epi32(both);
    }
    static __m512 multiply_add(__m512 sum, Factors left, Factors right) { return _mm512_dpbf16_ps(sum, left, right); }
    // Rows are interleaved within each 128 bits, which leaves the columns out of order.
    static void load_columns(const Element* row, const Element* next, Index columns, Factors found[2]) {
        const __mmask32 mask = columns >= 32 ? ~0u : (1u << columns) - 1;
        const __m512i first = _mm512_maskz_loadu_epi16(mask, row), second = _mm512_maskz_loadu_epi16(mask, next);
        found[0] = (Factors)_mm512_unpacklo_epi16(first, second);
        found[1] = (Factors)_mm512_unpackhi_epi16(first, second);
    }
    static void sort_columns(__m512 sums[2]) {
        const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        const __m512 sorted = _mm512_permutex2var_ps(sums[0], low, sums[1]);
        sums[1] = _mm512_permutex2var_ps(sums[0], high, sums[1]);
        sums[0] = sorted;
    }
    // Two rows as factors of single columns; count is a multiple of 8.
    static void pair(const Element* row, const Element* next, Index count, Element* to) {
        for (Index i = 0; i < count; i += 8) {
            const __m128i first = _mm_loadu_si128((const __m128i*)(row + i));
            const __m128i second = _mm_loadu_si128((const __m128i*)(next + i));
            _mm_storeu_si128((__m128i*)(to + 2 * i), _mm_unpacklo_epi16(first, second));
            _mm_storeu_si128((__m128i*)(to + 2 * i + 8), _mm_unpackhi_epi16(first, second));
        }
    }
};

// The left matrix of a product: element (r, k) is data[r * row + k * column]; for bf16 column is 1.
template <class T>
struct Left {
    const typename T::Element* data;
    Index row, column;
};

template <class T, int ROWS, int VECTORS, class Init, class Store>
void product_tile(Left<T> left, const typename T::Element* factor, Index width, Index depth, Index columns,
                  Index first_row, Index first_column, Init init, Store finish) {
    constexpr int TILES = ROWS * VECTORS;
    const __mmask16 last = mask_of(columns - (VECTORS - 1) * LANES);  // all other vectors are whole
    const auto mask = [&](int i) { return i % VECTORS == VECTORS - 1 ? last : __mmask16(0xffff); };
    // The rows by threes: an address is one of few pointers and 0, 1 or 2 times the width of a row.
    const typename T::Element* from[(ROWS + 2) / 3];
    for (int i = 0; i < (ROWS + 2) / 3; i++) from[i] = left.data + (first_row + 3 * i) * left.row;
    const Index step = left.column * T::DEPTH;
    __m512 sums[TILES];
    // One loop, not two nested ones: only such a one is unrolled in time for the sums to stay in registers.
#pragma GCC unroll 24
    for (int i = 0; i < TILES; i++)
        sums[i] = init(first_row + i / VECTORS, first_column + i % VECTORS * LANES, mask(i));
    for (Index k = 0; k < depth; k += T::DEPTH, factor += width * T::DEPTH) {
        typename T::Factors columns[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) columns[v] = T::load_factors(factor + v * LANES * T::DEPTH, mask(v));
#pragma GCC unroll 24
        for (int i = 0; i < TILES; i++)
            sums[i] = T::multiply_add(sums[i], T::broadcast(from[i / VECTORS / 3] + i / VECTORS % 3 * left.row),
                                      columns[i % VECTORS]);
#pragma GCC unroll 4
        for (int i = 0; i < (ROWS + 2) / 3; i++) from[i] += step;
    }
#pragma GCC unroll 24
    for (int i = 0; i < TILES; i++)
        finish(first_row + i / VECTORS, first_column + i % VECTORS * LANES, mask(i), sums[i]);
}

template <class T, int ROWS, class Init, class Store>
void product_row(Left<T> left, const typename T::Element* factor, Index width, Index depth, Index columns,
                 Index first_row, Init init, Store finish) {
    for (Index c = 0; c < columns; c += 4 * LANES) {
        const Index here = std::min(4 * LANES, columns - c);
        const auto* from = factor + c * T::DEPTH;
        switch (round_up(here, LANES) / LANES) {
            case 1:
                product_tile<T, ROWS, 1>(left, from, width, depth, here, first_row, c, init, finish);
                break;
            case 2:
                product_tile<T, ROWS, 2>(left, from, width, depth, here, first_row, c, init, finish);
                break;
            case 3:
                product_tile<T, ROWS, 3>(left, from, width, depth, here, first_row, c, init, finish);
                break;
            default:
                product_tile<T, ROWS, 4>(left, from, width, depth, here, first_row, c, init, finish);
        }
    }
}

// init(r, c, mask) + left (rows, depth) times factor (depth, columns), given to finish(r, c, mask, values) by vectors
// of columns from c on. The rows of factor, DEPTH at a time, are `width` columns apart.
template <class T, class Init, class Store>
void product(Left<T> left, const typename T::Element* factor, Index width, Index rows, Index depth, Index columns,
             Init init, Store finish) {
    Index r = 0;
    if (columns <= LANES)
        for (; r + 12 <= rows; r += 12) product_tile<T, 12, 1>(left, factor, width, depth, columns, r, 0, init, finish);
    else if (columns <= 2 * LANES)
        for (; r + 12 <= rows; r += 12) product_tile<T, 12, 2>(left, factor, width, depth, columns, r, 0, init, finish);
    for (; r + 6 <= rows; r += 6) product_row<T, 6>(left, factor, width, depth, columns, r, init, finish);
    for (; r + 3 <= rows; r += 3) product_row<T, 3>(left, factor, width, depth, columns, r, init, finish);
    for (; r < rows; r++) product_row<T, 1>(left, factor, width, depth, columns, r, init, finish);
}

constexpr auto nothing = [](Index, Index, __mmask16) { return _mm512_setzero_ps(); };

// A matrix (K, columns), element (k, c) at matrix[k * row + c * column], as the factor of a product of T: (K / DEPTH,
// columns up to whole vectors, DEPTH).
template <class T>
std::vector<typename T::Element> pack(const float* matrix, Index row, Index column, Index depth, Index columns) {
    const Index width = round_up(columns, LANES);
    std::vector<typename T::Element> packed(depth * width);
    const __m512i apart = _mm512_mullo_epi32(_mm512_set1_epi32(column),
                                             _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (Index c = 0; c < columns; c += LANES) {
        const __mmask16 mask = mask_of(columns - c);
        const auto read = [&](Index k) {
            const float* from = matrix + k * row + c * column;
            return column == 1 ? load(from, mask) : _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, apart, from, 4);
        };
        for (Index k = 0; k < depth; k += T::DEPTH)
            T::store_factors(&packed[k * width + c * T::DEPTH], read(k),
                             k + 1 < depth ? read(k + 1) : _mm512_setzero_ps());
    }
    return packed;
}

}  // namespace dcd
