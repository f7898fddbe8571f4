// Decode, cut, resize, flip and normalise JPEG and raw images, one batch a call, on any number of threads.
//
//     bytes  ->  checksum  ->  libjpeg-turbo: the rows and columns of the box  ->  ring of rows
//                                                   |  vertical pass   (u8 rows -> one float row)
//                                                   |  horizontal pass (float row -> out pixels)
//                                                   v
//                                               out row, normalised floats or rounded bytes
//
// Huffman codes can only be read from the beginning, which `jpeg_huffman.h` does for libjpeg. Everything after that is
// done for the box alone: rows above it are skipped, rows below it are never read, columns beside it are neither
// transformed nor upsampled. The resizer takes rows as they are decoded, so a thread works on a few rows, which stay in
// its cache.
//
// `__init__.py` compiles this file and is its only caller; its docstrings say what each function takes.

#include <atomic>
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include <jpeglib.h>
#include <jerror.h>

#include "jpeg_huffman.h"
#include "lost_sectors.h"

#ifndef LIBJPEG_TURBO_VERSION
#error "jpeglib.h is not libjpeg-turbo's"
#endif

typedef float Pixel __attribute__((vector_size(16)));  // red, green, blue, unused

static const int MARGIN = 2;       // columns beside the box that the upsampling of chroma looks at
static const size_t MESSAGE = 256;  // bytes of an error message

// A file of a few bytes may claim to be huge. A progressive image is kept whole, with 6 bytes a pixel, and each scan
// goes through all of it: these two limits bound memory and time.
static const uint64_t MOST_PIXELS = 178956970;  // what Pillow, and so the converter, allow
static const int MOST_SCANS = 100;  // libjpeg itself writes 10

// ---------------------------------------------------------------------------------------------------------- checksum

static inline uint64_t rotate(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }

// XXH64 of Y. Collet, seed 0 (the specification is doc/xxhash_spec.md of github.com/Cyan4973/xxHash): It is faster
// than memory, so checking that the bytes on the disk are still those of the image costs nothing.
extern "C" uint64_t dcd_xxh64(const uint8_t *p, uint64_t size) {
    const uint64_t P1 = 0x9E3779B185EBCA87, P2 = 0xC2B2AE3D27D4EB4F, P3 = 0x165667B19E3779F9, P4 = 0x85EBCA77C2B2AE63,
                   P5 = 0x27D4EB2F165667C5;
    auto round = [&](uint64_t lane, uint64_t input) { return rotate(lane + input * P2, 31) * P1; };
    const uint8_t *end = p + size;
    uint64_t hash = P5;
    if (size >= 32) {
        uint64_t lanes[4] = {P1 + P2, P2, 0, 0 - P1};
        for (; end - p >= 32; p += 32)
            for (int i = 0; i < 4; i++) lanes[i] = round(lanes[i], load64(p + 8 * i));
        hash = rotate(lanes[0], 1) + rotate(lanes[1], 7) + rotate(lanes[2], 12) + rotate(lanes[3], 18);
        for (uint64_t lane : lanes) hash = (hash ^ round(0, lane)) * P1 + P4;
    }
    hash += size;
    for (; end - p >= 8; p += 8) hash = rotate(hash ^ round(0, load64(p)), 27) * P1 + P4;
    if (end - p >= 4) {
        uint32_t word;
        memcpy(&word, p, 4);
        hash = rotate(hash ^ word * P1, 23) * P2 + P3;
        p += 4;
    }
    for (; p < end; p++) hash = rotate(hash ^ *p * P5, 11) * P1;
    hash = (hash ^ (hash >> 33)) * P2;
    hash = (hash ^ (hash >> 29)) * P3;
    return hash ^ (hash >> 32);
}

// --------------------------------------------------------------------------------------------------- libjpeg, guarded

class Decoder {
   public:
    jpeg_decompress_struct info;
    char message[MESSAGE];

    Decoder() { create(); }
    ~Decoder() { jpeg_destroy_decompress(&info); }
    Decoder(const Decoder &) = delete;

