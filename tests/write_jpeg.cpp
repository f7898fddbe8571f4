// JPEGs of every kind that libjpeg writes, for the tests: Pillow knows three samplings of chroma. `jpegs.py` compiles
// this file and is its only caller.

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <jpeglib.h>

// Writes `pixels` (height, width, components), 1: grey, 3: RGB or 4: CMYK. sampling: (horizontal, vertical) of each
// component; restart: MCUs in an interval, or 0. Returns the length of the JPEG at `*jpeg`, to be freed, or 0 where
// libjpeg refuses.
extern "C" uint64_t write_jpeg(const uint8_t *pixels, int height, int width, int components, const int *sampling,
                               int quality, int progressive, int arithmetic, int restart, uint8_t **jpeg) {
    static jmp_buf escape;
    jpeg_compress_struct info;
    jpeg_error_mgr errors;
    unsigned long size = 0;
    *jpeg = nullptr;
    info.err = jpeg_std_error(&errors);
    errors.error_exit = [](j_common_ptr) { longjmp(escape, 1); };
    jpeg_create_compress(&info);
    if (setjmp(escape)) {
        jpeg_destroy_compress(&info);
        return 0;
    }
    jpeg_mem_dest(&info, jpeg, &size);
    info.image_height = height, info.image_width = width, info.input_components = components;
    info.in_color_space = components == 1 ? JCS_GRAYSCALE : components == 3 ? JCS_RGB : JCS_CMYK;
    jpeg_set_defaults(&info);
    jpeg_set_quality(&info, quality, TRUE);
    for (int i = 0; i < components; i++)
        info.comp_info[i].h_samp_factor = sampling[2 * i], info.comp_info[i].v_samp_factor = sampling[2 * i + 1];
    if (progressive) jpeg_simple_progression(&info);
    info.arith_code = arithmetic, info.restart_interval = restart;
    jpeg_start_compress(&info, TRUE);
    while (info.next_scanline < info.image_height) {
        JSAMPROW row = const_cast<uint8_t *>(pixels) + size_t(info.next_scanline) * width * components;
        jpeg_write_scanlines(&info, &row, 1);
    }
    jpeg_finish_compress(&info);
    jpeg_destroy_compress(&info);
    return size;
}

extern "C" void free_jpeg(uint8_t *jpeg) { free(jpeg); }
