// Sectors that a disk has lost, which then read as zeros: in a JPEG they may be codes as any others.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>

#include <jpeglib.h>

using std::uint8_t;

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