    // Runs `work`; false if libjpeg gave up, with the reason in `message`. `work` must own
    // nothing, for libjpeg jumps out of it. It may run twice: if `Huffman` finds an irregular code, without `Huffman`.
    template <class Work>
    bool guarded(Work work) {
        return attempt(work, false) || (found_irregular_ && attempt(work, true));
    }

    // Runs `work` once, with or without `Huffman`.
    template <class Work>
    bool attempt(Work work, bool by_libjpeg_alone) {
        by_libjpeg_alone_ = by_libjpeg_alone, found_irregular_ = false;
        jpeg_destroy_decompress(&info);  // else tables of the last image would stand in for those that this one lacks
        create();
        if (setjmp(escape_)) {
            jpeg_abort_decompress(&info);
            return false;
        }
        work();
        return true;
    }

    // Reads the header. What libjpeg can't turn into RGB (CMYK), it refuses when decoding starts.
    void read_header(const uint8_t *data, uint64_t size) {
        has_lost_sector_ = false;
        jpeg_mem_src(&info, data, size);
        jpeg_read_header(&info, TRUE);
        if (uint64_t(info.image_height) * info.image_width > MOST_PIXELS) {
            char why[100];
            snprintf(why, sizeof why, "%u x %u pixels are more than 178,956,970", info.image_width, info.image_height);
            give_up(why);
        }
        info.dct_method = JDCT_ISLOW;
    }

    // Starts decompression.
    void start() {
        const uint8_t *const scan = info.src->next_input_byte;
        const size_t left = info.src->bytes_in_buffer;
        has_lost_sector_ = holds_zeroed_sector(scan, scan + left);
        jpeg_start_decompress(&info);
        if (has_lost_sector_ && zeros_are_coefficients(info))
            give_up("512 bytes of zeros, as a disk leaves them that has lost them");
        reads_codes_ = !by_libjpeg_alone_ && huffman_.begin(info, scan, left);
        if (reads_codes_)
            info.entropy->decode_mcu = [](j_decompress_ptr info, JBLOCKROW *blocks) -> boolean {
                Decoder *decoder = static_cast<Decoder *>(info->client_data);
                if (!decoder->huffman_.read(*info, blocks)) decoder->give_up_irregular();
                return TRUE;
            };
    }

    // Reads all codes behind the header, without decoding: true if they are regular, false if libjpeg has to read them.
    bool is_regular() {
        if (!reads_codes_) return false;
        if (!huffman_.is_whole(info)) give_up_irregular();
        return true;
    }

    // Ends decompression when all rows have been read.
    void finish() {
        if (!reads_codes_) return void(jpeg_finish_decompress(&info));
        if (!huffman_.is_at_end()) give_up_irregular();  // libjpeg has to judge what lies behind the last block
        jpeg_abort_decompress(&info);
    }

   private:
    jpeg_error_mgr errors_;
    jpeg_progress_mgr progress_;
    jmp_buf escape_;
    Huffman huffman_;
    bool reads_codes_ = false;      // whether `huffman_` reads them instead of libjpeg
    bool by_libjpeg_alone_ = false, found_irregular_ = false;
    bool has_lost_sector_ = false;  // perhaps: left-over bytes would prove it

    void create() {
        info.err = jpeg_std_error(&errors_);
        errors_.error_exit = [](j_common_ptr common) { fail(common); };
        errors_.emit_message = [](j_common_ptr common, int level) {
            if (level < 0 && is_damage(common)) fail(common);
        };
        info.client_data = this;
        jpeg_create_decompress(&info);
        progress_.progress_monitor = [](j_common_ptr common) {
            Decoder *decoder = static_cast<Decoder *>(common->client_data);
            if (decoder->info.input_scan_number > MOST_SCANS) decoder->give_up("more than 100 scans");
        };
        info.progress = &progress_;
    }

