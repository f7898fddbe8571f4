// Is a JPEG whole? What its bytes tell without being decoded.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include <jpeglib.h>

using std::uint8_t;

static inline uint64_t load64(const uint8_t *p) {
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

static const int SECTOR = 512;  // bytes that a disk loses at once, and a file system then reads as zeros

// Whether a sector of zeros lies in an image whose scans begin at `scan`; behind the image it means nothing.
static inline bool holds_zeroed_sector(const uint8_t *scan, const uint8_t *end) {
    for (const uint8_t *probe = scan + SECTOR - 1; probe < end; probe += SECTOR) {  // one of these lies in it
        if (*probe) continue;
        const uint8_t *first = probe, *last = probe;
        while (first > scan && !first[-1]) first--;
        while (last < end && !*last) last++;
        if (last - first >= SECTOR) {
            const uint8_t end_of_image[] = {0xFF, JPEG_EOI};
            return std::search(scan, first, end_of_image, end_of_image + 2) == first;
        }
    }
    return false;
}

// Whether a row of zeros stands for coefficients, block after block, as no image has them; where it stands for empty
// blocks it may be a plain area. Decompression has started.
static inline bool zeros_are_coefficients(const jpeg_decompress_struct &info) {
    if (info.progressive_mode || info.arith_code || info.comps_in_scan != info.num_components) return false;
    for (int component = 0; component < info.comps_in_scan; component++)
        if (info.ac_huff_tbl_ptrs[info.cur_comp_info[component]->ac_tbl_no]->huffval[0]) return true;
    return false;
}

// Walks through the codes without decoding what they say: twice as fast as libjpeg, which looks up 8 bits at a time
// and keeps what it finds. It knows the common form alone (one scan, not progressive, 8 bits) and says only that
// a file is whole; of every other file libjpeg has to say what it is.
class Scan {
   public:
    // Whether the scan that starts at `next`, `left` bytes from the end, holds every block and is followed by the end
    // of the image. Decompression has started, so libjpeg has accepted the headers.
    bool is_whole(const jpeg_decompress_struct &info, const uint8_t *next, size_t left) {
        if (info.progressive_mode || info.arith_code || info.data_precision != 8 ||
            info.comps_in_scan != info.num_components)
            return false;
        const Codes *dc[D_MAX_BLOCKS_IN_MCU], *ac[D_MAX_BLOCKS_IN_MCU];
        for (int component = 0; component < info.comps_in_scan; component++) {
            const int dc_table = info.cur_comp_info[component]->dc_tbl_no;
            const int ac_table = info.cur_comp_info[component]->ac_tbl_no;
            codes_[0][dc_table].set(*info.dc_huff_tbl_ptrs[dc_table], true);
            codes_[1][ac_table].set(*info.ac_huff_tbl_ptrs[ac_table], false);
            for (int block = 0; block < info.blocks_in_MCU; block++)
                if (info.MCU_membership[block] == component)
                    dc[block] = &codes_[0][dc_table], ac[block] = &codes_[1][ac_table];
        }
        const uint8_t *const end = next + left;
        const uint64_t units = uint64_t(info.MCUs_per_row) * info.MCU_rows_in_scan;
        const uint64_t interval = info.restart_interval ? info.restart_interval : units;
        for (uint64_t done = 0, restarts = 0; done < units; restarts++) {
            const int marker = unstuff(next, end);
            const uint64_t count = std::min(interval, units - done);
            if (!walk(dc, ac, info.blocks_in_MCU, count)) return false;
            done += count;
            if (marker != (done < units ? JPEG_RST0 + int(restarts % 8) : int(JPEG_EOI))) return false;
        }
        return true;
    }

   private:
    static const int BITS = 12;             // that are looked up at once
    static const int END = 128;             // moves behind the end of the block
    static const size_t PADDING = 1 << 13;  // a unit has at most 10 blocks of 64 codes of 31 bits

    // What the next bits stand for: moves in the block << 8 | bits of codes and values; 0 where a code is longer than
    // BITS, or there is none.
    struct Codes {
        uint16_t one[1 << BITS];  // the first code
        uint16_t two[1 << BITS];  // and the second, where its code is in the same BITS
        uint16_t long_[256];      // the codes of more bits, by their number
        int first[17], start[17];  // by length: the first code and its number
        JHUFF_TBL table = {};

        void set(const JHUFF_TBL &wanted, bool is_dc) {
            if (!memcmp(table.bits, wanted.bits, sizeof table.bits) &&
                !memcmp(table.huffval, wanted.huffval, sizeof table.huffval))
                return;  // most files have the same
            table = wanted;
            memset(one, 0, sizeof one);
            uint8_t lengths[1 << BITS] = {};
            int code = 0, at = 0;
            for (int length = 1; length <= 16; length++, code *= 2) {
                first[length] = code, start[length] = at;
                for (int i = 0; i < table.bits[length]; i++, code++, at++) {
                    const int size = table.huffval[at] & 15, run = table.huffval[at] >> 4;
                    const int move = is_dc || size ? run + 1 : run == 15 ? 16 : END;
                    long_[at] = move << 8 | (length + size);
                    if (length > BITS) continue;
                    const int from = code << (BITS - length), count = 1 << (BITS - length);
                    std::fill(one + from, one + from + count, long_[at]);
                    std::fill(lengths + from, lengths + from + count, length);
                }
            }
            for (int i = 0; i < 1 << BITS; i++) {
                const int bits = one[i] & 63, rest = (uint32_t(i) << bits) & ((1 << BITS) - 1);
                const bool fits = one[i] && one[i] >> 8 != END && bits < BITS && one[rest] && bits + lengths[rest] <= BITS;
                two[i] = fits ? one[i] + one[rest] : one[i];
            }
        }
        int find_long(uint64_t bits) const {
            for (int length = BITS + 1; length <= 16; length++) {
                const int i = int(bits >> (64 - length)) - first[length];
                if (i >= 0 && i < table.bits[length]) return long_[start[length] + i];
            }
            return 0;
        }
    };

    Codes codes_[2][NUM_HUFF_TBLS];
    std::vector<uint8_t> bytes_;
    size_t size_ = 0;

    // Copies the bytes up to the next marker without their stuffing into `bytes_`; moves `next` behind the marker and
    // returns it, or 0 where there is none.
    int unstuff(const uint8_t *&next, const uint8_t *end) {
        if (bytes_.size() < size_t(end - next) + PADDING) bytes_.resize(end - next + PADDING);
        uint8_t *to = bytes_.data();
        int marker = 0;
        while (next < end) {
            const uint8_t *found = static_cast<const uint8_t *>(memchr(next, 0xFF, end - next));
            const uint8_t *stop = found ? found : end;
            memcpy(to, next, stop - next);
            to += stop - next, next = stop;
            if (end - next < 2) break;
            if (next[1] == 0) *to++ = 0xFF;
            next += 2;
            if (next[-1] != 0) {
                for (marker = next[-1]; marker == 0xFF && next < end;) marker = *next++;  // any number of FF may lead
                break;
            }
        }
        size_ = to - bytes_.data();
        memset(to, 0, PADDING);
        return marker;
    }

    // Whether `bytes_` holds `count` units of `blocks` blocks each, and no more.
    bool walk(const Codes *const *dc, const Codes *const *ac, int blocks, uint64_t count) const {
        const uint8_t *next = bytes_.data(), *const end = next + size_;
        uint64_t bits = 0;  // `valid` of them, at the top, are read
        int valid = 0;
        auto read = [&](const Codes &codes, const uint16_t *entries) {
            bits |= __builtin_bswap64(load64(next)) >> valid;
            next += (63 - valid) >> 3, valid |= 56;
            int entry = entries[bits >> (64 - BITS)];
            if (__builtin_expect(!entry, 0)) entry = codes.find_long(bits);
            bits <<= entry & 63, valid -= entry & 63;
            return entry;
        };
        for (uint64_t unit = 0; unit < count; unit++) {
            if (next > end + 8) return false;
            for (int block = 0; block < blocks; block++) {
                if (!read(*dc[block], dc[block]->one)) return false;
                const Codes &codes = *ac[block];
                int place = 1;
                while (place < 64) {
                    const uint8_t *const next_before = next;
                    const uint64_t bits_before = bits;
                    const int valid_before = valid, place_before = place;
                    int entry = read(codes, codes.two);
                    place += entry >> 8;
                    if (place <= 64 || (place >= END && place < END + 64)) {
                        if (!entry) return false;
                        continue;
                    }
                    // The first code has ended the block, and the second is none of its.
                    next = next_before, bits = bits_before, valid = valid_before;
                    entry = read(codes, codes.one);
                    place = place_before + (entry >> 8);
                    if (place != 64) return false;
                }
            }
        }
        const uint64_t used = uint64_t(next - bytes_.data()) * 8 - valid;
        return used <= size_ * 8 && size_ * 8 - used < 8;  // more is left over: libjpeg has to say what it means
    }
};
