// The Huffman codes of a JPEG, read faster than libjpeg does.
//
// libjpeg spends six tenths of the time for a box on reading codes: it looks up a code, then takes the bits of its
// value. Here one look-up gives both where they fit into it, and the stuffing is removed from the bytes beforehand.
// libjpeg does everything else: it gets these blocks in place of its own. Only the common form is read here (one scan,
// not progressive, 8 bits). Anything irregular is left to libjpeg, whose verdict counts.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include <jpeglib.h>

using std::uint8_t;

// libjpeg's entropy decoder, which no installed header declares. It has begun like this in all versions since 1998.
struct jpeg_entropy_decoder {
    void (*start_pass)(j_decompress_ptr);
    boolean (*decode_mcu)(j_decompress_ptr, JBLOCKROW *);
};

static inline uint64_t load64(const uint8_t *p) {
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

class Huffman {
   public:
    // Whether the scan that starts at `next`, `left` bytes from the end, is of the common form. Decompression has
    // started, so libjpeg has accepted the headers.
    bool begin(const jpeg_decompress_struct &info, const uint8_t *next, size_t left) {
        if (info.progressive_mode || info.arith_code || info.data_precision != 8 ||
            info.comps_in_scan != info.num_components)
            return false;
        for (int component = 0; component < info.comps_in_scan; component++) {
            const int dc = info.cur_comp_info[component]->dc_tbl_no, ac = info.cur_comp_info[component]->ac_tbl_no;
            tables_[0][dc].set(*info.dc_huff_tbl_ptrs[dc], true);
            tables_[1][ac].set(*info.ac_huff_tbl_ptrs[ac], false);
            for (int block = 0; block < info.blocks_in_MCU; block++)
                if (info.MCU_membership[block] == component)
                    dc_[block] = &tables_[0][dc], ac_[block] = &tables_[1][ac];
        }
        next_ = next, end_ = next + left;
        units_ = uint64_t(info.MCUs_per_row) * info.MCU_rows_in_scan;
        interval_ = info.restart_interval ? info.restart_interval : units_;
        restarts_ = 0;
        begin_interval();
        return true;
    }

    // Reads the blocks of the next unit into `blocks`, which hold zeros; skips them where `blocks` is null. False if the
    // unit is irregular.
    bool read(const jpeg_decompress_struct &info, JBLOCKROW *blocks) {
        return blocks ? read_unit<true>(info, blocks) : read_unit<false>(info, blocks);
    }

    // Whether all units have been read, and the end of the image follows.
    bool is_at_end() const { return !units_ && marker_ == JPEG_EOI && is_used_up(); }

    // Whether the scan is whole, by reading all that is left of it.
    bool is_whole(const jpeg_decompress_struct &info) {
        while (units_)
            if (!read_unit<false>(info, nullptr)) return false;
        return is_at_end();
    }

   private:
    static const int BITS = 11;             // bits in one look-up
    static const int SKIPPED = 13;          // the same, where codes are skipped
    static const int END = 127;             // a run that leads out of the block, and farther than any two runs
    static const size_t PADDING = 1 << 13;  // a unit has at most 10 blocks of 64 codes of 31 bits

    struct Code {
        int16_t value;
        uint8_t run;   // zeros before the value; END where no value follows in the block
        uint8_t bits;  // of code and value; 0 where this entry has no meaning
    };

    struct Table {
        Code codes[1 << BITS];        // by the next bits, where these hold code and value
        uint16_t symbols[1 << BITS];  // length << 8 | symbol, where the next bits hold the code; 0 where it is longer
        uint16_t moves[1 << SKIPPED];  // steps in the block << 8 | bits: of two codes with values, or one
        int first[17], start[17];     // by length: the first code and its number
        bool is_dc;
        JHUFF_TBL table = {};

        void set(const JHUFF_TBL &wanted, bool dc) {
            if (!memcmp(table.bits, wanted.bits, sizeof table.bits) &&
                !memcmp(table.huffval, wanted.huffval, sizeof table.huffval))
                return;  // most files have the same table
            table = wanted, is_dc = dc;
            memset(symbols, 0, sizeof symbols);
            int code = 0, at = 0;
            for (int length = 1; length <= 16; length++, code *= 2) {
                first[length] = code, start[length] = at;
                for (int i = 0; i < table.bits[length]; i++, code++, at++)
                    if (length <= BITS)
                        std::fill_n(symbols + (size_t(code) << (BITS - length)), size_t(1) << (BITS - length),
                                    length << 8 | table.huffval[at]);
            }
            for (uint64_t i = 0; i < 1 << BITS; i++) {
                const Code code = make(symbols[i], i << (64 - BITS));
                codes[i] = code.bits <= BITS ? code : Code{0, 0, 0};
            }
            for (uint64_t i = 0; !is_dc && i < 1 << SKIPPED; i++) {
                Code one = codes[i >> (SKIPPED - BITS)];
                if (!one.bits) one = find(i << (64 - SKIPPED));
                const Code two = codes[((i << one.bits) & ((1 << SKIPPED) - 1)) >> (SKIPPED - BITS)];
                const bool both = one.run != END && two.bits && one.bits + two.bits <= SKIPPED;
                moves[i] = one.bits && one.bits <= SKIPPED ? (one.run + 1) << 8 | one.bits : 0;
                if (moves[i] && both) moves[i] += (two.run + 1) << 8 | two.bits;
            }
        }

        // The code and value at the top of `bits`.
        Code find(uint64_t bits) const {
            uint16_t symbol = symbols[bits >> (64 - BITS)];
            for (int length = BITS + 1; !symbol && length <= 16; length++) {
                const int i = int(bits >> (64 - length)) - first[length];
                if (i >= 0 && i < table.bits[length]) symbol = length << 8 | table.huffval[start[length] + i];
            }
            return make(symbol, bits);
        }

        Code make(uint16_t symbol, uint64_t bits) const {
            if (!symbol) return {0, 0, 0};
            const int length = symbol >> 8, run = is_dc ? 0 : (symbol >> 4) & 15, size = symbol & 15;
            if (!size) return {0, uint8_t(is_dc || run == 15 ? run : END), uint8_t(length)};
            const int value = int((bits << length) >> (64 - size)), least = 1 << (size - 1);  // Figure F.12 of T.81
            return {int16_t(value < least ? value - 2 * least + 1 : value), uint8_t(run), uint8_t(length + size)};
        }
    };

    // Reads codes from `next` on.
    struct Reader {
        const uint8_t *next;
        uint64_t bits;  // the upper `valid` bits are the next ones of the file
        int valid;

        void refill(int needed) {
            if (valid >= needed) return;
            bits |= __builtin_bswap64(load64(next)) >> valid;
            next += (63 - valid) >> 3, valid |= 56;
        }
        void take(int count) { bits <<= count, valid -= count; }

        Code read(const Table &table) {
            refill(BITS);
            Code code = table.codes[bits >> (64 - BITS)];
            if (__builtin_expect(!code.bits, 0)) {
                refill(31);  // the longest code, and its value
                code = table.find(bits);
            }
            take(code.bits);
            return code;
        }

        bool read_block(const Table &table, JCOEF *block) {
            for (int place = 1; place < 64; place++) {
                const Code code = read(table);
                place += code.run;
                if (place > 63 || !code.bits) return code.run == END;
                block[ZIGZAG[place]] = code.value;
            }
            return true;
        }

        // The same, up to two codes in one look-up.
        bool skip_block(const Table &table) {
            for (int place = 1; place < 64;) {
                refill(SKIPPED);
                const int moves = table.moves[bits >> (64 - SKIPPED)], to = place + (moves >> 8);
                if (moves && (to <= 64 || (to > END && to <= END + 64))) {
                    place = to;
                    take(moves & 255);
                    continue;
                }
                const Code code = read(table);  // a longer code, or one of the next block is behind it
                place += code.run + 1;
                if (place > 64 || !code.bits) return code.run == END;
            }
            return true;
        }
    };

    Table tables_[2][NUM_HUFF_TBLS];
    const Table *dc_[D_MAX_BLOCKS_IN_MCU], *ac_[D_MAX_BLOCKS_IN_MCU];
    const uint8_t *next_, *end_;  // of the file
    uint64_t units_, interval_, left_, restarts_;  // units that are left in the scan and in the interval
    int marker_;                                   // behind the interval
    uint32_t last_dc_[MAX_COMPS_IN_SCAN];
    std::vector<uint8_t> bytes_;  // of the interval, without their stuffing
    size_t size_ = 0;
    Reader in_;                   // of `bytes_`

    uint64_t used() const { return uint64_t(in_.next - bytes_.data()) * 8 - in_.valid; }  // bits of the interval
    bool is_used_up() const { return used() <= size_ * 8 && size_ * 8 - used() < 8; }

    void begin_interval() {
        marker_ = unstuff();
        left_ = std::min(interval_, units_);
        in_ = {bytes_.data(), 0, 0};
        memset(last_dc_, 0, sizeof last_dc_);
    }

    // Copies the bytes up to the next marker without their stuffing into `bytes_`; moves `next_` behind the marker and
    // returns it, or 0 where there is none.
    int unstuff() {
        if (bytes_.size() < size_t(end_ - next_) + PADDING) bytes_.resize(end_ - next_ + PADDING);
        uint8_t *to = bytes_.data();
        int marker = 0;
        while (next_ < end_) {
            const uint8_t *found = static_cast<const uint8_t *>(memchr(next_, 0xFF, end_ - next_));
            const uint8_t *stop = found ? found : end_;
            memcpy(to, next_, stop - next_);
            to += stop - next_, next_ = stop;
            if (end_ - next_ < 2) break;
            if (next_[1] == 0) *to++ = 0xFF;
            next_ += 2;
            if (next_[-1] != 0) {
                for (marker = next_[-1]; marker == 0xFF && next_ < end_;) marker = *next_++;  // FFs may precede it
                break;
            }
        }
        size_ = to - bytes_.data();
        memset(to, 0, PADDING);
        return marker;
    }

    template <bool store>
    bool read_unit(const jpeg_decompress_struct &info, JBLOCKROW *blocks) {
        if (!left_) {
            if (marker_ != JPEG_RST0 + int(restarts_++ % 8) || !is_used_up()) return false;
            begin_interval();
        }
        Reader in = in_;
        for (int block = 0; block < info.blocks_in_MCU; block++) {
            const Code dc = in.read(*dc_[block]);
            if (!dc.bits) return false;
            uint32_t &last = last_dc_[info.MCU_membership[block]];
            last += dc.value;
            if (store) (*blocks[block])[0] = JCOEF(last);
            if (!(store ? in.read_block(*ac_[block], *blocks[block]) : in.skip_block(*ac_[block]))) return false;
        }
        in_ = in;
        left_--, units_--;
        return used() <= size_ * 8;
    }

    static constexpr uint8_t ZIGZAG[64] = {  // the place of each value in a block, Figure A.6 of T.81
        0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
        41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
        30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};
};