    // libjpeg warns of damaged data and goes on with grey; here damage is an error. Bytes that are left over after the
    // last block are no damage by themselves: some programs write them.
    static bool is_damage(j_common_ptr common) {
        const int code = common->err->msg_code;
        if (code == JWRN_EXTRANEOUS_DATA) return static_cast<Decoder *>(common->client_data)->has_lost_sector_;
        return code == JWRN_HIT_MARKER || code == JWRN_HUFF_BAD_CODE || code == JWRN_JPEG_EOF ||
               code == JWRN_MUST_RESYNC || code == JWRN_NOT_SEQUENTIAL || code == JWRN_ARITH_BAD_CODE;
    }

    [[noreturn]] void give_up_irregular() {
        found_irregular_ = true;
        give_up("an irregular code");
    }

    [[noreturn]] void give_up(const char *why) {
        snprintf(message, MESSAGE, "%s", why);
        longjmp(escape_, 1);
    }

    static void fail(j_common_ptr common) {
        Decoder *decoder = static_cast<Decoder *>(common->client_data);
        char text[JMSG_LENGTH_MAX];
        common->err->format_message(common, text);
        decoder->give_up(text);
    }
};

// ------------------------------------------------------------------------------------------------------------ resizer

// Antialiased bilinear resize along one axis: output i is the sum over k of `weights[i * taps + k]` times input
// `first[i] + k`. The weights are a triangle. Each of its sides is as wide as the step between outputs, at least 1, and
// is cut off at the box, as in torchvision and Pillow.
struct Axis {
    int taps;  // the most inputs of any output; outputs of fewer inputs have weights of 0 at the end
    std::vector<int> first, count;
    std::vector<float> weights;

    // `size` outputs from inputs in [start, start + length); `end` is the first input behind it. `flip` reverses them.
    void set(float start, float length, int end, int size, bool flip) {
        const float step = length / size, reach = std::max(step, 1.0f);
        auto low = [&](int i) { return std::max(int(start + (i + 0.5f) * step - reach + 0.5f), int(start)); };
        auto high = [&](int i) { return std::min(int(start + (i + 0.5f) * step + reach + 0.5f), end); };
        taps = 0;
        for (int i = 0; i < size; i++) taps = std::max(taps, high(i) - low(i));
        first.resize(size), count.resize(size), weights.assign(size_t(size) * taps, 0.0f);
        for (int i = 0; i < size; i++) {
            const int at = flip ? size - 1 - i : i;
            const float center = start + (i + 0.5f) * step;
            float *w = &weights[size_t(at) * taps], sum = 0;
            first[at] = low(i), count[at] = high(i) - low(i);
            for (int k = 0; k < count[at]; k++)
                sum += w[k] = std::max(0.0f, 1 - std::abs(first[at] + k + 0.5f - center) / reach);
            for (int k = 0; k < count[at]; k++) w[k] /= sum;
        }
    }
};

// line[x] (+)= sum over k < count of weights[k] * rows[k][x], for x in [0, width). One loop for each count, which the
// compiler turns into vector instructions.
template <int count, bool add>
static void blend(const uint8_t *const *rows, const float *weights, int width, float *__restrict line) {
    const uint8_t *__restrict r[count];
    float w[count];
    for (int k = 0; k < count; k++) r[k] = rows[k], w[k] = weights[k];
    for (int x = 0; x < width; x++) {
        float sum = add ? line[x] : 0;
        for (int k = 0; k < count; k++) sum += w[k] * r[k][x];
        line[x] = sum;
    }
}

static void blend_rows(const uint8_t *const *rows, const float *weights, int count, int width, float *line) {
    switch (std::min(count, 4)) {
        case 1: blend<1, false>(rows, weights, width, line); break;
        case 2: blend<2, false>(rows, weights, width, line); break;
        case 3: blend<3, false>(rows, weights, width, line); break;
        case 4: blend<4, false>(rows, weights, width, line); break;
    }
    for (int k = 4; k < count; k++) blend<1, true>(rows + k, weights + k, width, line);
}

