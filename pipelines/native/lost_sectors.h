// Finds sectors that a disk has lost. They read as zeros, which a JPEG decoder may take for codes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>

#include <jpeglib.h>

using std::uint8_t;

static const int SECTOR = 512;  // bytes that a disk loses at once, and a file system then reads as zeros

// Whether a sector of zeros lies in an image whose scans begin at `scan`. Zeros behind the image are no damage.
static inline bool holds_zeroed_sector(const uint8_t *scan, const uint8_t *end) {
    for (const uint8_t *probe = scan + SECTOR - 1; probe < end; probe += SECTOR) {  // 512 zeros cover one
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

// Whether zero bits stand for coefficients in every block: no image has such blocks. Otherwise they may stand for empty
// blocks, as a plain area has them. Decompression has started.
static inline bool zeros_are_coefficients(const jpeg_decompress_struct &info) {
    if (info.progressive_mode || info.arith_code || info.comps_in_scan != info.num_components) return false;
    for (int component = 0; component < info.comps_in_scan; component++)
        if (info.ac_huff_tbl_ptrs[info.cur_comp_info[component]->ac_tbl_no]->huffval[0]) return true;
    return false;
}