// Whether libjpeg can cut columns away while it decodes at a smaller size: it can for 4:4:4, 4:2:0, 4:2:2, 4:4:0, 4:1:1
// and grey. At 1/2 and 1/4 libjpeg gives chroma a larger inverse transform where that leaves less to upsample, but its
// jpeg_crop_scanline counts the columns of chroma by the sampling alone. In these layouts the chroma that is still
// upsampled has the transform of brightness. In others (4x2, 2x4, two kinds of chroma) some columns stay unwritten.
static bool can_shrink(const jpeg_decompress_struct &info) {
    if (info.num_components == 1) return true;
    if (info.num_components != 3) return false;
    const jpeg_component_info &brightness = info.comp_info[0], &blue = info.comp_info[1], &red = info.comp_info[2];
    if (blue.h_samp_factor != red.h_samp_factor || blue.v_samp_factor != red.v_samp_factor) return false;
    for (const auto &[across, down] : {std::pair{1, 1}, {2, 2}, {2, 1}, {1, 2}, {4, 1}})
        if (brightness.h_samp_factor == across * blue.h_samp_factor &&
            brightness.v_samp_factor == down * blue.v_samp_factor)
            return true;
    return false;
}

// ------------------------------------------------------------------------------------------------------------- render

struct Job {  // as in __init__.py
    const uint8_t *data;
    uint64_t size, checksum;
    int32_t height, width;               // of the stored image
    int32_t top, left, box_h, box_w;     // of the box
    uint8_t is_raw, flip, has_checksum, padding[5];
};

struct Output {
    void *images;  // [count, side, side, 3]
    int side;
    bool as_float;  // normalised float32 instead of uint8
    Pixel scale, shift;
};

// How a pixel becomes floats or bytes. `write` may write one component behind the pixel, `write_last` may not.
struct Floats {
    typedef float Component;
    const Pixel scale, shift;
    void write(float *to, Pixel value) const { value = value * scale + shift, memcpy(to, &value, 16); }
    void write_last(float *to, Pixel value) const { value = value * scale + shift, memcpy(to, &value, 12); }
};

struct Bytes {
    typedef uint8_t Component;
    typedef int32_t Ints __attribute__((vector_size(16)));
    typedef uint8_t Sixteen __attribute__((vector_size(16)));
    static Sixteen pack(Pixel value) {
        return __builtin_shuffle((Sixteen)__builtin_convertvector(value + 0.5f, Ints), Sixteen{0, 4, 8, 12});
    }
    void write(uint8_t *to, Pixel value) const { const Sixteen bytes = pack(value); memcpy(to, &bytes, 4); }
    void write_last(uint8_t *to, Pixel value) const { const Sixteen bytes = pack(value); memcpy(to, &bytes, 3); }
};

// One output row from one blended row of `channels` floats a pixel.
template <int channels, int fixed_taps, class Format>
static void write_row(const float *__restrict line, const Axis &axis, const Format format, int side,
                      typename Format::Component *__restrict to) {
    const int taps = fixed_taps ? fixed_taps : axis.taps;
    const float *__restrict weights = axis.weights.data();
    const int *__restrict first = axis.first.data();
    auto sum = [&](int x) {
        const float *from = line + size_t(first[x]) * channels, *w = weights + size_t(x) * taps;
        Pixel total = {};
        for (int k = 0; k < taps; k++) {
            Pixel value;
            memcpy(&value, from + k * channels, 16);
            total += w[k] * value;
        }
        return total;
    };
    for (int x = 0; x < side - 1; x++) format.write(to + 3 * x, sum(x));
    format.write_last(to + 3 * (side - 1), sum(side - 1));
}

template <int channels, class Format>
static void write_row(const float *line, const Axis &axis, const Format format, int side,
                      typename Format::Component *to) {
    switch (axis.taps) {  // a fixed number of taps makes a loop without branches
        case 2: return write_row<channels, 2>(line, axis, format, side, to);
        case 3: return write_row<channels, 3>(line, axis, format, side, to);
        case 4: return write_row<channels, 4>(line, axis, format, side, to);
        case 5: return write_row<channels, 5>(line, axis, format, side, to);
        case 6: return write_row<channels, 6>(line, axis, format, side, to);
        default: return write_row<channels, 0>(line, axis, format, side, to);
    }
}

class Renderer {
   public:
    char message[MESSAGE];

    // One image into its place in the batch; false, with the reason in `message`, if it can't be.
    bool run(const Job &job, const Output &out, size_t position, bool exact) {
        if (job.has_checksum && dcd_xxh64(job.data, job.size) != job.checksum)
            return refuse("its bytes are not those that were converted");
        if (job.is_raw) {
            if (job.size != uint64_t(job.height) * job.width * 3) return refuse("it is not height x width x 3 bytes");
            return run_raw(job, out, position), true;
        }
        bool fits = true;
        const bool decoded = decoder_.guarded([&] { fits = run_jpeg(job, out, position, exact); });
        if (!decoded) return refuse(decoder_.message);
        return fits || refuse("its size is not the one in the index");
    }

   private:
    Decoder decoder_;
    Axis vertical_, horizontal_;
    std::vector<uint8_t> ring_;
    std::vector<float> line_;
    std::vector<const uint8_t *> window_;

    bool refuse(const char *why) {
        snprintf(message, MESSAGE, "%s", why);
        return false;
    }

    void run_raw(const Job &job, const Output &out, size_t position) {
        vertical_.set(job.top, job.box_h, job.top + job.box_h, out.side, false);
        horizontal_.set(0, job.box_w, job.box_w, out.side, job.flip);
        const size_t stride = size_t(job.width) * 3;
        resize<3>(job.box_w, out, position, [&](int row) { return job.data + row * stride + job.left * 3; });
    }

    bool run_jpeg(const Job &job, const Output &out, size_t position, bool exact) {
        jpeg_decompress_struct &info = decoder_.info;
        decoder_.read_header(job.data, job.size);
        if (int(info.image_height) != job.height || int(info.image_width) != job.width) {
            jpeg_abort_decompress(&info);
            return false;
        }
        info.out_color_space = JCS_EXT_RGBX;
        // A smaller inverse transform, where the box still has as many pixels as the output in both directions.
        const int smallest = exact || !can_shrink(info) ? 1 : 8;
        int scale = 1;
        while (scale < smallest && std::min(job.box_h, job.box_w) >= 2 * scale * out.side) scale *= 2;
        info.scale_num = 1, info.scale_denom = scale;
        decoder_.start();

        const float shrink = 1.0f / scale;
        const int end_row = std::min(int(info.output_height), (job.top + job.box_h + scale - 1) / scale);
        const int end_column = std::min(int(info.output_width), (job.left + job.box_w + scale - 1) / scale);
        JDIMENSION offset = std::max(0, job.left / scale - MARGIN);
        JDIMENSION width = std::min(int(info.output_width), end_column + MARGIN) - offset;
        jpeg_crop_scanline(&info, &offset, &width);  // moves the offset to the left, to a whole block
        const int first_row = job.top / scale;
        if (first_row) jpeg_skip_scanlines(&info, first_row);

        vertical_.set(job.top * shrink, job.box_h * shrink, end_row, out.side, false);
        horizontal_.set(job.left * shrink - offset, job.box_w * shrink, end_column - int(offset), out.side,
                        job.flip);
        const size_t stride = size_t(width) * 4;
        const int capacity = vertical_.taps + 16;  // libjpeg hands out up to 16 rows at a time
        ring_.resize(stride * capacity);
        resize<4>(end_column - int(offset), out, position, [&](int row) {
            while (int(info.output_scanline) <= row) {
                JSAMPROW line = &ring_[(info.output_scanline % capacity) * stride];
                jpeg_read_scanlines(&info, &line, 1);
            }
            return &ring_[(row % capacity) * stride];
        });
        jpeg_abort_decompress(&info);
        return true;
    }

    // `get_row(y)` gives row y of the input, `channels` bytes a pixel; it is asked for rows in rising order.
    template <int channels, class GetRow>
    void resize(int width, const Output &out, size_t position, GetRow get_row) {
        line_.resize((size_t(width) + horizontal_.taps) * 4);  // taps beyond the box have weight 0
        window_.resize(vertical_.taps);
        for (int y = 0; y < out.side; y++) {
            for (int k = 0; k < vertical_.count[y]; k++) window_[k] = get_row(vertical_.first[y] + k);
            float *line = line_.data();
            blend_rows(window_.data(), &vertical_.weights[size_t(y) * vertical_.taps], vertical_.count[y],
                       width * channels, line);
            const size_t at = (position * out.side + y) * out.side * 3;
            if (out.as_float)
                write_row<channels>(line, horizontal_, Floats{out.scale, out.shift}, out.side,
                                    static_cast<float *>(out.images) + at);
            else
                write_row<channels>(line, horizontal_, Bytes{}, out.side, static_cast<uint8_t *>(out.images) + at);
        }
    }
};

// Renders `count` images on `threads` threads. Returns the position of an image that failed, with the reason in
// `message` (256 bytes), or -1.
extern "C" int64_t dcd_render(const Job *jobs, int64_t count, int threads, int side, int as_float, const float *scale,
                              const float *shift, int exact, void *images, char *message) {
    Output out = {images, side, bool(as_float), {}, {}};
    for (int c = 0; c < 3; c++) out.scale[c] = scale[c], out.shift[c] = shift[c];
    std::atomic<int64_t> next{0}, failed{-1};
    std::mutex first;
    auto work = [&] {
        Renderer renderer;
        for (int64_t i; failed < 0 && (i = next++) < count;) {
            if (renderer.run(jobs[i], out, i, exact)) continue;
            std::lock_guard<std::mutex> lock(first);
            if (failed < 0) memcpy(message, renderer.message, MESSAGE), failed = i;
        }
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads && i < count; i++) others.emplace_back(work);
    work();
    for (std::thread &other : others) other.join();
    return failed;
}

// ------------------------------------------------------------------------------------------------ whole images, alone

// The height and width of a JPEG, from its header. 0, or 1 with the reason in `message`.
extern "C" int dcd_jpeg_size(const uint8_t *data, uint64_t size, int32_t *height_width, char *message) {
    Decoder decoder;
    if (decoder.guarded([&] {
            decoder.read_header(data, size);
            height_width[0] = decoder.info.image_height, height_width[1] = decoder.info.image_width;
        }))
        return 0;
    memcpy(message, decoder.message, MESSAGE);
    return 1;
}

static void decode_whole(Decoder &decoder, const uint8_t *data, uint64_t size, uint8_t *pixels,
                         std::vector<uint8_t> &row) {
    jpeg_decompress_struct &info = decoder.info;
    decoder.read_header(data, size);
    info.out_color_space = JCS_RGB;
    info.scale_num = 1, info.scale_denom = pixels ? 1 : 8;
    decoder.start();
    if (!pixels && decoder.is_regular()) return jpeg_abort_decompress(&info);
    const size_t stride = size_t(info.output_width) * 3;
    row.resize(stride);
    while (info.output_scanline < info.output_height) {
        JSAMPROW line = pixels ? pixels + info.output_scanline * stride : row.data();
        jpeg_read_scanlines(&info, &line, 1);
    }
    decoder.finish();
}

// Decodes a whole JPEG: into `pixels` (height, width, 3), or, where `pixels` is null, only to see that it decodes:
// everything is read, but nothing or only the mean of each block is computed. 0, or 1 with the reason in `message`.
extern "C" int dcd_decode(const uint8_t *data, uint64_t size, uint8_t *pixels, int by_libjpeg_alone, char *message) {
    static thread_local Decoder decoder;  // keeps its tables
    std::vector<uint8_t> row;
    const auto work = [&] { decode_whole(decoder, data, size, pixels, row); };
    if (by_libjpeg_alone ? decoder.attempt(work, true) : decoder.guarded(work)) return 0;
    memcpy(message, decoder.message, MESSAGE);
    return 1;
}
